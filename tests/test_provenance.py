"""The code digest, and the environment of a record."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import provenance
from harness.provenance import (
    capture_environment,
    code_digest,
    meaning,
    meaning_digest,
    rooms_under,
)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package whose sources are digested."""
    folder = tmp_path / "harness"
    shutil.copytree(
        Path(provenance.__file__).parent,
        folder,
        ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"),
    )
    monkeypatch.setattr(provenance, "PACKAGE", folder)
    return folder


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n# changed\n")


def of_a_new_process() -> str:
    """The digest of a process that is started now."""
    provenance.sources.cache_clear()
    provenance.imports_of_rooms.cache_clear()
    return code_digest()


def test_the_copy_has_the_originals_digest(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = code_digest()
    monkeypatch.undo()
    assert code_digest() == found
    assert len(found) == 16


@pytest.mark.parametrize(
    "name",
    [
        "training/trainer.py",
        "runs/run.py",
        "methods/ard.py",
        "tasks/digits.yaml",
        "metrics/fidelity.py",
    ],
)
def test_the_digest_changes_with_what_decides_numbers(name: str, copied: Path) -> None:
    before = of_a_new_process()
    append(copied / name)
    assert code_digest() == before  # of what it runs, which was read before
    assert of_a_new_process() != before


@pytest.mark.parametrize(
    "name", ["cli/main.py", "cli/console.py", "__main__.py", "report/tables.py", "sweeps/sweep.py"]
)
def test_the_digest_does_not_change_with_presentation(name: str, copied: Path) -> None:
    before = of_a_new_process()
    append(copied / name)
    assert of_a_new_process() == before


def test_the_digest_changes_with_a_new_or_renamed_file(copied: Path) -> None:
    before = of_a_new_process()
    (copied / "methods" / "new.py").write_text("")
    with_new = of_a_new_process()
    (copied / "methods" / "new.py").rename(copied / "methods" / "newer.py")
    assert len({before, with_new, of_a_new_process()}) == 3


EDITED = """
from harness.provenance import __file__ as file, code_digest
with open(file.replace("provenance.py", "training/trainer.py"), "a") as source:
    source.write("# changed")
print(code_digest())
"""


def test_what_is_edited_after_the_import_does_not_count(copied: Path) -> None:
    before, words = of_a_new_process(), [sys.executable, "-c", EDITED]
    found = [
        subprocess.run(
            words, cwd=copied.parent, capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert found[0] == before
    assert found[1] != before


def test_the_environment_names_code_versions_and_machine() -> None:
    found = capture_environment(torch.device("cpu"))
    assert found.code == code_digest()
    assert (
        found.packages["torch"] == torch.__version__.partition("+")[0]
        or found.packages["torch"] == torch.__version__
    )
    assert found.device == "cpu"
    assert found.threads == torch.get_num_threads()
    assert "cores" in found.cpu


def test_outside_of_a_checkout_there_is_no_commit(copied: Path) -> None:
    found = capture_environment(torch.device("cpu"))
    assert (found.commit, found.dirty) == (None, None)


def test_only_changes_of_the_package_make_it_dirty(copied: Path) -> None:
    root = copied.parent
    (root / "results").mkdir()
    (root / "results" / "page.md").write_text("first")
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", *words], cwd=root, check=True)
    (root / "results" / "page.md").write_text("second")
    clean = capture_environment(torch.device("cpu"))
    (copied / "training" / "trainer.py").write_text("changed = True")
    assert capture_environment(torch.device("cpu")) == clean  # what runs was imported before
    provenance.checkout.cache_clear()
    assert (clean.dirty, capture_environment(torch.device("cpu")).dirty) == (False, True)
    assert clean.commit


def test_a_room_s_digest_covers_what_it_imports_and_no_more(copied: Path) -> None:
    rooms = rooms_under(("data",), copied)
    assert {"data", "solvers", "networks", "diffusion", "files"} <= rooms
    assert not rooms & {"methods", "metrics", "training", "runs", "cli"}

    def digests() -> tuple[str, str]:
        provenance.sources.cache_clear()
        provenance.imports_of_rooms.cache_clear()
        return code_digest("data"), code_digest()

    of_data, of_runs = digests()
    append(copied / "methods" / "ard.py")
    assert digests()[0] == of_data
    assert digests()[1] != of_runs
    append(copied / "solvers" / "ddim.py")
    assert digests()[0] != of_data


def test_the_meaning_of_code_leaves_out_what_nobody_runs() -> None:
    plain = b"class A:\n    size: int = 1\n\n    def f(self):\n        return {'a': 1}\n"
    same = (
        b'"""Module."""\n# remark\nclass A:\n    """Class."""\n    size: int = 1  # one\n'
        b'    """Field."""\n\n    def f(self):\n        """Method."""\n'
        b'        return {\n            "a": 1,\n        }\n'
    )
    assert meaning(same) == meaning(plain)
    for old, new in ((b"1}", b"2}"), (b"size", b"sizes"), (b"'a'", b"'b'"), (b"(self)", b"(s)")):
        assert meaning(plain.replace(old, new)) != meaning(plain)


def test_the_digest_of_meaning_follows_imports(copied: Path) -> None:
    """A comment in what a module imports does not count, code does, and so do no other files."""

    def found() -> str:
        provenance.sources.cache_clear()
        return meaning_digest(["harness.solvers.heun"])

    before = found()
    for name in ("solvers/heun.py", "solvers/ddim.py", "diffusion/schedules.py"):
        append(copied / name)
    assert found() == before
    (copied / "solvers" / "unipc.py").write_text("changed = True")
    assert found() == before
    seen = {before}
    for name in ("solvers/heun.py", "solvers/ddim.py", "diffusion/schedules.py"):
        with (copied / name).open("a") as file:
            file.write("\nchanged = True\n")
        seen.add(found())
    assert len(seen) == 4
    with pytest.raises(KeyError, match=r"harness\.solvers\.gone"):
        meaning_digest(["harness.solvers.gone"])


def test_a_reexported_name_leads_to_its_file() -> None:
    found = provenance.imported_with(["harness.data.trajectories"], provenance.PACKAGE)
    assert Path("solvers/base.py") in found  # by `from harness.solvers import Trajectory`
    assert Path("solvers/heun.py") not in found


def test_a_comment_in_a_plugin_keeps_the_digest_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for source in (b"", b"x = 1\n", b"# one\nx = (1)\n", b"x = 2\n"):
        monkeypatch.setattr(provenance, "PLUGIN_SOURCES", {Path("plugin.py"): source})
        found.append(code_digest())
    assert found[1] == found[2]
    assert len(set(found)) == 3
