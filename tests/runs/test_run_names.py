"""What a budget means, and what a run's name depends on."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_runs import ARD, config

from harness.errors import UsageError
from harness.methods import METHODS
from harness.runs.resolve import resolve
from harness.tasks import Task


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
    "steps=99999999999",
    "steps=²",
    "=3",
    "",
]
NONSENSE += ["flops=inf", "flops=nan", "flops=-1", "seconds=1e99", "tokens=5"]


@pytest.mark.parametrize("budget", NONSENSE)
def test_nonsense_budgets(budget: str, tiny: Task) -> None:
    with pytest.raises(
        UsageError,
        match=r"budget is .* but must be one of: quick, table, steps=NUMBER, images=NUMBER",
    ) as caught:
        resolve(config(budget=budget))
    assert "\n" not in str(caught.value)


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
