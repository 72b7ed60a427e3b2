"""The next commands for a new task, with times that follow from one pass of each network."""

from __future__ import annotations

from collections.abc import Callable

import torch

from harness.diffusion.randomness import Keyed
from harness.networks.backbones import build
from harness.tasks import Task
from harness.training.estimate import shortest
from harness.training.trainer import MILESTONES

TRAINED = 3
"""Forward passes that a pass with its gradient is worth."""
STEPS = 4
"""Sampling steps of ARD's default student, and states of a sample in its training."""

SMALL = 0.05
"""Seconds of a pass below which passes are timed in batches."""


def next_commands(task: Task, file: str, device: torch.device) -> list[tuple[str, float]]:
    """Commands and their seconds: training what is missing, a first run, and its page."""
    one = seconds_a_pass(task, device)
    commands = [
        (f"harness run --task {file} --method ard", run_seconds(task, one)),
        ("harness report", 5.0),
    ]
    if missing := training_seconds(task, one, device):
        return [(f"harness teacher train --task {file}", missing), *commands]
    return [(f"harness run --task {file} --method ard --dry-run", 60 * one), *commands]


def seconds_a_pass(task: Task, device: torch.device) -> float:
    """Seconds of the teacher's pass for one sample, in batches of 32 if the network is small.

    Its weights do not matter, so they are random.
    """
    network = build(task.network_options).to(device).eval()

    def timed(batch: int) -> float:
        x = Keyed("outlook", 0).normal("x", torch.arange(batch), task.shape).to(device)
        cond = task.conditions.balanced(torch.arange(batch)).to(device)
        time = torch.full((batch,), 0.5, device=device)
        return _seconds(device, lambda: network(x, time, cond)) / batch

    one = timed(1)
    return timed(32) if one < SMALL else one


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    with torch.no_grad():
        call()
        return shortest(call, device, 3)


def training_seconds(task: Task, one: float, device: torch.device) -> float:
    """Seconds of what `harness teacher train` has to make; 0 if nothing is missing."""
    total = 0.0
    if (teacher := task.spec.teacher) and teacher.training and not teacher.sha256:
        total += teacher.training.steps * teacher.training.batch_size * TRAINED * one
        spec, samples = task.spec, task.spec.guidance_scan_samples or task.spec.evaluation.samples
        passes = sum(1 if scale == 1 else 2 for scale in spec.guidance_scan)
        total += passes * samples * spec.reference.num_steps * one
    training = getattr(task.spec.features, "training", None)
    if training and not task.trained("features").sha256:
        network = task.new_classifier().to(device)
        x = torch.zeros(32, *task.shape, device=device)
        seconds = _seconds(device, lambda: network(x)) / 32
        total += training.steps * training.batch_size * TRAINED * seconds
    return total


def run_seconds(task: Task, one: float) -> float:
    """Seconds of a first run of ARD: reference, trajectories, training, milestones and samples."""
    spec = task.spec
    guided = 1 if spec.guidance.scale == 1 else 2
    budget = next(iter(spec.budgets.values()))
    reference = spec.evaluation.samples * budget.noise_sets * spec.reference.num_steps * guided
    stored = spec.trajectories.count * spec.trajectories.steps * guided
    training = budget.steps * spec.batch_size * STEPS * TRAINED
    curve = len(MILESTONES) * (spec.evaluation.milestone_samples or spec.evaluation.samples)
    samples = (spec.evaluation.samples * budget.noise_sets + curve) * STEPS
    return (reference + stored + training + samples) * one
