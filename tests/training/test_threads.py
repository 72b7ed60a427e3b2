"""One thread and two give the same numbers but for rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from harness.diffusion.randomness import keyed_initialisation
from harness.methods import METHODS
from harness.metrics.features import classify
from harness.metrics.fidelity import fid
from harness.metrics.sampling import sample_set
from harness.runs.build import sampler_of
from harness.tasks import load_task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS, BATCH, SAMPLES = 2, 16, 40


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trained(count: int) -> tuple[list[float], Tensor, float]:
    """Losses, samples and their FID after a few steps of ECT on digits, by so many threads."""
    torch.set_num_threads(count)
    task, cls = load_task("digits"), METHODS["ect"]
    with keyed_initialisation(0, "ect"):
        method = cls(cls.Config(), task.teacher(CPU), task, 1, STEPS)
    settings = TrainSettings(STEPS, BATCH, 0, log_every=1)
    trainer = Trainer(method, {"data": task.split.train}, settings, None, CPU)
    trainer.train()
    samples = sample_set(sampler_of(method), task, 0, CPU, count=SAMPLES)
    network = task.classifier(CPU)
    reference = classify(network, task.split.train.images)[0]
    losses = [point["loss"] for point in trainer.curve]
    return losses, samples, fid(classify(network, samples)[0], reference)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_two_threads_give_the_numbers_of_one() -> None:
    (losses, samples, distance), (others, again, other) = trained(1), trained(2)
    assert others == pytest.approx(losses, rel=1e-4)
    assert float((again - samples).square().mean().sqrt()) < 1e-4
    assert other == pytest.approx(distance, rel=1e-4)
