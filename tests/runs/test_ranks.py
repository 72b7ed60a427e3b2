"""A run on several ranks that torchrun starts: the numbers of one process, and one set of files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.records import Record, read_record
from harness.runs.config import parse_config
from harness.runs.resolve import resolve
from harness.runs.run import run

CPU = torch.device("cpu")
STEPS, PAUSE = 6, 3
ASKED: dict[str, Any] = {
    "method": "ard",
    "num_steps": 2,
    "budget": f"steps={STEPS}",
    "noise_sets": 2,
    "options": {"history_layers": 2},
}
ENDING = f"""
import os, signal
from harness import ranks
from harness.training.trainer import Trainer

one_step = Trainer.one_step

def ending(self):
    if self.step == {PAUSE} and "ENDS" in os.environ:
        self._save([])
        ranks.wait()
        if ranks.number() == int(os.environ["ENDS"]):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    means = one_step(self)
    if ranks.is_first():
        with (self.folder / "steps").open("a") as file:
            print(self.step, file=file)
    return means

Trainer.one_step = ending
"""
"""A plug-in: in the middle of training a checkpoint is written, and one rank gets a signal.

The first rank notes each step that is done.
"""


def torchrun(count: int, folder: Path, task: Path, *more: str, **env: str) -> Any:
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**ASKED, "task": str(task)}))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc-per-node={count}", "-m", "harness", "run", "--config", str(config)]
    words += ["--results", str(folder / "ranks"), "--device", "cpu", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def records(results: Path) -> dict[str, Record]:
    found = [read_record(path) for path in results.glob("runs/*/record.json")]
    return {record.method: record for record in found}


def check_equal(found: Record, expected: Record, tolerance: float) -> None:
    """Two records hold the same numbers, and the same bill but for seconds and memory."""
    assert (found.run_id, found.status) == (expected.run_id, "finished")
    assert found.metrics.keys() == expected.metrics.keys()
    for name, metric in expected.metrics.items():
        values = pytest.approx(metric.values, rel=tolerance) if tolerance else metric.values
        assert found.metrics[name].values == values, name
    if expected.cost is not None and expected.cost.training is not None:
        assert found.cost is not None
        assert found.cost.training is not None
        for name in ("images", "flops", "trajectory_flops", "teacher_evaluations"):
            assert getattr(found.cost.training, name) == getattr(expected.cost.training, name), name


def alone(folder: Path, task: Path) -> dict[str, Record]:
    """The records of one process, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(folder / "other cache"))
        run(resolve(parse_config({**ASKED, "task": str(task)})), folder / "alone", CPU)
    return records(folder / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard",)], ids=str)
def test_two_ranks_make_the_records_of_one_process(
    more: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    """The reference, which is not trained, is equal to the last bit."""
    task = tiny_folder / "tiny.yaml"
    done = torchrun(2, tmp_path, task, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("record: ") == 1
    found, expected = records(tmp_path / "ranks"), alone(tmp_path, task)
    assert found.keys() == expected.keys() == {"ard", "teacher"}
    check_equal(found["teacher"], expected["teacher"], 0.0)
    check_equal(found["ard"], expected["ard"], 1e-4)
    assert found["ard"].environment.ranks == 2
    assert found["ard"].first_losses == pytest.approx(expected["ard"].first_losses, rel=1e-4)
    assert not list((tmp_path / "ranks").rglob("checkpoint"))
    assert sorted(path.name for path in (tmp_path / "ranks").rglob("samples.png")) == [
        "samples.png",
        "samples.png",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "number", "first", "then"),
    [
        ("1", signal.SIGKILL, (2,), (1,)),
        ("0", signal.SIGKILL, (2,), (4,)),
        ("1", signal.SIGKILL, (2, "--shard"), (1,)),
        ("1", signal.SIGTERM, (2,), (2, "--shard")),
    ],
)
def test_a_run_whose_rank_ends_goes_on_with_other_ranks(
    ends: str,
    number: signal.Signals,
    first: tuple[Any, ...],
    then: tuple[Any, ...],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    """Each step is done once, in one of the two processes, and the record is that of one."""
    task, plugin = tiny_folder / "tiny.yaml", tmp_path / "ending.py"
    plugin.write_text(ENDING)
    count, *options = first
    options += ["--plugin", str(plugin)]
    done = torchrun(count, tmp_path, task, *options, ENDS=ends, SIGNAL=str(int(number)))
    assert done.returncode == 1
    checkpoint = torch.load(next((tmp_path / "ranks").rglob("state.pt")), weights_only=True)
    assert checkpoint["step"] == PAUSE + (number == signal.SIGTERM)
    stopped = "stopped by a signal to another rank at step 4"
    said = stopped if number == signal.SIGTERM else "another rank has ended"
    assert said in done.stderr
    assert "ard" not in records(tmp_path / "ranks")
    count, *options = then
    done = torchrun(count, tmp_path, task, *options, "--plugin", str(plugin))
    assert done.returncode == 0, done.stderr
    steps = next((tmp_path / "ranks").rglob("steps")).read_text().split()
    assert steps == list(map(str, range(STEPS)))
    check_equal(records(tmp_path / "ranks")["ard"], alone(tmp_path, task)["ard"], 1e-4)
