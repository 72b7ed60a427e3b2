"""The mixture task makes rows: exact numbers beside them, and the error's parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import UsageError
from harness.metrics.evaluator import Evaluator
from harness.report.markdown import task_section
from harness.report.task_report import TaskReport
from harness.runs.config import parse_config
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.runs.teacher_training import train_networks, verify
from harness.tasks import MixtureTask, load_task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all tests: maps, trajectories and reference samples are computed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def small() -> MixtureTask:
    """A small version of the task."""
    task = load_task("mixture")
    evaluation = task.spec.evaluation.model_copy(update={"samples": 400, "noise_sets": 1})
    trajectories = task.spec.trajectories.model_copy(update={"count": 64})
    changes = {
        "evaluation": evaluation,
        "trajectories": trajectories,
        "network": {**task.spec.network, "depth": 2},
    }
    return MixtureTask(task.spec.model_copy(update=changes))


def record_of(folder: Path, **changes: Any) -> Any:
    return Run(
        resolve(parse_config({"task": "mixture", "budget": "steps=2", **changes}), small()),
        folder,
        CPU,
    ).execute()


def test_the_exact_map_has_no_error(tmp_path: Path) -> None:
    task = small()
    exact = task.ode_map(0)
    found = Evaluator(task, lambda k: exact.float(), CPU).evaluate({0: exact.float()})
    assert found["map_error"].mean < 1e-6
    assert found["frechet_distance"].mean < 0.05
    # The same samples from other noise: the distribution is right, the map is not.
    wrong = exact.float().roll(1, 0)
    assert (
        Evaluator(task, lambda k: exact.float(), CPU).evaluate({0: wrong})["map_error"].mean > 0.5
    )


def test_trajectories_of_another_schedule_are_others() -> None:
    task = small()
    other = MixtureTask(task.spec.model_copy(update={"schedule": "flow"}))
    assert task.recipe != other.recipe


def test_solver_errors_shrink_with_steps(tmp_path: Path) -> None:
    records = [record_of(tmp_path, method="teacher", num_steps=k) for k in (4, 8, 24)]
    errors, kls = (
        [record.metrics[name].mean for record in records] for name in ("map_error", "kl")
    )
    assert errors == sorted(errors, reverse=True)
    assert kls == sorted(kls, reverse=True)
    assert 0 < kls[2] < 1
    assert records[2].metrics["map_error"].mean == records[2].metrics["solver_error"].mean
    assert records[2].metrics["distance_to_teacher"].mean == 0


@pytest.mark.parametrize(
    "options",
    [{"method": "ard", "options": {"history_layers": 1}}, {"method": "consistency-distillation"}],
)
def test_a_student_is_a_row(options: dict[str, Any], tmp_path: Path) -> None:
    record = record_of(tmp_path, **options)
    assert record.status == "finished"
    assert ("kl" in record.metrics) == (record.exposure is not None)
    assert record.hashes["teacher"] == small().teacher_hash
    page = task_section(
        TaskReport.of([record, record_of(tmp_path, method="teacher", num_steps=24)]), 2
    )
    for heading in (
        "Frechet distance",
        "error of the ODE map",
        "solver: the teacher's trajectories",
        "held-out real samples",
    ):
        assert heading in page
    assert "FID" not in page
    assert "KID" not in page


def test_the_parts_of_the_error_bound_the_whole(tmp_path: Path) -> None:
    """Errors add as vectors, so root mean squares obey the triangle inequality.

    Exposure is measured on the first 1,000 samples.
    """
    record = record_of(
        tmp_path,
        method="ard",
        options={"history_layers": 1, "trajectory": "states"},
        budget="steps=30",
    )
    metrics, exposure = record.metrics, record.exposure
    parts = metrics["solver_error"].mean + exposure.on_teachers_history[-1] + exposure.drift[-1]
    assert metrics["map_error"].mean <= parts * 1.01
    assert exposure.drift[0] == 0
    assert exposure.drift[-1] > 0


@pytest.mark.parametrize(
    "refused", [verify, lambda task, device: train_networks(task, Path("nowhere"), device)]
)
def test_there_is_nothing_to_train_or_verify(refused: Any) -> None:
    with pytest.raises(UsageError, match="it is exact"):
        refused(load_task("mixture"), CPU)


def test_a_gan_stage_needs_a_networks_blocks() -> None:
    with pytest.raises(UsageError, match="closed formula"):
        resolve(parse_config({"task": "mixture", "method": "ard", "options": {"gan_from": 0.5}}))
