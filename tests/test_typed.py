"""An installed package has types for strict clients."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import harness

CLIENT = Path(__file__).parent / "typed_client.py"
BROKEN = """
from harness.records import Record
def wrong(record: Record) -> int:
    return record.task
"""


def checked(client: Path, folder: Path) -> str:
    """What strict mypy says of a file, in an environment where the package is installed."""
    venv.create(folder / "venv")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    installed = Path(harness.__file__).parents[1], sysconfig.get_paths()["purelib"]
    (site / "installed.pth").write_text("\n".join(map(str, installed)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file="),
            *(f"--python-executable={folder}/venv/bin/python", f"--cache-dir={folder}/cache"),
            client,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_strict_client(tmp_path: Path) -> None:
    assert checked(CLIENT, tmp_path).startswith("Success")
    (tmp_path / "broken.py").write_text(BROKEN)
    said = checked(tmp_path / "broken.py", tmp_path)
    assert 'Incompatible return value type (got "str", expected "int")' in said
