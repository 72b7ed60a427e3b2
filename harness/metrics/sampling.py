"""Samplers: the samples of a noise set, their cost, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from harness import ranks
from harness.data.images import to_uint8
from harness.diffusion.conditions import Condition
from harness.errors import RunFailed
from harness.files import room_for
from harness.metrics.compute import count_macs
from harness.networks.passes import count_passes
from harness.progress import Progress
from harness.solvers import Noise
from harness.tasks import Task

Sampler = Callable[[Tensor, Condition, Noise], Tensor]
"""A function from noise [B, C, H, W] and conditions to samples [B, C, H, W].

Its third argument gives further noise to stochastic samplers.
"""


@torch.no_grad()
def sample_set(
    sampler: Sampler,
    task: Task,
    noise_set: int,
    device: torch.device,
    progress: Progress | None = None,
    count: int | None = None,
) -> Tensor:
    """Samples of one evaluation noise set, or its first `count`: [N, C, H, W] on the CPU."""
    spec = task.spec.evaluation
    n = min(count or spec.samples, spec.samples)
    done = room_for((n, *task.shape))
    parts = [slice(k, min(k + spec.batch_size, n)) for k in range(0, n, spec.batch_size)]

    def sampled(part: slice) -> Tensor:
        x_T, cond = task.evaluation_inputs(noise_set, part)
        noise = task.evaluation_noise(noise_set, part)
        return sampler(x_T.to(device), cond.to(device), noise).float().cpu()

    for part, found in zip(parts, ranks.each(sampled, parts), strict=True):
        done[part] = found
        if progress:
            progress(part.stop, n)
    return done


@torch.no_grad()
def sampling_cost(
    sampler: Sampler, network: nn.Module, task: Task, device: torch.device
) -> tuple[float, int]:
    """NFE and MACs per sample, both counted while the sampler runs."""
    count = 2
    x_T, cond = task.evaluation_inputs(0, slice(count))
    x_T, cond = x_T.to(device), cond.to(device)
    with count_passes(network) as passes:
        macs = count_macs(lambda: sampler(x_T, cond, lambda name: x_T))
    return passes.total / count, macs // count


def sample_grid(
    rows: Sequence[Tensor],
    columns: int = 20,
    scale: int = 5,
    gap: int = 2,
    draw: Callable[[Tensor], Tensor] = to_uint8,
) -> Tensor:
    """A picture of samples from the same noise, one row for each tensor [n, C, H, W].

    Each row shows the first `columns` samples; pixels are enlarged `scale` times.

    Args:
        draw: makes uint8 pictures [n, 1 or 3, H, W] of samples; see `drawable`.

    Returns:
        uint8 [height, width, 3].
    """
    shown = [row[:columns] for row in rows]
    pictures = draw(torch.cat(shown)).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    enlarged = pictures.split([len(row) for row in shown])
    framed = [nn.functional.pad(row, (gap, gap, gap, gap), value=255) for row in enlarged]
    picture = torch.cat([torch.cat(list(row), -1) for row in framed], -2)
    return picture.expand(3, -1, -1).permute(1, 2, 0).contiguous()


def check_finite(images: Tensor, noise_set: int) -> None:
    """Raises RunFailed for samples that are not finite; 8 bits would turn NaN into any colour."""
    if not bool(images.isfinite().all()):
        raise RunFailed(f"samples of noise set {noise_set} are not finite")
