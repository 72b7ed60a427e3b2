"""Whether weights fit a network: the names and shapes that differ, and the likely reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from harness.errors import UsageError

SHOWN = 5
"""Names of each kind that an error shows."""
CAUSES = (
    ("lora_", "these are LoRA factors, not a network"),
    ("exp_avg", "this is the state of an optimizer"),
    ("scalar_embedders.", "this is a student with further inputs, not a teacher"),
    ("transformer_blocks.", "these are names of diffusers: give the folder with its config.json"),
    ("decoder.conv_in.", "this is an autoencoder"),
    ("down_blocks.", "this is a U-Net, not a transformer"),
    ("text_embedder.", "this network is conditioned on text"),
    ("final_layers.", "this is a student with an output layer for each step, not a teacher"),
    ("q_norm.", "this is a variant of DiT that normalises queries and keys"),
    ("double_blocks.", "this is a network of the FLUX family"),
    ("joint_blocks.", "this is a network of the SD3 family"),
)
"""Parts of names that tell what a file holds."""


def load_into(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Loads weights into a network.

    Args:
        where: what has the weights, as an error names it.

    Raises:
        UsageError: if names or shapes differ; it has up to five of each kind.
    """
    check_fit(network.state_dict(), state, where)
    network.load_state_dict(state)


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raises UsageError if names or shapes differ, with up to five of each kind and a reason."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name].shape)} in place of {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    parts = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    if parts:
        raise UsageError(
            f"{where} does not fit the network ({'; '.join(parts)}); "
            f"{reason(found, missing, unexpected, expected)}"
        )


def some(names: Iterable[str]) -> str:
    """The first five names, and how many follow."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def reason(
    found: Iterable[str],
    missing: Sequence[str],
    unexpected: Sequence[str],
    expected: Iterable[str] = (),
) -> str:
    """Why weights probably do not fit."""
    usual = " ".join(expected)
    for part, cause in CAUSES:
        if part not in usual and any(part in name for name in unexpected):
            return f"probably {cause}"
    if not set(found) - set(unexpected):
        return "probably this is another kind of network"
    if missing and unexpected:
        return "probably this is another variant of the network"
    if unexpected:
        return "probably this is a deeper network, or one with further layers"
    if missing:
        return "probably this is a shallower network, or a part of a larger file"
    return "probably this is a network of another size"
