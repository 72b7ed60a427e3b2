"""Averages of weights whose width is chosen after training.

Karras et al. 2023, arXiv 2312.02696, sec. 3 and appendix C. An average of width `sigma_rel` weighs
the weights of step t by t^gamma. Two of them are kept and written now and then. A sum of what was
written comes closest, in least squares over time, to the average of any other width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from harness import ranks
from harness.errors import UsageError
from harness.files import read_tensors, write_sealed
from harness.methods.parts.players import blend

WIDTHS = (0.05, 0.10)
"""The widths that are kept (the released code's)."""
NAME = re.compile(r"(\d{9})-(\d\.\d{2})\.safetensors")


def exponent(width: float) -> float:
    """gamma of a width: the largest real root of

    `g^3 + 7 g^2 + (16 - width^-2) g + 12 - width^-2` (eq. 123). The width is the standard deviation
    of the times that are averaged, as a part of the time so far.

    Raises UsageError outside (0, 0.28], where gamma would be below 0.
    """
    if not 0 < width <= 0.28:
        raise UsageError(f"width is {width:g}, but must be above 0 and at most 0.28")
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


class PowerAverages:
    """The two averages of a student, and their snapshots.

    Args:
        module: the student that is trained.
        folder: the folder of the snapshots.
        every: optimizer steps from one snapshot to the next.
    """

    def __init__(self, module: nn.Module, folder: Path, every: int):
        self.folder, self.every, self.step = folder, max(every, 1), 0
        self.modules = {
            width: copy.deepcopy(module).requires_grad_(False).eval() for width in WIDTHS
        }

    def update(self, module: nn.Module) -> None:
        """Takes the weights after an optimizer step, and writes a snapshot if it is time.

        `average = beta average + (1 - beta) weights`, `beta = (1 - 1 / t)^(gamma + 1)` (eq. 127).
        """
        self.step += 1
        for width, average in self.modules.items():
            blend(average, module, 1 - (1 - 1 / self.step) ** (exponent(width) + 1))
        if self.step % self.every == 0:
            self.write()

    def write(self) -> None:
        """Writes both averages to `STEP-WIDTH.safetensors`; of several ranks the first does."""
        for width, average in self.modules.items() if ranks.is_first() else ():
            path = self.folder / f"{self.step:09d}-{width:.2f}.safetensors"
            write_sealed(path, average.state_dict())

    def restart(self) -> None:
        """Begins anew, as a method does whose student becomes another one's teacher."""
        self.step = 0
        self._drop_later()

    def state_dict(self) -> dict[str, Any]:
        """The state for exact resume."""
        return {
            "step": self.step,
            **{f"{width:.2f}": average.state_dict() for width, average in self.modules.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state, and drops snapshots of later steps."""
        self.step = state["step"]
        for width, average in self.modules.items():
            average.load_state_dict(state[f"{width:.2f}"])
        self._drop_later()

    def _drop_later(self) -> None:
        """Deletes the snapshots of later steps."""
        for snapshot in snapshots(self.folder) if ranks.is_first() else ():
            if snapshot.step > self.step:
                snapshot.path.unlink()


@dataclass(frozen=True)
class Snapshot:
    """A written average."""

    path: Path
    step: int
    width: float


def snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder, by step and width."""
    found = [(path, NAME.fullmatch(path.name)) for path in sorted(folder.glob("*.safetensors"))]
    return [Snapshot(path, int(m[1]), float(m[2])) for path, m in found if m]


def product(t: np.ndarray, g: np.ndarray, at: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The inner products over time of averages that end at t and `at` (appendix C.2)."""
    ratio, largest = t / at, np.maximum(t, at)
    powers = np.where(t < at, of, -g)
    return (g + 1) * (of + 1) * ratio**powers / ((g + of + 1) * largest)


def shares(kept: Sequence[tuple[int, float]], step: int, width: float) -> np.ndarray:
    """The shares of averages (step, width) in the average of another width at a step; sum 1."""
    t = np.array([float(each) for each, _ in kept])
    g = np.array([exponent(each) for _, each in kept])
    rows = t[:, None], g[:, None]
    matrix = product(*rows, t[None], g[None])
    wanted = product(t, g, np.float64(step), np.float64(exponent(width)))  # type: ignore[arg-type]
    found = np.linalg.lstsq(matrix, wanted, rcond=1e-12)[0]
    return found / found.sum()


def average_of_width(folder: Path, width: float) -> dict[str, Tensor]:
    """The student's weights under an average of any width, at the last snapshot.

    Raises UsageError for a folder without snapshots and for an impossible width.
    """
    kept = snapshots(folder)
    if not kept:
        raise UsageError(
            f"{folder} has no snapshots of averages: delete the run, and make it anew with "
            "--snapshots 8"
        )
    found = shares([(each.step, each.width) for each in kept], kept[-1].step, width)
    total: dict[str, Tensor] = {}
    for share, snapshot in zip(found, kept, strict=True):
        for key, value in read_tensors(snapshot.path).items():
            part = value.double() * float(share) if value.is_floating_point() else value
            joins = key in total and value.is_floating_point()
            total[key] = total[key] + part if joins else part
    kinds = read_tensors(kept[-1].path)
    return {key: value.to(kinds[key].dtype) for key, value in total.items()}
