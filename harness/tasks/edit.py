"""Sets entries of a YAML file and leaves the rest as its author wrote it, comments included."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.documents import parse_yaml, read_yaml
from harness.errors import UsageError
from harness.files import write_text


def set_entries(path: Path, changes: Mapping[str, Any]) -> None:
    """Sets entries at the top of a YAML file. Raises UsageError as `edited` does."""
    write_text(path, edited(path, changes))


def edited(path: Path, changes: Mapping[str, Any]) -> str:
    """The text of a YAML file with entries set at its top; new ones come at its end.

    Comments inside a replaced entry move above it.

    Raises UsageError if the file cannot be read, or not be edited, since it has anchors.
    """
    before, text = read_yaml(path), path.read_text(encoding="utf-8")
    found = with_entries(text, changes)
    try:
        right = parse_yaml(found) == {**before, **changes}
    except ValueError:
        right = False
    if not right:
        raise UsageError(f"{path} cannot be edited: set {', '.join(changes)} by hand")
    return found


def with_entries(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a YAML mapping with entries set at its top."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    for key, value in reversed(pairs):  # from the end, so that earlier places stay
        if key.value in changes:
            start, end = key.start_mark.index, _end(value)
            entry = entry_text(key.value, changes[key.value])
            comments = "".join(f"{line}\n" for line in _comments(text, key, value))
            text = text[:start] + comments + entry + text[end:]
    new = [name for name in changes if name not in {key.value for key, _ in pairs}]
    added = "".join(f"{entry_text(name, changes[name])}\n" for name in new)
    return f"{text.rstrip()}\n{added}" if added else text


def entry_text(name: str, value: Any) -> str:
    """`name: value` as YAML, without a line break at its end; the name is a plain word."""
    flow = isinstance(value, Mapping | list)
    dumped = yaml.safe_dump(
        value if flow else {name: value},
        sort_keys=False,
        default_flow_style=flow,
        width=90 - len(name),
        allow_unicode=True,
    ).rstrip()
    return f"{name}: {dumped}" if flow else dumped


def _end(node: yaml.Node) -> int:
    """Where a node's text ends; PyYAML ends a block where the next one starts."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    buffer = node.end_mark.buffer
    text = buffer[node.start_mark.index : node.end_mark.index] if buffer else ""
    return node.end_mark.index - (len(text) - len(text.rstrip()))


def _scalars(node: yaml.Node) -> Iterator[tuple[int, int]]:
    """Start and end of each scalar below a node."""
    if isinstance(node, yaml.ScalarNode):
        yield node.start_mark.index, node.end_mark.index
    else:
        for part in node.value:
            for child in part if isinstance(part, tuple) else (part,):
                yield from _scalars(child)


def _comments(text: str, key: yaml.Node, value: yaml.Node) -> Iterator[str]:
    """The comments between the start of an entry and its end."""
    inside = list(_scalars(value))
    for match in re.compile(r"(?<!\S)#[^\n]*").finditer(text, key.start_mark.index, _end(value)):
        if not any(start <= match.start() < end for start, end in inside):
            yield match.group()
