"""Feature caching: a step reuses the contribution of the network's upper blocks to an earlier step.

Sources: Chen et al. 2024, Delta-DiT, arXiv 2406.01125; Ma et al. 2023, DeepCache, arXiv 2312.00858.

Neighbouring steps have similar inputs. So all but every n-th step run the lowest blocks alone and
add the difference that the upper blocks made in the last full step. A partial pass counts as a
pass: the NFE stay, the MACs fall.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.networks.backbones import Backbone
from harness.solvers.base import Noise, Solver


class Reusing(nn.Module):
    """A network for one step.

    Args:
        lowest: number of blocks that always run.
        added: the contribution of the upper blocks to reuse, [B, T, d]; None runs all blocks.

    Attributes:
        added: after the pass, the contribution that it computed or reused.
    """

    def __init__(self, network: Backbone, lowest: int, added: Tensor | None):
        super().__init__()
        self.network, self.lowest, self.added, self.reused = network, lowest, added, added

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """As `Backbone.forward`."""
        output, self.added = self.network.reuse(x, time, cond, self.lowest, self.reused)
        return output


@dataclass(frozen=True)
class ReuseState:
    """The inner solver's state, the upper blocks' contribution, and the number of steps so far."""

    inner: Any
    added: Tensor | None = None
    steps: int = 0


class FeatureReuse(Solver):
    """A solver for a teacher with a full pass in every n-th step.

    Args:
        solver: the inner solver.
        every: n; 1 is the inner solver alone.
        lowest: number of blocks that run in the other steps, 1 to depth - 1.
    """

    def __init__(self, solver: Solver, every: int, lowest: int):
        self.solver, self.every, self.lowest = solver, every, lowest

    def init(self, model: Guided, x_T: Tensor, cond: Condition) -> ReuseState:
        return ReuseState(self.solver.init(model, x_T, cond))

    def step(
        self,
        model: Guided,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition,
        state: ReuseState,
        noise: Noise | None,
    ) -> tuple[Tensor, Tensor, ReuseState]:
        backbone = model.denoiser.network
        assert isinstance(backbone, Backbone)
        reused = state.added if state.steps % self.every else None
        network = Reusing(backbone, self.lowest, reused)
        x_s, x_0, inner = self.solver.step(
            model.with_network(network), x_t, t, s, cond, state.inner, noise
        )
        return x_s, x_0, ReuseState(inner, network.added, state.steps + 1)
