"""Transformers of the library diffusers, by class and config: DiT, PixArt and SD3.

A description holds `class`, `config` (the content of `config.json`) and, for DiT, `source`.
Weights have diffusers' keys behind `model.`.

diffusers' DiT is not the official one: with the same weights, its outputs differ by 61 % at level
999. Its time frequencies are `10000^(-i / (half - 1))`, and a norm has eps 1e-5. So the rule
belongs to the source of the weights: `source: official` for converted ones, or `diffusers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.errors import UsageError, unknown
from harness.networks.backbones.base import Backbone
from harness.networks.layers import sinusoids
from harness.networks.library import diffusers_for

Hook = Callable[[nn.Module, Any, Any], Any]
LATENT_FACTOR = 8
"""Pixels a latent, in PixArt's conditions on the size of an image."""


@dataclass(frozen=True)
class Family:
    """Where a class of diffusers has what a `Backbone` names.

    Attributes:
        attention: the self-attention of a block, by name.
        head: the last linear layer, by name.
        embeddings: the modules whose output is the conditioning vector.
        inputs: from x and conditions, both [N], to the arguments of `forward` beside x and time.
        trained_as: schedule and prediction type, as its authors trained it.
        time_factor: times of the network for each of the schedule's.
    """

    attention: str
    head: str
    embeddings: Callable[[Any], list[nn.Module]]
    inputs: Callable[[Any, Tensor, Condition], dict[str, Any]]
    trained_as: tuple[str, str]
    time_factor: float = 1.0


def _pixart_inputs(model: Any, x: Tensor, cond: Condition) -> dict[str, Any]:
    found = {
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


def needed(part: Tensor | None, name: str) -> Tensor:
    """A part of the conditions. Raises ValueError if there is none."""
    if part is None:
        raise ValueError(f"the network needs {name}, but the conditions have none")
    return part


DIT = "DiTTransformer2DModel"
FAMILIES = {
    DIT: Family(
        "attn1",
        "proj_out_2",
        # Every block has a copy of its own.
        lambda model: [block.norm1.emb for block in model.transformer_blocks],
        lambda model, x, cond: {"class_labels": cond.classes},
        ("vp", "eps"),
    ),
    "PixArtTransformer2DModel": Family(
        "attn1", "proj_out", lambda model: [model.adaln_single.emb], _pixart_inputs, ("vp", "eps")
    ),
    "SD3Transformer2DModel": Family(
        "attn",
        "proj_out",
        lambda model: [model.time_text_embed],
        # It attends to padding too, as in its training.
        lambda model, x, cond: {
            "encoder_hidden_states": needed(cond.text, "text"),
            "pooled_projections": needed(cond.pooled, "a pooled text vector"),
        },
        ("flow", "v"),
        1000.0,
    ),
}


def class_of(options: Mapping[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of a description and its whole config. Raises UsageError if they do not fit."""
    for name in options:
        if name not in ("class", "config", "source"):
            raise unknown("option", name, ("class", "config", "source"), "network")
    name = options.get("class", "none")
    if name not in FAMILIES:
        raise unknown("class of diffusers", name, FAMILIES, "network")
    cls = getattr(diffusers_for(name), name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    config = {key: v for key, v in options.get("config", {}).items() if not key.startswith("_")}
    for key in config:
        if key not in (known := [parameter.name for parameter in parameters]):
            raise unknown("option", key, known, f"the config of {name}")
    return cls, {**{parameter.name: parameter.default for parameter in parameters}, **config}


def build(
    options: Mapping[str, Any], scalars: Sequence[str], extra_channels: int
) -> DiffusersBackbone:
    """A transformer from its description. Raises UsageError if it does not fit."""
    cls, config = class_of(options)
    source = options.get("source", "diffusers")
    if source not in ("official", "diffusers"):
        raise unknown("source", source, ("official", "diffusers"), "network")
    if source == "official":
        if cls.__name__ != DIT:
            raise UsageError(
                f"source official is for DiT's weights: leave it out for {cls.__name__}"
            )
        config["norm_eps"] = 1e-6
    config["out_channels"] = config["out_channels"] or config["in_channels"]
    config["in_channels"] += extra_channels
    return DiffusersBackbone(cls(**config), source == "official", scalars)


def depth_of(options: Mapping[str, Any]) -> int:
    """The number of blocks of a description."""
    return class_of(options)[1]["num_layers"]


class OfficialTimes(nn.Module):
    """Sines and cosines of times [N] at the official frequencies, [N, 256]."""

    def forward(self, time: Tensor) -> Tensor:
        return sinusoids(time.to(torch.promote_types(time.dtype, torch.float32)))


def image_tokens(output: Any) -> Tensor:
    """The image's tokens [N, T, d] of a block's output; joint blocks return the text's first."""
    return output[-1] if isinstance(output, tuple) else output


class DiffusersBackbone(Backbone):
    """A transformer of diffusers.

    It stays in evaluation mode, since DiT drops labels at random in training mode.

    Args:
        model: the transformer.
        official_times: whether a DiT has the official time frequencies.
        scalars: names of the inputs beside time and conditions (`Condition.scalars`).
    """

    def __init__(self, model: Any, official_times: bool, scalars: Sequence[str]):
        super().__init__()
        self.model: Any = model.eval()
        self.family = type(model).__name__
        self.width = self.model.inner_dim
        if official_times:
            for embedding in self.embeddings:
                embedding.time_proj = OfficialTimes()
        self.embed_scalars(scalars)
        self.added: Tensor | None = None
        for embedding in self.embeddings if scalars else ():
            embedding.register_forward_hook(self._with_scalars)

    def _with_scalars(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if self.added is None else output + self.added

    def train(self, mode: bool = True) -> DiffusersBackbone:
        super().train(mode)
        self.model.eval()
        return self

    @property
    def embeddings(self) -> list[nn.Module]:
        """The modules whose output is the conditioning vector."""
        return FAMILIES[self.family].embeddings(self.model)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.model.transformer_blocks

    @property
    def attentions(self) -> Sequence[nn.Module]:
        return [getattr(block, FAMILIES[self.family].attention) for block in self.blocks]

    @property
    def head(self) -> nn.Module:
        return getattr(self.model, FAMILIES[self.family].head)

    @property
    def patch_embedding(self) -> nn.Module:
        return self.model.pos_embed

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        family, cond = FAMILIES[self.family], cond.of_states(len(x))
        scalars = self.embedded_scalars(cond)
        self.added = sum(scalars[1:], scalars[0]) if scalars else None
        output = self.model(
            x,
            timestep=time * family.time_factor,
            **family.inputs(self.model, x, cond),
            return_dict=False,
        )[0]
        self.added = None
        if (len(output), *output.shape[2:]) != (len(x), *x.shape[2:]):
            raise ValueError(
                f"the input is {tuple(x.shape)}, but the network answers {tuple(output.shape)}: "
                "it takes the image size of its config alone"
            )
        return output

    @contextmanager
    def lowest_blocks(self, count: int | None, hook: Hook) -> Iterator[None]:
        """Inside, the lowest blocks alone run, and hook(block, args, output) follows each."""
        blocks = self.blocks
        handles = [block.register_forward_hook(hook) for block in blocks[:count]]
        self.model.transformer_blocks = blocks[:count]
        try:
            yield
        finally:
            self.model.transformer_blocks = blocks
            for handle in handles:
                handle.remove()

    def features(
        self, x: Tensor, time: Tensor, cond: Condition, depth: int | None = None
    ) -> tuple[Iterable[Tensor], Tensor]:
        found, vectors = list[Tensor](), list[Tensor]()

        def note(block: nn.Module, args: Any, output: Any) -> None:
            found.append(image_tokens(output))

        handle = self.embeddings[0].register_forward_hook(
            lambda module, args, output: vectors.append(output)
        )
        try:
            with self.lowest_blocks(depth, note):
                self(x, time, cond)
        finally:
            handle.remove()
        return found, vectors[0]

    def reuse(
        self, x: Tensor, time: Tensor, cond: Condition, lowest: int, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        tokens = list[Tensor]()

        def note(block: nn.Module, args: Any, output: Any) -> Any:
            tokens.append(image_tokens(output))
            if added is None or len(tokens) < lowest:
                return output
            moved = tokens[-1] + added
            return (*output[:-1], moved) if isinstance(output, tuple) else moved

        with self.lowest_blocks(None if added is None else lowest, note):
            output = self(x, time, cond)
        return output, tokens[-1] - tokens[lowest - 1] if added is None else added
