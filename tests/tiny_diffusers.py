"""Descriptions of small transformers of diffusers, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.networks.backbones import Backbone, build
from harness.networks.backbones.families import FAMILIES

SHARED = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
PATCHED = {"in_channels": 3, "sample_size": 8, "patch_size": 4}
PACKED = {"in_channels": 12, "axes_dims_rope": [2, 2, 4]}
TEXT, POOLED = 12, 10
"""Widths of the text and of its pooled vector."""
CONFIGS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {**PATCHED, "num_embeds_ada_norm": 10, "out_channels": 6},
    "PixArtTransformer2DModel": {
        **PATCHED,
        "out_channels": 6,
        "cross_attention_dim": 16,
        "caption_channels": TEXT,
    },
    "SD3Transformer2DModel": {
        **PATCHED,
        "out_channels": 3,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 4,
    },
    "FluxTransformer2DModel": {
        **PACKED,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
    },
    "SanaTransformer2DModel": {
        **PATCHED,
        "out_channels": 3,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT,
        "timestep_scale": 0.5,
    },
    "QwenImageTransformer2DModel": {
        **PACKED,
        "out_channels": 3,
        "joint_attention_dim": TEXT,
    },
}
CLASSES = list(CONFIGS)


def network_of(name: str, **config: Any) -> dict[str, Any]:
    """The description of a small transformer."""
    whole = {**SHARED, **CONFIGS[name], **config}
    guidance = {"guidance": 3.5} if whole.get("guidance_embeds") else {}
    return {"backbone": "diffusers", "class": name, "config": whole, **guidance}


def built(
    name: str,
    dtype: torch.dtype = torch.float64,
    scalars: Sequence[str] = (),
    extra_channels: int = 0,
    **config: Any,
) -> Backbone:
    """A small transformer with random weights; zeros are drawn anew, since they hide errors."""
    with keyed_initialisation(0, name):
        network = build(network_of(name, **config), scalars, extra_channels)
        for key, parameter in network.named_parameters():
            if not parameter.any() and not key.startswith("scalar_embedders"):
                torch.nn.init.normal_(parameter, std=0.2)
    return network.to(dtype).requires_grad_(False)


def condition_for(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> Condition:
    """Labels, or text of five outputs, of which the first sample's last two are padding."""
    if name == "DiTTransformer2DModel":
        return Condition(torch.arange(batch))
    keys, index = Keyed("diffusers", 0), torch.arange(batch)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    return Condition(
        text=keys.normal("text", index, (5, TEXT)).to(dtype),
        text_mask=mask,
        pooled=keys.normal("pooled", index, (POOLED,)).to(dtype),
    )


def direct(model: Any, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """What a transformer of diffusers answers to the arguments that its pipeline passes."""
    name, batch, size = type(model).__name__, len(x), x.shape[-2:]
    text = {"encoder_hidden_states": cond.text}
    masked = {**text, "encoder_attention_mask": cond.text_mask}
    cells = [length // 2 for length in size]
    inputs: dict[str, Any] = {
        "DiTTransformer2DModel": {"class_labels": cond.labels},
        "PixArtTransformer2DModel": {
            **masked,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "SD3Transformer2DModel": {**text, "pooled_projections": cond.pooled},
        "FluxTransformer2DModel": {
            **text,
            "pooled_projections": cond.pooled,
            "img_ids": FluxPipeline._prepare_latent_image_ids(batch, *cells, x.device, x.dtype),
            "txt_ids": torch.zeros(0 if cond.text is None else cond.text.shape[1], 3),
            "guidance": torch.full((batch,), 3.5),
        },
        "SanaTransformer2DModel": masked,
        "QwenImageTransformer2DModel": {
            **text,
            "encoder_hidden_states_mask": cond.text_mask,
            "img_shapes": [[(1, *cells)]] * batch,
        },
    }
    if packed := name.startswith(("Flux", "Qwen")):
        x = FluxPipeline._pack_latents(x, batch, x.shape[1], *size)
    if name.startswith(("SD3", "Sana")):
        time = 1000 * getattr(model.config, "timestep_scale", 1.0) * time
    out = model(x, timestep=time, **inputs[name], return_dict=False)[0]
    return FluxPipeline._unpack_latents(out, *(8 * side for side in size), 8) if packed else out


def states_for(name: str, count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Random states [B, count, 3, 8, 8] and falling network times [B, count], in float64."""
    x = Keyed("diffusers", 1).normal("x", torch.arange(batch), (count, 3, 8, 8)).double()
    t = torch.linspace(0.99, 0.25, count, dtype=torch.float64).repeat(batch, 1)
    t -= 0.01 * torch.arange(batch).unsqueeze(1)
    return x, t if FAMILIES[name].trained_as[0] == "flow" else 1000 * t - 1
