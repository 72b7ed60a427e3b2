"""Every registered method keeps the contract; and each check can fail."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import elsewhere
from method_cases import CASES, case_of
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.methods import METHODS, Batch, Update
from harness.methods.ard import ARD
from harness.methods.parts.players import EMA
from harness.methods.parts.points import CachedSteps
from harness.methods.parts.student import DenoisingStudent
from harness.methods.teacher import Teacher
from harness.solvers import sample
from harness.tasks import Task
from harness.training import contract
from harness.training.batches import Items
from harness.training.case import BATCH, STEPS, Case
from harness.training.contract import Check, checks_of, run_checks
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

ALL = [(name, check) for name, (method, _) in CASES.items() for check in checks_of(method)]


LONG = {
    contract.trained_levels,
    contract.default_steps,
    contract.accumulation,
    contract.seeded,
}
"""Checks that take longest, which `tox -e slow` has alone."""
SHORT = {
    contract.sampling,
    contract.untrained,
    contract.finite,
    contract.isolation,
}
"""Checks that variants of a method pass in every run; `tox -e slow` has them all."""
RELATED = {"ayf", "drifting", "freeflow", "imf", "rcm", "tvm"}
"""Methods of which a run has `OWN` alone; it has all of others with which they share most."""
OWN = SHORT | {contract.names, contract.tunes, contract.precision}
"""Checks of what a related method does not share with others."""


def is_long(name: str, check: Check) -> bool:
    """Whether only `tox -e slow` makes a check of a case."""
    if check in LONG or name not in METHODS.names():
        return check not in SHORT
    return name in RELATED and check not in OWN


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(
            name,
            check,
            id=f"{name}-{check.__name__}",
            marks=[pytest.mark.slow] if is_long(name, check) else [],
        )
        for name, check in ALL
    ],
)
def test_contract(name: str, check: Check, tiny: Task, tmp_path: Path) -> None:
    check(case_of(name, tiny, tmp_path / "case"))


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(
            name,
            check,
            id=f"{name}-{check.__name__}",
            marks=[]
            if check is contract.padding and name in METHODS.names()
            else [pytest.mark.slow],
        )
        for name, check in ALL
        if not METHODS[CASES[name][0]].needs_labels
    ],
)
def test_contract_on_prompts(name: str, check: Check, tiny_text: Task, tmp_path: Path) -> None:
    """Every run trains each method and looks at padding; `tox -e slow` does all checks."""
    check(case_of(name, tiny_text, tmp_path / "case"))


def test_methods_that_need_labels_refuse_prompts(tmp_path: Path) -> None:
    needy = [name for name in METHODS.names() if METHODS[name].needs_labels]
    assert needy
    for name in needy:
        with pytest.raises(UsageError, match=f"{name} needs class labels, but task tiny-text is"):
            next(run_checks(name, tmp_path / name, prompts=True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in METHODS.names() else [pytest.mark.slow])
        for name in CASES
    ],
)
def test_on_a_flow_teacher_it_starts_right_and_trains(
    name: str, tiny: Task, tmp_path: Path
) -> None:
    """The same weights serve as a velocity-predicting teacher on a linear path.

    That is another denoiser; everything else is equal.
    """
    flow = Task(
        tiny.spec.model_copy(
            update={"name": "tiny-flow", "schedule": "flow", "prediction_type": "v"}
        ),
        tiny.folder,
    )
    case = case_of(name, flow, tmp_path / "case")
    for check in (
        contract.sampling,
        contract.untrained,
        *([contract.finite] if case.cls.sources else []),
    ):
        check(case)


FORWARD_MODE = ("imf", "meanflow", "rcm", "scm", "tvm")  # which `elsewhere` does not know
ELSEWHERE = {"ard", "consistency-distillation", "dmd2", "imm", "ladd", "pdd"}
"""Methods of every run; `tox -e slow` has all."""
DIFFERENCES = {"freeflow"}
"""Methods whose difference of two near outputs makes rounding larger."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ELSEWHERE else [pytest.mark.slow])
        for name in CASES
        if not name.startswith(FORWARD_MODE)
    ],
)
def test_elsewhere_it_does_the_same(
    name: str, tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and sampling on another device leave no tensor behind and give the CPU's numbers."""
    # torch.autocast does not know that device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: nullcontext())
    case = case_of(name, tiny, tmp_path / "case")
    (x_T, cond), rows = tiny.evaluation_inputs(0), slice(0, 3)

    def samples(device: torch.device) -> Tensor:
        built = case.build(tiny.teacher(device))
        built.to(device)
        for player in (
            built.players.values()
        ):  # Adam divides rounding noise by rounding noise where a gradient is 0
            player.optimizer = torch.optim.SGD(player.trained, lr=0.1)
        if built.players:
            Trainer(built, case.sources, TrainSettings(STEPS, BATCH, 0), None, device).train(
                until=2
            )
        inputs, noise = (
            (x_T[rows].to(device), built.levels, cond[rows].to(device)),
            tiny.evaluation_noise(0, rows),
        )
        with torch.no_grad():
            found = sample(built.solver, built.student, *inputs, noise)
        assert found.device == device
        return found.cpu()

    expected = samples(torch.device("cpu"))
    limit = 3e-3 if name in DIFFERENCES else 1e-4
    with elsewhere() as device:
        torch.testing.assert_close(samples(device), expected, rtol=1e-3, atol=limit)


# Each check finds the fault that it is for.

LOSS, STEP = ARD.loss, CachedSteps.step
Patch = pytest.MonkeyPatch


def changed_loss(patch: Patch, change: Callable[[Any, Tensor], Tensor]) -> None:
    def loss(self: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return change(self, LOSS(self, batch)[0]), {}

    patch.setattr(ARD, "loss", loss)


def changed_step(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    def step(self: Any, *args: Any) -> tuple[Tensor, Tensor, Any]:
        x_s, x_0, state = STEP(self, *args)
        return change(x_s), x_0, state

    patch.setattr(CachedSteps, "step", step)


def counted(self: Any, loss: Tensor) -> Tensor:
    """A loss that depends on something that no checkpoint holds."""
    self.calls = getattr(self, "calls", 0) + 1
    return loss * self.calls


def leaky(self: Any, loss: Tensor) -> Tensor:
    """A loss that also trains the average."""
    self.student.requires_grad_(True)
    return loss + sum(p.square().sum() for p in self.student.parameters())


def bf16_trains_one_bias(self: Any, loss: Tensor) -> Tensor:
    """A loss that under autocast loses the gradients of all other parameters."""
    bias = self.players["student"].module.x_embedder.proj.bias
    return loss.detach() + bias.sum() if torch.is_autocast_enabled("cpu") else loss


def undocumented(patch: Patch) -> None:
    class Config(ARD.Config):
        knob: int = 3

    patch.setattr(ARD, "Config", Config)


def other_canonical(patch: Patch) -> None:
    deeper = classmethod(
        lambda cls, c, num_steps: (
            "ard",
            c.model_copy(update={"history_layers": c.history_layers + 1}),
        )
    )
    patch.setattr(ARD, "canonical", deeper)


def unmasked(patch: Patch) -> None:
    patch.setattr(Condition, "mean_text", property(lambda self: self.text.mean(1)))


TEACHERS = {"trajectory": "states", "heads": "shared", "parametrization": "teacher"}
FAULTS: dict[Check, Callable[[Patch], None]] = {
    contract.names: undocumented,
    contract.canonical: other_canonical,
    contract.sampling: lambda patch: changed_step(patch, lambda x: x + torch.rand(())),
    contract.points: lambda patch: patch.setattr(
        ARD, "teacher_points", lambda self, path: path.states[:, ::2].flip(1)
    ),
    contract.neighbours: lambda patch: changed_step(patch, lambda x: x + x.mean()),
    contract.untrained: lambda patch: changed_step(patch, lambda x: 1.01 * x),
    contract.generator: lambda patch: changed_loss(patch, lambda self, loss: loss * torch.rand(())),
    contract.padding: unmasked,
    contract.default_steps: lambda patch: changed_step(patch, lambda x: 1.2 * x),
    contract.training_free: lambda patch: patch.setattr(
        Teacher, "updates", lambda self, step: [Update("student", LOSS)]
    ),
    contract.finite: lambda patch: changed_loss(patch, lambda self, loss: loss * float("nan")),
    contract.precision: lambda patch: changed_loss(patch, bf16_trains_one_bias),
    contract.isolation: lambda patch: changed_loss(patch, leaky),
    contract.averaged: lambda patch: patch.setattr(EMA, "update", lambda self, module: None),
    contract.accumulation: lambda patch: changed_loss(patch, lambda self, loss: (1e6 * loss) ** 2),
    contract.resume: lambda patch: changed_loss(patch, counted),
    contract.own_state: lambda patch: patch.setattr(
        ARD, "state_dict", lambda self: {"number": id(self)}
    ),
    contract.any_step: lambda patch: patch.setattr(
        ARD, "trained_once", classmethod(lambda cls, config: True)
    ),
    contract.gradient_by_level: lambda patch: patch.setattr(
        DenoisingStudent, "conditioned", lambda self, off, t: off
    ),
    contract.trained_levels: lambda patch: patch.setattr(
        DenoisingStudent, "with_uniform", lambda self, batch, t: t
    ),
    contract.tunes: lambda patch: patch.setattr(ARD, "tunes", {}),
    contract.blind: lambda patch: changed_loss(
        patch,
        lambda self, loss: loss * Keyed("evaluate", 0).uniform("x_T", torch.arange(1))[0].float(),
    ),
    contract.seeded: lambda patch: patch.setattr(
        Items, "__call__", lambda self, index: index % self.size
    ),
}


@pytest.mark.parametrize("check", FAULTS, ids=lambda check: check.__name__)
def test_a_check_finds_its_fault(
    check: Check, tiny: Task, tiny_text: Task, tmp_path: Path, monkeypatch: Patch
) -> None:
    elsewhere = {
        contract.training_free: "teacher",
        contract.gradient_by_level: "progressive",
        contract.trained_levels: "scm",
    }
    task = tiny_text if check is contract.padding else tiny
    if check in elsewhere:
        case = Case(elsewhere[check], tiny, tmp_path / "case")
    else:
        options = (
            {"history_layers": 0, **TEACHERS}
            if check is contract.untrained
            else {"history_layers": 2}
        )
        case = Case("ard", task, tmp_path / "case", options)
    check(case)
    FAULTS[check](monkeypatch)
    with pytest.raises(AssertionError):
        check(Case(case.name, task, tmp_path / "faulty", case.options))


def test_every_check_has_a_fault() -> None:
    assert set(FAULTS) == {check for name in METHODS.names() for check in checks_of(name)}


def test_a_gradient_that_points_elsewhere_in_bf16_is_found(
    tiny: Task, tmp_path: Path, monkeypatch: Patch
) -> None:
    changed_loss(
        monkeypatch, lambda self, loss: -loss if torch.is_autocast_enabled("cpu") else loss
    )
    with pytest.raises(AssertionError, match=r"in bf16 the gradient of \S+ has cosine -(1.00|0.9)"):
        contract.precision(Case("ard", tiny, tmp_path / "case", {"history_layers": 2}))


def test_the_suite_tells_what_is_wrong(tmp_path: Path, tiny: Task, monkeypatch: Patch) -> None:
    changed_loss(monkeypatch, lambda self, loss: loss * float("nan"))
    outcomes = {
        outcome.check: outcome for outcome in run_checks("ard", tmp_path, {"history_layers": 2})
    }
    assert outcomes.keys() == {check.__name__ for check in checks_of("ard")}
    assert outcomes["sampling"].problem == ""
    assert "the loss of student is nan" in outcomes["finite"].problem
    assert all(outcome.what for outcome in outcomes.values())
