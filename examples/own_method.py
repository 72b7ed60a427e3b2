"""A method of your own from the parts of the others: one jump, on the teacher's pairs.

harness run --plugin examples/own_method.py --method jump --num-steps 1

L = mean |f(x_T) - x_0|^2, times alpha of the step for a network that predicts eps
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from harness.methods.base import METHODS, Batch
from harness.methods.parts.options import Span
from harness.methods.parts.student import DenoisingStudent, StudentConfig


@METHODS.register("jump")
class Jump(DenoisingStudent):
    """The student's x_0-prediction at pure noise learns the end of the teacher's trajectory."""

    Config = StudentConfig
    sources = frozenset({"trajectory"})
    reference = "examples/own_method.py"
    default_num_steps = 1
    tunes: ClassVar = {  # what a fair search varies
        "lr": Span(1e-4, 1e-2, log=True),
        "weight_decay": (0.0, 0.01, 0.1),
        "ema_half_life": (0.02, 0.05, 0.1),
    }

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch."""
        path = batch.trajectory
        assert path is not None  # `sources` asks for it
        x_T, x_0 = path.states[:, 0], path.states[:, -1]
        t = torch.ones(len(x_T), dtype=torch.float64, device=x_T.device)
        off = self.model(x_T, t, path.cond).x_0 - x_0
        return self.conditioned(off, t).square().mean(), {"mse": off.detach().square().mean()}
