"""What is committed as results: every page is what the report makes of its records, and the README repeats it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from harness.report.publish import publish
from harness.report.rows import load_records

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "results").glob("**/README.md"))
FOLDERS = [page.parent for page in PAGES if list(page.parent.glob("*/records.jsonl"))]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed records, published anew."""
    copy = tmp_path_factory.mktemp("published") / "results"
    shutil.copytree(ROOT / "results", copy, ignore=shutil.ignore_patterns("README.md", "runs"))
    for folder in FOLDERS:
        publish(load_records(copy / folder.relative_to(ROOT / "results")), copy / folder.relative_to(ROOT / "results"))
    return copy


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_a_page_is_made_of_its_records(page: Path, published: Path) -> None:
    assert (published / page.relative_to(ROOT / "results")).read_text() == page.read_text()


def test_the_readmes_rows_stand_in_a_page() -> None:
    made = {" ".join(line.split()) for page in PAGES for line in page.read_text().splitlines()}
    readme = (ROOT / "README.md").read_text()
    table = re.search(r"## What comes out\n\n(?:[^|#].*\n|\n)*((?:\|.*\n)+)", readme)
    assert table, "the README has no results table"
    rows = [" ".join(line.split()) for line in table[1].splitlines() if not set(line) <= set("|:- ")]
    assert len(rows) >= 7
    assert [row for row in rows if row not in made] == []


def test_records_were_made_by_committed_code() -> None:
    """Where files of a checkout had been changed, others made by the unchanged checkout show that the code was not."""
    environments = [record.environment for folder in FOLDERS for record in load_records(folder)]
    committed = {(environment.commit, environment.code) for environment in environments if environment.dirty is False}
    for environment in environments:
        assert environment.commit
        assert (environment.commit, environment.code) in committed
