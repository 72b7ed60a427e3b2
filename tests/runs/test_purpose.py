"""Purposes never meet: searches have noise, seeds and students that no table uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.runs.build import Reference
from harness.runs.config import RunConfig
from harness.runs.identity import run_settings, samples_key, student_key
from harness.runs.resolve import reference_of, resolve
from harness.runs.run import Run
from harness.tasks import Task

CPU = torch.device("cpu")
TUNE = {"task": "tiny", "budget": "steps=1", "noise_sets": 1, "purpose": "tune", "seed": 1000}


def test_tuning_noise_is_keyed_by_its_own_purpose(tiny: Task) -> None:
    tuning, count, seed = tiny.judged_for("tune"), tiny.spec.evaluation.samples, 0
    seed = tiny.spec.evaluation.seed
    for task, purpose in ((tiny, "evaluate"), (tuning, "tune")):
        x_T, cond = task.evaluation_inputs(1)
        keyed, index = Keyed(purpose, seed), torch.arange(count, 2 * count)
        assert torch.equal(x_T, keyed.normal("x_T", index, tiny.shape))
        assert torch.equal(cond.labels, tiny.evaluation_inputs(1)[1].labels)
        noise = task.evaluation_noise(1, slice(2, 5))("step 0")
        assert torch.equal(noise, keyed.normal("step 0", index[2:5], tiny.shape))
    assert tuning.judged_for("tune") is tuning
    assert tuning.judged_for("evaluate").purpose == tiny.purpose == "evaluate"


@pytest.mark.parametrize(
    ("purpose", "seed", "rule"),
    [
        ("evaluate", 1000, "needs seeds below 1000"),
        ("tune", 999, "needs seeds from 1000"),
    ],
)
def test_a_seed_of_the_other_purpose_is_refused(
    purpose: str, seed: int, rule: str, tiny: Task
) -> None:
    config = RunConfig.model_validate({**TUNE, "method": "ect", "purpose": purpose, "seed": seed})
    with pytest.raises(UsageError, match=f"seed is {seed}, but purpose {purpose} {rule}"):
        resolve(config)


def test_the_purpose_names_the_run_but_not_its_student(tiny: Task) -> None:
    tuned = resolve(RunConfig.model_validate({**TUNE, "method": "ect", "num_steps": 1}))
    other = replace(tuned, task=tiny)
    assert run_settings(tuned) == {**run_settings(other), "purpose": "tune"}
    assert tuned.run_id != other.run_id
    assert student_key(tuned) == student_key(other)
    assert samples_key(tuned, 0, CPU) != samples_key(other, 0, CPU)


def test_the_reference_has_the_noise_of_the_run(tiny: Task, tmp_path: Path) -> None:
    """The reference's own samples are at distance 0 from the reference, and nothing else is."""
    tuning = tiny.judged_for("tune")
    assert not torch.equal(Reference(tuning, CPU).samples(0), Reference(tiny, CPU).samples(0))
    records = {
        task.purpose: Run(replace(reference_of(task), noise_sets=1), tmp_path, CPU).execute()
        for task in (tiny, tuning)
    }
    for purpose, record in records.items():
        assert record.metrics["distance_to_teacher"].mean == 0
        assert record.config.get("purpose", "evaluate") == purpose
    metrics = [record.metrics for record in records.values()]
    assert metrics[1]["fid"].identity == {**metrics[0]["fid"].identity, "noise_purpose": "tune"}
    assert metrics[0]["fid"].values != metrics[1]["fid"].values


def test_no_run_starts_from_a_student_of_the_other_purpose(tiny: Task, tmp_path: Path) -> None:
    tuned = RunConfig.model_validate({**TUNE, "method": "ect", "num_steps": 1})
    parent = Run(resolve(tuned), tmp_path, CPU).execute().run_id
    child = tuned.model_copy(update={"init_from": parent})
    assert resolve(child, results=tmp_path).parent is not None
    table = child.model_copy(update={"purpose": "evaluate", "seed": 0})
    with pytest.raises(UsageError, match="a run of purpose tune, but this one has purpose evalu"):
        resolve(table, results=tmp_path)
