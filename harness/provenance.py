"""What a number was made by: a digest of the code, the versions and the machine.

A room's digest covers the room and every room that it imports, directly or not. Records carry the
digest of `runs`, so a change to the command line, to reports or to sweeps leaves them valid. Nobody
keeps a list of files.

Stored trajectories cost hours, so their digest is narrower: of the files that compute them, without
comments, docstrings and formatting (`meaning_digest`).
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from harness import ranks
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

    Of plug-ins, comments, docstrings and formatting do not count.

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
        whole.update(meaning(PLUGIN_SOURCES[path]).encode())
    for plugin in installed_plugins():
        whole.update(plugin.encode())
    return whole.hexdigest()[:16]


def meaning_digest(
    modules: Iterable[str], classes: Iterable[type] = (), rooms: frozenset[str] = frozenset()
) -> str:
    """SHA-256 of what the code of some modules does.

    Comments, docstrings and formatting do not count. A module of this package counts with those
    that it imports, one of a plug-in or of another package alone.

    Args:
        modules: names such as "harness.solvers.ddim".
        classes: further classes, whose modules and whose bases' modules count.
        rooms: the rooms of this package that count; none means all.

    Returns:
        16 hexadecimal digits.
    """
    named = {*modules, *(base.__module__ for cls in classes for base in cls.__mro__)}
    named -= {"builtins", "abc", "typing"}
    own = {name for name in named if name.partition(".")[0] == "harness"}
    whole = hashlib.sha256()
    for inside in sorted(imported_with(own, PACKAGE)):
        if rooms and room_of(inside) not in rooms:
            continue
        whole.update(f"{inside.as_posix()}\0{meaning(sources(PACKAGE)[inside])}\0".encode())
    for name in sorted(named - own):
        path = Path(getattr(sys.modules[name], "__file__", None) or "")
        content = PLUGIN_SOURCES.get(path) or (path.read_bytes() if path.is_file() else b"")
        whole.update(f"{meaning(content)}\0".encode())
    return whole.hexdigest()[:16]


def meaning(source: bytes) -> str:
    """Python source without comments, docstrings and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(line: ast.AST) -> bool:
    """Whether a statement is a string alone, such as a docstring."""
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


def imported_with(modules: Iterable[str], folder: Path) -> set[Path]:
    """The files of some modules of a package and of all that they import, inside the package.

    A name that a room re-exports leads to the file that defines it, not to the whole room.

    Raises KeyError for a module that does not exist.
    """
    seen, waiting = set[Path](), [_file_of(name, folder) for name in modules]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(sources(folder)[path])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harness"):
                waiting += [_defining(str(node.module), alias.name, folder) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("harness.")]
                waiting += [_file_of(name, folder) for name in names]
    return seen


def _file_of(module: str, folder: Path) -> Path:
    """The file of a module inside a package's folder. Raises KeyError if there is none."""
    inside = Path(*module.split(".")[1:])
    for path in (inside.with_suffix(".py") if inside.parts else inside, inside / "__init__.py"):
        if path in sources(folder):
            return path
    raise KeyError(module)


def _defining(module: str, name: str, folder: Path) -> Path:
    """The file that defines a name which is imported from a module."""
    path = _file_of(module, folder)
    if path.name != "__init__.py":
        return path
    if (submodule := path.parent / f"{name}.py") in sources(folder):
        return submodule
    for node in ast.parse(sources(folder)[path]).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _defining(str(node.module), name, folder)
    return path


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
        ranks=ranks.count(),
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
