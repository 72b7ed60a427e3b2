"""The checkpoint of a training run: everything that exact resume needs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import ranks
from harness.asides import write_aside
from harness.errors import UsageError
from harness.methods.base import Method
from harness.seals import check_zip
from harness.training.sharding import placed, whole

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
NAME = "state.pt"
OWN = ("step", "bill", "flops", "curve", "milestones")
"""Names of the trainer's own state, beside the networks."""
SOMETIMES = ("averages",)
"""Those that some runs have."""


def save_checkpoint(path: Path, method: Method, state: dict[str, Any]) -> None:
    """Writes the networks, optimizers and averages of a method with the trainer's own state.

    All ranks gather what is sharded; the first one writes.
    """
    players = {
        name: {
            "module": player.module.state_dict(),
            "optimizer": player.optimizer.state_dict(),
            "ema": player.ema.module.state_dict() if player.ema else None,
        }
        for name, player in method.players.items()
    }
    content = whole({**state, "players": players, "method": method.state_dict()}, everywhere=False)
    if ranks.is_first():
        write_aside(path, lambda aside: _save(content, aside))


def _save(content: dict[str, Any], path: Path) -> None:
    """Saves a checkpoint. torch makes a RuntimeError of the OSError of a full disk."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def is_left_over(folder: Path, identity: str) -> bool:
    """Whether a folder has a checkpoint of this identity, or is there without a checkpoint."""
    path = folder / NAME
    if not path.exists():
        return folder.exists()
    try:
        return bool(torch.load(path, mmap=True, weights_only=True)["identity"] == identity)
    except (OSError, *BROKEN):
        return False


def load(module: nn.Module, state: dict[str, Any]) -> None:
    """Loads whole tensors into a module, of which this rank may hold a part."""
    module.load_state_dict(placed(state, module.state_dict()))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state of whole tensors into an optimizer of parameters that may be parts."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        number: {name: placed(value, weights[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def load_checkpoint(
    path: Path, method: Method, identity: str, device: torch.device
) -> dict[str, Any] | None:
    """Loads a checkpoint into a method and returns the trainer's own state.

    None if there is no checkpoint, or if it belongs to another run or other code.

    Raises UsageError for a damaged file.
    """
    if not ranks.told_by_first(path.exists):
        return None
    if not path.exists():
        raise UsageError(
            f"rank {ranks.number()} does not see {path}, but the first rank does: give all ranks "
            "one results folder"
        )
    try:
        ranks.told_by_first(lambda: check_zip(path))
        state = torch.load(path, map_location=device, weights_only=True)
        if state["identity"] != identity:
            return None
        for name, player in method.players.items():
            saved = state["players"][name]
            load(player.module, saved["module"])
            load_optimizer(player.optimizer, saved["optimizer"])
            if player.ema:
                load(player.ema.module, saved["ema"])
        method.load_state_dict(placed(state["method"], method.state_dict()))
        return {name: state[name] for name in OWN} | {
            name: state[name] for name in SOMETIMES if name in state
        }
    except torch.OutOfMemoryError:
        raise
    except (UsageError, *BROKEN) as error:
        reason = "it is damaged" if isinstance(error, UsageError) else type(error).__name__
        raise UsageError(
            f"checkpoint {path} cannot be read ({reason}); delete its folder to start anew"
        ) from error
