"""The page shows every row and picture, chooses, opens, compares, and fits a telephone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from importlib.resources import files
from math import nan as NAN
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from written import field, record, trained

from harness.records import Exposure, Record
from harness.report.figures import Axis, Named, curves_figure, number_text, pareto_front
from harness.report.html import html_page
from harness.report.latex import latex_table
from harness.report.markdown import task_section
from harness.report.pictures import set_log_limits
from harness.report.plots import Line, Panel, Plot, ablations
from harness.report.rows import rows_of
from harness.report.statistics import crossed_interval, paired_difference
from harness.report.tables import KEYS, results_table
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
    teachers = [record("teacher", steps=0, num_steps=n, fid=9.0 - 2 * n) for n in (2, 4)]
    return [*field(), *again, *layers, *teachers, failure]


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
        assert text.count(f'<figure class="{kind}"') >= least, kind
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


def test_no_row_picture_or_record_is_left_out(page: Path) -> None:
    """Without scripts too: each row has its part of the page, which its points and lines name."""
    text, report = page.read_text(), TaskReport.of(sweep())
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert text.count("<article ") == len(report.rows)
    assert text.count('<tr data-row="') == len(report.rows)
    assert text.count('<pre class="record"') == len(sweep())
    assert text.count('<figure class="grid"') == len(report.finished)
    assert text.count('alt="Samples of ') == len(report.finished)
    lines = sum(len(panel.lines) for plot in report.plots for panel in plot.panels)
    assert len(re.findall(r'<path class="trace" d="M[^"]*L', text)) >= lines
    assert "# No command: " not in text
    assert (
        "harness run --task TASK.yaml --method ard --num-steps 4 --seed 1 --budget steps=100"
        in text
    )


def test_what_has_no_room_is_said(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.html.MOST_LETTERS", 30)
    text = html_page(sweep(), page.parent, Path("none"))
    assert "data:image" not in text
    assert text.count("too large with this picture") == len(TaskReport.of(sweep()).finished)
    assert text.count("too large with this record") == len(sweep())


def test_eight_lines_have_colours_and_all_are_drawn() -> None:
    row = Named("row-1", "a <row>")
    lines = [
        Line(f"m{n}", [1.0, 2.0], [9.0 + n, n + 1.0], [0.5, NAN], ["r"] * 2) for n in range(20)
    ]
    svg = curves_figure(Panel("", "x", lines), Plot("p", "", "FID", [], log=True), {"r": row})
    assert re.findall(r'<g class="line (c\d)" data-line', svg) == [f"c{n}" for n in range(8)][::-1]
    assert svg.count('<g class="line rest"') == 12
    assert svg.count("<li") == 9
    assert "12 more, which end higher, are grey" in svg
    assert svg.count("a &lt;row&gt;: FID 9 ± 0.5, x 1</title>") == 1
    assert svg.count('href="#row-1"') == 40


@pytest.mark.parametrize(
    "values", [[34.7, 46.9], [0.004, 2.3], [30.0, 1100.0], [1e-9, 1e9], [5.0, 5.0], [-0.03, 0.15]]
)
@pytest.mark.parametrize("log", [True, False])
def test_an_axis_has_numbers_to_read(values: list[float], log: bool) -> None:
    axis = Axis.around(values, log, 0, 100)
    assert axis.log is (log and min(values) > 0)
    assert 2 <= len(axis.ticks) <= 8
    places = [axis.at(tick) for tick in axis.ticks]
    assert places == sorted(places)
    assert 0 <= places[0] < places[-1] <= 100
    assert len({number_text(tick) for tick in axis.ticks}) == len(axis.ticks)


def test_colours_have_contrast() -> None:
    """Text 4.5 to 1 (WCAG 1.4.3), lines 3 to 1 (1.4.11); no colour stands outside the palette."""
    style = files("harness.report").joinpath("page", "page.css").read_text()
    palette, rest = style.split("}", 1)
    colours = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6});", palette))
    assert "#" not in re.sub(r"#[a-z-]+ [{.>]|^#[a-z]+", "", rest, flags=re.MULTILINE)
    coloured = [f"c{n}" for n in range(8)]
    for ground in ("paper", "band", "chosen"):
        for text in ("ink", "faint", "mark", "warn", *coloured):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["paper"], colours["ink"]) >= 4.5
    assert contrast(colours["rest"], colours["paper"]) >= 3


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_markdown_and_html_have_the_same_sections(page: Path) -> None:
    """The tables of all rows are one in HTML."""
    report = TaskReport.of(sweep())
    assert len(report.sections) > 6
    shown, folded = (
        [s.heading for s in report.sections if s.detail is detail and not s.of_results]
        for detail in (False, True)
    )
    text = page.read_text()
    assert re.findall(r"<h3>(.*?)</h3>", text) == [
        shown[0], "All rows", *shown[1:], "Samples", "Notes",
    ]  # fmt: skip
    found = [each for each in re.findall(r"<summary>(.*?)</summary>", text) if "seed" not in each]
    assert found == ["Samples of the other rows", *folded, "Curves", "Each row"]
    assert shown[0] == "Best at 1, 2 and 4 steps"
    assert text.index(shown[0]) < text.index('<figure class="pareto">') < text.index("All rows")
    parts = [section.heading for section in report.sections if section.of_results]
    assert parts == ["All rows", "Fidelity and diversity", "Cost"]
    assert sorted(re.findall(r"^### (.*)$", task_section(report, 3), re.MULTILINE)) == sorted(
        [*shown, *folded, *parts, "Notes"]
    )


# in a browser


MATRICES = {
    "one set": [[1.0], [2.5], [0.5]],
    "one seed": [[1.0, 2.0, 4.0]],
    "crossed": [[1.0, 2.0, 4.0], [1.5, 1.0, 5.0]],
    "seeds differ": [[1.0, 1.1], [9.0, 9.2], [4.0, 4.1]],
    "rest only": [[1.0, 2.0], [2.0, 1.0]],
}
ACTING = """(() => {
  const found = {}, $ = selector => document.querySelector(selector);
  const $$ = selector => [...document.querySelectorAll(selector)];
  const table = $("table.all"), heads = [...table.tHead.rows[0].cells];
  const read = i => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
  const visible = rows => [...rows].filter(row => row.offsetParent !== null);
  const set = (id, value, kind) => { $(id).value = value; $(id).dispatchEvent(new Event(kind)); };
  const column = heads.findIndex(head => head.textContent.startsWith("FID"));
  found.first = read(column);
  heads[column].firstChild.click(); found.down = read(column);
  heads[column].firstChild.click(); found.up = read(column);
  heads[0].firstChild.click(); found.names = read(0);

  found.columns = visible(heads).map(head => head.textContent);
  $(".columns button").click();
  found.allColumns = visible(heads).length;
  set("#words", "ARD layers", "input");
  found.searched = visible(table.tBodies[0].rows).map(row => row.cells[0].textContent);
  found.count = $("#count").textContent;
  found.told = $$(".hiding").filter(each => !each.hidden)[0].textContent;
  found.live = $$("figure.pareto a:not(.pale)").length;
  set("#words", "", "input");
  set("#steps", "2", "change");
  found.ofSteps = visible(table.tBodies[0].rows).length;
  set("#steps", "", "change");

  const points = $$("figure.budget a"), box = points[0].querySelector("path");
  points[0].closest("details").open = true;
  const at = point => { const r = point.getBoundingClientRect();
    return {clientX: r.x + r.width / 2, clientY: r.y + r.height / 2, bubbles: true}; };
  box.dispatchEvent(new PointerEvent("pointermove", {...at(box), pointerType: "mouse"}));
  found.touched = [points[0].getAttribute("aria-label"), $("figure.budget .tip")?.textContent];
  const away = {clientX: 0, clientY: 0, bubbles: true, pointerType: "mouse"};
  document.body.dispatchEvent(new PointerEvent("pointermove", away));
  found.left = $$(".tip").length;
  const finger = () => box.dispatchEvent(new PointerEvent(
    "click", {...at(box), pointerType: "touch", detail: 1, cancelable: true}));
  finger(); found.once = [$$(".tip").length, dialog.open];
  finger(); found.twice = [dialog.matches(":modal"), $("#opened-title").textContent];
  found.opened = [...dialog.querySelectorAll("h5")].map(each => each.textContent);
  found.chosen = dialog.querySelectorAll(".line.chosen").length;
  found.copy = dialog.querySelectorAll("img").length;
  found.focus = document.activeElement.textContent;
  $("#close").click(); found.closed = !dialog.open;

  const scatter = $("figure.pareto svg"), start = scatter.querySelector('a[tabindex="0"]');
  start.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  const reached = document.activeElement;
  found.arrow = [reached !== start, reached.closest("svg") === scatter,
    scatter.querySelectorAll('a[tabindex="0"]').length];

  const rowOf = name => [...table.tBodies[0].rows].find(
    row => row.cells[0].textContent === name && row.cells[1].textContent === "4");
  for (const name of ["ect", "imm"]) rowOf(name).querySelector(".pick").click();
  found.tray = $("#tray").textContent;
  $("#tray button").click();
  found.compared = [...dialog.querySelectorAll(".gap tbody tr")].map(
    row => [...row.cells].map(cell => cell.textContent));
  found.grids = dialog.querySelectorAll(".two img").length;
  found.bothChosen = dialog.querySelectorAll(".line.chosen.second").length;
  found.halves = Object.fromEntries(Object.entries(MATRICES).map(([name, matrix]) => {
    const values = seeds => ({seeds: seeds.map((_, s) => s), trained: false, diverged: false,
      metrics: {m: seeds.map(row => Object.fromEntries(row.map((x, k) => [k, x])))}});
    return [name, difference(values(matrix), values(matrix.map(row => row.map(() => 0))), "m")];
  }));
  return found;
})()"""


@pytest.fixture(scope="module")
def acted(page: Path) -> dict[str, Any]:
    """What a reader's acts lead to, one after the other in one browser."""
    return asked(page, ACTING.replace("MATRICES", json.dumps(MATRICES)))


@browser
def test_headings_sort_and_columns_are_chosen(acted: dict[str, Any]) -> None:
    numbers = [[float(x.split()[0]) for x in acted[way] if x] for way in ("up", "down")]
    assert len(numbers[0]) > 8
    assert numbers[0] == sorted(numbers[0])
    assert numbers[1] == sorted(numbers[1], reverse=True)
    assert acted["first"] == acted["up"]
    assert acted["up"][-1] == acted["down"][-1] == ""  # the failure, which has no FID
    assert acted["names"] == sorted(acted["names"])
    assert {*KEYS, "FID ↓", "latency / teacher", "status"} < {*acted["columns"]}
    assert len(acted["columns"]) == 8
    assert acted["allColumns"] == len(TaskReport.of(sweep()).results.columns)


@browser
def test_words_and_steps_choose_rows_points_and_pictures(acted: dict[str, Any]) -> None:
    rows = len(TaskReport.of(sweep()).rows)
    assert len(acted["searched"]) == 4
    assert all(name.startswith("ard, history_layers") for name in acted["searched"])
    assert acted["count"] == f"4 of {rows} rows"
    assert "the choice at the top hides the others" in acted["told"]
    assert 0 < acted["live"] < rows
    assert acted["ofSteps"] == 1


@browser
def test_a_touched_point_names_its_row_and_opens_it(acted: dict[str, Any]) -> None:
    label, tip = acted["touched"]
    assert tip.split("\n")[0] == label
    assert acted["left"] == 0
    assert acted["once"] == [1, False]
    assert acted["twice"][0] is True
    assert label.startswith(acted["twice"][1])
    assert acted["opened"] == [
        "Samples", "Numbers", "Curves", "Options and settings", "Command to repeat it", "Record",
    ]  # fmt: skip
    assert acted["chosen"] >= 1
    assert acted["copy"] == 1
    assert acted["focus"] == "Close"
    assert acted["closed"] is True
    assert acted["arrow"] == [True, True, 1]


@browser
def test_two_rows_are_compared_as_reports_do(acted: dict[str, Any]) -> None:
    assert acted["tray"].startswith("ect, 4 steps and imm, 4 steps")
    rows = {row.label: row for row in TaskReport.of(sweep()).rows}
    expected = paired_difference(rows["ect"].finished, rows["imm"].finished, "fid")
    assert expected is not None
    compared = {name: cells for name, *cells in acted["compared"]}
    assert compared["FID ↓"][2] == expected.interval.text(2)
    assert len(compared) > 8
    assert acted["grids"] == 2
    assert acted["bothChosen"] >= 1
    for name, matrix in MATRICES.items():
        interval = crossed_interval(np.array(matrix))
        assert acted["halves"][name]["mean"] == pytest.approx(interval.mean)
        assert acted["halves"][name]["half"] == pytest.approx(interval.half_width, rel=1e-3)


@browser
@pytest.mark.parametrize("width", [400, 1400])
def test_it_is_readable_at_a_width(width: int, page: Path) -> None:
    """Only tables reach beyond the window, every plot can be read, and no two numbers overlap."""
    frame = page.with_name("frame.html")
    inner = html.escape(page.read_text(), quote=True)
    frame.write_text(
        f'<!doctype html><html><body><iframe id="f" width="{width}" height="900" '
        f'srcdoc="{inner}"></iframe></body></html>'
    )
    measuring = """(() => {
      const view = document.getElementById("f").contentWindow, inside = view.document;
      for (const each of inside.querySelectorAll("details")) each.open = true;
      const boxes = (selector, place = inside) => [...place.querySelectorAll(selector)].map(
        element => element.getBoundingClientRect());
      const apart = (a, b) => a.right <= b.left || b.right <= a.left
        || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
      const plots = [...inside.querySelectorAll("svg.plot")];
      const overlaps = plots.flatMap(plot => {
        const texts = boxes("text", plot);
        return texts.filter((a, i) => texts.some((b, j) => i < j && !apart(a, b)));
      }).length;
      const letters = boxes("figure svg.plot text").map(box => box.height).filter(h => h > 0);
      const table = inside.querySelector("table.all"), cell = table.tBodies[0].rows[0].cells[0];
      const before = cell.getBoundingClientRect().left;
      table.closest(".scroll").scrollLeft = 150;
      const moved = cell.getBoundingClientRect().left - before;
      const sides = boxes("figure svg.plot, figure img");
      const found = {wide: inside.documentElement.scrollWidth, least: Math.min(...letters),
        overlaps, moved, first: cell.getBoundingClientRect().width,
        plots: sides.map(r => [r.left, r.right, r.width, r.height])};
      const dialog = inside.querySelector("dialog"), content = dialog.querySelector(".content");
      const fits = () => [dialog.getBoundingClientRect().width,
        content.scrollWidth - content.clientWidth];
      table.querySelector("td a").click(); found.opened = fits();
      const picks = [...inside.querySelectorAll(".pick")].slice(0, 2);
      for (const pick of picks) pick.click();
      inside.querySelector("#tray button").click(); found.compared = fits();
      return found;
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
    assert measured["overlaps"] == 0
    assert measured["moved"] == pytest.approx(0, abs=1)
    assert measured["first"] < 0.6 * width
    for wide, beyond in (measured["opened"], measured["compared"]):
        assert wide <= width
        assert beyond <= 0


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
    assert text.count("<tr") > count
    assert text.count('<svg class="plot"') < 10
    assert text.count("<article") == count


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
