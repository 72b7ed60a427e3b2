"""The cost of sampling without weights: any method and any network size, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Denoiser, Guided
from harness.diffusion.schedules import GRIDS, Schedule, VPSchedule
from harness.errors import UsageError
from harness.methods import METHODS, MethodConfig
from harness.metrics.compute import count_macs, macs_by_kind, parameters
from harness.networks.adapters import merged
from harness.networks.backbones import build
from harness.networks.backbones.dit import sized
from harness.networks.passes import count_passes
from harness.solvers import sample
from harness.training.estimate import NOMINAL_STEPS

LATENT_FACTOR, LATENT_CHANNELS, PIXEL_CHANNELS = 8, 4, 3


@dataclass(frozen=True)
class PaperProblem:
    """A class-conditional problem with a DiT of the paper's sizes, without data or weights."""

    shape: tuple[int, int, int]
    num_classes: int
    network_options: dict[str, Any]
    schedule: Schedule
    trajectory_steps: int
    prediction_type: Any = "eps"
    data_std: float = 0.5
    guidance_scale: float = 1.0
    network_teacher: bool = True
    grid: str = "few-step"

    @property
    def null(self) -> Condition:
        return Conditions(self.num_classes).null

    @property
    def trajectory_levels(self) -> torch.Tensor:
        return GRIDS[self.grid](self.trajectory_steps)


@dataclass(frozen=True)
class SamplingCost:
    """Multiply-adds of one sample.

    Attributes:
        macs: MACs of the whole sampler.
        plain_macs: MACs of as many passes of the plain network in one run of sampling, which step
            distillation takes. Later passes spare what the first computed of a text.
        by_kind: `macs` by kind of layer.
        nfe: network passes.
        parameters: number of parameters of the sampled network, those of adapters included.
        trained_parameters: those that training changes.
        merged_macs: `macs` once adapters are merged into the weights.
    """

    macs: int
    plain_macs: int
    by_kind: dict[str, int]
    nfe: float
    parameters: int
    trained_parameters: int
    merged_macs: int

    @property
    def extra(self) -> float:
        """What history adds, as a fraction of the plain passes."""
        return self.macs / self.plain_macs - 1


def paper_problem(
    network: str, image_size: int, latent: bool, num_classes: int, num_steps: int
) -> PaperProblem:
    """The problem of a network such as "DiT-XL/2" at an image size in pixels.

    Args:
        latent: whether the network works on latents 8 times smaller, or on pixels.

    Raises UsageError for a size that does not exist or an image that the patches do not divide.
    """
    options = sized({"size": network})
    side, channels = (
        (image_size // LATENT_FACTOR, LATENT_CHANNELS) if latent else (image_size, PIXEL_CHANNELS)
    )
    unit = options["patch_size"] * (LATENT_FACTOR if latent else 1)
    if image_size % unit or image_size < unit:
        where = f"{network} on latents" if latent else network
        raise UsageError(
            f"image_size is {image_size}, but must be a multiple of {unit} for {where}"
        )
    whole = {
        **options,
        "image_size": side,
        "in_channels": channels,
        "num_classes": num_classes,
        "learn_sigma": True,
    }
    return PaperProblem((channels, side, side), num_classes, whole, VPSchedule(), num_steps)


@contextmanager
def without_weights() -> Iterator[None]:
    """Makes networks on the meta device inside the block, where they take no memory."""

    def weight(module: nn.Module, name: str, value: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(value.detach().to("meta"), value.requires_grad)

    # The return value of a registration hook replaces the registered value.
    hooks = (
        register_module_parameter_registration_hook(weight),  # type: ignore[arg-type]
        register_module_buffer_registration_hook(
            lambda module, name, value: value if value is None else value.to("meta")
        ),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sampling_cost_on_meta(
    method: str, config: MethodConfig, problem: PaperProblem, num_steps: int
) -> SamplingCost:
    """Counts a method's sampler as it runs, for one sample without guidance."""
    METHODS[method].check(config, problem, num_steps)
    x = torch.empty(1, *problem.shape, device="meta")
    cond = Condition(torch.empty(1, dtype=torch.long, device="meta"))
    with without_weights():
        network = build(problem.network_options)
        denoiser = Denoiser(network, problem.schedule, problem.prediction_type)
        teacher = Guided(denoiser, 1.0, problem.null)
        built = METHODS[method](config, teacher, problem, num_steps, NOMINAL_STEPS)
    sampled = built.sampled_network
    trained = built.student_player.trained if built.players else []
    time, kept = torch.empty(1, device="meta"), cond.keeping()
    with torch.no_grad():
        first, later = (count_macs(lambda: network(x, time, kept)) for _ in range(2))
    with torch.no_grad(), count_passes(sampled) as passes:
        by_kind = macs_by_kind(
            lambda: sample(built.solver, built.student, x, built.levels, cond, lambda name: x)
        )
    student = merged(built.student)
    with torch.no_grad():
        merged_macs = count_macs(
            lambda: sample(built.solver, student, x, built.levels, cond, lambda name: x)
        )
    return SamplingCost(
        macs=sum(by_kind.values()),
        plain_macs=first + later * (passes.total - 1),
        by_kind=by_kind,
        nfe=passes.total,
        parameters=parameters(sampled),
        trained_parameters=sum(p.numel() for p in trained),
        merged_macs=merged_macs,
    )
