"""Every registered method on small text-conditioned teachers of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_diffusers import CLASSES, built, condition_for, network_of

from harness.errors import UsageError
from harness.files import file_hash, write_tensors
from harness.methods import METHODS
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.tasks import Task
from harness.tasks.spec import PromptSpec, Weights
from harness.training.case import CPU, Case, losses, weights
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

DIT, PIXART, SD3, FLUX, SANA, QWEN = CLASSES
STEPS, BATCH, PROMPTS = 3, 2, 10
OPTIONS: dict[str, dict[str, Any]] = {
    "ard": {"history_layers": 2, "heads": "per_step"},
    "progressive": {"rounds": 1},
    "ladd": {"gan_virtual_batch": 2},
    "dmd2": {"student_every": 2},
    "rcm": {"ramp_steps": 0, "student_every": 2},
}
"""Options that suit a shallow teacher and few steps."""
SCHEDULES = {PIXART: ("vp", "eps"), FLUX: ("flow-3", "v")}
CHANNELS = {PIXART: {"in_channels": 1, "out_channels": 2}, FLUX: {"in_channels": 4}}
REFUSED = dict.fromkeys(("drifting", "imm"), "needs class labels, but task tiny is conditioned on")
ONE_STEP = ("drifting", "freeflow", "knowledge-distillation")
SHORT = ("ard", "imm", "ladd", "meanflow")
"""Methods of the default run: history, a refusal, GAN heads and forward derivatives."""


def prompts(folder: Path) -> PromptSpec:
    """The file of ten prompts of five tokens; the first prompt has two of padding."""
    cond = condition_for(PIXART, PROMPTS + 1, torch.float32)
    parts = {"": cond.text, "_mask": cond.text_mask, "_pooled": cond.pooled}
    rows = {"table": slice(0, PROMPTS), "null": slice(PROMPTS, PROMPTS + 1)}
    found = {
        f"{name}{part}": value[chosen].contiguous()
        for name, chosen in rows.items()
        for part, value in parts.items()
    }
    save_file(found, folder / "prompts.safetensors")
    return PromptSpec(
        file=str(folder / "prompts.safetensors"), sha256=file_hash(folder / "prompts.safetensors")
    )


def task_of(name: str, tiny: Task, folder: Path) -> Task:
    """The tiny task with prompts and a teacher of diffusers."""
    schedule, kind = SCHEDULES[name]
    file = folder / "teacher.safetensors"
    write_tensors(file, built(name, torch.float32, **CHANNELS[name]).state_dict())
    update = {
        "network": network_of(name, **CHANNELS[name]),
        "teacher": Weights(file=str(file), sha256=file_hash(file)),
        "prompts": prompts(folder),
        "schedule": schedule,
        "prediction_type": kind,
    }
    return Task(tiny.spec.model_copy(update=update))


def train(method: str, task: Task, folder: Path) -> None:
    """Trains every player for three steps, and samples."""
    options = OPTIONS.get(method, {})
    num_steps = 1 if method in ONE_STEP else 2
    resolved = resolve(RunConfig(method=method, options=options, num_steps=num_steps), task)
    case = Case(resolved.method, task, folder, options, num_steps)
    made = case.build(total_steps=STEPS)
    before = weights(made)
    group = resolved.config.sample_group
    settings = TrainSettings(STEPS, max(BATCH, group), 0, log_every=1, sample_group=group)
    if case.cls.sources:
        trainer = Trainer(made, case.sources, settings, None, CPU)
        trainer.train()
        assert all(torch.isfinite(torch.tensor(losses(trainer))))
    after = weights(made)
    for player in made.players:
        own = [key for key in after if key.startswith(f"{player}.")]
        assert any(not torch.equal(before[key], after[key]) for key in own), player
    assert case.sample(made).isfinite().all()


@pytest.mark.parametrize("name", [PIXART, FLUX])
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method in SHORT else pytest.mark.slow)
        for method in METHODS.names()
    ],
)
def test_every_method_trains_or_says_why_not(
    method: str, name: str, tiny: Task, tmp_path: Path
) -> None:
    task = task_of(name, tiny, tmp_path)
    if method in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[method]):
            train(method, task, tmp_path)
    else:
        train(method, task, tmp_path)
