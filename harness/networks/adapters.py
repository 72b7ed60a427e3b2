"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on any backbone, by the library peft.

An adapter adds `alpha / rank B A x` to what a linear layer makes of x. B is 0 at first, so nothing
changes. The layer's own weights stay as they are, under the name `base_layer`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from harness.errors import unknown
from harness.networks.backbones import Backbone
from harness.networks.library import peft_for

ADAPTER = "default"
"""The adapter's name in peft, which a layer's adapters have in their keys."""


def add_adapters(
    network: Backbone,
    teacher: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    targets: Sequence[str] = (),
) -> None:
    """Puts adapters on linear layers of the blocks and freezes every weight that a teacher has.

    The weights that the teacher lacks go on training (`Backbone.added_weights`).

    Args:
        network: the network with the teacher's weights, which is changed in place.
        teacher: the teacher's weights by name.
        rank: number of rows of A and of columns of B.
        targets: see `target_names`.

    Raises UsageError without peft, and for a target that is no linear layer of the blocks.
    """
    peft = peft_for("lora_rank")
    added = network.added_weights(teacher)
    names = target_names(network, targets)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    peft.inject_adapter_in_model(config, network)
    for weight in added.values():
        weight.requires_grad_(True)


def target_names(network: Backbone, targets: Sequence[str] = ()) -> list[str]:
    """The names of the linear layers that get adapters.

    Args:
        targets: names of layers in the blocks, or what they end in, as in `attn.qkv`; none means
            every linear layer of the blocks.

    Raises UsageError for a target that no linear layer of the blocks has.
    """
    inside = {id(module) for block in network.blocks for module in block.modules()}
    layers = [name for name, layer in linear_layers(network) if id(layer) in inside]
    chosen: list[str] = []
    for target in targets:
        found = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not found:
            known = {name for block in network.blocks for name, _ in linear_layers(block)}
            raise unknown("linear layer of the blocks", target, known, "lora_targets")
        chosen += found
    return sorted(set(chosen)) if targets else layers


def linear_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a network, with their names."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def adapters_of(network: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name; none for a network without adapters."""
    own = ".base_layer"
    names = [name.removesuffix(own) for name, _ in network.named_modules() if name.endswith(own)]
    return {name: network.get_submodule(name) for name in names}


def merged(network: nn.Module) -> nn.Module:
    """A copy whose weights hold what its adapters add; a network without adapters itself."""
    if not adapters_of(network):
        return network
    plain = copy.deepcopy(network)
    for name, layer in adapters_of(plain).items():
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    return plain


def adapter_weights(network: nn.Module) -> dict[str, Tensor]:
    """A [rank, inputs] and B [outputs, rank] of every adapter, by peft's keys.

    B holds the factor `alpha / rank`, so that a reader who takes alpha as the rank is right.
    """
    found = {}
    for name, layer in adapters_of(network).items():
        found[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach()
        scaled = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
        found[f"{name}.lora_B.weight"] = scaled
    return found
