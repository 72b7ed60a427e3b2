"""Locks: one process works on a name at a time, and a dead one holds nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.errors import Busy, UsageError
from harness.runs.locks import held, held_names, is_held

HOLDER = """
import sys, time
from pathlib import Path
from harness.runs.locks import held
with held(Path(sys.argv[1]), "run"):
    print("holds", flush=True)
    time.sleep(600)
"""


def test_a_name_is_held_once(tmp_path: Path) -> None:
    assert not is_held(tmp_path, "run")
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path, "run", "student"):
        assert held_names(tmp_path) == ["run", "student"]
        for names in (("run",), ("other", "student")):
            with pytest.raises(Busy, match="another process works on"), held(tmp_path, *names):
                pass
        with held(tmp_path, "other"):
            assert is_held(tmp_path, "other")
        assert not is_held(tmp_path, "other")
    assert held_names(tmp_path) == []


def test_who_waits_gets_it_next(tmp_path: Path) -> None:
    def wait() -> list[str]:
        with held(tmp_path, "run", wait=True):
            return held_names(tmp_path)

    with ThreadPoolExecutor(1) as pool, held(tmp_path, "run"):
        found = pool.submit(wait)
        with pytest.raises(TimeoutError):
            found.result(timeout=0.2)
    assert found.result() == ["run"]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        assert is_held(tmp_path, "run")
        holder.send_signal(signal.SIGKILL)
    assert not is_held(tmp_path, "run")
    with held(tmp_path, "run"):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UsageError, match=r"cannot write .*give another --results"),
        held(tmp_path / "file", "run"),
    ):
        pass
