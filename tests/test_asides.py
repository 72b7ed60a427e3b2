"""Writing aside: what killed processes left is removed, and writers of one path take turns."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from harness.asides import write_aside
from harness.errors import UsageError
from harness.files import write_text


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.tmp").write_text("half of a longer text")
    write_text(tmp_path / "a.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_writers_of_one_path_take_turns(tmp_path: Path) -> None:
    path, inside, may_end = tmp_path / "a.txt", threading.Event(), threading.Event()
    order: list[str] = []

    def slow(aside: Path) -> None:
        inside.set()
        may_end.wait()
        aside.write_text("first")
        order.append("first")

    def quick(aside: Path) -> None:
        assert aside.read_text() == ""
        aside.write_text("second")
        order.append("second")

    writers = [threading.Thread(target=write_aside, args=(path, how)) for how in (slow, quick)]
    writers[0].start()
    inside.wait()
    writers[1].start()
    writers[1].join(0.2)
    assert order == []
    may_end.set()
    for writer in writers:
        writer.join()
    assert order == ["first", "second"]
    assert path.read_text() == "second"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_no_search_by_ending_finds_a_half(tmp_path: Path) -> None:
    found: list[Path] = []

    def write(aside: Path) -> None:
        aside.write_text("half")
        found.extend([*tmp_path.rglob("*.jsonl"), *tmp_path.rglob("records*")])

    write_aside(tmp_path / "records.jsonl", write)
    assert found == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write .*a\.txt: .*; free some space or name"):
        write_text(tmp_path / "file" / "a.txt", "text")
