"""The diffusion transformer (Peebles & Xie 2023, arXiv 2212.09748).

State dicts have the keys of the official DiT, which are SiT's too. `layers.py` holds the layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.errors import UsageError, unknown
from harness.networks.backbones.base import Backbone, check_room
from harness.networks.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    TimestepEmbedder,
    sincos_position_embedding,
)

SIZES = {  # name: (depth, hidden_size, num_heads), table 1 of the paper
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)
MOST_TOKENS = 2**20
"""Tokens of a picture of 16,384 px in latents of 8 px and patches of 2."""
LARGEST = {
    "patch_size": (1, 2**14),
    "in_channels": (1, 2**14),
    "hidden_size": (4, 2**16),
    "depth": (1, 10**4),
    "num_heads": (1, 2**12),
    "num_classes": (0, 10**7),
    "text_width": (0, 2**16),
}
"""The least and the largest sizes of a network; the largest are far above any that was trained."""


def size_options(name: str) -> dict[str, int]:
    """Constructor arguments of a size of the paper, e.g. "DiT-XL/2".

    Raises:
        KeyError: for a size that the paper does not have.
    """
    size, _, patch = name.partition("/")
    depth, width, heads = SIZES[size]
    if patch not in map(str, PATCHES):
        raise KeyError(name)
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": int(patch)}


def sized(options: Mapping[str, Any]) -> dict[str, Any]:
    """A description with depth, width, heads and patch in place of `size`.

    Raises UsageError for a size that the paper does not have.
    """
    whole = dict(options)
    size = whole.pop("size", None)
    try:
        return whole if size is None else {**size_options(size), **whole}
    except KeyError:
        names = [f"{name}/{patch}" for name in SIZES for patch in PATCHES]
        raise unknown("network", size, names) from None


def arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of a description.

    Raises UsageError for an option that does not exist or is missing.
    """
    whole, known = sized(options), inspect.signature(DiT).parameters
    for name in whole:
        if name not in known:
            raise unknown("option", name, ["size", *known], "network")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in whole]
    if missing:
        raise UsageError(f"network lacks {', '.join(missing)}: give them, or a size as in DiT-S/2")
    _check(whole)
    return whole


def _check(options: Mapping[str, Any]) -> None:
    """Raises UsageError for sizes that are no whole numbers, absurd, or do not fit each other."""
    side = options["image_size"]
    sides = list(side) if isinstance(side, list | tuple) and len(side) == 2 else [side]
    given = [(name, options[name]) for name in LARGEST if name in options]
    for name, value in [*given, *(("image_size", each) for each in sides)]:
        least, most = LARGEST.get(name, (1, 2**14))
        if type(value) is not int or not least <= value <= most:
            raise UsageError(f"network: {name} is {value!r}, but should be {least} to {most}")
    patch, width, heads = (options[name] for name in ("patch_size", "hidden_size", "num_heads"))
    if width % heads or width % 4:
        raise UsageError(
            f"network: hidden_size is {width}, but {heads} attention heads and 4 must divide it"
        )
    if any(each % patch for each in sides):
        raise UsageError(f"network: image_size is {side}, which patches of {patch} do not divide")
    if (tokens := sides[0] * sides[-1] // patch**2) > MOST_TOKENS:
        raise UsageError(f"network has {tokens} tokens, but a picture has at most {MOST_TOKENS}")


def check(options: Mapping[str, Any]) -> None:
    """Raises UsageError for a description that does not fit."""
    arguments(options)


def build(options: Mapping[str, Any], scalars: Sequence[str], extra_channels: int) -> DiT:
    """A DiT from its description. Raises UsageError if it does not fit."""
    whole = arguments(options)
    check_room(whole["depth"], whole["hidden_size"])
    return DiT(**whole, scalars=scalars, extra_channels=extra_channels)


def depth_of(options: Mapping[str, Any]) -> int:
    """The number of blocks of a description. Raises UsageError if it does not say."""
    whole = sized(options)
    if "depth" not in whole:
        raise UsageError("network lacks depth: give it, or a size as in DiT-S/2")
    return whole["depth"]


def sizes_of(options: Mapping[str, Any]) -> tuple[int | None, Any]:
    """Channels and side of the images of a description; None where it does not say."""
    return options.get("in_channels"), options.get("image_size")


class DiT(Backbone):
    """A diffusion transformer under class labels, text, or neither.

    Args:
        image_size: height and width of the input, an int or a pair.
        patch_size: side of a token's square patch.
        in_channels: channels of the input.
        hidden_size, depth, num_heads: width d, number of blocks, attention heads.
        num_classes: labels are 0 .. num_classes, of which the last is the null class; 0 means none.
        learn_sigma: whether the output holds DiT's learned variance in a second set of channels.
        text_width: width of a text encoder's outputs; 0 means no text. Every block attends to
            the text, and its mean is part of the conditioning vector.
        convention: "sit" for the weights of an official SiT, which is told 1 - t and predicts
            data - noise (Ma et al. 2024, arXiv 2401.08740). The output is v all the same.
        adaln: "single" for PixArt's: one modulation from the conditioning vector for all blocks.
        extra_channels: further channels of the input, which the output lacks.
        scalars: names of the inputs beside time and condition (`Condition.scalars`).
    """

    head_name: ClassVar[str] = "final_layer"

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int = 0,
        learn_sigma: bool = False,
        text_width: int = 0,
        convention: Literal["dit", "sit"] = "dit",
        adaln: Literal["block", "single"] = "block",
        extra_channels: int = 0,
        scalars: Sequence[str] = (),
    ):
        super().__init__()
        if adaln not in ("block", "single"):
            raise UsageError(f"adaln is {adaln!r}, but must be 'block' or 'single'")
        if convention not in ("dit", "sit"):
            raise UsageError(f"convention is {convention!r}, but must be 'dit' or 'sit'")
        self.in_channels, self.width, self.convention = in_channels, hidden_size, convention
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        from timm.layers import PatchEmbed

        self.x_embedder = PatchEmbed(
            (height, width), patch_size, in_channels + extra_channels, hidden_size, bias=True
        )
        self.patch_size = patch_size
        self.grid: tuple[int, int] = self.x_embedder.grid_size
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size) if num_classes else None
        self.text_embedder = nn.Linear(text_width, hidden_size) if text_width else None
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, self.grid))
        single = adaln == "single"
        self.blocks = nn.ModuleList(
            [Block(hidden_size, num_heads, text_width, single) for _ in range(depth)]
        )
        self.adaLN_modulation = (
            nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) if single else None
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()
        self.embed_scalars(scalars)

    def _initialise(self) -> None:
        """Xavier for linear maps, N(0, 0.02^2) for embeddings, zero for gates and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.zeros_(projection.bias)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if (
                "adaLN_modulation" in name
                or ".cross.proj" in name
                or name.startswith("final_layer.linear")
            ):
                nn.init.zeros_(parameter)

    @property
    def attentions(self) -> Sequence[nn.Module]:
        return [block.get_submodule("attn") for block in self.blocks]

    @property
    def head(self) -> nn.Module:
        return self.final_layer

    @property
    def patch_embedding(self) -> nn.Module:
        return self.x_embedder

    def last_layer(self, head: nn.Module) -> nn.Linear:
        assert isinstance(head, FinalLayer)
        return head.linear

    def conditioning(self, time: Tensor, cond: Condition) -> Tensor:
        """The conditioning vector [N, d] for times [N] under conditions [B]."""
        added = [self.y_embedder(cond.classes)] if self.y_embedder is not None else []
        if self.text_embedder is not None and cond.text is not None:
            embedder = self.text_embedder
            added.append(cond.once(embedder, lambda: embedder(cond.mean_text)))
        added += self.embedded_scalars(cond)
        t = self.t_embedder(1 - time if self.convention == "sit" else time)
        if not added:
            return t
        c = sum(added[1:], added[0])
        return (t.unflatten(0, (len(c), -1)) + c.unsqueeze(1)).flatten(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Embedded tokens [N, T, d] of images [N, C, H, W]."""
        return self.x_embedder(x) + self.pos_embed

    def image(self, tokens: Tensor) -> Tensor:
        """The output [N, C', H, W] from output tokens [N, T, patch^2 C']."""
        (rows, columns), p, channels = self.grid, self.patch_size, self.out_channels
        pixels = tokens.reshape(-1, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        image = pixels.reshape(-1, channels, rows * p, columns * p)
        return -image if self.convention == "sit" else image

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        c = self.conditioning(time, cond)
        for h in self.outputs(x, c, cond):  # noqa: B007
            pass
        return self.image(self.final_layer(h, c))

    def outputs(self, x: Tensor, c: Tensor, cond: Condition) -> Iterator[Tensor]:
        """Tokens [N, T, d] after each block, which runs when its tokens are asked for."""
        h = self.tokens(x)
        signal = c if self.adaLN_modulation is None else self.adaLN_modulation(c)
        for block in self.blocks:
            h = block(h, signal, cond)
            yield h

    def features(
        self, x: Tensor, time: Tensor, cond: Condition, depth: int | None = None
    ) -> tuple[Iterable[Tensor], Tensor]:
        c = self.conditioning(time, cond)
        return islice(self.outputs(x, c, cond), depth), c

    def reuse(
        self, x: Tensor, time: Tensor, cond: Condition, lowest: int, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        found, c = self.features(x, time, cond, None if added is None else lowest)
        tokens = list(found)
        if added is None:
            added = tokens[-1] - tokens[lowest - 1]
            return self.image(self.final_layer(tokens[-1], c)), added
        return self.image(self.final_layer(tokens[-1] + added, c)), added
