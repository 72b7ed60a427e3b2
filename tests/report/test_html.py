"""The page sorts, filters, shows every plot, fits a telephone and needs no network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from written import field, record, trained

from harness.records import Exposure, Record
from harness.report.figures import pareto_front, set_log_limits
from harness.report.html import html_page
from harness.report.latex import latex_table
from harness.report.markdown import task_section
from harness.report.plots import ablations
from harness.report.rows import rows_of
from harness.report.tables import results_table
from harness.report.task_report import TaskReport

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("HARNESS_NEEDS_CHROMIUM"), reason="needs chromium"
)


def sweep() -> list[Record]:
    """A field at equal FLOPs, an ablation of history layers, a teacher and a failure."""
    layers = []
    for n in (1, 3, 9):
        exposure = Exposure(
            on_teachers_history=[0.1, 0.2, 0.3, 0.4],
            on_own_history=[0.1, 0.3, 0.5, 0.4 + 0.1 * n],
            n=8,
        )
        for seed in (0, 1):
            made = trained("ard", 30.0 / n + seed, flops=9e11, seed=seed)
            layers.append(
                made.model_copy(
                    update={
                        "options": {"history_layers": n},
                        "run_id": f"ard-{n}-{seed}",
                        "exposure": exposure,
                    }
                )
            )
    failure = record("ard", seed=3, steps=7).model_copy(
        update={"status": "failed", "reason": "the loss is <not> finite", "metrics": {}}
    )
    again = [trained(method, 4.5 + n, seed=1) for n, method in enumerate(("ect", "imm"))]
    return [*field(), *again, *layers, record("teacher", steps=0, fid=1.0), failure]


def opened(page: Path, script: str = "") -> str:
    """The page's document after its scripts have run, and one more."""
    text = page.read_text().replace("</html>", f"<script>{script}</script></html>")
    changed = page.with_suffix(".test.html")
    changed.write_text(text)
    assert BROWSER, "HARNESS_NEEDS_CHROMIUM is set, but there is no chromium"
    words = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        "--dump-dom",
        changed.as_uri(),
    ]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, check=True).stdout


def asked(page: Path, expression: str) -> Any:
    """The value of a JavaScript expression in the page."""
    script = (
        'const answer = document.createElement("pre"); '
        'answer.id = "answer"; document.body.append(answer);'
    )
    dom = opened(page, f"{script} answer.textContent = JSON.stringify({expression});")
    found = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)
    assert found, "the page's script failed"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    for one in sweep():
        folder = results / "runs" / one.run_id
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(folder / "samples.png")
    (results / "page.html").write_text(html_page(sweep(), results))
    return results / "page.html"


def test_the_page_needs_nothing_else_and_shows_everything(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "@@" not in text
    assert "url(http" not in text
    for kind, least in {"pareto": 1, "ablations": 1, "exposure": 1, "budget": 1, "grid": 5}.items():
        assert text.count(f'<figure class="{kind}">') >= least, kind
    for part in (
        "Methods at equal training FLOPs",
        "not the best",
        "after 6,400 images",
        "Claims",
        "Failures",
        "the loss is &lt;not&gt; finite",
        "code c.",
    ):
        assert part in text, part
    assert "<not>" not in text


def test_markdown_and_html_have_the_same_sections(page: Path) -> None:
    report = TaskReport.of(sweep())
    assert len(report.sections) > 6
    shown, folded = (
        [section.heading for section in report.sections if section.detail is detail]
        for detail in (False, True)
    )
    text = page.read_text()
    assert re.findall(r"<h3>(.*?)</h3>", text) == [*shown, "Samples", "Notes"]
    assert re.findall(r"<summary>(.*?)</summary>", text) == [*folded, "Curves"]
    assert shown[0] == "Best at 1, 2 and 4 steps"
    assert text.index(shown[0]) < text.index('<figure class="pareto">') < text.index(shown[1])
    assert sorted(re.findall(r"^### (.*)$", task_section(report, 3), re.MULTILINE)) == sorted(
        [*shown, *folded, "Notes"]
    )


@browser
def test_headings_sort(page: Path) -> None:
    sorting = """(() => {
      const table = document.querySelector("table[data-filter^=filter-tiny]");
      const heads = [...table.tHead.rows[0].cells];
      const column = heads.findIndex(head => head.textContent.startsWith("FID"));
      const read = i => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
      heads[column].click(); const up = read(column);
      heads[column].click(); const down = read(column);
      heads[0].click(); const names = read(0);
      return {up, down, names};
    })()"""
    found = asked(page, sorting)
    numbers = [[float(cell.split()[0]) for cell in found[way] if cell] for way in ("up", "down")]
    assert len(numbers[0]) > 8
    assert numbers[0] == sorted(numbers[0])
    assert numbers[1] == sorted(numbers[1], reverse=True)
    assert found["up"][-1] == found["down"][-1] == ""  # the failure, which has no FID
    assert found["names"] == sorted(found["names"])


@browser
def test_the_box_filters(page: Path) -> None:
    filtering = """(() => {
      const box = document.querySelector("input[id^=filter-tiny]");
      const table = document.querySelector("table[data-filter^=filter-tiny]");
      box.value = "ARD layers"; box.dispatchEvent(new Event("input"));
      const visible = [...table.tBodies[0].rows].filter(row => row.offsetParent !== null);
      const shown = visible.map(row => row.cells[0].textContent);
      return {shown, count: box.nextElementSibling.textContent, all: table.tBodies[0].rows.length};
    })()"""
    found = asked(page, filtering)
    assert len(found["shown"]) == 4
    assert all(name.startswith("ard, history_layers") for name in found["shown"])
    assert found["count"] == f"4 of {found['all']} rows"


@browser
@pytest.mark.parametrize("width", [400, 1400])
def test_it_is_readable_at_a_width(width: int, page: Path) -> None:
    """Only tables reach beyond the window, and every plot can be read."""
    frame = page.with_name("frame.html")
    inner = html.escape(page.read_text(), quote=True)
    frame.write_text(
        f'<!doctype html><html><body><iframe id="f" width="{width}" height="4000" '
        f'srcdoc="{inner}"></iframe></body></html>'
    )
    measuring = """(() => {
      const inside = document.getElementById("f").contentDocument;
      const boxes = selector => [...inside.querySelectorAll(selector)].map(
        element => element.getBoundingClientRect());
      const plots = boxes("figure svg, figure img");
      const letters = boxes("figure svg text").map(box => box.height).filter(h => h > 0);
      return {wide: inside.documentElement.scrollWidth, least: Math.min(...letters),
              plots: plots.map(r => [r.left, r.right, r.width, r.height])};
    })()"""
    waiting = f"""document.getElementById("f").addEventListener("load", () => {{
      const answer = document.createElement("pre");
      answer.id = "answer"; answer.textContent = JSON.stringify({measuring});
      document.body.append(answer); }});"""
    found = re.search(r'<pre id="answer">(.*?)</pre>', opened(frame, waiting), re.DOTALL)
    assert found, "the frame was not loaded"
    measured = json.loads(html.unescape(found[1]))
    assert measured["wide"] <= width
    assert len(measured["plots"]) > 8
    for left, right, wide, high in measured["plots"]:
        assert 0 <= left < right <= width
        assert wide > 250
        assert high > 100
    assert measured["least"] > 6


def test_an_ablation_is_three_values_of_one_number() -> None:
    report = TaskReport.of(sweep())
    (panel,) = ablations(report.finished, report.equal, "fid")
    assert panel.x_label == "history_layers"
    assert panel.lines[0].x == [1, 3, 9]
    assert panel.lines[0].y == pytest.approx([31.0, 11.0, 30 / 9 + 1])
    assert panel.title == "ard, 4 steps, trained 100 × 64"
    assert (
        ablations(
            [row for row in report.finished if "layers 9" not in row.label], report.equal, "fid"
        )
        == []
    )


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 6.0), (2.0, 4.0), (3.0, 4.0), (4.0, 1.0), (0.5, 9.0)]
    assert pareto_front(points) == [5, 0, 2, 4]


@pytest.mark.parametrize("count", [1, pytest.param(1_000, marks=pytest.mark.slow)])
def test_a_page_of_one_record_or_of_many(count: int, tmp_path: Path) -> None:
    made = [
        trained("ard", 5.0 + i % 97).model_copy(
            update={"options": {"lr": 1e-4 * (1 + i), "gan_lr": 1e-3}, "run_id": f"ard-{i}"}
        )
        for i in range(count)
    ]
    text = html_page(made, tmp_path)
    assert text.count("<tr>") > count
    assert text.count("<svg") < 10


def test_latex_is_escaped() -> None:
    text = latex_table(
        results_table(rows_of(field()[:2]))[["method", "FID ↓"]], "Results on a_task."
    )
    assert r"FID $\downarrow$" in text
    assert text.count(r"\\") == 3
    assert r"\caption{Results on a\_task.}" in text
    assert r"history\_layers 6" in latex_table(results_table(rows_of([record()])), "x")


@pytest.mark.parametrize("values", [[34.7, 46.9], [0.004, 2.3], [30.0, 1100.0]])
def test_a_logarithmic_axis_has_numbers_to_read(values: list[float]) -> None:
    axes = Figure().subplots()
    set_log_limits(axes, values)
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 10
    assert [float(axes.yaxis.get_major_formatter()(tick)) for tick in ticks] == pytest.approx(ticks)
