"""Decoupled DMD (Liu et al. 2025, arXiv 2511.22677, eq. 8 and alg. 1).

The gradient of distribution matching with a guided teacher has two parts: matching the conditional
teacher, and what guidance adds. The second drives the student, and the first keeps it from
artefacts. Here each has noise and a timestep of its own:

    grad = (x_fake - x_real,c)(x_t) - (w - 1) (x_real,c - x_real,null)(x_t')

t is anywhere, as without decoupling. t' is below the level at which the student's step starts: what
lies above is settled there. (The paper's time is 0 at noise, so its tau' is above.)

Decided here, since there is no released code: both parts are divided by the mean of |x - x_real,c|
at x_t, as DMD2 does. `dmd2.py` refuses it without guidance, where the second part would be 0, and
with a divergence, whose weights would scale that part too.
"""

from __future__ import annotations

from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.methods.parts.matching import Below, Matching


class Decoupled(Matching):
    """Distribution matching whose guidance has noise and a timestep of its own."""

    def difference(
        self, teacher: Guided, x_t: Tensor, t: Tensor, cond: Condition, below: Below
    ) -> tuple[Tensor, Tensor]:
        real = teacher.at(1.0)(x_t, t, cond).x_0
        off = self.model(x_t, t, cond).x_0 - real
        return off - teacher.change(*below(), cond), real
