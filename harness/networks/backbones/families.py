"""What each supported class of diffusers needs, as declarations.

Sources: the models and pipelines of diffusers, whose arguments these are. "Packed" latents are
FLUX's: a token holds a square of latents, channel by channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition

LATENT_FACTOR = 8
"""Pixels a latent, in PixArt's conditions on the size of an image."""


@dataclass(frozen=True)
class Family:
    """Where a class of diffusers has what a `Backbone` names.

    Attributes:
        attention: the self-attention of a block, by name.
        embeddings: the modules whose output is the conditioning vector.
        inputs: from the model, x, time and conditions, each [N], to the arguments of `forward`
            beside x.
        trained_as: schedule and prediction type, where no scheduler says them.
        blocks: the lists of blocks, lowest first, with the option that is their number.
        entrance: the module from images to tokens, by name.
        head: the last linear layer, by name.
        packed: side of the square of latents that a token holds; 1 for classes that cut patches
            themselves.
        of_text: names of the modules that read the text alone, so that their output is the same at
            every time; `*` stands for anything.
        linear: whether self-attention is linear, so that history sums states.
        only: options that must have these values, since the rest is another kind of network.
        idle: options of earlier versions of the class, which never had an effect.
    """

    attention: str
    embeddings: Callable[[Any], list[nn.Module]]
    inputs: Callable[[Any, Tensor, Tensor, Condition], dict[str, Any]]
    trained_as: tuple[str, str]
    blocks: Mapping[str, str] = field(default_factory=lambda: {"transformer_blocks": "num_layers"})
    entrance: str = "pos_embed"
    head: str = "proj_out"
    packed: int = 1
    of_text: tuple[str, ...] = ()
    linear: bool = False
    only: Mapping[str, Any] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()


def needed(part: Tensor | None, name: str) -> Tensor:
    """A part of the conditions. Raises ValueError if there is none."""
    if part is None:
        raise ValueError(f"the network needs {name}, but the conditions have none")
    return part


def _dit(model: Any, x: Tensor, time: Tensor, cond: Condition) -> dict[str, Any]:
    return {"timestep": time, "class_labels": cond.classes}


def _pixart(model: Any, x: Tensor, time: Tensor, cond: Condition) -> dict[str, Any]:
    found = {
        "timestep": time,
        "encoder_hidden_states": needed(cond.text, "text"),
        "encoder_attention_mask": cond.text_mask,
    }
    if not model.use_additional_conditions:
        return found
    height, width = (LATENT_FACTOR * side for side in x.shape[-2:])
    size = {
        "resolution": x.new_tensor([[height, width]]).expand(len(x), -1),
        "aspect_ratio": x.new_tensor([[height / width]]).expand(len(x), -1),
    }
    return {**found, "added_cond_kwargs": size}


def _sd3(model: Any, x: Tensor, time: Tensor, cond: Condition) -> dict[str, Any]:
    """It attends to padding too, as in its training."""
    return {
        "timestep": 1000 * time,
        "encoder_hidden_states": needed(cond.text, "text"),
        "pooled_projections": needed(cond.pooled, "a pooled text vector"),
    }


def _flux(model: Any, x: Tensor, time: Tensor, cond: Condition) -> dict[str, Any]:
    """It attends to padding too; a distilled one is told its guidance scale."""
    text, (height, width) = needed(cond.text, "text"), (side // 2 for side in x.shape[-2:])
    rows, columns = (
        axis.flatten()
        for axis in torch.meshgrid(
            torch.arange(height, device=x.device),
            torch.arange(width, device=x.device),
            indexing="ij",
        )
    )
    found = {
        "timestep": time,
        "encoder_hidden_states": text,
        "pooled_projections": needed(cond.pooled, "a pooled text vector"),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1),
        "txt_ids": rows.new_zeros(text.shape[1], 3),
    }
    if model.config.guidance_embeds:
        return {**found, "guidance": x.new_full((len(x),), model.guidance)}
    return found


def _sana(model: Any, x: Tensor, time: Tensor, cond: Condition) -> dict[str, Any]:
    return {
        "timestep": 1000 * model.config.timestep_scale * time,
        "encoder_hidden_states": needed(cond.text, "text"),
        "encoder_attention_mask": cond.text_mask,
    }


def _qwen(model: Any, x: Tensor, time: Tensor, cond: Condition) -> dict[str, Any]:
    height, width = (side // 2 for side in x.shape[-2:])
    return {
        "timestep": time,
        "encoder_hidden_states": needed(cond.text, "text"),
        "encoder_hidden_states_mask": cond.text_mask,
        "img_shapes": [[(1, height, width)]] * len(x),
    }


CROSS_ATTENTION = (
    "caption_projection",
    "transformer_blocks.*.attn2.to_k",
    "transformer_blocks.*.attn2.to_v",
)
"""What reads the text alone where it has an attention of its own; joint blocks change the text."""
DIT = "DiTTransformer2DModel"
FAMILIES = {
    DIT: Family(
        "attn1",
        # Every block has a copy of its own.
        lambda model: [block.norm1.emb for block in model.transformer_blocks],
        _dit,
        ("vp", "eps"),
        head="proj_out_2",
    ),
    "PixArtTransformer2DModel": Family(
        "attn1",
        lambda model: [model.adaln_single.emb],
        _pixart,
        ("vp", "eps"),
        of_text=CROSS_ATTENTION,
    ),
    "SD3Transformer2DModel": Family(
        "attn",
        lambda model: [model.time_text_embed],
        _sd3,
        ("flow", "v"),
        of_text=("context_embedder",),
    ),
    "FluxTransformer2DModel": Family(
        "attn",
        lambda model: [model.time_text_embed],
        _flux,
        ("flow", "v"),
        {
            "transformer_blocks": "num_layers",
            "single_transformer_blocks": "num_single_layers",
        },
        entrance="x_embedder",
        packed=2,
        of_text=("context_embedder",),
        only={"patch_size": 1},
    ),
    "SanaTransformer2DModel": Family(
        "attn1",
        lambda model: [model.time_embed.emb],
        _sana,
        ("flow", "v"),
        entrance="patch_embed",
        of_text=(*CROSS_ATTENTION, "caption_norm"),
        linear=True,
        only={"guidance_embeds": False},
    ),
    "QwenImageTransformer2DModel": Family(
        "attn",
        lambda model: [model.time_text_embed],
        _qwen,
        ("flow", "v"),
        entrance="img_in",
        packed=2,
        of_text=("txt_norm", "txt_in"),
        only={
            "patch_size": 2,
            "guidance_embeds": False,
            "zero_cond_t": False,
            "use_additional_t_cond": False,
            "use_layer3d_rope": False,
        },
        idle=frozenset({"pooled_projection_dim"}),
    ),
}
"""What a `Backbone` needs of each supported class, by name."""
