"""The table of methods in docs/methods.md says what the code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.diffusion.counting import count_flops
from harness.methods import METHODS
from harness.tasks import Task
from harness.training.case import STEPS, Case

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
OPTIONS: dict[str, dict[str, Any]] = {
    "ard": {"history_layers": 2},
    "drifting": {"group": 4},
    "imm": {"group": 2},
    "ladd": {"gan_virtual_batch": 2},
    "rcm": {"ramp_steps": 0},
}
APART = {
    "denoising",  # trains the teachers that ship
    "teacher",  # trains nothing
    "knowledge-distillation",  # another name of a listed method
}


def row(name: str, task: Task, folder: Path) -> str:
    """A method's table row.

    It gives name, sources, players, cost of a training step per image, step counts and target.
    """
    cls = METHODS[name]
    case = Case(name, task, folder, OPTIONS.get(name, {}), num_steps=2)
    teacher = task.teacher(torch.device("cpu"))
    method = case.build(teacher=teacher)
    trainer = case.trainer(method)
    trainer.teacher = teacher.denoiser.network
    trainer.train()
    passes = trainer.bill.teacher_evaluations / trainer.bill.images
    x_T, cond = task.evaluation_inputs(0)
    forward = count_flops(
        lambda: task.teacher(torch.device("cpu")).denoiser(x_T[:1], torch.tensor(0.5), cond[:1])
    )
    steps = "any" if cls.any_step else "trained for"
    cells = [
        f"`{name}`",
        ", ".join(sorted(method.sources)),
        ", ".join(method.players),
        f"{passes:.3g}",
        f"{trainer.bill.flops / trainer.bill.images / forward:.1f}",
        steps,
        method.target,
    ]
    return "| " + " | ".join(cells)


@pytest.mark.parametrize("name", sorted(set(METHODS.names()) - APART))
def test_the_table_of_methods(name: str, tiny: Task, tmp_path: Path) -> None:
    assert STEPS == 10
    assert row(name, tiny, tmp_path) in PAGE.read_text()


def test_every_method_is_on_the_page() -> None:
    assert all(f"`{name}`" in PAGE.read_text() for name in METHODS.names())
