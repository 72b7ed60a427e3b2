"""Strips of the best rows' samples: the right crop of the right grid, and words where none is."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written import metric, record

from harness.records import Record, write_record
from harness.report import html as pages
from harness.report import publish as publishing
from harness.report.html import html_page
from harness.report.publish import publish
from harness.report.rows import load_records
from harness.report.strips import APART, COUNT, LARGEST, LEGIBLE, NAMES, strips_of
from harness.report.task_report import TaskReport

TIMES = 4
SQUARE = LEGIBLE // TIMES


@pytest.fixture(autouse=True)
def _without_plots_and_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "write_plots", lambda plots, folder: None)
    monkeypatch.setattr(publishing, "claims_section", lambda records: [])


def rows() -> list[Record]:
    """Four lines of the best table, from its last to its first, and a row that is second."""
    own = record("teacher", steps=0, num_steps=24, fid=1.0)
    own.metrics["distance_to_teacher"] = metric("distance_to_teacher", {0: 0.0, 1: 0.0})
    return [
        own,
        record("imm", fid=2.5, target="data"),
        record("ard", fid=2.0),
        record("teacher", steps=0, num_steps=1, fid=7.0),
        record("step-distillation", fid=3.0),
    ]


OWN, DATA, TAUGHT, FREE, SECOND = (one.run_id for one in rows())


def grid(number: int, square: int = SQUARE, columns: int = 10) -> np.ndarray:
    """A grid of noise, uint8 [2 squares, 10 squares, 3]: the upper row is the run's own."""
    shape = square, columns * square, 3
    upper, lower = (np.random.default_rng(seed).integers(0, 256, shape) for seed in (number, 99))
    return np.concatenate([upper, lower]).astype(np.uint8)


def written(results: Path, grids: dict[str, np.ndarray]) -> Path:
    """A results folder with the records, and these grids by run id."""
    for one in rows():
        write_record(results / "runs" / one.run_id / "record.json", one)
    for run_id, content in grids.items():
        Image.fromarray(content).save(results / "runs" / run_id / "samples.png")
    return results


def shown(results: Path) -> tuple[str, list[np.ndarray]]:
    """The published page, and the strips of its picture as they were before they were enlarged."""
    publish(load_records(results), results)
    folder = results / "tiny"
    page = (folder / "README.md").read_text()
    assert ("](best.png)" in page) == (folder / "best.png").exists()
    if not (folder / "best.png").exists():
        return page, []
    whole = np.array(Image.open(folder / "best.png"))[:, NAMES:]
    assert whole.shape[1] == COUNT * LEGIBLE
    found, top = [], 0
    while top < len(whole):
        strip = whole[top : top + LEGIBLE]
        if (strip[:APART] == 255).all():  # another number of steps
            top += APART
            continue
        found.append(strip[::TIMES, ::TIMES])
        assert (strip == found[-1].repeat(TIMES, 0).repeat(TIMES, 1)).all()
        top += LEGIBLE
    return page, found


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def first(content: np.ndarray, lower: bool = False) -> np.ndarray:
    """The first samples of a grid's row, in their order."""
    square = len(content) // 2
    return content[square * lower : square * (1 + lower), : COUNT * square]


def test_each_best_row_shows_its_first_samples_in_the_tables_order(tmp_path: Path) -> None:
    grids = {run: grid(number) for number, run in enumerate((OWN, DATA, TAUGHT, FREE, SECOND))}
    grids[OWN][:SQUARE] = grids[OWN][SQUARE:]  # the reference is its own
    page, found = shown(written(tmp_path, grids))
    assert same(found, [first(grids[run]) for run in (FREE, TAUGHT, DATA, OWN)])
    alt = "teacher, 1 step; ard, history_layers 6, 4 steps; imm, 4 steps; the teacher itself, 24"
    assert re.search(rf"!\[The first 8 samples of [^]]*same noise: {alt} steps\]\(best.png\)", page)
    assert page.index("## Best at") < page.index("](best.png)") < page.index("](details.md)")
    assert "No samples" not in page
    assert {FREE, OWN} < {path.stem for path in (tmp_path / "tiny" / "samples").iterdir()}


def test_the_teacher_is_any_grids_lower_row(tmp_path: Path) -> None:
    page, found = shown(written(tmp_path, {DATA: grid(1)}))
    assert same(found, [first(grid(1)), first(grid(1), lower=True)])
    assert (
        "No samples that can be shown here are published for: "
        "teacher, 1 step; ard, history_layers 6, 4 steps.\n" in page
    )


def test_what_cannot_be_cut_is_named(tmp_path: Path) -> None:
    """A broken grid, one row, and rows of oblongs; of too few samples all are shown."""
    written(tmp_path, {TAUGHT: grid(1)[: SQUARE + 1], DATA: grid(2)[:, :-1], FREE: grid(3)})
    (tmp_path / "runs" / OWN / "samples.png").write_bytes(b"a picture")
    page, found = shown(tmp_path)
    assert same(found, [first(grid(3)), first(grid(3), lower=True)])
    assert "published for: ard, history_layers 6, 4 steps; imm, 4 steps.\n" in page
    Image.fromarray(grid(4, columns=3)).save(tmp_path / "runs" / FREE / "samples.png")
    few = strips_of(TaskReport.of(rows()), tmp_path)[0]
    assert np.array_equal(np.array(few.picture), grid(4, columns=3)[:SQUARE])
    assert few.caption == "The first 3 samples of teacher, 1 step, from noise set 0"


def test_without_grids_a_page_says_so_and_keeps_no_older_picture(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "best.png").write_bytes(b"of older runs")
    page, found = shown(written(tmp_path, {}))
    assert not found
    assert "published for: teacher, 1 step; " in page


def test_publishing_again_without_runs_changes_nothing(tmp_path: Path) -> None:
    written(tmp_path, {run: grid(n) for n, run in enumerate((DATA, TAUGHT, FREE))})
    published = tmp_path / "tiny"

    def made() -> dict[Path, bytes]:
        publish(load_records(tmp_path), tmp_path)
        return {path: path.read_bytes() for path in published.rglob("*") if path.is_file()}

    before = made()
    for file in tmp_path.glob("runs/*/*"):
        file.unlink()
    assert published / "best.png" in before
    assert made() == before


def test_large_samples_are_shrunk(tmp_path: Path) -> None:
    written(tmp_path, {FREE: grid(1, 2 * LARGEST, 1)})
    (strip,) = strips_of(TaskReport.of(rows()), tmp_path)[:1]
    halves = first(grid(1, 2 * LARGEST, 1)).reshape(LARGEST, 2, LARGEST, 2, 3).mean((1, 3))
    assert np.array(strip.picture) == pytest.approx(halves, abs=1)


def test_the_page_in_one_file_embeds_the_strips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, {DATA: grid(1), TAUGHT: grid(2)})
    text = html_page(rows(), tmp_path, Path("none"))
    found = re.findall(
        r'<figure class="strip" data-row="(row-\d+)"><img alt="(.*?)" src="data:image/png;base64,'
        r'(.*?)"><figcaption><a href="#(.*?)">(.*?)</a></figcaption></figure>',
        text,
    )
    titles = [
        "ard, history_layers 6, 4 steps, from the teacher",
        "imm, 4 steps, from data alone",
        "the teacher itself, 24 steps, no training",
    ]
    assert [title for *_, title in found] == titles
    files = [io.BytesIO(base64.b64decode(data)) for _, _, data, *_ in found]
    pictures = [np.array(Image.open(file)) for file in files]
    assert same(pictures, [first(grid(2)), first(grid(1)), first(grid(1), lower=True)])
    for row, alt, _, link, title in found:
        assert row == link
        assert f'<article id="{row}"' in text
        assert alt == f"The first 8 samples of {title.rpartition(', ')[0]}, from noise set 0"
    assert "No samples that can be shown here are published for: teacher, 1 step.</p>" in text
    assert text.index("Best at 1, 2 and 4") < text.index("<figure ") < text.index("All rows")
    monkeypatch.setattr(pages, "MOST_LETTERS", 30)
    full = html_page(rows(), tmp_path, Path("none"))
    assert '<figure class="strip"' not in full
    assert "teacher, 1 step. The page would be too large with 3 more strips.</p>" in full
