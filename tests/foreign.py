"""Checkpoints of others, written in the formats that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.networks.checkpoints import Teacher, read_teacher

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def official(name: str = "dit") -> dict[str, Tensor]:
    """The official state dict of the golden network."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in golden(name).items() if k.startswith(prefix)}


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def read(content: Any, folder: Path, name: str = "DiT.pt", **options: Any) -> Teacher:
    """The teacher in a file that torch.save wrote."""
    torch.save(content, folder / name)
    return read_teacher(str(folder / name), num_heads=4, **options)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


DIFFUSERS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
        "out_channels": 8,
        "norm_num_groups": 1,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "norm_num_groups": 1,
        "use_additional_conditions": False,
    },
    "SD3Transformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "in_channels": 16,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "axes_dims_rope": [2, 2, 4],
        "guidance_embeds": True,
    },
    "SanaTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    },
    "QwenImageTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "in_channels": 16,
        "out_channels": 4,
        "joint_attention_dim": 12,
        "axes_dims_rope": [2, 2, 4],
    },
}


def plain(teacher: Teacher) -> dict[str, Tensor]:
    """The weights of a transformer of diffusers under diffusers' names."""
    return {name.removeprefix("model."): value for name, value in teacher.weights.items()}


def folder_of(name: str, folder: Path, **options: Any) -> tuple[nn.Module, Path]:
    """A transformer of diffusers with random weights, and the folder that it was saved to."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = getattr(diffusers, name)(**DIFFUSERS[name])
    network.save_pretrained(folder, **options)
    return network, folder
