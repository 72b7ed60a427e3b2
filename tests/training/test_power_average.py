"""Averages whose width is chosen afterwards: closed formulas, resume, the command."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from method_cases import case_of
from torch import Tensor, nn

from harness.cli.main import main
from harness.errors import UsageError
from harness.files import DIGEST, header_of, read_tensors
from harness.tasks import Task
from harness.training.power_average import (
    WIDTHS,
    PowerAverages,
    average_of_width,
    exponent,
    shares,
    snapshots,
)

STEPS = 400


class Moving(nn.Module):
    """Weights that are known functions of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def at(self, step: int) -> Tensor:
        t = step / STEPS
        return torch.tensor([t, math.sin(6 * t), math.exp(-3 * t)], dtype=torch.float64)

    def move(self, step: int) -> None:
        self.weight.data = self.at(step)


def filled(folder: Path, every: int = 50) -> PowerAverages:
    module = Moving()
    averages = PowerAverages(module, folder, every)
    for step in range(1, STEPS + 1):
        module.move(step)
        averages.update(module)
    return averages


def direct(width: float) -> Tensor:
    """An average that was kept at this width from the start."""
    g = exponent(width)
    average = Moving().at(1)
    for step in range(2, STEPS + 1):
        beta = (1 - 1 / step) ** (g + 1)
        average = beta * average + (1 - beta) * Moving().at(step)
    return average


@pytest.mark.parametrize(("width", "gamma"), [(0.10, 6.94), (0.05, 16.97), (0.01, 96.99)])
def test_the_exponent_is_that_of_the_paper(width: float, gamma: float) -> None:
    assert exponent(width) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("width", [0.0, 0.3, -1.0, math.nan])
def test_an_impossible_width_is_refused(width: float) -> None:
    with pytest.raises(UsageError, match="must be above 0 and at most"):
        exponent(width)


def test_the_average_of_the_time_is_a_part_of_it(tmp_path: Path) -> None:
    """`t (gamma + 1) / (gamma + 2)`, as the number of steps grows."""
    for width, module in filled(tmp_path).modules.items():
        g = exponent(width)
        expected = (g + 1) / (g + 2)
        assert float(module.weight[0]) == pytest.approx(expected, abs=2 / STEPS)  # type: ignore[index]


def test_a_width_that_was_kept_is_its_last_snapshot(tmp_path: Path) -> None:
    averages = filled(tmp_path)
    for width in WIDTHS:
        found = average_of_width(tmp_path, width)["weight"]
        torch.testing.assert_close(found, averages.modules[width].weight.data)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.2])
def test_another_width_is_close_to_an_average_of_that_width(width: float, tmp_path: Path) -> None:
    filled(tmp_path, every=25)
    error = (average_of_width(tmp_path, width)["weight"] - direct(width)).abs().max()
    others = [(direct(kept) - direct(width)).abs().max() for kept in WIDTHS]
    assert error < 0.1 * min(others)


def test_shares_add_up_to_1() -> None:
    kept = [(step, width) for step in (100, 200, 300) for width in WIDTHS]
    assert shares(kept, 300, 0.12).sum() == pytest.approx(1)
    expected = [0.0] * 4 + [1.0, 0.0]
    np.testing.assert_allclose(shares(kept, 300, 0.05), expected, atol=1e-6)


def test_a_resumed_run_writes_the_same_snapshots(tmp_path: Path, tiny: Task) -> None:
    found = []
    for name, stops in (("straight", (6,)), ("resumed", (3, 6))):
        for stop in stops:
            case = case_of("ard", tiny, tmp_path / "case")
            method = case.build()
            folder = tmp_path / name
            averages = PowerAverages(method.student_player.module, folder / "averages", 2)
            trainer = case.trainer(method, folder)
            trainer.averages = averages
            trainer.train(until=stop)
        found.append([(s.step, read_tensors(s.path)) for s in snapshots(folder / "averages")])
    straight, resumed = found
    assert [step for step, _ in straight] == [2, 2, 4, 4, 6, 6]
    for (step, one), (same, other) in zip(straight, resumed, strict=True):
        assert step == same
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_snapshots_of_a_run_that_left_no_checkpoint_do_not_count(
    tmp_path: Path, tiny: Task
) -> None:
    case = case_of("ard", tiny, tmp_path / "case")
    method = case.build()
    averages = PowerAverages(method.student_player.module, tmp_path / "averages", 3)
    averages.step = 5
    averages.write()
    trainer = case.trainer(method, tmp_path)
    trainer.averages = averages
    averages.step = 0
    trainer.train(until=3)
    assert [each.step for each in snapshots(tmp_path / "averages")] == [3, 3]


def test_a_checkpoint_without_averages_is_refused(tmp_path: Path, tiny: Task) -> None:
    case = case_of("ard", tiny, tmp_path / "case")
    case.trainer(case.build(), tmp_path).train(until=2)
    method = case.build()
    trainer = case.trainer(method, tmp_path)
    trainer.averages = PowerAverages(method.student_player.module, tmp_path / "averages", 1)
    with pytest.raises(UsageError, match="was written without --snapshots"):
        trainer.train(until=3)


def test_the_command_writes_a_student_of_another_width(tiny: Task, tmp_path: Path) -> None:
    def harness(*words: object) -> str:
        done = CliRunner().invoke(main, [*map(str, words), "--results", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.output

    harness(
        "run", "--task", "tiny", "--method", "reflow", "--num-steps", 2, "--budget", "steps=8",
        "--noise-sets", 1, "--snapshots", 4,
    )  # fmt: skip
    (run,) = (tmp_path / "runs").glob("reflow*")
    assert len(snapshots(run / "averages")) == 8
    path = Path(harness("student", "ema", run.name, "--width", 0.2).strip())
    own, other = read_tensors(run / "student.safetensors"), read_tensors(path)
    assert own.keys() == other.keys()
    assert any(not torch.equal(own[key], other[key]) for key in own)
    found, expected = (header_of(file)[0] for file in (path, run / "student.safetensors"))
    assert found.pop(DIGEST) != expected.pop(DIGEST)
    assert found == expected
    refused = CliRunner().invoke(
        main, ["student", "ema", run.name, "--width", "9", "--results", str(tmp_path)]
    )
    assert refused.exit_code == 2
    assert "width is 9" in refused.output
