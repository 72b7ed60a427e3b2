"""What may be committed: the hook that refuses binary files."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOOK = ROOT / ".ci" / "no_binaries.py"


def refused(folder: Path, name: str, content: bytes) -> bool:
    """Whether the hook refuses a file of this name and content, and names it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, HOOK, "fine.py", name],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 1) == done.stdout.startswith(f"{name} is binary"), done.stderr
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("harness/text.py", b"x = 1\n", False),
        ("docs/umlaut.md", "Größe".encode(), False),
        ("harness/empty.py", b"", False),
        ("dist.whl", b"text", True),
        ("harness/picture.PNG", b"", True),
        ("no_extension", b"a\0b", True),
        ("latin.txt", b"Gr\xf6\xdfe", True),
        ("harness/tasks/weights/teacher.safetensors", b"\0", False),
        ("harness/tasks/weights/teacher.pt", b"\0", True),
        ("tests/golden/dit.safetensors", b"\0", False),
        ("results/digits/samples/ard.png", b"\x89PNG\0", False),
        ("results/digits/student.safetensors", b"\0", True),
        ("other/results/page.png", b"\0", True),
    ],
)
def test_binaries_are_refused_outside_their_folders(
    name: str, content: bytes, expected: bool, tmp_path: Path
) -> None:
    (tmp_path / "fine.py").write_text("")
    assert refused(tmp_path, name, content) is expected


def test_pre_commit_calls_the_hook() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (local,) = (each["hooks"] for each in repositories if each["repo"] == "local")
    assert [ROOT / hook["entry"] for hook in local] == [HOOK]
    assert HOOK.stat().st_mode & 0o111


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")
def test_the_repository_passes_its_own_hook() -> None:
    names = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    existing = [name for name in names if (ROOT / name).exists()]
    done = subprocess.run(
        [sys.executable, HOOK, *existing], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("baseline", sorted((ROOT / "baselines").glob("*.json")))
def test_a_baselines_command_can_be_given_again(baseline: Path) -> None:
    """Each path in it is one of the checkout's."""
    paths = [
        word for word in shlex.split(json.loads(baseline.read_text())["command"]) if "/" in word
    ]
    assert paths
    assert [path for path in paths if path[0] == "/" or not (ROOT / path).exists()] == []
