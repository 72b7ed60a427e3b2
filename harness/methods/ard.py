"""ARD, autoregressive distillation (Kim et al. 2025, arXiv 2504.11295).

The student predicts the next point of the teacher's trajectory from all points so far (eq. 4):

    x_hat_{tau_{s-1}} = G(x_{tau_S}, ..., x_{tau_s})

The lowest N layers attend to earlier states under a block mask; the layers above attend to their
own state alone. Training is one masked forward pass over all S states. Sampling caches the keys and
values of the lowest N layers. N = 0 is step distillation, whose file holds everything but the mask.

Points are noisy states, predicted in the teacher's parametrisation by one head. The released code
uses x_0-predictions and one head for each step: `protocol: released`. On its own grid of levels it
is `protocol: released, grid: released`.

Untrained, the first step under the defaults is that of the unguided teacher under S-step DDIM.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from harness.errors import UsageError
from harness.methods.base import METHODS, Problem
from harness.methods.parts.points import DistillationConfig
from harness.methods.step_distillation import TUNES, StepDistillation, TrajectoryDistillation
from harness.networks.masks import Visible, causal, keep_first, window


class ARDConfig(DistillationConfig):
    history_layers: int = Field(6, ge=0, json_schema_extra={"in_label": True})
    """Number of lowest layers that attend to earlier states (paper: N); 0 is step distillation."""
    mask: Literal["causal", "keep_first"] = "causal"
    """Visible states: all earlier ones (M4; M2 with a history_depth), or the noise alone (M3)."""
    history_depth: int | None = Field(None, ge=0)
    """Number of visible earlier states under the causal mask; none means all, 0 is M1."""


@METHODS.register("ard")
class ARD(TrajectoryDistillation):
    """Autoregressive distillation: the lowest N layers attend to earlier states."""

    Config = ARDConfig
    tunes: ClassVar = {**TUNES, "history_layers": (1, 3, 6)}
    reference: ClassVar = (
        "Kim et al. 2025, arXiv 2504.11295, eq. 4 and sec. 3.2; "
        "its released code for protocol and grid 'released'"
    )

    @staticmethod
    def history(config: Any) -> tuple[int, Visible]:
        if config.mask == "keep_first":
            return config.history_layers, keep_first
        return config.history_layers, causal if config.history_depth is None else window(
            config.history_depth
        )

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        super().check(config, task, num_steps)
        if config.mask == "keep_first" and config.history_depth is not None:
            raise UsageError(
                "history_depth is an option of mask 'causal'; "
                "under mask 'keep_first' only the noise is visible: leave it out"
            )

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        longest = max(config.step_counts, default=num_steps)
        if config.history_layers == 0 or config.history_depth == 0 or longest == 1:
            shared = config.model_dump(exclude={"history_layers", "mask", "history_depth"})
            return StepDistillation.canonical(DistillationConfig(**shared), num_steps)
        if config.history_depth is not None and config.history_depth >= longest - 1:
            config = config.model_copy(update={"history_depth": None})
        if longest == 2:  # two states: the history is the noise
            config = config.model_copy(update={"mask": "causal"})
        return METHODS.name_of(cls), config.without_idle_stages()
