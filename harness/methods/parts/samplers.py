"""The samplers of few-step students.

`ConsistencySteps` maps to t = 0 and adds fresh noise. `Jumps` takes DDIM's step between
neighbouring levels with a student that knows the jump.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Model, expand_to, on_device
from harness.solvers import Noise, Solver
from harness.solvers.ddim import ddim_step


class ConsistencySteps(Solver):
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, alg. 1).

    Each step maps to x_0 = f(x_t, t) and adds fresh noise up to the next level.

    Args:
        scalars: constant inputs of the student by name.
    """

    stochastic: ClassVar = True

    def __init__(self, **scalars: float):
        self.scalars = scalars

    def init(self, model: Model, x_T: Tensor, cond: Condition) -> int:
        return 0

    def step(self, model: Model, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: int,
             noise: Noise | None) -> tuple[Tensor, Tensor, int]:  # fmt: skip
        scalars = {
            name: torch.full((len(x_t),), value, device=x_t.device)
            for name, value in self.scalars.items()
        }
        x_0 = model(x_t, t, cond.with_scalars(**scalars)).x_0
        if float(s) == 0:
            return x_0, x_0, state + 1
        assert noise is not None
        alpha, sigma = (expand_to(c, x_0) for c in model.schedule.alpha_sigma(s))
        return alpha * x_0 + sigma * noise(f"step {state + 1}").to(x_0), x_0, state + 1


class Jumps(Solver):
    """DDIM's step with a student that takes inputs that depend on the jump.

    Args:
        scalars: from t and s, 0-d each, to the inputs by name, 0-d or [B].
    """

    def __init__(self, scalars: Callable[[Tensor, Tensor], dict[str, Tensor]]):
        self.scalars = scalars

    def step(self, model: Model, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: None,
             noise: Noise | None) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        scalars = {
            name: on_device(value, x_t.device).expand(len(x_t))
            for name, value in self.scalars(t, s).items()
        }
        prediction = model(x_t, t, cond.with_scalars(**scalars))
        return ddim_step(prediction, s, model.schedule), prediction.x_0, None
