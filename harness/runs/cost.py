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
from harness.methods import METHODS, Method, MethodConfig
from harness.metrics.compute import count_macs, macs_by_kind, parameters
from harness.networks.adapters import adapters_of, merged
from harness.networks.backbones import Backbone, build
from harness.networks.backbones.dit import sized
from harness.networks.backbones.text import text_widths
from harness.networks.classifier import Classifier
from harness.networks.history import Cache
from harness.networks.passes import count_passes
from harness.solvers import sample
from harness.training.estimate import NOMINAL_STEPS
from harness.training.memory import Memory, kept_bytes, networks_bytes

LATENT_FACTOR, LATENT_CHANNELS, PIXEL_CHANNELS = 8, 4, 3


@dataclass(frozen=True)
class PaperProblem:
    """A problem without data or weights: a network, and the shapes of what it denoises and reads.

    Attributes:
        text_length: tokens of a prompt; 0 means class labels.
    """

    shape: tuple[int, int, int]
    num_classes: int
    network_options: dict[str, Any]
    schedule: Schedule
    trajectory_steps: int
    prediction_type: Any = "eps"
    data_std: float = 0.5
    guidance_scale: float = 1.0
    network_teacher: bool = True
    own_classifier: bool = True
    grid: str = "few-step"
    text_length: int = 0

    @property
    def null(self) -> Condition:
        return self.condition("cpu") if self.text_length else Conditions(self.num_classes).null

    def classifier(self, device: torch.device) -> Classifier:
        """A classifier of these shapes, without weights like all networks here."""
        return Classifier(self.shape, self.num_classes)

    def condition(self, device: str) -> Condition:
        """A condition of the shapes that the network takes, a batch of one."""
        if not self.text_length:
            return Condition(torch.empty(1, dtype=torch.long, device=device))
        width, pooled = text_widths(self.network_options)
        return Condition(
            text=torch.zeros(1, self.text_length, width, device=device),
            pooled=torch.zeros(1, pooled, device=device) if pooled else None,
        )

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
        cache: bytes of the keys and values that reach the last step from those before, in float32.
    """

    macs: int
    plain_macs: int
    by_kind: dict[str, int]
    nfe: float
    parameters: int
    trained_parameters: int
    merged_macs: int
    cache: int = 0

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


def method_on_meta(
    method: str, config: MethodConfig, problem: PaperProblem, num_steps: int
) -> tuple[Backbone, Method]:
    """The teacher's network and a method, without memory for their weights.

    Raises UsageError if the options do not suit the problem.
    """
    METHODS[method].check(config, problem, num_steps)
    with without_weights():
        network = build(problem.network_options)
        denoiser = Denoiser(network, problem.schedule, problem.prediction_type)
        teacher = Guided(denoiser, 1.0, problem.null)
        return network, METHODS[method](config, teacher, problem, num_steps, NOMINAL_STEPS)


def training_memory(
    method: str, config: MethodConfig, problem: PaperProblem, num_steps: int, passes: float
) -> Memory:
    """The memory that a method's training needs.

    Args:
        passes: passes of the network whose tensors a loss keeps, for each sample.
    """
    network, built = method_on_meta(method, config, problem, num_steps)
    return Memory(networks_bytes(built, network), passes * pass_bytes(problem))


def pass_bytes(problem: PaperProblem) -> int:
    """Bytes that a backward pass needs of one pass of the network for one sample, in float32."""
    with without_weights():
        network = build(problem.network_options)
    x, time = torch.empty(1, *problem.shape, device="meta"), torch.empty(1, device="meta")
    cond = problem.condition("meta")
    return kept_bytes(lambda: network(x, time, cond), network.parameters())


def sampling_cost_on_meta(
    method: str, config: MethodConfig, problem: PaperProblem, num_steps: int
) -> SamplingCost:
    """Counts a method's sampler as it runs, for one sample without guidance."""
    network, built = method_on_meta(method, config, problem, num_steps)
    x = torch.empty(1, *problem.shape, device="meta")
    cond, sampled = problem.condition("meta"), built.sampled_network
    trained = built.student_player.trained if built.players else []
    time, kept = torch.empty(1, device="meta"), cond.keeping()
    with torch.no_grad():
        first, later = (count_macs(lambda: network(x, time, kept)) for _ in range(2))
    with torch.no_grad(), count_passes(sampled) as passes, carried_caches(sampled) as caches:
        by_kind = macs_by_kind(
            lambda: sample(built.solver, built.student, x, built.levels, cond, lambda name: x)
        )
    macs = merged_macs = sum(by_kind.values())
    if adapters_of(sampled):
        student = merged(built.student)
        with torch.no_grad():
            merged_macs = count_macs(
                lambda: sample(built.solver, student, x, built.levels, cond, lambda name: x)
            )
    carried = caches[-2].keys_values if len(caches) > 1 else ()
    return SamplingCost(
        macs=macs,
        plain_macs=first + later * (passes.total - 1),
        by_kind=by_kind,
        nfe=passes.total,
        parameters=parameters(sampled),
        trained_parameters=sum(p.numel() for p in trained),
        merged_macs=merged_macs,
        cache=sum(tensor.nbytes for pair in carried for tensor in pair),
    )


@contextmanager
def carried_caches(network: nn.Module) -> Iterator[list[Cache]]:
    """The caches that a network with history returns inside the block, one for each step."""
    found: list[Cache] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple) and isinstance(output[1], Cache):
            found.append(output[1])

    handle = network.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()
