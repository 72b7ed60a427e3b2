"""A student that serves every number of steps is trained once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from harness.data.trajectories import open_store
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import keyed_initialisation
from harness.errors import Busy, UsageError
from harness.files import read_tensors
from harness.methods import METHODS
from harness.records import Record
from harness.runs.config import RunConfig
from harness.runs.locks import held
from harness.runs.resolve import resolve
from harness.runs.run import Run, run
from harness.tasks import Task
from harness.training.trainer import Trainer

CPU = torch.device("cpu")


def made(results: Path, num_steps: int, **more: object) -> Record:
    config = RunConfig(task="tiny", method="consistency-distillation", num_steps=num_steps, **more)  # type: ignore[arg-type]
    return run(resolve(config, results=results), results, CPU)[0]


def test_the_second_step_count_takes_the_firsts_student_and_bill(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = made(tmp_path / "alone", 2)
    first = made(tmp_path / "both", 1)
    monkeypatch.setattr(Trainer, "train", lambda *args, **more: pytest.fail("trained again"))
    second = made(tmp_path / "both", 2)
    assert (first.trained_in, second.trained_in) == ("", first.run_id)
    assert first.cost is not None
    assert second.cost is not None
    assert second.cost.training == first.cost.training
    assert second.run_id == alone.run_id
    assert second.flags == alone.flags
    values = [
        {name: metric.values for name, metric in record.metrics.items()}
        for record in (second, alone)
    ]
    assert values[0] == values[1]
    weights = [
        read_tensors(tmp_path / "both" / "runs" / record.run_id / "student.safetensors")
        for record in (first, second)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_student_is_no_sibling(tiny: Task, tmp_path: Path) -> None:
    made(tmp_path, 1)

    def sibling(**changes: object) -> object:
        config = RunConfig(task="tiny", method="consistency-distillation", num_steps=2, **changes)  # type: ignore[arg-type]
        return Run(resolve(config, results=tmp_path), tmp_path, CPU).sibling()

    assert sibling() is not None
    for changes in (
        {"seed": 1},
        {"options": {"lr": 0.01}},
        {"budget": "steps=4"},
        {"batch_size": 4},
    ):
        assert sibling(**changes) is None, changes


def test_a_task_with_the_same_files_and_another_guidance_is_no_sibling(
    tiny: Task, tiny_folder: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    (tiny_folder / "other.yaml").write_text(
        yaml.safe_dump({**content, "name": "other", "guidance": {"scale": 2.0}})
    )
    first = made(tmp_path, 1)
    config = RunConfig(task="other", method="consistency-distillation", num_steps=2)
    second = run(resolve(config, results=tmp_path), tmp_path, CPU)[0]
    assert first.hashes == second.hashes
    assert second.trained_in == ""


def test_a_method_that_trains_for_its_steps_has_none(tiny: Task, tmp_path: Path) -> None:
    for num_steps in (1, 2):
        config = RunConfig(task="tiny", method="step-distillation", num_steps=num_steps)
        run(resolve(config, results=tmp_path), tmp_path, CPU)
        assert Run(resolve(config), tmp_path, CPU).sibling() is None


def test_a_student_for_several_numbers_of_steps_is_trained_once(tiny: Task, tmp_path: Path) -> None:
    options = {"history_layers": 2, "heads": "shared", "step_counts": [2, 1]}
    records = []
    for num_steps in (1, 2):
        config = RunConfig(task="tiny", method="ard", num_steps=num_steps, options=options)
        records.append(run(resolve(config, results=tmp_path), tmp_path, CPU)[0])
    assert [record.trained_in for record in records] == ["", records[0].run_id]
    assert [record.method for record in records] == ["ard", "ard"]
    weights = [
        read_tensors(tmp_path / "runs" / record.run_id / "student.safetensors")
        for record in records
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_two_processes_do_not_train_one_student_twice(tiny: Task, tmp_path: Path) -> None:
    """Runs for several numbers of steps share one student.

    A second run is Busy while the first trains it, and takes the finished student afterwards.
    """
    configs = [
        RunConfig(task="tiny", method="consistency-distillation", num_steps=num_steps)
        for num_steps in (1, 2)
    ]
    first, second = (Run(resolve(config), tmp_path, CPU) for config in configs)
    assert first.locks[1] == second.locks[1]
    assert first.locks[0] != second.locks[0]
    with held(tmp_path, first.locks[1]), pytest.raises(Busy):
        second.execute()
    first.execute()
    assert second.execute().trained_in == first.resolved.run_id
    other = Run(
        resolve(RunConfig(task="tiny", method="consistency-distillation", num_steps=2, seed=1)),
        tmp_path,
        CPU,
    )
    assert other.locks[1] != first.locks[1]
    assert (
        len(
            Run(
                resolve(RunConfig(task="tiny", method="step-distillation", num_steps=2)),
                tmp_path,
                CPU,
            ).locks
        )
        == 1
    )


def test_numbers_of_steps_are_read_as_they_are_typed() -> None:
    for typed in ("4,1,2", [4, 2, 1, 1], "1, 2,4"):
        assert METHODS["ard"].Config(step_counts=typed).step_counts == (1, 2, 4)
    for wrong in ("1,two", [0, 1], 3):
        with pytest.raises(ValidationError):
            METHODS["ard"].Config(step_counts=wrong)


@pytest.mark.parametrize(
    ("num_steps", "options", "message"),
    [
        (
            4,
            {"step_counts": [1, 2], "heads": "shared"},
            "num_steps is 4, but step_counts say that the student is trained for 1, 2",
        ),
        (2, {"step_counts": [1, 2], "heads": "per_step"}, "give heads 'shared' with it"),
        (2, {"step_counts": [2, 3], "heads": "shared"}, "step_counts is 3, but must divide"),
    ],
)
def test_numbers_of_steps_that_do_not_fit_are_refused(
    num_steps: int, options: dict[str, Any], message: str, tiny_folder: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(
            RunConfig(
                task="tiny",
                method="ard",
                num_steps=num_steps,
                options={"history_layers": 2, **options},
            )
        )


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_such_a_student_answers_in_steps_as_in_a_masked_pass(num_steps: int, tiny: Task) -> None:
    """And what it answers depends on the size of the step, once its weights have moved."""
    config = METHODS["ard"].Config(
        history_layers=2, step_counts=[1, 2, 4], parametrization="direct"
    )
    with keyed_initialisation(0, "several"), torch.no_grad():
        method: Any = METHODS["ard"](config, tiny.teacher(CPU), tiny, num_steps, 10)
        for parameter in method.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    method.student.double()
    points, cond = method.points, Condition(torch.tensor([0, 1, 2]))
    path = open_store(tiny.recipe, tiny.teacher(CPU), CPU).batch(torch.arange(3))
    path = replace(path, states=path.states.double(), predictions=path.predictions.double())
    x, _ = points.inputs_and_targets(path)
    with torch.no_grad():
        sized = cond.with_scalars(step_size=torch.full((3,), 1 / num_steps))
        masked, _ = method.student(x, points.times.expand(3, num_steps), sized)
        other, _ = method.student(
            x, points.times.expand(3, num_steps), cond.with_scalars(step_size=torch.full((3,), 0.3))
        )
        state = method.solver.init(method.student, x[:, 0], cond)
        for i in range(num_steps):
            answer, _, state = method.solver.step(
                method.student, x[:, i], *points.levels[i : i + 2], cond, state, None
            )
            torch.testing.assert_close(answer, masked[:, i], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(masked, other, rtol=1e-2)


def test_a_method_of_one_step_needs_no_number(tiny: Task) -> None:
    assert RunConfig(method="knowledge-distillation").num_steps == 1
    assert RunConfig(method="ard").num_steps == 4
    assert resolve(RunConfig(method="knowledge-distillation", task="tiny")).run_id.startswith(
        "step-distillation-1-"
    )
