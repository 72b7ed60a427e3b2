"""The checkpoint of a training run: everything that exact resume needs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from harness.errors import UsageError
from harness.files import write_aside
from harness.methods.base import Method

BROKEN = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
)
"""Errors that reading or loading a damaged checkpoint may raise."""
OWN = ("step", "bill", "flops", "curve", "milestones")
"""Names of the trainer's own state, beside the networks."""


def save_checkpoint(path: Path, method: Method, state: dict[str, Any]) -> None:
    """Writes the networks, optimizers and averages of a method with the trainer's own state."""
    players = {
        name: {
            "module": player.module.state_dict(),
            "optimizer": player.optimizer.state_dict(),
            "ema": player.ema.module.state_dict() if player.ema else None,
        }
        for name, player in method.players.items()
    }
    content = {**state, "players": players, "method": method.state_dict()}
    write_aside(path, lambda aside: torch.save(content, aside))


def load_checkpoint(
    path: Path, method: Method, identity: str, device: torch.device
) -> dict[str, Any] | None:
    """Loads a checkpoint into a method and returns the trainer's own state.

    None if there is no checkpoint, or if it belongs to another run or other code.

    Raises UsageError for a damaged file.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if state["identity"] != identity:
            return None
        for name, player in method.players.items():
            saved = state["players"][name]
            player.module.load_state_dict(saved["module"])
            player.optimizer.load_state_dict(saved["optimizer"])
            if player.ema:
                player.ema.module.load_state_dict(saved["ema"])
        method.load_state_dict(state["method"])
        return {name: state[name] for name in OWN}
    except BROKEN as error:
        raise UsageError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); "
            "delete its folder to start anew"
        ) from error
