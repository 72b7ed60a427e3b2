"""Transformers of the library diffusers, by class and config; `families.py` has the classes.

A description holds `class` and `config` (the content of `config.json`). Weights have diffusers'
keys behind `model.`. Two classes need one option more:

- `source` for DiT. diffusers' DiT is not the official one: with the same weights, its outputs
  differ by 61 % at level 999. Its time frequencies are `10000^(-i / (half - 1))`, and a norm has
  eps 1e-5. So the rule belongs to the source of the weights: `official` for converted ones, or
  `diffusers`.
- `guidance` for a FLUX with `guidance_embeds`. There the guidance scale is an input of the network,
  so one pass is guided. The task's `guidance.scale` is a second pass beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.errors import UsageError, unknown
from harness.networks.backbones.base import Backbone, check_room
from harness.networks.backbones.families import DIT, FAMILIES
from harness.networks.layers import sinusoids
from harness.networks.library import diffusers_for
from harness.networks.linear_attention import LinearAttention
from harness.networks.packing import Packing, unpacked
from harness.networks.reading import NOTHING, Reading, read_once
from harness.networks.swapping import swap

Hook = Callable[[nn.Module, Any, Any], Any]
MOST_BLOCKS, MOST_SIZE = 10**4, 2**24
"""The largest number of blocks, and the largest other number in a config."""
SIZES = ("num_attention_heads", "attention_head_dim")
"""Options whose product is the width."""
OPTIONS = ("class", "config", "source", "guidance")


def check(options: Mapping[str, Any]) -> None:
    """Raises UsageError for an unknown class or option, and for absurd sizes."""
    for option in options:
        if option not in OPTIONS:
            raise unknown("option", option, OPTIONS, "network")
    name, config = str(options.get("class", "none")), options.get("config", {})
    if name not in FAMILIES:
        raise unknown("class of diffusers", name, FAMILIES, "network")
    if not isinstance(config, Mapping):
        raise UsageError("network: config should be a mapping from names to values")
    for key, value in config.items():
        blocks = key in FAMILIES[name].blocks.values() or key in SIZES
        least, most = (1, MOST_BLOCKS) if blocks else (-MOST_SIZE, MOST_SIZE)
        for size in value if isinstance(value, list) else [value]:
            number = isinstance(size, int | float) and least <= size <= most
            if not number and (blocks or isinstance(size, int | float)):
                raise UsageError(f"network: {key} is {value!r}, but should be {least} to {most}")


def class_of(options: Mapping[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of a description and its whole config. Raises UsageError if they do not fit."""
    check(options)
    name = options["class"]
    cls = getattr(diffusers_for(name), name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    config = {key: v for key, v in options.get("config", {}).items() if not key.startswith("_")}
    for key in config:
        if key not in (known := [parameter.name for parameter in parameters]):
            raise unknown("option", key, known, f"the config of {name}")
    whole = {**{parameter.name: parameter.default for parameter in parameters}, **config}
    for key, value in FAMILIES[name].only.items():
        if whole[key] != value:
            raise UsageError(
                f"{name} with {key} {whole[key]} is not supported: {key} must be {value}"
            )
    return cls, whole


def build(
    options: Mapping[str, Any], scalars: Sequence[str], extra_channels: int
) -> DiffusersBackbone:
    """A transformer from its description. Raises UsageError if it does not fit."""
    cls, config = class_of(options)
    source, guidance = options.get("source", "diffusers"), options.get("guidance")
    if source not in ("official", "diffusers"):
        raise unknown("source", source, ("official", "diffusers"), "network")
    if source == "official":
        if cls.__name__ != DIT:
            raise UsageError(
                f"source official is for DiT's weights: leave it out for {cls.__name__}"
            )
        config["norm_eps"] = 1e-6
    _check_guidance(guidance, config, cls.__name__)
    blocks = sum(config[number] for number in FAMILIES[cls.__name__].blocks.values())
    check_room(blocks, config["num_attention_heads"] * config["attention_head_dim"])
    config["out_channels"] = config["out_channels"] or config["in_channels"]
    try:
        config["in_channels"] += extra_channels * FAMILIES[cls.__name__].packed ** 2
        return DiffusersBackbone(cls(**config), source == "official", scalars, guidance)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{cls.__name__} cannot be built of its config: {reason}") from error


def _check_guidance(guidance: Any, config: Mapping[str, Any], name: str) -> None:
    """Raises UsageError for a scale that a network does not take, or lacks."""
    if not config.get("guidance_embeds"):
        if guidance is not None:
            raise UsageError(
                f"{name} takes no guidance scale as an input: leave network.guidance out, "
                "and give the task's guidance.scale"
            )
    elif not isinstance(guidance, int | float):
        raise UsageError(
            f"{name} has guidance_embeds, so its guidance scale is an input: "
            f"network.guidance is {guidance}, but must be a number, such as 3.5"
        )


def depth_of(options: Mapping[str, Any]) -> int:
    """The number of blocks of a description."""
    cls, config = class_of(options)
    return sum(config[number] for number in FAMILIES[cls.__name__].blocks.values())


def sizes_of(options: Mapping[str, Any]) -> tuple[int | None, Any]:
    """Channels and side of what a description denoises; None where it does not say."""
    config, name = options.get("config", {}), options.get("class")
    channels, packed = config.get("in_channels"), FAMILIES[name].packed if name in FAMILIES else 1
    return channels and channels // packed**2, config.get("sample_size")


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
        guidance: the guidance scale of a network that takes it as an input.
    """

    def __init__(
        self,
        model: Any,
        official_times: bool,
        scalars: Sequence[str],
        guidance: float | None = None,
    ):
        super().__init__()
        self.model: Any = model.eval()
        self.model.guidance = guidance
        self.family = type(model).__name__
        self.width = model.config.num_attention_heads * model.config.attention_head_dim
        family = FAMILIES[self.family]
        if family.packed > 1:
            swap(self.patch_embedding, Packing, side=family.packed)
        for block in self.blocks if family.linear else ():
            setattr(block, family.attention, LinearAttention(getattr(block, family.attention)))
        self.reading = Reading()
        read_once(self.model, family.of_text, self.reading)
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
        return nn.ModuleList(
            block for name in FAMILIES[self.family].blocks for block in getattr(self.model, name)
        )

    @property
    def attentions(self) -> Sequence[nn.Module]:
        return [getattr(block, FAMILIES[self.family].attention) for block in self.blocks]

    @property
    def head(self) -> nn.Module:
        return getattr(self.model, FAMILIES[self.family].head)

    @property
    def patch_embedding(self) -> nn.Module:
        return getattr(self.model, FAMILIES[self.family].entrance)

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        self.reading.cond, self.reading.rows = cond, len(x)
        family, cond = FAMILIES[self.family], cond.of_states(len(x))
        scalars = self.embedded_scalars(cond)
        self.added = sum(scalars[1:], scalars[0]) if scalars else None
        output = self.model(x, **family.inputs(self.model, x, time, cond), return_dict=False)[0]
        self.added, self.reading.cond = None, NOTHING
        if family.packed > 1:
            output = unpacked(output, family.packed, x.shape[-2:])
        # Parallel heads give several outputs for each input.
        if output.shape[2:] != x.shape[2:] or len(output) % len(x):
            raise ValueError(
                f"the input is {tuple(x.shape)}, but the network answers {tuple(output.shape)}: "
                "it takes the image size of its config alone"
            )
        return output

    @contextmanager
    def lowest_blocks(self, count: int | None, hook: Hook) -> Iterator[None]:
        """Inside, the lowest blocks alone run, and hook(block, args, output) follows each."""
        model, handles, left = self.model, [], self.depth if count is None else count
        whole = {name: getattr(model, name) for name in FAMILIES[self.family].blocks}
        for name, blocks in whole.items():
            setattr(model, name, blocks[:left])
            handles += [block.register_forward_hook(hook) for block in blocks[:left]]
            left -= min(left, len(blocks))
        try:
            yield
        finally:
            for name, blocks in whole.items():
                setattr(model, name, blocks)
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
