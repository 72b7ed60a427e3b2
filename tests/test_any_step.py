"""A student that serves every number of steps is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from harness.config import RunConfig, resolve
from harness.files import read_tensors
from harness.records import Record
from harness.run import Run, run
from harness.tasks import Task
from harness.trainer import Trainer

CPU = torch.device("cpu")


def made(results: Path, num_steps: int, **more: object) -> Record:
    config = RunConfig(task="tiny", method="consistency-distillation", num_steps=num_steps, **more)  # type: ignore[arg-type]
    return run(config, results, CPU)[0]


def test_the_second_step_count_takes_the_firsts_student_and_bill(tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    values = [{name: metric.values for name, metric in record.metrics.items()} for record in (second, alone)]
    assert values[0] == values[1]
    weights = [read_tensors(tmp_path / "both" / "runs" / record.run_id / "student.safetensors") for record in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("changes", [{"seed": 1}, {"options": {"lr": 0.01}}, {"budget": "steps=4"}, {"batch_size": 4}])
def test_another_student_is_no_sibling(changes: dict[str, object], tiny: Task, tmp_path: Path) -> None:
    made(tmp_path, 1)
    second = made(tmp_path, 2, **changes)
    assert second.trained_in == ""


def test_a_task_with_the_same_files_and_another_guidance_is_no_sibling(tiny: Task, tiny_folder: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    (tiny_folder / "other.yaml").write_text(yaml.safe_dump({**content, "name": "other", "guidance": {"scale": 2.0}}))
    first = made(tmp_path, 1)
    config = RunConfig(task="other", method="consistency-distillation", num_steps=2)
    second = run(config, tmp_path, CPU)[0]
    assert first.hashes == second.hashes
    assert second.trained_in == ""


def test_a_method_that_trains_for_its_steps_has_none(tiny: Task, tmp_path: Path) -> None:
    for num_steps in (1, 2):
        config = RunConfig(task="tiny", method="step-distillation", num_steps=num_steps)
        run(config, tmp_path, CPU)
        assert Run(resolve(config), tmp_path, CPU).sibling() is None


def test_a_method_of_one_step_needs_no_number(tiny: Task) -> None:
    assert RunConfig(method="knowledge-distillation").num_steps == 1
    assert RunConfig(method="ard").num_steps == 4
    assert resolve(RunConfig(method="knowledge-distillation", task="tiny")).run_id.startswith("step-distillation-1-")
