"""Feature caching: steps that reuse what the upper blocks of the network added in an earlier one (Chen et al. 2024, Delta-DiT,
arXiv 2406.01125; Ma et al. 2023, DeepCache, arXiv 2312.00858).

Neighbouring steps ask the network nearly the same, so in all but every n-th step only the lowest blocks run, and the difference that
the blocks above them made in the last full step is added to their output. A pass is a pass, whatever part of it ran: the NFE stay,
the MACs fall.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.networks.dit import DiT
from harness.solvers.base import Noise, Solver


class ReusingDiT(nn.Module):
    """A DiT in one step.

    Args:
        lowest: how many blocks run in any case.
        added: what the blocks above them added before, [B, T, d]; None runs them all. Afterwards what this step added or reused.
    """

    def __init__(self, network: DiT, lowest: int, added: Tensor | None):
        super().__init__()
        self.network, self.lowest, self.added, self.reused = network, lowest, added, added

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """As a DiT's."""
        c = self.network.conditioning(t, cond)
        outputs = self.network.block_outputs(x, c, cond)
        for _ in range(self.lowest):
            h = below = next(outputs)
        if self.reused is not None:
            h = below + self.reused
        else:
            for h in outputs:  # noqa: B007
                pass
            self.added = h - below
        return self.network.image(self.network.final_layer(h, c))


@dataclass(frozen=True)
class ReuseState:
    """The state of the solver inside, what the upper blocks added, and the steps taken."""

    inner: Any
    added: Tensor | None = None
    steps: int = 0


class FeatureReuse(Solver):
    """A solver of a teacher that is a DiT, with a full pass in every n-th step.

    Args:
        solver: the solver inside.
        every: n; 1 is the solver alone.
        lowest: how many blocks run in the other steps, from 1 to the depth less 1.
    """

    def __init__(self, solver: Solver, every: int, lowest: int):
        self.solver, self.every, self.lowest = solver, every, lowest

    def init(self, model: Guided, x_T: Tensor, cond: Condition) -> ReuseState:
        return ReuseState(self.solver.init(model, x_T, cond))

    def step(self, model: Guided, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: ReuseState,
             noise: Noise | None) -> tuple[Tensor, Tensor, ReuseState]:  # fmt: skip
        dit = model.denoiser.network
        assert isinstance(dit, DiT)
        network = ReusingDiT(dit, self.lowest, state.added if state.steps % self.every else None)
        x_s, x_0, inner = self.solver.step(model.with_network(network), x_t, t, s, cond, state.inner, noise)
        return x_s, x_0, ReuseState(inner, network.added, state.steps + 1)
