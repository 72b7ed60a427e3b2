"""Entries of a YAML file are set, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.tasks.edit import entry_text, set_entries, with_entries

TEXT = """\
# first
name: mine  # after the name
network:
  depth: 2  # inside
  # and between
  words: "not # a comment"
# above the teacher
teacher: null  # none yet

# last
budgets:
  quick: {steps: 1}
"""


def test_comments_stay() -> None:
    edited = with_entries(
        TEXT, {"network": {"size": "DiT-S/2"}, "teacher": {"file": "a", "sha256": "b"}, "new": [1]}
    )
    assert (
        edited
        == """\
# first
name: mine  # after the name
# inside
# and between
network: {size: DiT-S/2}
# above the teacher
teacher: {file: a, sha256: b}  # none yet

# last
budgets:
  quick: {steps: 1}
new: [1]
"""
    )


def test_the_file_is_checked_and_written(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(TEXT)
    set_entries(path, {"name": "yours"})
    assert path.read_text() == TEXT.replace("mine", "yours")
    for text, entry in (("a: &anchor {b: 1}\nc: *anchor\n", "a"), ("{a: 1}\n", "b")):
        path.write_text(text)
        with pytest.raises(UsageError, match=f"set {entry} by hand"):
            set_entries(path, {entry: 2})
        assert path.read_text() == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab #:{}'\n\"-"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
    max_leaves=6,
)
MAPPINGS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=2), VALUES, min_size=1, max_size=5
)


@settings(max_examples=100, deadline=None)
@given(MAPPINGS, MAPPINGS, st.booleans())
def test_any_mapping_gets_any_entries(before: dict, changes: dict, flow: bool) -> None:
    """Written as blocks, or as blocks with flow inside."""
    text = yaml.safe_dump(before, default_flow_style=False, sort_keys=False)
    if flow:
        text = "".join(f"{entry_text(name, value)}\n" for name, value in before.items())
    assert yaml.safe_load(with_entries(text, changes)) == {**before, **changes}
