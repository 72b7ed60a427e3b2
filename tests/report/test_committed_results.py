"""Committed pages show what the report makes of their records; the README repeats rows."""

from __future__ import annotations

import math
import re
import shutil
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.report import publish as publishing
from harness.report.publish import publish
from harness.report.rows import load_records
from harness.report.strips import NAMES

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for name in ("README.md", "details.md") for path in (ROOT / "results").rglob(name)
)
FOLDERS = [page.parent for page in PAGES if list(page.parent.glob("*/records.jsonl"))]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed records, published anew without plots."""
    copy = tmp_path_factory.mktemp("published") / "results"
    shutil.copytree(
        ROOT / "results", copy, ignore=shutil.ignore_patterns("README.md", "details.md", "runs")
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(publishing, "write_plots", lambda plots, folder: None)
        for folder in FOLDERS:
            here = copy / folder.relative_to(ROOT / "results")
            publish(load_records(here), here)
    return copy


def words(page: Path) -> list[str]:
    """The words and numbers of a page, without the rules and padding of its tables."""
    found = re.split(r"[\s|,]+", page.read_text())
    return [word for word in found if word.strip(":-")]


def alike(one: str | None, other: str | None) -> bool:
    """Equal, or two numbers that differ by two units of the last digit that the page prints."""
    try:
        unit = 10.0 ** -len((one or "").partition(".")[2].partition("e")[0])
        return one == other or math.isclose(
            float(one or ""), float(other or ""), abs_tol=2.1 * unit
        )
    except ValueError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_made_of_its_records(page: Path, published: Path) -> None:
    pairs = zip_longest(words(page), words(published / page.relative_to(ROOT / "results")))
    assert [pair for pair in pairs if not alike(*pair)] == []


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "results").glob("**/records.jsonl")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_publishing_again_keeps_the_bytes_of_records(path: Path, published: Path) -> None:
    for file in (path, path.with_name("shared.json")):
        assert (published / file.relative_to(ROOT / "results")).read_bytes() == file.read_bytes()


STRIPS = sorted((ROOT / "results").glob("**/best.png"))


@pytest.mark.parametrize("path", STRIPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_strips_are_cut_from_committed_grids_of_one_noise(path: Path, published: Path) -> None:
    """The letters at their left may depend on a library's version; grids share the reference."""
    made = published / path.relative_to(ROOT / "results")
    found, expected = (np.array(Image.open(file), int)[:, NAMES:] for file in (path, made))
    assert np.array_equal(found, expected)
    lower = [np.array(Image.open(grid), int) for grid in path.parent.glob("samples/*.png")]
    lower = [grid[len(grid) // 2 :] for grid in lower]
    assert len(lower) > 1
    assert all(np.abs(grid - lower[0]).max() <= 2 for grid in lower)


def test_every_best_row_of_digits_has_a_strip() -> None:
    page = (ROOT / "results" / "digits" / "README.md").read_text()
    assert "](best.png)" in page
    assert "No samples that can be shown" not in page
    assert len(page.splitlines()) < 300


def cells(line: str) -> list[str]:
    """The cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readmes_numbers_stand_in_one_row_of_a_page() -> None:
    """Its rows have names of their own, so their training and numbers with intervals count."""
    made = [
        set(cells(line))
        for page in PAGES
        for line in page.read_text().splitlines()
        if line.startswith("|")
    ]
    section = (ROOT / "README.md").read_text().split("## What comes out\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    if not table:
        pytest.skip("the README has no table of results until the pages of digits are made anew")
    rows = [{cell for cell in cells(line) if "±" in cell or "×" in cell} for line in table[2:]]
    assert len(rows) >= 7
    assert all(len(row) >= 3 for row in rows)
    assert [row for row in rows if not any(row <= cells for cells in made)] == []


def test_records_were_made_by_committed_code() -> None:
    """A record of a changed checkout counts if an unchanged one has the same code."""
    environments = [record.environment for folder in FOLDERS for record in load_records(folder)]
    committed = {
        (environment.commit, environment.code)
        for environment in environments
        if environment.dirty is False
    }
    for environment in environments:
        assert environment.commit
        assert (environment.commit, environment.code) in committed
