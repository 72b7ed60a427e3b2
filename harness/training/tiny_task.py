"""Small tasks: 8 x 8 digits, and a 3-layer teacher and a feature network with random weights.

One task has class labels, the other prompts of different lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from harness.diffusion.randomness import Keyed, keyed_initialisation
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
TEXT_WIDTH, LONGEST, PROMPTS = 6, 4, 10
"""Width and greatest number of a prompt's embeddings, and number of prompts."""
TEXT_NETWORK: dict[str, Any] = {**NETWORK, "num_classes": 0, "text_width": TEXT_WIDTH}
"""The description of the network of a teacher that reads prompts."""


def _random_weights(folder: Path, network: dict[str, Any]) -> dict[str, Any]:
    """Writes the random weights to `folder` and returns their entries in the spec."""
    with keyed_initialisation(0, "tiny"):
        teacher, features = build(network), Classifier((1, 8, 8), 10)
        # A fresh DiT outputs zeros, so its last layers get random weights.
        for name, parameter in teacher.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            if "cross.proj" in name:
                torch.nn.init.normal_(parameter, std=0.5)
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


def _random_prompts(folder: Path, seed: int) -> dict[str, Any]:
    """Writes random embeddings to `folder` and returns their entry in the spec.

    Prompts have 2 to 4 embeddings, the empty one has 1; the rest is padding.
    """
    index, keyed = torch.arange(PROMPTS + 1), Keyed("prompts", seed)
    text = keyed.normal("text", index, (LONGEST, TEXT_WIDTH))
    lengths = torch.where(index < PROMPTS, 2 + index % 3, 1)
    parts = {
        "": text,
        "_mask": torch.arange(LONGEST) < lengths.unsqueeze(1),
        "_pooled": keyed.normal("pooled", index, (TEXT_WIDTH,)),
    }
    path = folder / f"prompts{seed}.safetensors"
    whole = {f"table{part}": x[:PROMPTS].contiguous() for part, x in parts.items()}
    write_tensors(path, whole | {f"null{part}": x[PROMPTS:].clone() for part, x in parts.items()})
    return {"file": str(path), "sha256": file_hash(path)}


def tiny_spec(folder: Path, network: dict[str, Any] = NETWORK) -> dict[str, Any]:
    """Writes random weights to `folder` and returns the spec of a small task that uses them."""
    return {
        "name": "tiny",
        "version": 1,
        "summary": "a task for tests",
        "data": {"set": "digits", "split_seed": 0, "shape": [1, 8, 8], "num_classes": 10},
        "network": dict(network),
        "schedule": "vp",
        "prediction_type": "eps",
        "guidance": {"scale": 1.25},
        "guidance_scan": [1.0, 1.25],
        **_random_weights(folder, network),
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


def tiny_text_spec(folder: Path, seed: int = 0) -> dict[str, Any]:
    """The same with ten prompts in place of labels, which the seed draws."""
    spec = tiny_spec(folder, TEXT_NETWORK)
    return {**spec, "name": "tiny-text", "prompts": _random_prompts(folder, seed)}


def tiny_task(folder: Path, prompts: bool = False) -> Task:
    """The task that the checks use, with labels or prompts; its files are written to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = tiny_text_spec(folder) if prompts else tiny_spec(folder)
    return Task(TaskSpec.model_validate(spec), folder)


def as_teacher(task: Task, schedule: str, prediction_type: str) -> Task:
    """The same weights as a teacher of another schedule and prediction type."""
    update = {"schedule": schedule, "prediction_type": prediction_type}
    return Task(task.spec.model_copy(update=update), task.folder)
