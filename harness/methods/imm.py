"""IMM, inductive moment matching (Zhou et al. 2025, arXiv 2503.07565).

Samples jump to s from t and, without gradients, from a time r a little nearer to s on the same line
between x_0 and eps. The two sets of ends must agree in all moments of a kernel, within groups of
`group` samples that share (s, r, t) (eq. 12):

    L = mean_ij [k(y_t^i, y_t^j) + k(y_r^i, y_r^j) - 2 k(y_t^i, y_r^j)]
    y_t = G(x_t, t, s),    y_r = sg G(x_r, r, s)

k is the Laplace kernel `exp(-|y - y'| / (b c D))` for samples of one label, else 0; so it is
a kernel of sample and label. c is what an error of a v network is multiplied by in the jump from t
to s, `c = alpha_s sigma_t - alpha_t sigma_s`, which on a flow is t - s. The paper scales the kernel
by 1 / c_out(s, t) likewise. So differences count in units of the network's output at all times. An
eps network's jump takes its gradient times alpha_t (`DenoisingStudent.conditioned`).

Times t are uniform in the schedule's time, and s below t is too. At r, sigma / alpha is smaller by
a fixed part of its range. G is DDIM's step with a prediction that has s as an input, as in
`ctm.py`.

Ours: the weight over times is 1, and the kernel uses labels, so that a group of 16 holds one or two
partners of a sample among ten classes (the paper's M = 4 has three). The method learns the
distribution of the data, without guidance.

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
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import Jumps
from harness.methods.parts.student import DataConfig, DenoisingStudent, largest_sigma, sigma_ve
from harness.solvers.ddim import ddim_step


class IMMConfig(DataConfig):
    group: int = Field(16, ge=1, le=4096)
    """Samples whose moments are matched together (paper: M = 4, without labels)."""
    gap: int = Field(12, ge=1, le=30)
    """sigma / alpha falls by 2^-gap of its range from t to r."""
    bandwidth: float = Field(1.0, gt=0, le=1e6)
    """Width b of the kernel, in units of the network's output."""

    @property
    def sample_group(self) -> int:
        return self.group


@METHODS.register("imm")
class IMM(DenoisingStudent):
    """Inductive moment matching: jumps from two times agree in all moments of a kernel."""

    Config = IMMConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "group": (16, 32, 64),
        "gap": (6, 9, 12),
        "bandwidth": Span(0.1, 3.0, log=True),
    }
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
        t = batch.uniform("t")[groups].clamp(min=1e-2)
        s = batch.uniform("s")[groups] * t
        widest = largest_sigma(self.schedule)
        r = self.schedule.time_of(
            (sigma_ve(self.schedule, t) - widest * 2.0**-self.config.gap).clamp(min=1e-6)
        )
        return t, torch.maximum(r, s), s

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """G from t to s, [B] each."""
        prediction = self.model(x_t, t, cond.with_scalars(target=self.schedule.network_time(s)))
        return self.with_gradient(ddim_step(prediction, s, self.schedule), t)

    def width(self, t: Tensor, s: Tensor) -> Tensor:
        """The kernel's width b c of each group, [G, 1, 1]."""
        (a, sigma), (b, sigma_s) = (self.schedule.alpha_sigma(level) for level in (t, s))
        widths = (b * sigma - a * sigma_s).clamp(min=1e-3) * self.config.bandwidth
        return widths[:: self.config.group].float().reshape(-1, 1, 1)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data[0], self.with_dropout(batch, batch.data[1])
        t, r, s = self.times(batch)
        eps = batch.normal("eps", x_0.shape[1:])
        from_t = self.jump(self.noised(x_0, eps, t), t, s, cond)
        with torch.no_grad():
            from_r = self.jump(self.noised(x_0, eps, r), r, s, cond)
        a, b = (y.flatten(1).unflatten(0, (-1, self.config.group)) for y in (from_t, from_r))
        labels = cond.classes.unflatten(0, (-1, self.config.group))
        same, width = labels.unsqueeze(1) == labels.unsqueeze(2), self.width(t, s)

        def kernel(x: Tensor, y: Tensor) -> Tensor:
            distance = ((x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1) + 1e-8).sqrt()
            return same * torch.exp(-distance / (width * x.shape[-1]))

        loss = (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).mean()
        return loss, {"mse": (from_t - from_r).detach().square().mean()}
