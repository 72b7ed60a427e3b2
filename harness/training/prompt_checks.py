"""The check that padding of prompts is never read.

Like the other checks it takes a case and raises AssertionError.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition, Conditions
from harness.tasks import Task
from harness.training.case import Case, losses

PADDED = 100.0
"""What stands in padding, in place of what was there."""


def padding(case: Case) -> None:
    """Padding of prompts changes neither losses nor samples; class labels have none."""
    conditions = case.task.conditions
    if conditions.prompts is None or conditions.prompts.text_mask is None:
        return
    changed = Task(case.task.spec, case.task.folder)
    changed.conditions = Conditions(
        conditions.count, repadded(conditions.prompts), repadded(conditions.null)
    )
    (curve, images), (other, others) = (
        trained(replace(case, task=task)) for task in (case.task, changed)
    )
    assert curve == other, "padding of prompts changes the losses"
    assert torch.equal(images, others), "padding of prompts changes the samples"


def repadded(cond: Condition) -> Condition:
    """The same conditions with other numbers in padding."""
    assert cond.text is not None
    assert cond.text_mask is not None
    return replace(cond, text=cond.text.masked_fill(~cond.text_mask.unsqueeze(-1), PADDED))


def trained(case: Case) -> tuple[list[float], Tensor]:
    """Losses of two training steps, and samples after them."""
    method = case.build()
    if not method.players:
        return [], case.sample(method)
    trainer = case.trainer(method)
    trainer.train(until=2)
    return losses(trainer), case.sample(method)
