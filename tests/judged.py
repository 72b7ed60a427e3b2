"""Small tasks that published networks judge: latents with an autoencoder, and a tiny Inception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.data.images import ImageSet, Split
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.files import file_hash, write_tensors
from harness.metrics.extractors import Extractor
from harness.networks.autoencoder import WEIGHTS
from harness.networks.backbones.dit import DiT
from harness.tasks import Task, TaskSpec
from harness.training.tiny_task import tiny_spec

LATENT = (4, 4, 4)
"""Shape of a latent; its image is [3, 8, 8]."""


def _layers() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False))


class TinyInception(Extractor):
    """As `Inception`: features [n, 6], spatial features [n, 7] and logits [n, 5]."""

    metric, need, at_once = "fid_inception", "inception", 16

    def fetched(self) -> Path:
        raise NotImplementedError

    def build(self, state: dict[str, Tensor]) -> nn.Module:
        network = _layers()
        network.load_state_dict(state)
        return network

    def features(self, images: Tensor) -> Tensor:
        return self.parts(images)["features"]

    def parts(self, images: Tensor) -> dict[str, Tensor]:
        pooled = functional.adaptive_avg_pool2d(images.float() / 128 - 1, 2).flatten(1)
        features = self.network[1](self.network[0](pooled))
        return {
            "features": features,
            "logits": self.network[2](features),
            "spatial": pooled[:, :7],
        }


def write_inception(folder: Path) -> dict[str, Any]:
    """Writes a file of random weights; returns the entry `features` of a task's YAML."""
    with keyed_initialisation(0, "tiny inception"):
        network = _layers()
    for weight in network.parameters():
        weight.data *= 4
    path = folder / "tiny-inception.pth"
    torch.save(network.state_dict(), path)
    return {"kind": "inception", "file": str(path), "sha256": file_hash(path)}


def write_autoencoder(folder: Path) -> dict[str, Any]:
    """Writes a small `AutoencoderKL`; returns the entry `autoencoder` of a task's YAML."""
    from diffusers import AutoencoderKL

    with keyed_initialisation(0, "autoencoder"):
        network = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=8,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
    path = folder / "autoencoder"
    network.save_pretrained(path)
    sha256 = file_hash(path / WEIGHTS)
    return {"folder": str(path), "sha256": sha256, "scaling": 0.5, "shift": 0.25}


def change_config(folder: Path, **changes: Any) -> None:
    """Changes the `config.json` of an autoencoder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def latent_spec(folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes a teacher of latents; returns the YAML of a task without anything that judges them."""
    spec = tiny_spec(folder)
    network = {**spec["network"], "image_size": 4, "patch_size": 2, "in_channels": 4}
    with keyed_initialisation(0, "latent teacher"):
        teacher = DiT(**network)
        for parameter in teacher.parameters():
            nn.init.normal_(parameter, std=0.1)
    write_tensors(folder / "latent-teacher.safetensors", teacher.state_dict())
    weights = {
        **spec["teacher"],
        "file": str(folder / "latent-teacher.safetensors"),
        "sha256": file_hash(folder / "latent-teacher.safetensors"),
    }
    data = {"set": "digits", "split_seed": 0, "shape": list(LATENT), "num_classes": 10}
    return {
        **spec,
        "name": "latent",
        "data": data,
        "network": network,
        "teacher": weights,
        "features": None,
        **changes,
    }


def latents(count: int, name: str = "latents") -> Tensor:
    """Latents of which many are outside [-1, 1]."""
    return 2 * Keyed("test", 0).normal(name, torch.arange(count), LATENT)


def with_split(task: Task, train: Tensor, held_out: Tensor) -> Task:
    """The task with these images; labels count from 0 to 9."""
    task.__dict__["split"] = Split(
        *(ImageSet(images, torch.arange(len(images)) % 10) for images in (train, held_out))
    )
    return task


def latent_task(folder: Path, **changes: Any) -> Task:
    """A task of latents with 60 training and 30 held-out ones."""
    task = Task(TaskSpec.model_validate(latent_spec(folder, **changes)), folder)
    return with_split(task, latents(60, "train"), latents(30, "held out"))
