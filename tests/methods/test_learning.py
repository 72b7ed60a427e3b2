"""A hundred steps on the exact mixture move every method's small student towards it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.data.trajectories import open_store
from harness.diffusion.randomness import keyed_initialisation
from harness.methods import METHODS
from harness.metrics.fidelity import frechet_distance, sample_moments
from harness.solvers import sample
from harness.tasks import MixtureTask, load_task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 100
OPTIONS: dict[str, dict[str, Any]] = {
    "ard": {"history_layers": 2},
    # curricula and averages in steps, for a run of a hundred
    "ayf": {"lr": 1e-3, "ramp_steps": 30},
    "consistency-distillation": {"target_half_life": 1.35},
    "consistency-training": {"target_half_life": 1.35, "curriculum_steps": 100},
    "ctm": {"target_half_life": 1.35},
    "ect": {"stage_steps": 12},
    "ict": {"stage_steps": 12},
    "tcm": {"stage_steps": 6},
    "lcm": {"target_half_life": 1.35},
    "dmd2": {
        "student_every": 1,
        "lr": 1e-3,
        "fake_lr": 3e-3,
        "student_gan": 0.0,
        "fake_gan": 0.0,
    },  # distribution matching alone
    "freeflow": {"lr": 3e-3},
    "meanflow": {"source": "teacher"},
    "progressive": {"rounds": 1},
    "rcm": {"ramp_steps": 30, "student_every": 1, "lr": 1e-3, "fake_lr": 3e-3},
    # Recursive consistency alone: what rectifies samples wants some that resemble the data.
    "twinflow": {"target_half_life": 1.35, "h": 0.3, "rectify": 0.0, "lr": 3e-3},
    "shortcut": {"bootstrap": 0.75, "finest": 4},  # few sizes of steps, each often
}
APART = {
    "denoising",
    "teacher",
    "knowledge-distillation",
    "drifting",  # needs a classifier
    "ladd",  # needs a teacher with blocks
    "imf",  # 0.78 of the distance is left after a hundred steps, and 0.48 after three hundred
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        whole = load_task("mixture").spec
        trajectories = whole.trajectories.model_copy(update={"count": 2048})
        task = MixtureTask(
            whole.model_copy(
                update={"network": {**whole.network, "depth": 2}, "trajectories": trajectories}
            )
        )
        yield task, open_store(task.recipe, task.teacher(CPU), CPU)


EVERY_RUN = {"ard", "consistency-distillation", "ect", "imm", "ladd", "step-distillation"}
"""Methods of every run; `tox -e slow` has all. Fixed points and contracts are in every run."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EVERY_RUN else [pytest.mark.slow])
        for name in sorted(set(METHODS.names()) - APART)
    ],
)
def test_a_student_moves_towards_the_mixture(name: str, mixture: Any, tmp_path: Path) -> None:
    task, store = mixture
    assert isinstance(task, MixtureTask)
    cls = METHODS[name]
    config = cls.Config(**OPTIONS.get(name, {}))
    with keyed_initialisation(0, name):
        method = cls(config, task.teacher(CPU), task, 1, STEPS)
    x_T, cond = task.evaluation_inputs(0)

    def distance() -> float:
        with torch.no_grad():
            images = sample(method.solver, method.student, x_T[:2000], method.levels, cond[:2000])
        return frechet_distance(sample_moments(images.flatten(1)), task.mixture.moments())

    before = distance()
    sources = {"data": task.split.train, "trajectory": store}
    Trainer(
        method, sources, TrainSettings(STEPS, 128, 0, sample_group=config.sample_group), None, CPU
    ).train()
    assert distance() < 0.75 * before
