"""What the release script refuses, and whether the project's files agree on version and paper."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from setuptools import Distribution

from harness import __version__

ROOT = Path(__file__).parents[1]


def loaded(path: Path) -> Any:
    """A Python file that no package holds, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = loaded(ROOT / ".ci" / "release.py")
STATING = ("pyproject.toml", "CHANGELOG.md", *release.STATED)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that state the version, with a changelog that is ready for a release."""
    for name in STATING:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {__version__} (today)\n\n## 0.0.1\n")
    return tmp_path


def test_the_projects_files_state_one_version() -> None:
    assert release.version(ROOT, draft=True) == __version__


def test_a_released_changelog_passes(copy: Path) -> None:
    assert release.version(copy, draft=False) == __version__


@pytest.mark.parametrize("name", sorted({*STATING} - {"CHANGELOG.md"}))
def test_another_version_is_refused(name: str, copy: Path) -> None:
    text = (copy / name).read_text()
    (copy / name).write_text(text.replace(__version__, "9.9.9", 1))
    with pytest.raises(release.Refused, match=r"9\.9\.9"):
        release.version(copy, draft=False)


def test_an_unreleased_changelog_is_a_draft(copy: Path) -> None:
    (copy / "CHANGELOG.md").write_text(f"# Changelog\n\n## Unreleased\n\n## {__version__}\n")
    assert release.version(copy, draft=True) == __version__
    with pytest.raises(release.Refused, match="begins with Unreleased"):
        release.version(copy, draft=False)


def archives(root: Path, left_out: str = "") -> tuple[Path, Path]:
    """A wheel and an sdist of the files below a folder, one of them left out."""
    wheel, sdist = root.parent / "a.whl", root.parent / "a.tar.gz"
    files = [path for path in root.rglob("*") if path.is_file() and path != root / left_out]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a.dist-info/METADATA", "")
        for path in files:
            name = path.relative_to(root).as_posix()
            if name.startswith("harness/"):
                archive.write(path, name)
    with tarfile.open(sdist, "w:gz") as archive:
        for path in files:
            archive.add(path, f"a-1/{path.relative_to(root)}")
    return wheel, sdist


def test_a_wheel_without_a_file_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "harness").mkdir(parents=True)
    named = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
    for name in ("harness/py.typed", "harness/a.py", *named):
        (root / name).write_text("")
    release.check_contents(*archives(root), root)
    with pytest.raises(release.Refused, match=r"differ in harness/py\.typed"):
        release.check_contents(*archives(root, left_out="harness/py.typed"), root)
    wheel, sdist = archives(root)
    (root / "LICENSE").rename(root / "harness" / "LICENSE")
    with pytest.raises(release.Refused, match="harness/LICENSE"):
        release.check_contents(wheel, sdist, root)


def test_archives_without_published_records_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    record, shipped = "results/digits/records.jsonl", "harness/published/digits/records.jsonl"
    named = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
    for name in (record, shipped, "results/digits/page.md", *named):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    wheel, sdist = archives(root)
    (root / shipped).unlink()  # the repository has no copy
    release.check_contents(wheel, sdist, root)
    (root / shipped).write_text("")
    wheel, sdist = archives(root, left_out=record)
    (root / shipped).unlink()
    with pytest.raises(release.Refused, match=f"the sdist lacks {record}$"):
        release.check_contents(wheel, sdist, root)
    with pytest.raises(release.Refused, match=f"differ in {shipped}$"):
        release.check_contents(*archives(root), root)


def test_the_build_ships_published_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is told where it stands by what the package holds, where it holds records."""
    shipped = ["digits/records.jsonl", "digits/shared.json", "mixture/records.jsonl"]
    others = ["README.md", "digits/details.md", "digits/runs/a/record.json"]
    searched = ["tuning/digits/records.jsonl", "tuning/digits/shared.json"]
    for name in (*shipped, *others, *searched):
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    beside = Path("harness/report/beside.py")
    (tmp_path / beside).parent.mkdir(parents=True)
    shutil.copyfile(ROOT / beside, tmp_path / beside)
    monkeypatch.chdir(tmp_path)
    project = Distribution({"packages": ["harness.report"], "script_name": "setup.py"})
    build = loaded(ROOT / "setup.py").BuildWithRecords(project)
    build.ensure_finalized()
    build.run()
    lib = tmp_path / "build" / "lib"
    where = loaded(lib / beside).PUBLISHED
    assert where.relative_to(lib) == Path("harness/published")
    copies = [path for path in where.rglob("*") if path.is_file()]
    texts = {path.relative_to(where).as_posix(): path.read_text() for path in copies}
    assert texts == {name: name for name in shipped}
    in_sdist = {f"{beside}", *(f"results/{name}" for name in shipped)}
    assert set(build.get_source_files()) == in_sdist
    assert loaded(tmp_path / beside).PUBLISHED.relative_to(tmp_path) == Path("results")


def test_both_citations_name_the_paper_and_its_authors() -> None:
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    bibtex = (ROOT / "CITATION.bib").read_text().replace('{\\"o}', "ö")
    assert paper["identifiers"][0]["value"] == "arXiv:2504.11295"
    assert "eprint        = {2504.11295}" in bibtex
    (authors,) = re.findall(r"author += \{(Kim.*?)\},\n", bibtex, re.DOTALL)
    assert re.split(r"\s+and\s+", authors) == [
        f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]
    ]


def test_workflows_run_each_python_that_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        matrices = [
            job["strategy"]["matrix"]
            for job in yaml.safe_load(path.read_text())["jobs"].values()
            if "strategy" in job
        ]
        assert [matrix["python"] for matrix in matrices] == [named], path.name
