"""Settings of a run's training that do not depend on the method, and the bill."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
"""The type that layers compute in; weights are float32."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which losses are called on a device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class TrainSettings:
    """How a run is trained.

    Attributes:
        total_steps: length of the run.
        batch_size: samples per step.
        micro_batch_size: samples per forward pass; None is the whole batch.
        seed: seeds all randomness of the run.
        precision: "bf16" runs the losses under autocast.
        compile: compiles the players' networks with torch.compile. Losses that call a network as
            a whole then use the compiled one.
        checkpoint_seconds: seconds between two checkpoints.
        log_every: steps between two points of the curve.
        sample_group: consecutive samples that a loss treats together.
        counted_samples: samples on which FLOPs are counted.
    """

    total_steps: int
    batch_size: int
    seed: int
    micro_batch_size: int | None = None
    precision: Precision = "fp32"
    compile: bool = False
    checkpoint_seconds: float = 60.0
    log_every: int = 10
    sample_group: int = 1
    counted_samples: int = 8


@dataclass(frozen=True)
class Execution:
    """How a run is executed. No number depends on it.

    Attributes:
        shard: whether ranks divide the networks among them.
        checkpoint_activations: whether blocks keep their inputs alone and run again in the
            backward pass.
        snapshots: how often in a run two averages of the student are written, from which one of
            any width is made afterwards.
    """

    shard: bool = False
    checkpoint_activations: bool = False
    snapshots: int = 0


PLAIN = Execution()
"""On the device as a whole, with nothing beside the student."""


@dataclass
class Bill:
    """The cost of training.

    Attributes:
        images: samples on which losses were computed.
        flops: training FLOPs, forward and backward, of all networks. Each loss is counted once and
            multiplied.
        seconds: wall time of the steps, without counting FLOPs, compiling and measuring quality.
        peak_memory_bytes: peak memory of the process (CPU) or of the device (CUDA).
        updates: optimizer steps of each player.
        teacher_evaluations: passes through the teacher inside the losses.
    """

    images: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    teacher_evaluations: int = 0


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
