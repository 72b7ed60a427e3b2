"""A small task: 8 x 8 digits, and a 3-layer teacher and a feature network with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from harness.diffusion.randomness import keyed_initialisation
from harness.files import file_hash, write_tensors
from harness.networks.backbones import build
from harness.networks.classifier import Classifier
from harness.tasks import Task, TaskSpec

NETWORK: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
"""The description of the teacher's network."""


def _random_weights(folder: Path) -> dict[str, Any]:
    """Writes the random weights to `folder` and returns their entries in the spec."""
    with keyed_initialisation(0, "tiny"):
        teacher, features = build(NETWORK), Classifier((1, 8, 8), 10)
        # A fresh DiT outputs zeros, so its last layers get random weights.
        for name, parameter in teacher.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    files = {"teacher": teacher, "features": features}
    for name, module in files.items():
        write_tensors(folder / f"{name}.safetensors", module.state_dict())
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"quality": {"held_out_accuracy": 0.5}})
        )
    training = {"steps": 4, "batch_size": 8, "seed": 0}
    return {
        name: {
            "file": f"{folder}/{name}.safetensors",
            "sha256": file_hash(folder / f"{name}.safetensors"),
            "training": training,
        }
        for name in files
    }


def tiny_spec(folder: Path) -> dict[str, Any]:
    """Writes random weights to `folder` and returns the spec of a small task that uses them."""
    return {
        "name": "tiny",
        "version": 1,
        "summary": "a task for tests",
        "data": {"set": "digits", "split_seed": 0, "shape": [1, 8, 8], "num_classes": 10},
        "network": dict(NETWORK),
        "schedule": "vp",
        "prediction_type": "eps",
        "guidance": {"scale": 1.25},
        "guidance_scan": [1.0, 1.25],
        **_random_weights(folder),
        "trajectories": {"solver": "ddim", "steps": 4, "count": 12, "seed": 0},
        "evaluation": {
            "samples": 40,
            "noise_sets": 2,
            "seed": 0,
            "kid_subset_size": 20,
            "batch_size": 16,
            "latency_batch": 2,
        },
        "reference": {"method": "teacher", "num_steps": 4, "options": {"solver": "ddim"}},
        "batch_size": 8,
        "budgets": {"quick": {"steps": 3, "noise_sets": 1}, "table": {"steps": 6, "noise_sets": 2}},
    }


def tiny_task(folder: Path) -> Task:
    """The task that the checks use; its weights are written to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Task(TaskSpec.model_validate(tiny_spec(folder)))


def as_teacher(task: Task, schedule: str, prediction_type: str) -> Task:
    """The same weights as a teacher of another schedule and prediction type."""
    update = {"schedule": schedule, "prediction_type": prediction_type}
    return Task(task.spec.model_copy(update=update), task.folder)
