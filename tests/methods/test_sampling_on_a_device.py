"""Sampling on a device neither copies to it nor waits for it, so it can be a CUDA graph.

The meta device stands for it: it has no values to wait for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import CASES, case_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.methods import METHODS
from harness.runs.build import sampler_of
from harness.solvers import SOLVERS, sample
from harness.tasks import Task

META = torch.device("meta")


def kinds(tree: Any) -> set[str]:
    """The devices of all tensors in a nested value."""
    return {x.device.type for x in tree_leaves(tree) if isinstance(x, Tensor)}


class Crossings(TorchDispatchMode):
    """Names the operations whose results lie elsewhere than some of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        copied = "copy" in str(function) and len(kinds([args, result])) > 1
        if copied or (kinds(args) == {"meta"} and "cpu" in kinds(result)):
            self.found.append(str(function))
        return result


def test_a_copy_to_the_device_is_noticed() -> None:
    with Crossings() as seen:
        torch.zeros(1).to(META)
        torch.zeros(1, device=META).copy_(torch.zeros(1))
        torch.zeros(1, device=META) + torch.zeros(())
    assert len(seen.found) == 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in METHODS.names() else [pytest.mark.slow])
        for name in CASES
    ],
)
def test_a_students_sampling_stays_on_the_device(name: str, tiny: Task, tmp_path: Path) -> None:
    method = case_of(name, tiny, tmp_path).build()
    method.student.to(META)
    x_T, cond = tiny.evaluation_inputs(0, slice(2))
    x_T, cond = x_T.to(META), cond.to(META)
    sampler = sampler_of(method)
    sampler(x_T, cond, lambda name: x_T)  # the null condition is copied once
    with Crossings() as seen:
        sampler(x_T, cond, lambda name: x_T)
    assert not seen.found


@pytest.mark.parametrize("name", SOLVERS.names())
def test_a_solvers_sampling_stays_on_the_device(name: str, tiny: Task) -> None:
    teacher = tiny.teacher(torch.device("cpu"))
    teacher.to(META)
    x_T, cond = tiny.evaluation_inputs(0, slice(2))
    x_T, cond = x_T.to(META), cond.to(META)

    def sampled() -> Tensor:
        levels = tiny.recipe.levels
        return sample(SOLVERS[name](), teacher, x_T, levels, cond, lambda name: x_T)

    with torch.no_grad():
        sampled()  # the null condition is copied once
        with Crossings() as seen:
            sampled()
    assert not seen.found
