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
from harness.networks.dit import DiT
from harness.solvers.base import Noise, Solver


class ReusingDiT(nn.Module):
    """A DiT for one step.

    Args:
        lowest: number of blocks that always run.
        added: the contribution of the upper blocks to reuse, [B, T, d]; None runs all blocks.

    Attributes:
        added: after the pass, the contribution that it computed or reused.
    """

    def __init__(self, network: DiT, lowest: int, added: Tensor | None):
        super().__init__()
        self.network, self.lowest, self.added, self.reused = network, lowest, added, added

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """As `DiT.forward`."""
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
    """The inner solver's state, the upper blocks' contribution, and the number of steps so far."""

    inner: Any
    added: Tensor | None = None
    steps: int = 0


class FeatureReuse(Solver):
    """A solver for a DiT teacher with a full pass in every n-th step.

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
        dit = model.denoiser.network
        assert isinstance(dit, DiT)
        network = ReusingDiT(dit, self.lowest, state.added if state.steps % self.every else None)
        x_s, x_0, inner = self.solver.step(
            model.with_network(network), x_t, t, s, cond, state.inner, noise
        )
        return x_s, x_0, ReuseState(inner, network.added, state.steps + 1)
