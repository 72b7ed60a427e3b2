"""What a number was made by: a digest of the code, the versions and the machine.

A room's digest covers the room and every room that it imports, directly or not. Records carry the
digest of `runs`, so a change to the command line, to reports or to sweeps leaves them valid; cached
trajectories carry the digest of `data`, and so on. Nobody keeps a list of files.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from harness.records import Environment

PACKAGES = ("torch", "timm", "torch-fidelity", "numpy", "scikit-learn", "safetensors")
"""The packages whose versions an environment holds."""
PLUGIN_SOURCES: dict[Path, bytes] = {}
"""Plug-ins as they were when they were loaded: they decide numbers too."""
IMPORT = re.compile(r"^\s*(?:from|import) harness\.(\w+)", re.MULTILINE)
PACKAGE = Path(__file__).parent


@cache
def sources(folder: Path) -> dict[Path, bytes]:
    """The Python and YAML files below a package's folder, as they were when this was first asked.

    A process runs what it imported, however the files are edited afterwards.
    """
    found = sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")])
    return {path.relative_to(folder): path.read_bytes() for path in found}


sources(PACKAGE)


def room_of(inside: Path) -> str:
    """The room of a file, given by its path inside the package.

    `solvers/ddim.py` belongs to `solvers`, and `files.py` to `files`.
    """
    return inside.parts[0].removesuffix(".py")


@cache
def imports_of_rooms(folder: Path) -> dict[str, frozenset[str]]:
    """For each room of a package, the rooms that its files import."""
    found: dict[str, set[str]] = {}
    for inside, content in sources(folder).items():
        imported = IMPORT.findall(content.decode()) if inside.suffix == ".py" else []
        found.setdefault(room_of(inside), set()).update(imported)
    return {room: frozenset(imported) for room, imported in found.items()}


def rooms_under(rooms: tuple[str, ...], folder: Path) -> set[str]:
    """The given rooms with every room that they import, directly or not."""
    imports, seen, waiting = imports_of_rooms(folder), set[str](), list(rooms)
    while waiting:
        room = waiting.pop()
        if room not in seen:
            seen.add(room)
            waiting += imports.get(room, ())
    return seen


def code_digest(*rooms: str) -> str:
    """SHA-256 of the sources of some rooms, of the rooms that they import, and of loaded plug-ins.

    Args:
        rooms: such as "data"; none means `runs`, whose code decides what a record says.

    Returns:
        16 hexadecimal digits.
    """
    covered, whole = rooms_under(rooms or ("runs",), PACKAGE), hashlib.sha256()
    for inside, content in sources(PACKAGE).items():
        if room_of(inside) in covered:
            whole.update(f"{inside.as_posix()}\0".encode() + content)
    for path in sorted(PLUGIN_SOURCES):
        whole.update(PLUGIN_SOURCES[path])
    for plugin in installed_plugins():
        whole.update(plugin.encode())
    return whole.hexdigest()[:16]


@cache
def installed_plugins() -> tuple[str, ...]:
    """What other packages add by entry points: each object with its package and version."""
    groups = ("harness.methods", "harness.solvers", "harness.metrics")
    points = [point for group in groups for point in entry_points(group=group) if point.dist]
    named = [(point.value, point.dist.name, point.dist.version) for point in points if point.dist]
    return tuple("\0".join(words) for words in sorted(named))


def capture_environment(device: torch.device) -> Environment:
    """The machine, the versions and the code of this process."""
    commit, dirty = checkout(PACKAGE)
    return Environment(
        commit=commit,
        dirty=dirty,
        code=code_digest(),
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := package_version(name))},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
    )


def package_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def checkout(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that holds a package, and whether the package's files differ.

    The answer is that of the first call in this process: what runs was imported about then.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    status = (
        _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".") if commit else None
    )
    return commit, None if status is None else bool(status)


def _git(folder: Path, *words: str) -> str | None:
    """The output of a git command in a package's checkout, or None where there is no checkout."""
    if not (folder.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's model and the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
