"""The two dynamic parts of DMDR (Jiang et al. 2025, arXiv 2511.13649, and its released code).

A student that starts far from the teacher gets poor directions from their scores. So in its first K
updates two things are eased. With `a = (1 + cos(pi n / K)) / 2` in update n = 0 .. K - 1, then 0:

    dynamic distribution guidance   W_real = W_teacher + 0.375 a (W_fake - W_teacher)
    dynamic renoising               t ~ Beta(1 + 3 a, 1 + a / 2) on [min_time, max_time]

The real score starts 37.5 % of the way to the fake score and returns to the teacher. Renoising
starts at high noise, by Beta(4, 1.5), and ends uniform. From update K on both are DMD2's, bit for
bit. The run's step gives n, so a resumed run needs no more state.

In the released code one network has both scores, by one adapter (LoRA of rank 32 on queries and
values). It counts twice for the fake score and 0.75 a times for the real one, 0.375 a of the way in
weights. Here both scores are whole networks, so all weights go this way. The code's K is 10,000 of
20,000 updates.

The fake score trains at t of the same law, as in the code, and so does the GAN's head. With bounds
0.02 and 0.98 a share of 3.4 % of t is within 0.05 of t = 1 at a = 1, and 3.1 % where t is uniform
(Beta(4, 1.5) on [0, 1]: 6.7 %). The t of Decoupled DMD's guidance stays uniform.

Not here: the paper's reinforcement learning.

Exact: where the fake score equals the teacher, guidance changes nothing. For scores that are linear
in the weights the difference of both is 1 - 0.375 a times DMD2's.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from harness.diffusion.denoiser import Guided

SHARE = 0.75 / 2.0
"""The way of the real score's weights to the fake's at a = 1 (code: factors of one adapter)."""
FIRST = (4.0, 1.5)
"""Parameters of the law of t at a = 1."""


def eased(update: int, updates: int | None) -> float:
    """a in the student's update number `update`: from 1 by half a cosine to 0 at `updates`.

    Without `updates` it is 0.
    """
    if updates is None or update >= updates:
        return 0.0
    return (1 + math.cos(math.pi * update / updates)) / 2


def renoised(u: Tensor, a: float) -> Tensor:
    """Numbers of Beta(1 + 3 a, 1 + a / 2) as its quantiles of uniform u [B] in (0, 1), float64.

    Torch has no such function, so scipy computes them on the CPU: a device waits for it.
    """
    if a == 0:
        return u
    from scipy import special  # here, because it takes half a second to import

    p, q = (1 + (first - 1) * a for first in FIRST)
    return torch.from_numpy(special.betaincinv(p, q, u.cpu().numpy())).to(u.device)


class Moved:
    """A real score on the way from a teacher to a fake score.

    Attributes:
        network: a frozen network of its own. Its weights are scratch: each `at` sets them.
    """

    def __init__(self, teacher: Guided, fake: nn.Module):
        self.teacher, self.fake = teacher, fake
        self.network = copy.deepcopy(fake).requires_grad_(False).eval()
        self.guided = teacher.with_network(self.network)

    @torch.no_grad()
    def at(self, a: float) -> Guided:
        """The score at the way's part `SHARE * a`, under the teacher's guidance."""
        # By state_dict, since of sharded networks it has the parts, whatever is gathered.
        start, end = self.teacher.denoiser.network.state_dict(), self.fake.state_dict()
        for name, weight in self.network.state_dict().items():
            weight.copy_(torch.lerp(start[name], end[name], SHARE * a))
        return self.guided
