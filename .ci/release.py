#!/usr/bin/env python3
"""Builds wheel and sdist, and tries the wheel in an empty environment, from another folder.

`tox -e release` calls it. It publishes nothing: what may be published lies in `dist/` at the end.
With `--draft` the changelog may still call its newest section "Unreleased".
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / ".ci" / "release.yaml"
RUN = "--method ect --budget steps=3 --num-steps 1 --noise-sets 1 --batch-size 8"
"""The sweep's one run, so that its record is found."""
CPU = ("--device", "cpu")
"""Where the published rows were made: a run elsewhere does not compare with them."""
STATED = {
    "harness/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "CITATION.bib": r"^  version = \{(.+)\},$",
}
"""Where else the version stands."""


class Refused(Exception):
    """What stands against a release, in a sentence."""


def version(root: Path, draft: bool) -> str:
    """The version that pyproject.toml states; raises Refused where another file contradicts."""
    stated = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    for name, pattern in STATED.items():
        found = re.findall(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        if found != [stated]:
            raise Refused(f"{name} states version {found}, but pyproject.toml states {stated}")
    newest = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0]
    if newest != stated and not (draft and newest == "Unreleased"):
        raise Refused(f"CHANGELOG.md begins with {newest}: give that section the name {stated}")
    return stated


def built(root: Path, out: Path) -> tuple[Path, Path]:
    """The wheel and the sdist; the wheel is built from the sdist."""
    shutil.rmtree(out, ignore_errors=True)
    called(sys.executable, "-m", "build", "--outdir", out, root)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path, root: Path) -> None:
    """Raises Refused if a file of the package is in no wheel, or something else is in it.

    The published records of each task belong to the package, as `harness/published/<task>/`.
    """
    sources = {
        path.relative_to(root).as_posix()
        for path in (root / "harness").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    records = {
        f"{path.parent.name}/{name}"
        for name in ("records.jsonl", "shared.json")
        for path in (root / "results").glob(f"*/{name}")
    }
    expected = sources | {f"harness/published/{name}" for name in records}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    if packed != expected:
        wrong = ", ".join(sorted(packed ^ expected))
        raise Refused(f"the wheel and what belongs in it differ in {wrong}")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE"}
    if missing := (needed | sources | {f"results/{name}" for name in records}) - inside:
        raise Refused(f"the sdist lacks {', '.join(sorted(missing))}")


def try_out(wheel: Path, stated: str, folder: Path) -> None:
    """Installs the wheel in an empty environment and runs it in an empty folder.

    Raises Refused if `harness --version` states another version, or if a run is not placed among
    the published rows.
    """
    venv.create(folder / "venv", with_pip=True)
    python, here = folder / "venv" / "bin" / "python", folder / "here"
    here.mkdir()
    called(python, "-m", "pip", "install", "--quiet", wheel)
    called(python, "-m", "pip", "check")
    harness = python.with_name("harness")
    called(harness, "--help", cwd=here)
    printed = called(harness, "--version", cwd=here)
    if stated not in printed.split():
        raise Refused(f"`harness --version` prints {printed.strip()!r}, but should name {stated}")
    called(harness, "sweep", SWEEP, *CPU, cwd=here, cache=folder / "cache")
    printed = called(harness, "run", *RUN.split(), *CPU, cwd=here, cache=folder / "cache")
    if "The best published" not in printed:
        raise Refused(f"`harness run` names no published row: {printed[-2000:]}")
    called(harness, "report", cwd=here)


def called(*words: str | Path, cwd: Path | None = None, cache: Path | None = None) -> str:
    """What a command prints; raises Refused if it fails. It sees nothing of this checkout."""
    line = " ".join(map(str, words))
    print(f"$ {line}", flush=True)
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    if cache:
        environment["HARNESS_CACHE"] = str(cache)
    done = subprocess.run(
        words, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise Refused(f"`{line}` failed with {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout


def main(words: list[str]) -> int:
    """Prints what may be published, or what stands against it, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", action="store_true", help="accept an unreleased changelog")
    asked = parser.parse_args(words)
    try:
        stated = version(ROOT, asked.draft)
        wheel, sdist = built(ROOT, ROOT / "dist")
        check_contents(wheel, sdist, ROOT)
        with tempfile.TemporaryDirectory() as folder:
            try_out(wheel, stated, Path(folder))
    except Refused as refused:
        print(f"no release: {refused}", file=sys.stderr)
        return 1
    sizes = [
        f"{path.relative_to(ROOT)} ({path.stat().st_size / 1e6:.1f} MB)" for path in (wheel, sdist)
    ]
    print(f"version {stated} may be published: {', '.join(sizes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
