"""Methods on a teacher of diffusers: they ask for a backbone and know no class of network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers import CLASSES, network_of

from harness.data.trajectories import store_folder
from harness.diffusion.counting import count_flops
from harness.diffusion.randomness import keyed_initialisation
from harness.files import file_hash, write_tensors
from harness.methods import METHODS
from harness.networks.backbones import build
from harness.networks.backbones.diffusers import DiffusersBackbone
from harness.networks.passes import count_passes
from harness.solvers import sample
from harness.tasks import Task
from harness.tasks.spec import Weights
from harness.training.case import Case, losses, weights

CPU = torch.device("cpu")
NETWORK = network_of(CLASSES[0], in_channels=1, out_channels=2)


@pytest.fixture
def task(tiny: Task, tmp_path: Path) -> Task:
    """The tiny task with a teacher of diffusers."""
    with keyed_initialisation(0, "teacher"):
        network = build(NETWORK)
    file = tmp_path / "teacher.safetensors"
    write_tensors(file, network.state_dict())
    old = tiny.trained("teacher")
    teacher = Weights(file=str(file), sha256=file_hash(file), training=old.training)
    update = {"network": NETWORK, "teacher": teacher}
    return Task(tiny.spec.model_copy(update=update))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ard", {"history_layers": 2, "heads": "per_step", "noise_channels": True}),
        ("ard", {"history_layers": 1, "step_counts": [1, 2], "own_history": 0.5}),
        (
            "ard",
            {"history_layers": 1, "gan_from": 0.0, "gan_warmup_steps": 1, "gan_virtual_batch": 2},
        ),
        ("dmd2", {}),
        ("meanflow", {}),
        ("denoising", {}),
    ],
)
def test_training_moves_every_player(
    method: str, options: dict[str, Any], task: Task, tmp_path: Path
) -> None:
    case = Case(method, task, tmp_path, options)
    built = case.build()
    before = weights(built)
    trainer = case.trainer(built)
    trainer.train()
    after = weights(built)
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    for player in built.players:
        assert any(
            not torch.equal(before[name], value)
            for name, value in after.items()
            if name.startswith(f"{player}.")
        )
    assert case.sample(built).shape == (3, 1, 8, 8)


def test_an_untrained_student_is_its_teacher(task: Task, tmp_path: Path) -> None:
    case = Case("ard", task, tmp_path, {"history_layers": 0})
    method = case.build()
    x_T, cond = task.evaluation_inputs(0)
    teacher = method.untrained_sampler()
    assert teacher is not None
    with torch.no_grad():
        expected = teacher(x_T[:3], cond[:3])
    torch.testing.assert_close(case.sample(method), expected, rtol=1e-4, atol=1e-4)


def test_reuse_keeps_the_passes_and_saves_work(task: Task) -> None:
    x_T, cond = task.evaluation_inputs(0)
    found = []
    for options in ({}, {"reuse_every": 2, "reuse_below": 1}):
        cls = METHODS["teacher"]
        method = cls(cls.Config(**options), task.teacher(CPU), task, 4, 0)
        assert isinstance(method.sampled_network, DiffusersBackbone)

        def run(count: int, method: Any = method) -> torch.Tensor:
            with torch.no_grad():
                return sample(
                    method.solver, method.student, x_T[:count], method.levels, cond[:count]
                )

        with count_passes(method.sampled_network) as passes:
            images = run(3)
        found.append((images, passes.total, count_flops(lambda run=run: run(1))))
    (plain, passes_of_plain, flops), (reused, passes_of_reused, fewer) = found
    assert passes_of_plain == passes_of_reused
    assert fewer < 0.9 * flops
    assert float((plain - reused).abs().max()) > 1e-4


def test_weights_that_are_read_by_another_rule_are_another_teacher(task: Task, tiny: Task) -> None:
    """Their trajectories lie in another folder; those of our own networks stay where they are."""
    official = {**NETWORK, "source": "official"}
    other = Task(task.spec.model_copy(update={"network": official}), task.folder)
    assert task.teacher_hash == other.teacher_hash
    assert task.hashes["teacher"] != other.hashes["teacher"]
    assert store_folder(task.recipe) != store_folder(other.recipe)
    assert tiny.recipe.teacher == tiny.hashes["teacher"] == tiny.teacher_hash
