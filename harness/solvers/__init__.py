"""Solvers of the sampling ODE, one file each, and the sampling loop: `sample` and `trace`."""

from harness.solvers.base import SOLVERS, Noise, Solver, Trajectory, sample, trace
from harness.solvers.ddim import DDIM, ddim_step
from harness.solvers.dpm_solver import DPMSolver2M, DPMSolver3M
from harness.solvers.euler import Euler
from harness.solvers.feature_reuse import FeatureReuse
from harness.solvers.heun import Heun
from harness.solvers.unipc import UniPC

__all__ = [
    "DDIM",
    "SOLVERS",
    "DPMSolver2M",
    "DPMSolver3M",
    "Euler",
    "FeatureReuse",
    "Heun",
    "Noise",
    "Solver",
    "Trajectory",
    "UniPC",
    "ddim_step",
    "sample",
    "trace",
]
