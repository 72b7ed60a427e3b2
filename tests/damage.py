"""Damage to files: what hits them, a complete tree of them, and how each is read again."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UsageError

Bytes = Callable[[bytes, random.Random], bytes]
REMEDIES = (
    "again",
    "anew",
    "expected",
    "delete",
    "give",
    "should",
    "must",
    "needs",
    "is needed",
    "did you mean",
    "known:",
    "replace",
    "fetch",
    "is missing",
    "Field required",
    "put",
    "is not YAML",
    "is broken",
    "there is no",
    "list",
    "cannot be made",
)
"""Words of which a refusal has one: what to do, or what would be right."""


def _range(content: bytes, dice: random.Random, longest: int = 64) -> tuple[int, int]:
    """First and last place of a part of a file."""
    first = dice.randrange(len(content))
    return first, min(len(content), first + dice.randint(1, longest))


def flip(content: bytes, dice: random.Random) -> bytes:
    place, bit = dice.randrange(len(content)), dice.randrange(8)
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def truncate(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randint(1, len(content) - 1)]


def zero(content: bytes, dice: random.Random) -> bytes:
    first, last = _range(content, dice)
    return content[:first] + bytes(last - first) + content[last:]


def swap(content: bytes, dice: random.Random) -> bytes:
    size = dice.randint(1, max(1, min(64, len(content) // 4)))
    first = dice.randrange(len(content) - 2 * size + 1)
    second = dice.randrange(first + size, len(content) - size + 1)
    parts = content[:first], content[first : first + size], content[first + size : second]
    last = content[second : second + size], content[second + size :]
    return parts[0] + last[0] + parts[2] + parts[1] + last[1]


def duplicate(content: bytes, dice: random.Random) -> bytes:
    first, last = _range(content, dice)
    return content[:last] + content[first:]


def empty(content: bytes, dice: random.Random) -> bytes:
    return b""


FAULTS: dict[str, Bytes] = {
    function.__name__: function for function in (flip, truncate, zero, swap, duplicate, empty)
}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        files: glob patterns in the tree; every file that one matches is hit.
        read: reads the files by a public function or command, and returns what it gives. Two equal
            answers hold equal numbers.
        outcomes: what may follow, of "refused" (one sentence), "rebuilt" (the same answer, also
            where the damage met nothing), and "told" (another answer that says so itself).
        told: whether an answer says that it is not the expected one.
        remedy: does what the sentence says; after it the answer must be the expected one.
    """

    files: tuple[str, ...]
    read: Callable[[], object]
    outcomes: tuple[str, ...] = ("refused",)
    told: Callable[[object, object], bool] = lambda found, expected: False
    remedy: Callable[[Path], None] | None = None


class Tree:
    """All files below a folder, which can be put back as they were."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = {path: path.read_bytes() for path in self._there()}
        self.times = {path: path.stat().st_mtime_ns for path in self.files}

    def _there(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def restore(self) -> None:
        """Deletes new files, and writes changed ones anew with their old times."""
        for path in self._there():
            if path not in self.files:
                path.unlink()
        for path, content in self.files.items():
            if not path.exists() or path.stat().st_mtime_ns != self.times[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.write_bytes(content)
                os.utime(path, ns=(self.times[path], self.times[path]))

    def of(self, kind: Kind) -> list[Path]:
        found = [path for path in self.files for part in kind.files if path.match(part)]
        assert found, f"the tree has no file {kind.files}"
        return sorted(found)


def damages(tree: Tree, kind: Kind, faults: tuple[str, ...], seed: int) -> Iterator[tuple]:
    """Damages the files of a kind one after the other; yields the fault, the file and the dice."""
    for path in tree.of(kind):
        for fault in faults:
            dice = random.Random(f"{path.name} {fault} {seed}")
            content = tree.files[path]
            changed = next(
                (new for _ in range(20) if (new := FAULTS[fault](content, dice)) != content), None
            )
            if changed is None:  # such as a swap of equal parts
                continue
            path.unlink()  # others may have it mapped
            path.write_bytes(changed)
            os.utime(path, ns=(tree.times[path] + 10**9,) * 2)
            yield fault, path
            tree.restore()


def answer(kind: Kind, path: Path, expected: Callable[[], object]) -> str:
    """What followed the damage of a file, one of `Kind.outcomes`, after its remedy was tried.

    Raises AssertionError for a wrong answer, and for a refusal that is no sentence.
    """
    try:
        found = kind.read()
    except UsageError as error:
        text = str(error)
        assert "\n" not in text, text
        assert path.name in text or path.parent.name in text, f"{path.name} is not named: {text}"
        assert any(word in text for word in REMEDIES), f"no remedy: {text}"
        if kind.remedy:
            kind.remedy(path)
            assert kind.read() == expected(), f"the remedy did not help: {text}"
        return "refused"
    if found == expected():
        return "rebuilt"
    assert kind.told(found, expected()), f"another answer: {str(found)[:300]}"
    return "told"
