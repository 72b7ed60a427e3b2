"""The database that workers share, behind a SQLAlchemy URL: SQLite on one machine, PostgreSQL between several. Floor 6."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from harness.errors import UsageError

PATIENCE = 600.0
"""Seconds for which a database that does not answer is asked again."""
CONNECTION: dict[str, dict[str, Any]] = {
    "sqlite": {"timeout": 60},
    "postgresql": {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
                   "tcp_user_timeout": 20_000, "options": "-c lock_timeout=10000 -c idle_in_transaction_session_timeout=20000"},
}  # fmt: skip
"""How a silent database or network is noticed."""

T = TypeVar("T")


def storage_of(results: Path, storage: str = "") -> str:
    """The URL of a results folder's database: what is said, or HARNESS_STORAGE, or a file in the folder, which serves one machine."""
    return storage or os.environ.get("HARNESS_STORAGE", "") or f"sqlite:///{results.resolve() / 'harness.db'}"


def database_url(storage: str) -> sa.URL:
    """A checked URL. Raises UsageError for another kind of database, and for one in memory."""
    with suppress(sa.exc.ArgumentError):
        url = sa.make_url(storage)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.drivername == "postgresql+psycopg" or (url.drivername == "sqlite" and url.database not in (None, "", ":memory:")):
            return url
    raise UsageError(f"--storage is {without_password(storage)}, but must be sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE")


def is_there(storage: str) -> bool:
    """Whether a database can hold anything: a file that is missing does not. Raises UsageError as `database_url` does."""
    url = database_url(storage)
    return url.get_backend_name() != "sqlite" or Path(url.database or "").exists()


def without_password(storage: str) -> str:
    """A URL without its password."""
    try:
        return sa.make_url(storage).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return repr(storage)


def reason(error: Exception) -> str:
    """The first line of what a database says."""
    return (str(getattr(error, "orig", None) or error).strip() or type(error).__name__).splitlines()[0]


def patiently(ask: Callable[[], T], patience: float = PATIENCE) -> T:
    """What `ask` returns, which is called again while a database is away. Raises UsageError after so many seconds of that, or if it
    refuses.
    """
    started = time.monotonic()
    while True:
        try:
            return ask()
        except Exception as error:
            cause = error if isinstance(error, sa.exc.SQLAlchemyError) else error.__cause__  # Optuna wraps them
            if not isinstance(cause, sa.exc.SQLAlchemyError):
                raise
            away = isinstance(cause, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError)
            if not away or ("sqlite3" in str(cause) and "locked" not in str(cause)) or time.monotonic() - started > patience:
                raise UsageError(f"the database of this results folder does not answer: {reason(cause)}") from error
            time.sleep(min(1.0, patience / 10))
