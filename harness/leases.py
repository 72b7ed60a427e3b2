"""Who makes which run: a table of leases in a database that workers share, on one machine or on several. Floor 7.

Whoever holds a lease says every few seconds that it is alive. A lease is free again when it is given back, when it was silent for too
long by the database's clock, or at once when its worker was of this machine and is gone: each worker locks a file of its own, which
the kernel lets go of with it. A worker that was held up for so long that another one took over finds that out before it writes.
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

BEAT, EXPIRY = 5.0, 30.0
"""Seconds between signs of life, and of silence after which a lease is free."""
PATIENCE = 600.0
"""Seconds for which a database that does not answer is asked again."""
RUNNING, FOLDER = "running", "results folder"
CLOCKS = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "cast(extract(epoch from clock_timestamp()) as double precision)",
}
"""Seconds since 1970 by the clock of each kind of database."""

TABLE = sa.Table(
    "leases", sa.MetaData(),
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("holder", sa.String(32), nullable=False),
    sa.Column("worker", sa.String(400), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
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


def default_storage(results: Path) -> str:
    """The database of a results folder where nothing else is said."""
    return f"sqlite:///{(results / 'harness.db').resolve()}"


@lru_cache(maxsize=8)
def leases_of(results: Path, storage: str = "") -> Leases:
    """The leases of a results folder, one object a process. Raises UsageError if the folder or the database cannot be used."""
    return Leases(results, storage)


class Leases:
    """The leases of a results folder.

    Args:
        storage: a SQLAlchemy URL; by default a file in the folder, which serves one machine.
        beat: seconds between signs of life.
        expiry: seconds of silence after which a lease is free.

    Raises:
        UsageError: if the folder or the database cannot be used, or if the database serves another folder.
    """

    def __init__(self, results: Path, storage: str = "", beat: float = BEAT, expiry: float = EXPIRY):
        self.folder, self.beat, self.expiry = results / "runs", beat, expiry
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._alive = self._sign(f"{this_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        except OSError as error:
            raise UsageError(f"cannot write {self.folder}: {error.strerror}; give another --results") from error
        self.worker = Path(self._alive.lock_file).name
        self.engine = open_database(storage or default_storage(results))
        self.now: sa.ColumnElement[float] = sa.literal_column(CLOCKS[self.engine.dialect.name], sa.Double)
        self._held: set[str] = set()
        self._changed = threading.Condition()
        self._pulse: threading.Thread | None = None
        self._refuse_another_folder()

    def _sign(self, worker: str) -> FileLock:
        """Locks this worker's file for as long as the process lives."""
        (self.folder / ".workers").mkdir(exist_ok=True)
        lock = FileLock(self.folder / ".workers" / worker, thread_local=False)
        lock.acquire()
        weakref.finalize(self, Path(lock.lock_file).unlink, missing_ok=True)
        return lock

    def _refuse_another_folder(self) -> None:
        """Workers of one database must share one results folder: it has a name, and the database knows it."""
        path = self.folder / ".name"
        aside = path.with_name(f".name.{uuid.uuid4().hex}.tmp")
        aside.write_text(uuid.uuid4().hex)
        with suppress(FileExistsError):  # whoever is first names it
            os.link(aside, path)
        aside.unlink()
        name = path.read_text()
        with self.engine.begin() as connection:
            connection.execute(self._insert(name=FOLDER, holder=name, worker=f"{this_machine()}:{self.folder.resolve()}", state=FOLDER))
            known, where = connection.execute(sa.select(TABLE.c.holder, TABLE.c.worker).where(TABLE.c.name == FOLDER)).one()
        if known != name:
            raise UsageError(f"the database serves the results folder {where}, and this is another one: workers on several machines "
                             "need one folder that all of them see, other sweeps a database of their own")  # fmt: skip

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
                raise Busy(f"{name} is being made by another process; ask again when it is done")
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
            with suppress(UsageError):  # it expires
                self._ask(lambda connection: connection.execute(back), patience=2 * self.beat)

    def _take(self, name: str, holder: str) -> bool:
        """Takes a lease if it is free or was never given."""

        def take(connection: sa.Connection) -> bool:
            mine = {"holder": holder, "worker": self.worker, "state": RUNNING}
            if connection.execute(sa.update(TABLE).where(TABLE.c.name == name, free).values(**mine, heartbeat=self.now)).rowcount:
                return True
            return connection.execute(self._insert(name=name, **mine).returning(TABLE.c.name)).first() is not None

        gone = self._ask(lambda connection: [
            row.holder for row in connection.execute(sa.select(TABLE).where(TABLE.c.name == name, TABLE.c.state == RUNNING))
            if self._is_gone(row.worker)
        ])  # fmt: skip
        free = sa.or_(TABLE.c.state != RUNNING, TABLE.c.heartbeat < self.now - self.expiry, TABLE.c.holder.in_(gone))
        return self._ask(take)

    def _is_gone(self, worker: str) -> bool:
        """Whether a worker was of this machine and its process has ended; of another machine nobody can say."""
        if not worker.startswith(f"{this_machine()}-") or worker == self.worker:
            return False
        file = self.folder / ".workers" / worker
        try:
            if not file.exists():
                return True
            with FileLock(file, timeout=0):
                return True
        except Timeout:
            return False

    def _beat(self) -> set[str]:
        """A sign of life for all that is held here; returns what still is."""
        with self._changed:
            held = list(self._held)
        mine = (TABLE.c.holder.in_(held), TABLE.c.state == RUNNING)

        def beat(connection: sa.Connection) -> set[str]:
            connection.execute(sa.update(TABLE).where(*mine).values(heartbeat=self.now))
            return set(connection.execute(sa.select(TABLE.c.holder).where(*mine)).scalars())

        return self._ask(beat) if held else set()

    def _keep_alive(self) -> None:
        """The thread that beats while anything is held."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._held, timeout=self.beat)
                if not self._held:
                    self._pulse = None
                    return
            with suppress(UsageError):  # whoever writes next asks again
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
        """The answer of the database, which is asked again while it cannot be reached."""

        def ask() -> T:
            with self.engine.begin() as connection:
                return what(connection)

        return patiently(ask, (sa.exc.OperationalError, sa.exc.InterfaceError), patience)


def patiently(ask: Callable[[], T], errors: type[Exception] | tuple[type[Exception], ...], patience: float = PATIENCE) -> T:
    """What `ask` returns, which is called again after these errors. Raises UsageError after so many seconds of them."""
    started = time.monotonic()
    while True:
        try:
            return ask()
        except errors as error:
            if time.monotonic() - started > patience or "no such table" in str(error):
                raise UsageError(f"the database of this results folder does not answer: {_reason(error)}") from error
            time.sleep(min(1.0, patience / 10))


def open_database(storage: str) -> sa.Engine:
    """A database that has the table of leases. Raises UsageError if it is of another kind or cannot be opened."""
    try:
        url = sa.make_url(storage)
        if url.get_backend_name() not in CLOCKS:
            raise UsageError(f"--storage is {shown(storage)}, but must be sqlite:///FILE or postgresql+psycopg://...")
        lasting = {"timeout": 60} if url.get_backend_name() == "sqlite" else {}
        engine = sa.create_engine(url, pool_pre_ping=True, connect_args=lasting)
        with suppress(sa.exc.IntegrityError, sa.exc.ProgrammingError):  # two made it at once
            TABLE.create(engine, checkfirst=True)
        with engine.connect() as connection:
            connection.execute(sa.select(TABLE.c.name).limit(1)).all()
        return engine
    except ImportError as error:
        raise UsageError(f"the database {shown(storage)} needs {error.name}: install distillation-harness[postgresql]") from error
    except sa.exc.SQLAlchemyError as error:
        raise UsageError(f"cannot open the database {shown(storage)}: {_reason(error)}") from error


def shown(storage: str) -> str:
    """A URL without its password."""
    try:
        return sa.make_url(storage).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return repr(storage)


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


@cache
def this_machine() -> str:
    """Its name and the time it was started, which containers with equal names do not share unless they share the machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}-{boot.read_text().strip()[:8] if boot.exists() else 'x'}"


def of_runs(leases: Sequence[Lease]) -> list[Lease]:
    """Without what is shared by runs: studies, and students for several numbers of steps."""
    return [lease for lease in leases if not lease.name.startswith(("study-", "student-"))]
