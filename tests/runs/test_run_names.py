"""What a budget means, and what a run's name depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from judged import with_split
from tiny_runs import ARD, config

from harness.errors import UsageError
from harness.methods import METHODS
from harness.runs.build import build, sampler_of
from harness.runs.identity import checkpoint_key, run_hashes, samples_key, student_key
from harness.runs.resolve import resolve
from harness.tasks import Task
from harness.tasks import task as task_module
from harness.tasks.spec import File

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("budget", "steps", "noise_sets"),
    [
        ("quick", 3, 1),
        ("table", 6, 2),
        ("steps=5", 5, 2),
        ("images=40", 5, 2),
        ("images=47", 5, 2),
        ("steps=1", 1, 2),
    ],
)
def test_budgets(budget: str, steps: int, noise_sets: int, tiny: Task) -> None:
    resolved = resolve(config(budget=budget))
    assert (resolved.settings.total_steps, resolved.noise_sets) == (steps, noise_sets)


NONSENSE = [
    "much",
    "steps",
    "steps=",
    "steps=-3",
    "steps=1.5",
    "steps=x",
    "steps=1e-3",
    "steps=²",
    "=3",
    "",
]
NONSENSE += ["flops=inf", "flops=nan", "flops=-1", "tokens=5"]


@pytest.mark.parametrize("budget", NONSENSE)
def test_nonsense_budgets(budget: str, tiny: Task) -> None:
    with pytest.raises(
        UsageError,
        match=r"budget is .* but must be one of: quick, table, steps=NUMBER, images=NUMBER",
    ) as caught:
        resolve(config(budget=budget))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", ["steps=99999999999", "seconds=1e99"])
def test_a_budget_that_no_run_can_have(budget: str, tiny: Task) -> None:
    with pytest.raises(UsageError, match=f"budget is '{budget}', but .* are at most"):
        resolve(config(budget=budget))


def test_the_run_id_does_not_depend_on_how_the_budget_was_said(tiny: Task) -> None:
    ids = {
        resolve(config(budget=budget)).run_id
        for budget in ("table", "steps=6", "images=48", "images=50")
    }
    assert len(ids) == 1
    assert resolve(config(budget="table", batch_size=8)).run_id in ids
    assert resolve(config(budget="steps=7")).run_id not in ids


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"num_steps": 4},
        {"batch_size": 4},
        {"precision": "bf16"},
        {"compile": True},
        {"options": {**ARD, "lr": 0.1}},
        {"budget": "table"},
    ],
    ids=str,
)
def test_the_run_id_depends_on_every_setting(changes: dict[str, Any], tiny: Task) -> None:
    assert resolve(config(**changes)).run_id != resolve(config()).run_id


def test_the_run_id_depends_on_the_task(tiny: Task) -> None:
    def run_id(**changes: Any) -> str:
        return resolve(config(), Task(tiny.spec.model_copy(update=changes))).run_id

    assert run_id() == resolve(config()).run_id
    assert run_id(version=2) != run_id()
    assert run_id(teacher=tiny.spec.teacher.model_copy(update={"sha256": "0" * 64})) != run_id()


def judged_by_file(tiny: Task, folder: Path, scale: float = 1.0) -> Task:
    """The task with a file as its reference, and training images of a scale."""
    (folder / "reference.npz").write_bytes(b"pictures")
    file = File(file=str(folder / "reference.npz"))
    evaluation = tiny.spec.evaluation.model_copy(update={"reference_npz": file})
    task = Task(tiny.spec.model_copy(update={"evaluation": evaluation}), tiny.folder)
    return with_split(task, scale * tiny.split.train.images, tiny.split.held_out.images)


READ_DATA = [
    {"method": "meanflow", "options": {}},
    {"method": "scm", "options": {}, "budget": "steps=0"},
    {"method": "consistency-distillation", "options": {"grid": "karras"}, "budget": "steps=0"},
    {"options": {**ARD, "gan_from": 0.5}},
    {"options": {**ARD, "dmd_from": 0.5}},
]
READ_NONE = [
    {},
    {"method": "teacher", "options": {}},
    {"method": "meanflow", "options": {}, "budget": "steps=0"},
    {"options": {**ARD, "gan_from": 0.5}, "budget": "steps=0"},
]


@pytest.mark.parametrize("changes", READ_DATA, ids=str)
def test_training_images_beside_another_reference_are_in_the_identity(
    changes: dict[str, Any], tiny: Task, tmp_path: Path
) -> None:
    made = config(**changes)
    first, second = (resolve(made, judged_by_file(tiny, tmp_path, x)) for x in (1.0, 0.5))
    assert first.task.hashes == second.task.hashes
    assert first.run_id != second.run_id
    assert student_key(first) != student_key(second)
    assert checkpoint_key(first, "code") != checkpoint_key(second, "code")
    assert samples_key(first, 0, CPU) != samples_key(second, 0, CPU)
    assert run_hashes(first)["data"] == first.task.split.train.content()
    assert "data" not in run_hashes(resolve(made, tiny))


@pytest.mark.parametrize("changes", READ_NONE, ids=str)
def test_images_that_nothing_reads_need_not_be_there(
    changes: dict[str, Any], tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = judged_by_file(tiny, tmp_path)
    whole = resolve(config(**changes), task)
    del task.__dict__["split"]
    monkeypatch.setattr(task_module, "load_split", lambda *args: pytest.fail("it is read"))
    assert resolve(config(**changes), task).run_id == whole.run_id


@pytest.mark.parametrize("name", METHODS.names())
def test_a_sampler_that_says_so_reads_no_images(
    name: str, tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"options": ARD if name == "ard" else {}, "num_steps": 1, "batch_size": 192}
    made = resolve(config(method=name, budget="steps=0", **changes), tiny)
    if made.cls.reads_data(made.config, 0):
        _ = tiny.split
    monkeypatch.setattr(task_module, "load_split", lambda *args: pytest.fail("it is read"))
    method = build(made, tiny.teacher(CPU), CPU)
    x_T, cond = tiny.evaluation_inputs(0, slice(2))
    assert sampler_of(method)(x_T, cond, lambda key: x_T).shape == x_T.shape


def test_spelling_out_a_default_changes_nothing(tiny: Task) -> None:
    default = METHODS["ard"].Config().lr
    assert resolve(config(options={**ARD, "lr": str(default)})).run_id == resolve(config()).run_id


def test_training_settings_do_not_matter_without_training(tiny: Task) -> None:
    ids = {
        resolve(config(method="teacher", options={}, seed=seed, batch_size=size)).run_id
        for seed, size in ((0, 8), (3, 4))
    }
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 3}, "micro_batch_size is 3, but must divide batch_size, which is 8"),
        ({"method": "ardd"}, "unknown method 'ardd'; did you mean ard"),
        ({"task": "tinny"}, "unknown task 'tinny'; did you mean tiny"),
        (
            {"options": {"histroy_layers": 1}},
            "unknown option 'histroy_layers' in options of ard; did you mean history_layers",
        ),
        (
            {"options": {"lr": "fast"}},
            "options of ard: lr is 'fast', but it should be a valid number",
        ),
        ({"num_step": 3}, "unknown option 'num_step' in run config; did you mean num_steps"),
        (
            {"num_steps": 0},
            "run config: num_steps is 0, but it should be greater than or equal to 1",
        ),
        ({"precision": "fp8"}, "run config: precision is 'fp8', but it should be 'fp32' or 'bf16'"),
        (
            {"compile": True, "budget": "seconds=5"},
            "budget is 'seconds=5', but seconds are measured without compile",
        ),
        (
            {"compile": True, "options": {**ARD, "gan_from": 0.5}},
            "compile is given, but these options of ard look inside the network",
        ),
    ],
)
def test_wrong_values_are_reported_in_one_sentence(
    changes: dict[str, Any], message: str, tiny: Task
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(config(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
