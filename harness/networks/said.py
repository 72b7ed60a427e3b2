"""Whether a teacher's file is the task's, by what its metadata say.

Names and shapes do not tell a DiT from a SiT, nor the number of heads.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.files import header_of
from harness.networks.backbones.diffusers import class_of
from harness.networks.backbones.dit import DiT, sized


def check_said(path: Path, network: dict[str, Any], schedule: str, prediction_type: str) -> None:
    """Compares what a teacher's file says of itself with a task; files of others say nothing.

    Args:
        network, schedule, prediction_type: the task's.

    Raises UsageError with everything that differs.
    """
    said, _ = header_of(path)
    if "network" not in said:
        return
    kind = ("schedule", "prediction_type")
    theirs = {**_whole(json.loads(said["network"])), **{name: said.get(name) for name in kind}}
    mine = _whole(network) | {"schedule": schedule, "prediction_type": prediction_type}
    other = [
        f"{name} {theirs.get(name)} in place of {mine.get(name)}"
        for name in {**theirs, **mine}
        if theirs.get(name) != mine.get(name)
    ]
    if other:
        raise UsageError(
            f"{path} says that it is another teacher than the task's ({', '.join(other)}): "
            "name the right file, or change the task"
        )


def _whole(network: Mapping[str, Any]) -> dict[str, Any]:
    """A network's options with their defaults, so that equal networks have equal ones.

    The `source` and `guidance` of weights of diffusers are left out: a task decides them.
    """
    decided = ("backbone", "source", "guidance")
    options = {name: value for name, value in network.items() if name not in decided}
    if network.get("backbone", "dit") == "diffusers":
        cls, config = class_of(options)
        whole = {"class": cls.__name__, **config}
    else:
        known = inspect.signature(DiT).parameters.values()
        whole = {p.name: p.default for p in known if p.default is not p.empty} | sized(options)
        if isinstance(side := whole.get("image_size"), int):
            whole["image_size"] = (side, side)
    return json.loads(json.dumps(whole))
