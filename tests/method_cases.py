"""Every registered method with options that suit the tiny task, and variants of some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.methods import METHODS
from harness.tasks import Task
from harness.training.case import Case

CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS.names()} | {
    "ard": ("ard", {"history_layers": 2}),  # the default suits a deeper teacher
    "ard on its own history": (
        "ard",
        {"history_layers": 2, "own_history": 0.5, "protocol": "states"},
    ),
    "ard for several numbers of steps": (
        "ard",
        {
            "history_layers": 2,
            "heads": "shared",
            "parametrization": "direct",
            "step_counts": [1, 2],
        },
    ),
    "ard with distribution matching": (
        "ard",
        {"history_layers": 2, "dmd_from": 0.0, "dmd_every": 2, "protocol": "states"},
    ),
    "ard with adapters": ("ard", {"history_layers": 2, "lora_rank": 2}),
    "imm": ("imm", {"group": 2, "gap": 6}),
    "pi-flow": ("pi-flow", {"substeps": 8}),
    "pi-flow, dx": ("pi-flow", {"policy": "dx", "substeps": 8}),
    "ladd": ("ladd", {"gan_virtual_batch": 2}),
    "dmd2": ("dmd2", {"student_every": 2}),
    "dmd2, decoupled": ("dmd2", {"student_every": 1, "renoising": "decoupled"}),
    "dmd2, dynamic": (
        "dmd2",
        {"student_every": 2, "dynamic_guidance_updates": 4, "dynamic_renoising_updates": 4},
    ),
    "dmd2 by another divergence": ("dmd2", {"student_every": 1, "divergence": "js"}),
    "drifting": ("drifting", {"group": 4}),
    "rcm": ("rcm", {"ramp_steps": 5, "student_every": 2}),
    "scm, data": ("scm", {"source": "data"}),
    "meanflow, teacher": ("meanflow", {"source": "teacher", "distinct": 0.5}),
    "meanflow, its own guidance": ("meanflow", {"kappa": 0.5, "second_time": "interval"}),
    "meanflow, by a difference": ("meanflow", {"derivative": "difference"}),
    "imf, without a head": ("imf", {"velocity": "boundary"}),
    "tvm, by a difference": ("tvm", {"derivative": "difference"}),
    "ict, few levels": ("ict", {"levels_from": 10, "levels_to": 40}),
    "ard with a GAN stage": (
        "ard",
        {"history_layers": 2, "gan_from": 0.0, "gan_warmup_steps": 1, "gan_virtual_batch": 2},
    ),
    "consistency-distillation, karras": (
        "consistency-distillation",
        {"grid": "karras", "solver": "heun", "loss": "l2"},
    ),
    "step-distillation of the teacher": (
        "step-distillation",
        {
            "trajectory": "states",
            "heads": "shared",
            "parametrization": "teacher",
            "noise_channels": True,
        },
    ),
}
"""Method and options by the name of a case; a method's own name is its case of default options."""


def case_of(name: str, task: Task, folder: Path) -> Case:
    """The case of that name on a task, in 2 sampling steps where the method takes them."""
    method, options = CASES[name]
    num_steps = min(METHODS[method].default_num_steps, 2)
    return Case(method, task, folder, options, num_steps=num_steps)
