"""Faults: real commands in forked processes that die, or meet an error, at a chosen moment.

Python tells an audit hook of each operation on files before it is done. So the product has no hook
for this, and a process can be killed between any two operations.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, tzinfo
from pathlib import Path
from stat import S_ISREG
from types import SimpleNamespace
from typing import Any

import pytest

from harness.__main__ import main
from harness.data.readers import threads
from harness.files import digest, file_hash
from harness.training.trainer import Trainer

Arm = Callable[[], None]
"""Prepares the fault of a process; it is called in that process before its command."""
Before = Callable[[int, str], None]
"""Is called before a change of files, with its number from 1 and the name of the operation."""
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod")
MAKING = ("open", "os.mkdir")
"""Operations that need room on a disk."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TIMES = {"seconds", "reference_seconds", "ratio", "peak_memory_bytes", "sha256"}
"""Fields of a record that differ from run to run; the last one is its seal."""

UNCOUNTED = ("lock", "run.log", "verified.json", "harness.db", "state.pt")
"""Files that hold times."""


def nothing() -> None:
    """No fault."""


def watch(
    folder: Path, before: Before, touched: Callable[[list[str]], object] = lambda paths: None
) -> None:
    """Calls `before` in this process, but not in its children, before each change below a folder.

    Writing native code is not seen; its files are renamed by Python.

    Args:
        touched: gets the paths of each operation, also of those that change nothing.
    """
    owner, count, inside = os.getpid(), 0, os.fspath(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if os.getpid() != owner or (event not in CHANGES and event != "open"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITES):
            return
        touched([os.fspath(arg) for arg in args if isinstance(arg, str | os.PathLike)])
        path, at = args[0], args[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1
        if at == -1 and not str(path).startswith(inside):
            return
        if event == "os.mkdir" and at == -1 and Path(path).is_dir():  # changes nothing
            return
        count += 1
        before(count, event)

    sys.addaudithook(hook)


def die(*ignored: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(folder: Path, number: int) -> Arm:
    """SIGKILL before a change of files."""
    return lambda: watch(folder, lambda count, event: die() if count == number else None)


def killed_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> Arm:
    """SIGKILL in a training step, before its checkpoint."""
    one_step, done = Trainer.one_step, iter(range(10**6))

    def dying(self: Trainer) -> dict[str, float]:
        means = one_step(self)
        if next(done) == number:
            die()
        return means

    return lambda: monkeypatch.setattr(Trainer, "one_step", dying)


def killed_in_write(size: int) -> Arm:
    """An end by a signal when a file grows beyond a size, also in native code."""

    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return arm


def file_limit(size: int) -> Arm:
    """Files cannot grow beyond a size: native code meets it too, as it meets a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def refused_from(folder: Path, number: int, code: int, events: Sequence[str]) -> Arm:
    """From a change of files on, all changes of some kinds raise an OSError."""

    def before(count: int, event: str) -> None:
        if count >= number and event in events:
            raise OSError(code, os.strerror(code), os.fspath(folder))

    return lambda: watch(folder, before)


def full_disk(folder: Path, number: int) -> Arm:
    return refused_from(folder, number, errno.ENOSPC, MAKING)


def read_only(folder: Path, number: int, code: int) -> Arm:
    return refused_from(folder, number, code, (*CHANGES, "open"))


def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the day jumps at each look: to 1970, years ahead, and back."""
    days = itertools.cycle((0.0, 3e9, 1e9, 2.5e9, 1e8))
    times = (day + look for look, day in enumerate(days))

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromtimestamp(next(times), tz)

    monkeypatch.setattr("time.time", lambda: next(times))
    monkeypatch.setattr("time.time_ns", lambda: int(1e9 * next(times)))
    monkeypatch.setattr("harness.runs.log.datetime", Jumping)


def slow_folder(monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: float) -> Arm:
    """A network folder: each change takes a while, and a new file of another process is not seen.

    A process sees what it touched itself at once, and the rest once it is `seconds` old.
    """
    inside, touched = os.fspath(folder), set[str]()
    stat, scan, listed = os.stat, os.scandir, os.listdir

    def seen(path: str) -> bool:
        if not path.startswith(inside) or path in touched:
            return True
        with suppress(OSError):
            found = stat(path)
            if S_ISREG(found.st_mode) and time.time() - found.st_ctime < seconds:
                return False
            touched.add(path)  # what was seen once is seen
        return True

    def late(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if isinstance(path, str | os.PathLike) and not seen(os.fspath(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        return stat(path, *args, **more)

    @contextmanager
    def scanned(path: Any = ".") -> Iterator[Iterator[os.DirEntry[str]]]:
        with scan(path) as entries:
            yield iter([one for one in entries if isinstance(path, int) or seen(one.path)])

    def names(path: Any = ".") -> list[str]:
        return [name for name in listed(path) if isinstance(path, int) or seen(f"{path}/{name}")]

    def arm() -> None:
        watch(folder, lambda count, event: time.sleep(0.002), touched.update)
        monkeypatch.setattr(os, "stat", late)
        monkeypatch.setattr(os, "scandir", scanned)
        monkeypatch.setattr(os, "listdir", names)

    return arm


class Process:
    """A `harness` command in a forked process, with a pipe as stdin.

    Args:
        words: the command line.
        log: gets what it prints.
        arm: its fault.
    """

    pipes: tuple[int, ...] = ()

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        arm: Arm = nothing,
        environment: Mapping[str, str] | None = None,
    ):
        read, self.pipe = os.pipe()
        self.told, self.tells = os.pipe()  # a limit of files does not hold for a pipe
        fcntl.fcntl(self.told, fcntl.F_SETPIPE_SZ, 2**20)
        Process.pipes = (*Process.pipes, self.pipe)
        self.log, self.code = log, None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os._exit(self._run([str(word) for word in words], read, arm, environment or {}))
            finally:
                os._exit(99)
        os.close(read)
        os.close(self.tells)

    def _run(self, words: list[str], read: int, arm: Arm, more: Mapping[str, str]) -> int:
        """The command in the forked process; its exit code."""
        for pipe in Process.pipes:  # of the other children too: they end with their parent
            os.close(pipe)
        Process.pipes = ()
        for old, new in ((read, 0), (self.tells, 1), (self.tells, 2)):
            os.dup2(old, new)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rw"[n > 0]) for n in range(3))
        threads.cache_clear()  # they stayed behind
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(more)
        sys.argv = ["harness", *words]
        code: Any = 0
        try:
            arm()
            main()
        except SystemExit as error:
            code = error.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        return int(code or 0)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, how: int) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, how)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
            if pid:
                self._write_log()
        return self.code

    def _write_log(self) -> None:
        os.set_blocking(self.told, False)  # a child of the process may still hold its end
        with suppress(BlockingIOError), self.log.open("ab") as log:
            while part := os.read(self.told, 2**16):
                log.write(part)
        os.close(self.told)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        """Closes its stdin and waits for it, as `subprocess.Popen` does."""
        if self.pipe in Process.pipes:
            Process.pipes = tuple(pipe for pipe in Process.pipes if pipe != self.pipe)
            os.close(self.pipe)
        self.wait()


def forked_children(monkeypatch: pytest.MonkeyPatch, log: Path, arm: Arm = nothing) -> None:
    """Lets sweeps fork their children, which import nothing anew.

    Args:
        arm: the fault of every child.
    """

    def popen(command: Sequence[str], env: Mapping[str, str], **more: object) -> Process:
        assert command[:3] == [sys.executable, "-m", "harness"]
        return Process(command[3:], log, arm, env)

    stand_in = SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE)
    monkeypatch.setattr("harness.sweeps.engines.subprocess", stand_in)


def once(mark: Path, arm: Arm) -> Arm:
    """A fault of the first process that meets it alone."""

    def first() -> None:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        arm()

    return first


def content(folder: Path) -> dict[str, str]:
    """What lies below a folder, by relative path, as digests.

    Times in records do not count, nor do locks, logs and notes of the times of files.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in UNCOUNTED or ".locks" in path.parts:
            said = "there"
        elif path.is_dir():
            said = "a folder"
        elif path.name == "record.json":
            said = digest(timeless(json.loads(path.read_text())))
        else:
            said = file_hash(path)
        found[str(path.relative_to(folder))] = said
    return found


def timeless(value: Any) -> Any:
    """A JSON value without times."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if name not in TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value
