"""Full disks, folders that cannot be written, clocks that jump: told in a sentence, and no loss."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable

import pytest
from fault_scenarios import SCENARIOS, Place
from injection import Arm, file_limit, full_disk, jumping_clock, read_only

Making = Callable[[str], Place]
PLACES = [name for name in SCENARIOS if name != "run, pictures"]


def refused(made: Place, arm: Arm) -> bool:
    """Whether a command is refused; if it is, then in a sentence, and no run counts as failed."""
    code, said = made.start(arm), made.log.read_text()
    assert code in (0, 2), said
    assert "Traceback" not in said
    if code == 2:
        assert said.splitlines()[-1].startswith("harness: "), said
    for path in made.work.glob("results/runs/*/record.json"):
        assert json.loads(path.read_text())["status"] == "finished", path.read_text()
    return code == 2


def test_a_run_on_a_full_disk(place: Making) -> None:
    """By an error of the kernel, which native code meets too, and by one of Python."""
    made = place("run")
    assert refused(made, full_disk(made.work, 20))
    assert refused(made, file_limit(6_000))
    made.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_a_full_disk(name: str, place: Making) -> None:
    made, count = place(name), 0
    for size in [4**power for power in range(3, 9)]:
        made.reset()
        count += refused(made, file_limit(size))
        made.check(f"files of at most {size} bytes")
    for number in range(1, 100, 16):
        made.reset()
        count += refused(made, full_disk(made.work, number))
        made.check(f"full before change {number}")
    print(f"\n{name}: full {count} times")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=["read-only", "forbidden"])
def test_a_folder_that_cannot_be_written(code: int, name: str, place: Making) -> None:
    made, count = place(name), 0
    for number in range(1, 100, 20):
        made.reset()
        count += refused(made, read_only(made.work, number, code))
        made.check(f"not to be written from change {number} on")
    print(f"\n{name}: {count} refusals")
    assert count


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_a_clock_that_jumps(name: str, place: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    made = place(name)
    jumping_clock(monkeypatch)
    made.check("a clock that jumps")
