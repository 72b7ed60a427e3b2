"""Solvers of the sampling ODE, one file each, and `integrate`. Floor 2: may import floors 0 and 1."""

from harness.solvers.base import SOLVERS, Noise, Solver, Trajectory, integrate
from harness.solvers.ddim import DDIM, ddim_step

__all__ = ["DDIM", "SOLVERS", "Noise", "Solver", "Trajectory", "ddim_step", "integrate"]
