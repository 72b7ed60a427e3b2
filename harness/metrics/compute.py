"""Compute: MACs of any callable, and parameters. 1 MAC = 2 FLOPs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.diffusion.counting import count_flops


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-adds of `run()`: half its FLOPs."""
    return count_flops(run) // 2


KINDS = {
    "attn.qkv": "attention projections",
    "attn.proj": "attention projections",
    "attn": "attention products",
    "cross": "cross-attention",
    "mlp": "MLP",
    "adaLN_modulation": "adaLN",
    "x_embedder": "embeddings",
    "t_embedder": "embeddings",
    "y_embedder": "embeddings",
    "text_embedder": "embeddings",
    "final_layer": "final layer",
}
"""Kinds of layers by module of a diffusion transformer."""
_MODULE = re.compile(
    r"\.(?:blocks\.\d+\.(attn\.qkv|attn\.proj|attn|cross|mlp|adaLN_modulation)"
    r"|(x_embedder|t_embedder|y_embedder|text_embedder|final_layer)\d*)$"
)


def macs_by_kind(run: Callable[[], Any]) -> dict[str, int]:
    """Multiply-adds of `run()` by kind of layer of a diffusion transformer; "other" is the rest."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    kinds = dict.fromkeys(KINDS.values(), 0)
    for name, by_operation in counter.get_flop_counts().items():
        if found := _MODULE.search(name):
            kinds[KINDS[found[1] or found[2]]] += sum(by_operation.values()) // 2
    # The count of the module `attn` includes its two projections.
    kinds["attention products"] -= kinds["attention projections"]
    return kinds | {"other": counter.get_total_flops() // 2 - sum(kinds.values())}


def parameters(module: nn.Module) -> int:
    """Number of parameters of a module; fixed position embeddings are buffers and do not count."""
    return sum(p.numel() for p in module.parameters())
