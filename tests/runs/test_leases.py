"""Leases: one worker a run, whoever dies, sleeps or loses the database."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from harness.errors import Busy, RunFailed, UsageError
from harness.runs.database import patiently
from harness.runs.leases import TABLE, Leases, leases_of, of_runs

NEVER = 1e6


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest) -> str:
    """A new database: a file in the results folder, or one of a real server."""
    return "" if request.param == "sqlite" else request.getfixturevalue("postgresql")


@pytest.fixture
def worker(tmp_path: Path, storage: str) -> Callable[..., Leases]:
    """From the seconds of beat and expiry to one more worker of the same results folder and database."""
    return lambda beat=NEVER, expiry=NEVER: Leases(tmp_path / "results", storage, beat, expiry)


def state(leases: Leases, name: str) -> str:
    with leases.engine.begin() as connection:
        return connection.execute(sa.select(TABLE.c.state).where(TABLE.c.name == name)).scalar_one()


def test_a_run_has_one_worker_at_a_time(worker: Any) -> None:
    one, two = worker(), worker()
    with one.holding("run") as may_write:
        may_write()
        for other in (two, one):
            with pytest.raises(Busy, match="run is being made by another worker"), other.holding("run"):
                pass
        assert [(lease.name, lease.worker) for lease in two.running()] == [("run", one.worker)]
        with two.holding("another"):
            pass
    assert state(one, "run") == "finished"
    assert two.running() == []
    with two.holding("run"):
        assert [lease.worker for lease in one.running()] == [two.worker]


@pytest.mark.parametrize(
    ("error", "expected"), [(RunFailed("no"), "failed"), (KeyboardInterrupt(), "stopped"), (UsageError("no"), "stopped")]
)
def test_how_it_ended(error: BaseException, expected: str, worker: Any) -> None:
    one = worker()
    with pytest.raises(type(error)), one.holding("run"):
        raise error
    assert state(one, "run") == expected


def test_all_or_none(worker: Any) -> None:
    one, two = worker(), worker()
    with one.holding("student-x"):
        with pytest.raises(Busy, match="student-x"), two.holding("run", "student-x"):
            pass
        with two.holding("run"):
            assert [lease.name for lease in of_runs(one.running())] == ["run"]


def test_many_at_once_share_what_there_is(worker: Any) -> None:
    """Eight workers want the same twenty runs: each run has one of them."""
    workers, names = [worker() for _ in range(8)], [f"run-{i}" for i in range(20)]
    begin, done = threading.Barrier(8), threading.Barrier(8)

    def grasp(leases: Leases) -> list[str]:
        held, taken = [], []
        begin.wait()
        for name in names:
            try:
                held.append(leases.holding(name))
                held[-1].__enter__()
                taken.append(name)
            except Busy:
                held.pop()
        done.wait()
        for one in held:
            one.__exit__(None, None, None)
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [name for names in pool.map(grasp, workers) for name in names]
    assert sorted(taken) == sorted(names)


def test_who_beats_keeps_it(worker: Any) -> None:
    one, two = worker(beat=0.1, expiry=1.0), worker(expiry=1.0)
    with one.holding("run") as may_write:
        for _ in range(8):
            time.sleep(0.25)
            with pytest.raises(Busy), two.holding("run"):
                pass
        may_write()


def test_who_is_silent_loses_it_and_writes_no_more(worker: Any) -> None:
    one, two = worker(expiry=0.5), worker(expiry=0.5)
    began = time.monotonic()
    with one.holding("run", "student-x") as may_write, two.holding("run", wait=True):
        assert time.monotonic() - began > 0.5
        with pytest.raises(Busy, match=r"run was taken over by another worker, since this one was silent for more than 0.5 s"):
            may_write()
        assert [lease.name for lease in two.running()] in (["run"], ["run", "student-x"])
        state_before = state(two, "run")
    assert state_before == "running"
    assert state(two, "run") == "finished"


def test_who_lost_it_does_not_give_back_what_is_not_its(worker: Any) -> None:
    one, two, three = worker(expiry=0.3), worker(expiry=0.3), worker()
    first, second = one.holding("run"), two.holding("run", wait=True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(Busy), three.holding("run"):
        pass
    second.__exit__(None, None, None)


SCRIPT = """
import sys, time
from pathlib import Path
from harness.runs.leases import Leases
leases = Leases(Path(sys.argv[1]), sys.argv[2], beat=0.1, expiry=float(sys.argv[3]))
with leases.holding("run") as may_write:
    for number in range(10_000):
        may_write()
        Path(sys.argv[4]).write_text(str(number))
        time.sleep(0.02)
"""


@pytest.fixture
def process(tmp_path: Path, storage: str) -> Iterator[Callable[[float], tuple[subprocess.Popen, Path]]]:
    """From an expiry to a process that holds the lease of "run" and goes on writing a file."""
    started: list[subprocess.Popen] = []

    def start(expiry: float) -> tuple[subprocess.Popen, Path]:
        file = tmp_path / "written"
        words = [sys.executable, "-c", SCRIPT, str(tmp_path / "results"), storage, str(expiry), str(file)]
        started.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
        while not file.exists():
            assert started[-1].poll() is None, started[-1].communicate()[1]
            time.sleep(0.02)
        return started[-1], file

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_a_killed_process_of_this_machine_is_replaced_at_once(process: Any, worker: Any) -> None:
    dead, _ = process(NEVER)
    other = worker()
    with pytest.raises(Busy), other.holding("run"):
        pass
    assert len(other.running()) == 1
    dead.kill()
    dead.wait()
    assert other.running() == []
    with other.holding("run"):
        assert [lease.worker for lease in other.running()] == [other.worker]


def test_a_process_that_sleeps_too_long_finds_itself_replaced(process: Any, worker: Any) -> None:
    asleep, file = process(1.0)
    os.kill(asleep.pid, signal.SIGSTOP)
    with worker(beat=0.1, expiry=1.0).holding("run", wait=True) as may_write:
        before = file.read_text()
        os.kill(asleep.pid, signal.SIGCONT)
        _, errors = asleep.communicate()
        assert "Busy: run was taken over by another worker" in errors
        assert file.read_text() in (before, str(int(before) + 1))  # it may have slept between the question and the write
        may_write()


def test_workers_share_one_results_folder(worker: Any, storage: str, tmp_path: Path) -> None:
    one = worker()
    (tmp_path / "linked").symlink_to(tmp_path / "results")
    with one.holding("run"), pytest.raises(Busy), Leases(tmp_path / "linked", storage).holding("run"):
        pass


def test_folder_and_database_know_each_other(tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    one = Leases(results, postgresql)
    shutil.copytree(results, tmp_path / "copied")
    for other in ("elsewhere", "copied"):
        with pytest.raises(UsageError, match=f"the database serves the results folder .*{results}/runs, and .*{other}/runs is another one"):
            Leases(tmp_path / other, postgresql)
    for said in ("", f"sqlite:///{tmp_path}/other.db"):
        with pytest.raises(UsageError, match=r"are leased in another database: give its --storage .* or delete .*\.database"):
            Leases(results, said)
    monkeypatch.setenv("HARNESS_STORAGE", postgresql)
    with one.holding("run"):
        assert [lease.name for lease in leases_of(results).running()] == ["run"]
        shutil.rmtree(results)
        with pytest.raises(UsageError, match="is another one"):  # somebody is at work there
            Leases(results)
    Leases(results)
    Leases(results)


def test_a_folder_of_its_own_may_be_copied_and_emptied(tmp_path: Path) -> None:
    for _ in range(2):
        with Leases(tmp_path / "results").holding("run"):
            pass
        shutil.rmtree(tmp_path / "results" / "runs")
    shutil.copytree(tmp_path / "results", tmp_path / "copied")
    assert state(Leases(tmp_path / "copied"), "run") == "finished"


def test_it_does_not_matter_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with leases_of(Path("results")).holding("run"):
        (tmp_path / "deeper").mkdir()
        monkeypatch.chdir(tmp_path / "deeper")
        assert leases_of(Path("../results")) is leases_of(tmp_path / "results")
        with pytest.raises(Busy), Leases(Path("../results")).holding("run"):
            pass


def test_the_first_ones_may_come_at_once(worker: Any) -> None:
    begin = threading.Barrier(4)

    def first(_: int) -> str:
        begin.wait()
        return worker().worker

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(first, range(4)))) == 4


def test_many_make_the_table_of_a_database_at_once(tmp_path: Path, server: Any) -> None:
    """PostgreSQL has several words for that, of which one comes in one of 200 cases."""
    for number in range(10):
        url, begin = server.database(), threading.Barrier(8)

        def start(url: str = url, begin: threading.Barrier = begin, folder: Path = tmp_path / str(number)) -> list[Any]:
            begin.wait()
            return Leases(folder, url).running()

        with ThreadPoolExecutor(8) as pool:
            assert [found.result() for found in [pool.submit(start) for _ in range(8)]] == [[]] * 8


def test_an_answer_that_was_lost_is_no_other_worker(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, asked = worker(), []
    ask = one._ask

    def losing(what: Any, *more: Any, **rest: Any) -> Any:
        found = ask(what, *more, **rest)
        if found is True and not asked:
            asked.append(True)
            return ask(what)  # as after a connection that broke when all was done
        return found

    monkeypatch.setattr(one, "_ask", losing)
    with one.holding("run") as may_write:
        may_write()
    assert asked


def test_the_heartbeat_outlives_what_goes_wrong(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, beats = worker(beat=0.05), []
    beat = one._beat

    def failing() -> set[str]:
        beats.append(len(beats))
        if len(beats) == 2:
            raise RuntimeError("something else")
        return beat()

    monkeypatch.setattr(one, "_beat", failing)
    with one.holding("run"):
        while len(beats) < 5:
            time.sleep(0.02)


def test_a_forked_child_does_not_end_its_parents_leases(tmp_path: Path) -> None:
    one = Leases(tmp_path)
    file = tmp_path / "runs" / ".workers" / one.worker
    child = multiprocessing.get_context("fork").Process(target=weakref.finalize._exitfunc)  # type: ignore[attr-defined]
    child.start()
    child.join()
    assert file.exists()
    del one
    gc.collect()
    assert not file.exists()


def test_a_server_that_is_killed_and_comes_back(tmp_path: Path, server: Any) -> None:
    """The holder waits for it, and goes on with its lease."""
    storage = server.database()
    one = Leases(tmp_path / "results", storage, beat=0.1, expiry=NEVER)
    with one.holding("run") as may_write:
        server.kill()
        back = threading.Timer(1.5, server.start)
        back.start()
        may_write()
        back.join()
        assert [lease.name for lease in Leases(tmp_path / "results", storage).running()] == ["run"]
    assert state(one, "run") == "finished"


@pytest.mark.parametrize(("storage", "complaint"), [
    ("mysql://me:secret@host/x", r"--storage is mysql://me:\*\*\*@host/x, but must be sqlite:///FILE or postgresql\+psycopg://"),
    ("postgresql+asyncpg://host/x", "but must be"),
    ("nonsense", "--storage is 'nonsense', but must be"),
    ("sqlite://", "--storage is sqlite://, but must be"),
    ("sqlite:///:memory:", "but must be"),
    ("sqlite:////nowhere/at/all.db", "cannot open the database sqlite:////nowhere/at/all.db: unable to open database file"),
    ("postgresql://me:secret@127.0.0.1:9/x?connect_timeout=2", r"cannot open the database postgresql://me:\*\*\*@127"),
])  # fmt: skip
def test_databases_that_cannot_be_used(storage: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=complaint) as found:
        leases_of(tmp_path, storage)
    assert "secret" not in str(found.value)


def test_without_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UsageError, match=r"the database postgresql://host/x needs psycopg: install distillation-harness\[postgresql\]"):
        leases_of(tmp_path, "postgresql://host/x")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write .*give another --results"):
        leases_of(tmp_path / "file")


def test_patience_ends() -> None:
    asked = []

    def ask() -> None:
        asked.append(time.monotonic())
        raise sa.exc.OperationalError("select", {}, Exception("away"))

    with pytest.raises(UsageError, match="does not answer: away"):
        patiently(ask, patience=0.3)
    assert len(asked) > 3

    def refuse() -> None:
        asked.append(0.0)
        raise sa.exc.ProgrammingError("select", {}, Exception("no right"))

    asked.clear()
    with pytest.raises(UsageError, match="does not answer: no right"):
        patiently(refuse)
    assert asked == [0.0]
    with pytest.raises(KeyError):
        patiently(lambda: {}["other"])


def test_a_database_that_was_deleted_is_told(worker: Any) -> None:
    leases = worker()
    with leases.engine.begin() as connection:
        TABLE.drop(connection)
    with pytest.raises(UsageError, match=r"does not answer: (no such table|relation .* does not exist)"), leases.holding("run"):
        pass
