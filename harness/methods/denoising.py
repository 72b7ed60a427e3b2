"""Teacher training: denoising score matching and flow matching.

    L = |eps - eps_theta(alpha_t x_0 + sigma_t eps, t, c)|^2
    L = |v - v_theta(alpha_t x_0 + sigma_t eps, t, c)|^2

Sources: Ho et al. 2020, arXiv 2006.11239, eq. 14; for v = eps - x_0 on a flow Ma et al. 2024,
arXiv 2401.08740, eq. 8.

The loss follows the prediction type of the task's network. t is uniform over DiT's levels, and the
label is dropped at random for guidance. The student of this method is the future teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from harness.diffusion.denoiser import Denoiser, Guided, expand_to, of_pair
from harness.diffusion.schedules import NUM_LEVELS, few_step_levels
from harness.methods.base import METHODS, Batch, Method, Problem, Update
from harness.methods.parts.options import OptimizerConfig, Span
from harness.networks.backbones import build
from harness.solvers import DDIM


@METHODS.register("denoising")
class Denoising(Method):
    """Teacher training: denoising or flow matching on real images, from random weights."""

    class Config(OptimizerConfig):
        label_dropout: float = Field(0.1, ge=0, lt=1)
        """Share of samples whose condition becomes the null condition."""

    sources = frozenset({"data"})
    target = "data"
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "weight_decay": (0.0, 0.01, 0.1),
        "label_dropout": (0.1, 0.2),
    }
    init: Literal["teacher", "random"] = "random"
    reference: ClassVar = (
        "Ho et al. 2020, arXiv 2006.11239, eq. 14; Peebles & Xie 2023, arXiv 2212.09748"
    )

    def __init__(
        self,
        config: Config,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        self.config, self.task = config, task
        network = build(task.network_options)
        self.players = {"student": config.player(network, total_steps)}
        ema = self.players["student"].ema
        assert ema is not None
        self.student = Denoiser(ema.module, task.schedule, task.prediction_type)
        self.solver, self.levels = DDIM(), few_step_levels(num_steps)

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        t = (batch.uniform("t") * NUM_LEVELS).floor().add(1) / NUM_LEVELS
        eps = batch.normal("eps", x_0.shape[1:])
        cond = cond.replaced(batch.uniform("dropout") < self.config.label_dropout, self.task.null)
        schedule, kind = self.task.schedule, self.task.prediction_type
        alpha, sigma = (expand_to(c, x_0) for c in schedule.alpha_sigma(t))
        denoiser = Denoiser(self.players["student"].module, schedule, kind)
        found = denoiser(alpha * x_0 + sigma * eps, t, cond)
        target = getattr(of_pair(x_0, eps, t, schedule), kind)
        loss = (getattr(found, kind) - target).square().mean()
        return loss, {"mse": loss.detach()}
