"""A run's method and sampler, and the samples of the reference beside which a task's rows stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from harness.data.cache import cached_samples, samples_folder
from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.diffusion.randomness import keyed_initialisation
from harness.files import read_tensors
from harness.methods import Method
from harness.metrics.sampling import Sampler, sample_set
from harness.runs.finished import student_weights
from harness.runs.identity import samples_key
from harness.runs.log import Report, silent
from harness.runs.resolve import Resolved, reference_of
from harness.solvers import Noise, sample
from harness.tasks import Task


def build(resolved: Resolved, teacher: Guided, device: torch.device) -> Method:
    """A run's method on a device; the run's seed initialises its networks."""
    r = resolved
    with keyed_initialisation(r.settings.seed, r.method):
        method = r.cls(r.config, teacher, r.task, r.num_steps, r.settings.total_steps)
    if r.parent:
        method.start_from(read_tensors(r.parent.weights, r.parent.sha256))
    method.to(device)
    if r.parent and r.settings.total_steps:  # after the move: the state follows its parameters
        kept = r.parent.optimizer
        method.continue_optimizer(read_tensors(kept) if kept else None)
    return method


def sampler_of(method: Method, grad: bool = False) -> Sampler:
    """A method's student under its solver, from noise and conditions to samples.

    Args:
        grad: whether gradients go through it.
    """

    def sampler(x_T: Tensor, cond: Condition, noise: Noise) -> Tensor:
        return sample(method.solver, method.student, x_T, method.levels, cond, noise)

    return sampler if grad else torch.no_grad()(sampler)


def samples_of(
    resolved: Resolved,
    sampler: Sampler,
    noise_set: int,
    device: torch.device,
    report: Report = silent,
) -> Tensor:
    """A run's samples of a noise set, [N, C, H, W]; those of a training-free run are cached."""

    def compute() -> Tensor:
        return sample_set(
            sampler, resolved.task, noise_set, device, report(f"sampling, noise set {noise_set}")
        )

    if resolved.settings.total_steps:
        return compute()
    return cached_samples(samples_key(resolved, noise_set, device), compute)


def samples_again(
    resolved: Resolved, folder: Path, device: torch.device, report: Report = silent
) -> Callable[[int], Tensor]:
    """What makes a finished run's samples of a noise set, with the student in its folder."""

    @cache
    def sampler() -> Sampler:
        method = build(resolved, resolved.task.teacher(device), device)
        if method.players:
            method.start_from(student_weights(folder))
        return sampler_of(method)

    return lambda noise_set: samples_of(resolved, sampler(), noise_set, device, report)


class Reference:
    """A task's reference run: its sampler, and its cached samples by noise set.

    Args:
        teacher: the task's teacher, if it is loaded already.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        report: Report = silent,
        teacher: Guided | None = None,
    ):
        self.resolved, self.device, self.report = reference_of(task), device, report
        self.teacher = teacher

    @cached_property
    def sampler(self) -> Sampler:
        """From noise and conditions to the reference's samples."""
        teacher = self.teacher or self.resolved.task.teacher(self.device)
        return sampler_of(build(self.resolved, teacher, self.device))

    def samples(self, noise_set: int) -> Tensor:
        """[N, C, H, W], from the cache or made now."""
        return samples_of(self.resolved, self.sampler, noise_set, self.device, self.report)

    def has_samples(self, noise_set: int) -> bool:
        """Whether a noise set's samples are in the cache."""
        return samples_folder(samples_key(self.resolved, noise_set, self.device)).exists()
