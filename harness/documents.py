"""Text, YAML and JSON from outside, read within limits, so that no file fills the memory.

A YAML file of 400 bytes can stand for 10^9 values, by aliases of aliases, and a file of zeros has
no end. What is read here has an end, and plain values alone: numbers are finite and fit 64 bits.
"""

from __future__ import annotations

import errno
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from harness.errors import UsageError

MOST_TEXT = 2**28
"""Bytes of a text that is read as a whole."""
MOST_LINE = 2**24
"""Bytes of a line, where a file is read by its lines."""
MOST_YAML = 2**20
"""Bytes of a YAML file, which is read at some 100 kB a second."""
MOST_VALUES = 10**5
"""Values of a YAML file once its aliases are written out."""
WRONG = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What PyYAML raises: of wrong dates, numbers and tags it raises more than its own errors."""
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""In JSON, a half of a surrogate pair; one without the other half cannot be written as UTF-8."""


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """The bytes of a file. Raises OSError if it cannot be read, or has more than `most`."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no name of a file holds the character U+0000")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most / 1e6:.0f} MB")
    return content


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """The text of a file in UTF-8. Raises OSError as `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file in UTF-8, one at a time, without their ends.

    Raises OSError for a line of more than `MOST_LINE` bytes, and UnicodeDecodeError.
    """
    with path.open("rb") as file:
        while line := file.readline(MOST_LINE + 1):
            if len(line) > MOST_LINE:
                raise OSError(errno.EFBIG, f"it has a line of more than {MOST_LINE / 1e6:.0f} MB")
            yield line.decode("utf-8").removesuffix("\n")


def parse_json(text: str, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        finite: whether infinite numbers and NaN are refused; diffusers' schedulers have them.

    Raises ValueError for what is no JSON, is nested too deeply, or holds NaN, an infinite number,
    a whole number above 64 bits, or half a surrogate pair.
    """
    try:
        found = json.loads(text, parse_constant=_finite if finite else float)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_numbers(found, finite)
    if HALF_PAIR.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds half of a surrogate pair") from error
    return found


def _finite(text: str) -> float:
    if not math.isfinite(found := float(text)):
        raise ValueError(f"{text} is no finite number")
    return found


def _check_numbers(value: Any, finite: bool) -> None:
    """Raises ValueError for a number that is too large. Faster than `json`'s hooks by half."""
    values = [value]
    while values:
        value = values.pop()
        kind = type(value)
        if kind is float:
            if finite and not -math.inf < value < math.inf:
                raise ValueError(f"{value} is no finite number")
        elif kind is int:
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"the number {str(value)[:20]} does not fit 64 bits")
        elif kind is dict:
            values += value.values()
        elif kind is list:
            values += value


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys; the standard silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (found := self.construct_object(key, deep=True)) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {found!r} stands there twice", problem_mark=key.start_mark
                )
            seen.add(found)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises UsageError if the file cannot be read, is broken, is too large with its aliases written
    out, repeats a key, or holds what is no plain value.
    """
    try:
        content = parse_yaml(read_text(path, MOST_YAML))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping from names to values")
    return content


def parse_yaml(text: str, keys: type | UnionType = str) -> Any:
    """The value of a YAML text.

    Args:
        keys: the types of keys.

    Raises ValueError for anything that `read_yaml` refuses.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")
        found = loader.construct_document(node)
        check_plain(found, keys)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except WRONG as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ValueError(reason or type(error).__name__) from error
    return found


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values of a node, those of an alias each time that it is named."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # while it is counted: what holds itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for part in parts for child in (part if type(part) is tuple else [part])]
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


def check_plain(value: Any, keys: type | UnionType = str, where: str = "") -> None:
    """Raises ValueError unless a value is plain: what JSON has, by names, finite, in 64 bits.

    Args:
        where: its place in the document, as the error names it.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, keys):
                raise ValueError(f"{where}{name!r} is a key, but keys should be text")
            check_plain(name, keys, f"{where}{name!r}")
            check_plain(inner, keys, f"{where}{name}.")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            check_plain(inner, keys, f"{where}{number}.")
    elif isinstance(value, str):
        strange = (c for c in value if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs"))
        if found := next(strange, None):
            raise ValueError(f"{where.strip('.')} has the control character U+{ord(found):04X}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where.strip('.')} is {value}, but should be a finite number")
    elif type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where.strip('.')} is a number that does not fit 64 bits")
    elif not isinstance(value, int | float | None):
        raise ValueError(f"{where.strip('.')} is a {type(value).__name__}, not a plain value")
