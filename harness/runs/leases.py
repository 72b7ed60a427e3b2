"""Who makes which run: a table of leases in a database that workers share, on one machine or on several. Floor 7.

Whoever holds a lease says every few seconds that it is alive. A lease is free again when it is given back, when it was silent for too
long by the database's clock, or at once when its worker was of this machine and is gone: each worker locks a file of its own, which
the kernel lets go of with it. A worker that was held up for so long that another one took over finds that out before it writes.
Folder and database know each other, so that two workers of one folder cannot use two databases, nor those of one database two folders.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.dialects import postgresql, sqlite

from harness.errors import Busy, RunFailed, UsageError
from harness.runs.database import CONNECTION, PATIENCE, database_url, patiently, reason, storage_of, without_password

BEAT, EXPIRY = 5.0, 30.0
"""Seconds between signs of life, and of silence after which a lease is free."""
RUNNING, FOLDER, DATABASE = "running", "results folder", "database"
CLOCKS = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "cast(extract(epoch from clock_timestamp()) as double precision)",
}
"""Seconds since 1970 by the clock of each kind of database."""

TABLE = sa.Table(
    "leases", sa.MetaData(),
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("holder", sa.String(100), nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("heartbeat", sa.Double, nullable=False),
)  # fmt: skip
"""One row a run: its id, which taking of it counts, the process, running or how it ended, and the last sign of life."""

T = TypeVar("T")


@dataclass(frozen=True)
class Lease:
    """A run that a worker is at.

    Attributes:
        name: the run id.
        worker: machine, process and a random part.
        silent_for: seconds since its last sign of life.
    """

    name: str
    worker: str
    silent_for: float


def leases_of(results: Path, storage: str = "") -> Leases:
    """The leases of a results folder, one object a process. Raises UsageError if the folder or the database cannot be used."""
    return _leases(results.resolve(), storage_of(results, storage))


@lru_cache(maxsize=8)
def _leases(results: Path, storage: str) -> Leases:
    return Leases(results, storage)


class Leases:
    """The leases of a results folder.

    Args:
        storage: as in `storage_of`.
        beat: seconds between signs of life.
        expiry: seconds of silence after which a lease is free.

    Raises:
        UsageError: if the folder or the database cannot be used, or if one of them belongs to another.
    """

    def __init__(self, results: Path, storage: str = "", beat: float = BEAT, expiry: float = EXPIRY):
        results = results.resolve()
        self.folder, self.beat, self.expiry = results / "runs", beat, expiry
        self.engine = open_database(storage_of(results, storage), self.folder)
        self.now: sa.ColumnElement[float] = sa.literal_column(CLOCKS[self.engine.dialect.name], sa.Double)
        self._held: set[str] = set()
        self._changed = threading.Condition()
        self._pulse: threading.Thread | None = None
        self.worker = f"{this_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        file = Path(self.engine.url.database or "")
        try:
            self._alive = self._sign()
            if file.resolve() != results / "harness.db":  # which goes with the folder, also into a copy
                self._refuse_another_folder()
            self._refuse_another_database()
        except OSError as error:
            raise UsageError(f"cannot write {self.folder}: {error.strerror}; give another --results") from error

    def _sign(self) -> FileLock:
        """Locks this worker's file for as long as the process lives."""
        (self.folder / ".workers").mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".workers" / self.worker, thread_local=False)
        lock.acquire()
        weakref.finalize(self, _remove, Path(lock.lock_file), os.getpid())
        return lock

    def _refuse_another_folder(self) -> None:
        """A database serves one folder, known by a name that lies in it; a copy of the file has another inode, and is another folder."""
        path = self.folder / ".name"
        name = f"{_named(path, uuid.uuid4().hex)}-{path.stat().st_ino}"
        here = f"{this_machine()}:{self.folder}"
        known, where = self._known(FOLDER, name, here)
        if known != name and where == here and not self.running():  # it was deleted and made anew
            renamed = sa.update(TABLE).where(TABLE.c.name == FOLDER, TABLE.c.holder == known).values(holder=name)
            self._ask(lambda connection: connection.execute(renamed))
            known, where = self._known(FOLDER, name, here)
        if known != name:
            raise UsageError(
                f"the database serves the results folder {where}, and {self.folder} is another one: workers on several machines need "
                "one folder that all of them see, other sweeps a database of their own"
            )

    def _refuse_another_database(self) -> None:
        """A folder's runs are leased in one database, whose name lies in the folder."""
        known, _ = self._known(DATABASE, uuid.uuid4().hex, "")
        path = self.folder / ".database"
        if _named(path, known) != known:
            raise UsageError(f"the runs of {self.folder} are leased in another database: give its --storage (or HARNESS_STORAGE), "
                             f"or delete {path} if nobody works there any more")  # fmt: skip

    def _known(self, what: str, holder: str, worker: str) -> tuple[str, str]:
        """Notes a name, if none is noted, and returns the one that is, with its second part."""
        self._ask(lambda connection: connection.execute(self._insert(name=what, holder=holder, worker=worker, state=what)))
        noted = sa.select(TABLE.c.holder, TABLE.c.worker).where(TABLE.c.name == what)
        return self._ask(lambda connection: tuple(connection.execute(noted).one()))

    def _insert(self, **values: Any) -> Any:
        insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[self.engine.dialect.name]
        return insert(TABLE).values(heartbeat=self.now, **values).on_conflict_do_nothing()

    @contextmanager
    def holding(self, *names: str, wait: bool = False) -> Iterator[Callable[[], None]]:
        """Holds the leases of these names for the block.

        Args:
            wait: whether to wait until they are free; otherwise what somebody is at raises Busy.

        Yields:
            What is to be called before anything is written: it raises Busy if another worker took over.
        """
        with ExitStack() as stack:
            holders = {name: stack.enter_context(self._one(name, wait)) for name in names}

            def check() -> None:
                kept = self._beat()
                for name, holder in holders.items():
                    if holder not in kept:
                        raise Busy(f"{name} was taken over by another worker, since this one was silent for more than {self.expiry:g} s")

            yield check

    @contextmanager
    def _one(self, name: str, wait: bool) -> Iterator[str]:
        pauses = itertools.chain((0.02, 0.05, 0.1, 0.2), itertools.repeat(0.5))
        holder = uuid.uuid4().hex
        while not self._take(name, holder):
            if not wait:
                raise Busy(f"{name} is being made by another worker; ask again when it is done")
            time.sleep(next(pauses))
        with self._changed:
            self._held.add(holder)
            if self._pulse is None:
                self._pulse = threading.Thread(target=self._keep_alive, daemon=True)
                self._pulse.start()
        state = "stopped"
        try:
            yield holder
            state = "finished"
        except RunFailed:
            state = "failed"
            raise
        finally:
            with self._changed:
                self._held.discard(holder)
                self._changed.notify_all()
            back = sa.update(TABLE).where(TABLE.c.name == name, TABLE.c.holder == holder).values(state=state, heartbeat=self.now)
            with suppress(Exception):  # it expires
                self._ask(lambda connection: connection.execute(back), patience=2 * self.beat)

    def _take(self, name: str, holder: str) -> bool:
        """Takes a lease if it is free or was never given."""

        def take(connection: sa.Connection) -> bool:
            mine = {"holder": holder, "worker": self.worker, "state": RUNNING}
            if connection.execute(sa.update(TABLE).where(TABLE.c.name == name, free).values(**mine, heartbeat=self.now)).rowcount:
                return True
            return connection.execute(self._insert(name=name, **mine).returning(TABLE.c.name)).first() is not None

        at_it = sa.select(TABLE.c.holder, TABLE.c.worker).where(TABLE.c.name == name, TABLE.c.state == RUNNING)
        rows = self._ask(lambda connection: connection.execute(at_it).all())
        gone = [row.holder for row in rows if self._is_gone(row.worker)]
        silent = TABLE.c.heartbeat < self.now - self.expiry
        free = sa.or_(TABLE.c.state != RUNNING, silent, TABLE.c.holder.in_([*gone, holder]))  # its own: the answer before was lost
        return self._ask(take)

    def _is_gone(self, worker: str) -> bool:
        """Whether a worker was of this machine and its process has ended; of another machine, or without its file, nobody can say."""
        if not worker.startswith(f"{this_machine()}-") or worker == self.worker:
            return False
        file = self.folder / ".workers" / worker
        try:
            if not file.exists():
                return False
            with FileLock(file, timeout=0):
                return True
        except Timeout:
            return False

    def _beat(self) -> set[str]:
        """A sign of life for all that is held here; returns what still is."""
        with self._changed:
            held = list(self._held)
        beat = sa.update(TABLE).where(TABLE.c.holder.in_(held), TABLE.c.state == RUNNING).values(heartbeat=self.now)
        return self._ask(lambda connection: set(connection.execute(beat.returning(TABLE.c.holder)).scalars())) if held else set()

    def _keep_alive(self) -> None:
        """The thread that beats while anything is held."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._held, timeout=self.beat)
                if not self._held:
                    self._pulse = None
                    return
            with suppress(Exception):  # whoever writes next asks again, and says what is wrong
                self._beat()

    def running(self) -> list[Lease]:
        """The runs that workers are at, by their ids."""
        found = self._ask(lambda connection: connection.execute(
            sa.select(TABLE.c.name, TABLE.c.worker, (self.now - TABLE.c.heartbeat).label("silent"))
            .where(TABLE.c.state == RUNNING).order_by(TABLE.c.name)
        ).all())  # fmt: skip
        leases = [Lease(row.name, row.worker, max(0.0, row.silent)) for row in found]
        return [lease for lease in leases if lease.silent_for <= self.expiry and not self._is_gone(lease.worker)]

    def _ask(self, what: Callable[[sa.Connection], T], patience: float = PATIENCE) -> T:
        """The answer of the database, each statement for itself; it is asked again while it cannot be reached."""

        def ask() -> T:
            with self.engine.connect() as connection:
                return what(connection)

        return patiently(ask, patience)


def open_database(storage: str, folder: Path) -> sa.Engine:
    """A database that has the table of leases. Raises UsageError if it is of another kind or cannot be opened.

    Args:
        folder: is made for a file of SQLite in it.
    """
    url = database_url(storage)
    kind = url.get_backend_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, pool_pre_ping=True, connect_args=CONNECTION[kind], isolation_level="AUTOCOMMIT")
        at_once = (sa.exc.IntegrityError, sa.exc.ProgrammingError)  # PostgreSQL's words for two that make it; what is asked next tells
        with suppress(*at_once), engine.connect() as connection:
            connection.execute(sa.schema.CreateTable(TABLE, if_not_exists=True))
        with engine.connect() as connection:
            connection.execute(sa.select(TABLE).limit(1)).all()
        return engine
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; give another --results") from error
    except ImportError as error:
        raise UsageError(
            f"the database {without_password(storage)} needs {error.name}: install distillation-harness[postgresql]"
        ) from error
    except sa.exc.SQLAlchemyError as error:
        raise UsageError(f"cannot open the database {without_password(storage)}: {reason(error)}") from error


def _named(path: Path, name: str) -> str:
    """The content of a file that whoever is first writes."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        aside.write_text(name)
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path.read_text()


def _remove(path: Path, process: int) -> None:
    """Removes a worker's file when its process, and not a fork of it, ends."""
    if os.getpid() == process:
        path.unlink(missing_ok=True)


@cache
def this_machine() -> str:
    """Its name and the time it was started, which containers with equal names do not share unless they share the machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}-{boot.read_text().strip()[:8] if boot.exists() else 'x'}"


def of_runs(leases: Sequence[Lease]) -> list[Lease]:
    """Without what is shared by runs: studies, and students for several numbers of steps."""
    return [lease for lease in leases if not lease.name.startswith(("study-", "student-"))]
