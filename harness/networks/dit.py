"""The diffusion transformer (Peebles & Xie 2023, arXiv 2212.09748).

State dicts have the keys of the official DiT. `layers.py` holds the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from harness.diffusion.conditions import Condition
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


def size_options(name: str) -> dict[str, int]:
    """Constructor arguments of a size of the paper, e.g. "DiT-XL/2".

    Raises:
        KeyError: for a size that the paper does not have.
    """
    size, _, patch = name.partition("/")
    depth, width, heads = SIZES[size]
    if patch not in ("2", "4", "8"):
        raise KeyError(name)
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": int(patch)}


class Trunk(nn.Module):
    """The layers of a class-conditional diffusion transformer; subclasses define the forward pass.

    Args:
        image_size: height and width of the input, an int or a pair.
        patch_size: side of a token's square patch.
        in_channels: channels of the input.
        hidden_size, depth, num_heads: width d, number of blocks, attention heads.
        num_classes: labels are 0 .. num_classes, of which the last is the null class; 0 means none.
        learn_sigma: whether the output holds DiT's learned variance in a second set of channels.
        extra_channels: further channels of the input, which the output lacks.
        scalars: names of the inputs beside time and label (`Condition.scalars`).
        text_width: width of a text encoder's outputs; 0 means no text. Every block attends to
            the text, and its mean is part of the conditioning vector.
    """

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
        extra_channels: int = 0,
        scalars: Sequence[str] = (),
        text_width: int = 0,
    ):
        super().__init__()
        self.in_channels, self.depth, self.num_classes = in_channels, depth, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        from timm.layers import PatchEmbed

        self.x_embedder = PatchEmbed(
            size, patch_size, in_channels + extra_channels, hidden_size, bias=True
        )
        self.patch_size = patch_size
        self.grid: tuple[int, int] = self.x_embedder.grid_size
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size) if num_classes else None
        self.text_embedder = nn.Linear(text_width, hidden_size) if text_width else None
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, self.grid))
        self.blocks = nn.ModuleList(
            [Block(hidden_size, num_heads, text_width) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()
        self.scalar_embedders = nn.ModuleDict(
            {name: TimestepEmbedder(hidden_size, starts_at_zero=True) for name in scalars}
        )

    def _initialise(self) -> None:
        """Xavier for linear maps, N(0, 0.02^2) for embeddings, zero for gates and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
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

    def load_teacher(self, state: dict[str, Tensor]) -> None:
        """Loads a DiT's weights; the embedders of scalars, which a DiT lacks, keep their own."""
        own = {
            name: value
            for name, value in self.state_dict().items()
            if name.startswith("scalar_embedders.")
        }
        self.load_state_dict({**own, **state})

    def conditioning(self, t: Tensor, cond: Condition) -> Tensor:
        """The conditioning vector [B, d] or [B, S, d] for network times [B] or [B, S].

        Raises:
            KeyError: if the conditions lack a scalar that the network was built with.
        """
        added = [self.y_embedder(cond.classes)] if self.y_embedder is not None else []
        if self.text_embedder is not None and cond.text is not None:
            added.append(self.text_embedder(cond.text.mean(1)))
        added += [embedder(cond.scalars[name]) for name, embedder in self.scalar_embedders.items()]
        if not added:
            return self.t_embedder(t)
        c = sum(added[1:], added[0])
        return self.t_embedder(t) + c.reshape(len(c), *[1] * (t.dim() - 1), -1)

    def tokens(self, x: Tensor) -> Tensor:
        """Embedded tokens [..., T, d] of images [..., C, H, W]."""
        embedded = self.x_embedder(x.flatten(0, -4)) + self.pos_embed
        return embedded.unflatten(0, x.shape[:-3])

    def image(self, tokens: Tensor) -> Tensor:
        """Images [..., C', H, W] from output tokens [..., T, patch^2 C']."""
        (rows, columns), p, c = self.grid, self.patch_size, self.out_channels
        lead, n = tokens.shape[:-2], tokens.dim() - 2
        pixels = tokens.reshape(*lead, rows, columns, p, p, c)
        order = [*range(n), n + 4, n, n + 2, n + 1, n + 3]
        return pixels.permute(order).reshape(*lead, c, rows * p, columns * p)


class DiT(Trunk):
    """The class-conditional diffusion transformer."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Raw network output.

        Args:
            x: [B, C, H, W].
            t: [B], the input of the time embedding (DiT: the level index).
            cond: labels [B], text [B, L, width] and scalars [B], as the network was built.

        Returns:
            [B, C', H, W] with C' = 2 C under `learn_sigma`, else C.
        """
        c = self.conditioning(t, cond)
        for h in self.block_outputs(x, c, cond):  # noqa: B007
            pass
        return self.image(self.final_layer(h, c))

    def block_outputs(self, x: Tensor, c: Tensor, cond: Condition) -> Iterator[Tensor]:
        """Tokens after each block, [B, T, d], for x [B, C, H, W] under c [B, d]."""
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h, c, text=cond.text)
            yield h
