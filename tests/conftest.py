"""A tiny task: 8 x 8 images, a 2-layer teacher and features with random weights, small numbers everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from harness.files import file_hash, write_tensors
from harness.networks.classifier import Classifier
from harness.networks.dit import DiT
from harness.randomness import keyed_initialisation
from harness.tasks import Task, load_task
from harness.tasks import base as tasks_base

torch.set_num_threads(1)
CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"


def tiny_spec(folder: Path) -> dict:
    """Writes random weights to `folder` and returns the spec of a task that uses them."""
    network = {"image_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 10}
    with keyed_initialisation(0, "tiny"):
        teacher, features = DiT(**network), Classifier((1, 8, 8), 10)
        for name, parameter in teacher.named_parameters():  # a fresh DiT outputs zeros; this one says something
            if "adaLN" in name or "final_layer" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    files = {"teacher": teacher, "features": features}
    for name, module in files.items():
        write_tensors(folder / f"{name}.safetensors", module.state_dict())
        card = {"quality": {"held_out_accuracy": 0.5}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(card))
    training = {"steps": 4, "batch_size": 8, "seed": 0}
    weights = {
        name: {"file": f"{folder}/{name}.safetensors", "sha256": file_hash(folder / f"{name}.safetensors"), "training": training}
        for name in files
    }
    return {
        "name": "tiny",
        "version": 1,
        "summary": "a task for tests",
        "data": {"set": "digits", "split_seed": 0, "shape": [1, 8, 8], "num_classes": 10},
        "network": network,
        "schedule": "vp",
        "prediction_type": "eps",
        "guidance": {"scale": 1.25},
        "guidance_scan": [1.0, 1.25],
        **weights,
        "trajectories": {"solver": "ddim", "steps": 4, "count": 12, "seed": 0},
        "evaluation": {"samples": 40, "noise_sets": 2, "seed": 0, "kid_subset_size": 20, "batch_size": 16, "latency_batch": 2},
        "reference": {"method": "teacher", "num_steps": 4, "options": {"solver": "ddim"}},
        "batch_size": 8,
        "budgets": {"quick": {"steps": 3, "noise_sets": 1}, "table": {"steps": 6, "noise_sets": 2}},
    }


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks that holds `tiny.yaml`, put in place of the package's, with a cache of its own."""
    folder = tmp_path / "tasks"
    weights = folder / "weights"
    weights.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_spec(weights)))
    monkeypatch.setattr(tasks_base, "FOLDER", folder)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> Task:
    """The tiny task."""
    return load_task("tiny")
