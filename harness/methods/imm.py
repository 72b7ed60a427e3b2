"""IMM, inductive moment matching (Zhou et al. 2025, arXiv 2503.07565).

Samples jump to s from t and, without gradients, from a time r a little nearer to s on the same line
between x_0 and eps. The two sets of ends must agree in all moments of a kernel, within groups of
`group` samples that share (s, r, t) (eq. 12):

    L = mean_ij [k(y_t^i, y_t^j) + k(y_r^i, y_r^j) - 2 k(y_t^i, y_r^j)]
    y_t = G(x_t, t, s),    y_r = sg G(x_r, r, s)

k is the Laplace kernel `exp(-|y - y'| / (b sqrt(D)))` for samples of one label, else 0; so it is a
kernel of sample and label. At r, sigma / alpha is smaller by a fixed part of its range. G is
DDIM's step with a prediction that has s as an input, as in `ctm.py`.

Ours: the weight over times is 1, the kernel's width does not depend on times, and it uses labels.
The method learns the distribution of the data.

Untrained, from the teacher's weights: the student is the unguided teacher under S-step DDIM. Exact:
the loss is 0, its minimum, if jumps from t and r end in the same points.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.student import (
    DenoisingStudent,
    Jumps,
    StudentConfig,
    largest_sigma,
    sigma_ve,
    time_of_flow,
)
from harness.solvers.ddim import ddim_step


class IMMConfig(StudentConfig):
    group: int = Field(16, ge=1, le=4096)
    """Samples whose moments are matched together (paper: M = 4, without labels)."""
    gap: int = Field(12, ge=1, le=30)
    """sigma / alpha falls by 2^-gap of its range from t to r."""
    bandwidth: float = Field(1.0, gt=0, le=1e6)
    """Width b of the kernel."""

    @property
    def sample_group(self) -> int:
        return self.group


@METHODS.register("imm")
class IMM(DenoisingStudent):
    """Inductive moment matching: jumps from two times agree in all moments of a kernel."""

    Config = IMMConfig
    any_step = True
    needs_labels = True
    scalars = ("target",)
    target = "data"
    reference: ClassVar = "Zhou et al. 2025, arXiv 2503.07565, eq. 12 and alg. 1"

    def __init__(
        self,
        config: IMMConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.solver = Jumps(lambda t, s: {"target": self.schedule.network_time(s)})

    def times(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Times t > r >= s, float64 [B] each; a group has those of its first sample."""
        groups = (
            torch.arange(len(batch.index), device=batch.index.device)
            // self.config.group
            * self.config.group
        )
        tau = (batch.uniform("t")[groups] * self.largest_tau).clamp(min=1e-2)
        t, s = (
            time_of_flow(self.schedule, tau),
            time_of_flow(self.schedule, batch.uniform("s")[groups] * tau),
        )
        widest = largest_sigma(self.schedule)
        r = self.schedule.time_of(
            (sigma_ve(self.schedule, t) - widest * 2.0**-self.config.gap).clamp(min=1e-6)
        )
        return t, torch.maximum(r, s), s

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """G from t to s, [B] each."""
        prediction = self.model(x_t, t, cond.with_scalars(target=self.schedule.network_time(s)))
        return ddim_step(prediction, s, self.schedule)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        t, r, s = self.times(batch)
        eps = batch.normal("eps", x_0.shape[1:])
        from_t = self.jump(self.noised(x_0, eps, t), t, s, cond)
        with torch.no_grad():
            from_r = self.jump(self.noised(x_0, eps, r), r, s, cond)
        a, b = (y.flatten(1).unflatten(0, (-1, self.config.group)) for y in (from_t, from_r))
        labels = cond.classes.unflatten(0, (-1, self.config.group))
        same = labels.unsqueeze(1) == labels.unsqueeze(2)

        def kernel(x: Tensor, y: Tensor) -> Tensor:
            distance = ((x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1) + 1e-8).sqrt()
            return same * torch.exp(-distance / (self.config.bandwidth * x.shape[-1] ** 0.5))

        loss = (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).mean()
        return loss, {"mse": (from_t - from_r).detach().square().mean()}
