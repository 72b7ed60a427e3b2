"""Knowledge distillation (Luhman & Luhman 2021, arXiv 2101.02388).

One step, `L = |G(x_T) - x_0|^2` on the teacher's pairs. This is step distillation with one step,
and every table names it so.
"""

from __future__ import annotations

from typing import Any, ClassVar

from harness.errors import UsageError
from harness.methods.base import METHODS, Problem
from harness.methods.step_distillation import StepDistillation


@METHODS.register("knowledge-distillation")
class KnowledgeDistillation(StepDistillation):
    """Knowledge distillation: regression from noise to the teacher's sample in one step."""

    default_num_steps = 1
    reference: ClassVar = "Luhman & Luhman 2021, arXiv 2101.02388, eq. 6"

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        return StepDistillation.canonical(config, num_steps)

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        super().check(config, task, num_steps)
        if num_steps != 1:
            raise UsageError(
                f"num_steps is {num_steps}, but knowledge distillation has one step: "
                "give --num-steps 1"
            )
