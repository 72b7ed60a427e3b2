"""Solvers of the sampling ODE, one file each, and `integrate`. Floor 2: may import floors 0 and 1."""

from harness.solvers.base import SOLVERS, Noise, Solver, Trajectory, integrate
from harness.solvers.ddim import DDIM, ddim_step
from harness.solvers.dpm_solver import DPMSolver2M, DPMSolver3M
from harness.solvers.euler import Euler
from harness.solvers.feature_reuse import FeatureReuse
from harness.solvers.heun import Heun
from harness.solvers.unipc import UniPC

__all__ = [
    "DDIM", "SOLVERS", "DPMSolver2M", "DPMSolver3M", "Euler", "FeatureReuse", "Heun", "Noise", "Solver", "Trajectory", "UniPC",
    "ddim_step", "integrate",
]  # fmt: skip
