"""The sizes of a DiT, read from the shapes of its weights.

Shapes tell everything but the number of attention heads. That comes from the caller, from the
checkpoint's own options, or from the paper's table by width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harness.errors import UsageError
from harness.networks.backbones.dit import SIZES
from harness.networks.fit import reason, some
from harness.networks.layers import sincos_position_embedding

TOLD = ("x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight", "blocks.0.mlp.fc1.bias")
"""Weights of a DiT that sizes are read from."""
OTHERS = {"y_embedder.embedding_table.weight": 2, "text_embedder.weight": 2}
"""Dimensions of further weights that sizes are read from, where a network has them."""
PARTS = ("x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer")
"""The first parts of a DiT's names."""
HEADS = {width: heads for _, width, heads in SIZES.values()}
"""Attention heads by width, table 1 of the DiT paper."""
POSITION_ERROR = 0.01
"""Largest distance between a DiT's positions and those of a file, which may be in 16 bits."""


def sizes_of(
    state: Mapping[str, Tensor], args: Mapping[str, Any], where: str, num_heads: int | None = None
) -> dict[str, Any]:
    """Constructor arguments of the DiT that has these weights, as a task's `network` names them.

    Args:
        args: the options of the training script; `num_heads`, `model`, `num_classes` are read.
        where: what has the weights, as an error names it.
        num_heads: attention heads, where neither `args` nor the paper's table tell.

    Raises:
        UsageError: if the weights are not a DiT's, or if the number of heads is unknown.
    """
    if missing := [name for name in TOLD if name not in state]:
        strange = [n for n in state if n.split(".")[0] not in PARTS or "lora_" in n]
        raise UsageError(
            f"{where} is not a DiT's state dict (missing: {some(missing)}; it has {some(state)}); "
            f"{reason(state, missing, strange)}"
        )
    _check_told(state, where)
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = _heads(width, args, where, num_heads)
    rows, columns = _grid(state["pos_embed"], where)
    found: dict[str, Any] = {
        **_blocks(depth, width, heads, patch),
        "image_size": patch * rows if rows == columns else [patch * rows, patch * columns],
        "in_channels": channels,
    }
    if (table := state.get("y_embedder.embedding_table.weight")) is not None:
        found["num_classes"] = _classes(len(table), args, where)
    if (text := state.get("text_embedder.weight")) is not None:
        found["text_width"] = text.shape[1]
    if _learns_sigma(state["final_layer.linear.weight"], channels, patch, where):
        found["learn_sigma"] = True
    return found


def _check_told(state: Mapping[str, Tensor], where: str) -> None:
    """Raises UsageError unless the weights that tell sizes have the dimensions of a DiT's."""
    dims = dict(zip(TOLD, (4, 3, 2, 1), strict=True)) | OTHERS
    for name, count in dims.items():
        if name in state and (state[name].dim() != count or 0 in state[name].shape):
            raise UsageError(
                f"{where} has {name} {list(state[name].shape)}, but a DiT's has {count} dimensions"
            )
    width, positions = len(state["x_embedder.proj.weight"]), state["pos_embed"].shape[2]
    if width != positions or width % 4:
        raise UsageError(f"{where} has tokens of width {width}, but positions of width {positions}")


def _blocks(depth: int, width: int, heads: int, patch: int) -> dict[str, Any]:
    """The paper's name of a size, or its numbers."""
    found = {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch}
    names = [f"{name}/{patch}" for name, size in SIZES.items() if size == (depth, width, heads)]
    if names and patch in (2, 4, 8):
        return {"size": names[0]}
    return found


def _heads(width: int, args: Mapping[str, Any], where: str, said: int | None) -> int:
    """The number of attention heads. Raises UsageError if nothing tells, or if it cannot be."""
    stated = args.get("num_heads")
    heads = said or (stated if type(stated) is int and stated > 0 else None)
    heads = heads or _heads_of_model(args.get("model"))
    heads = heads or HEADS.get(width)
    if not heads:
        raise UsageError(
            f"{where} has width {width}, which tells no number of attention heads "
            f"(the DiT paper has {', '.join(map(str, HEADS))}): give --num-heads"
        )
    if width % int(heads):
        raise UsageError(
            f"{where} has width {width}, which {heads} attention heads do not divide: "
            "give another --num-heads"
        )
    return int(heads)


def _heads_of_model(model: Any) -> int | None:
    """Attention heads of a model by name, such as "DiT-XL/2" or "SiT-B/4"."""
    if not isinstance(model, str):
        return None
    size = SIZES.get(model.replace("SiT-", "DiT-").partition("/")[0])
    return size[2] if size else None


def _grid(positions: Tensor, where: str) -> tuple[int, int]:
    """Rows and columns of tokens: those whose fixed positions [1, T, d] are the file's."""
    _, tokens, width = positions.shape
    for rows in range(1, tokens + 1):
        if tokens % rows == 0:
            grid = (rows, tokens // rows)
            error = (sincos_position_embedding(width, grid) - positions.float()).abs().max()
            if float(error) < POSITION_ERROR:
                return grid
    raise UsageError(
        f"{where} has {tokens} positions that are not DiT's fixed sines and cosines: "
        "this variant of the network is not known"
    )


def _classes(rows: int, args: Mapping[str, Any], where: str) -> int:
    """The number of classes; the last row of the table is the null class."""
    if args.get("num_classes") == rows:
        raise UsageError(
            f"{where} was trained without label dropout, so that it has no null class, "
            "which guidance and our networks need"
        )
    return rows - 1


def _learns_sigma(last: Tensor, channels: int, patch: int, where: str) -> bool:
    outputs = last.shape[0] / patch**2
    if outputs not in (channels, 2 * channels):
        raise UsageError(
            f"{where} has {channels} input channels and {outputs:g} output channels, "
            "but a DiT has as many, or twice as many with a learned variance"
        )
    return outputs == 2 * channels
