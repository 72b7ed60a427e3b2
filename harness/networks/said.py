"""Whether a teacher's file is the task's, by what its metadata say.

Names and shapes do not tell a DiT from a SiT, nor the number of heads.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from harness.diffusion.denoiser import PredictionType
from harness.diffusion.schedules import schedule_of
from harness.documents import parse_json
from harness.errors import UsageError, unknown
from harness.files import header_of
from harness.networks.backbones.diffusers import class_of
from harness.networks.backbones.dit import DiT, sized

KIND = ("schedule", "prediction_type")
"""What metadata say beside the network."""


def check_said(path: Path, network: dict[str, Any], schedule: str, prediction_type: str) -> None:
    """Compares what a teacher's file says of itself with a task; files of others say nothing.

    Args:
        network, schedule, prediction_type: the task's.

    Raises UsageError with everything that differs.
    """
    said, _ = header_of(path)
    if "network" not in said:
        return
    theirs, kind = said_in(said, str(path))
    theirs = {**_whole(theirs), **dict(zip(KIND, kind, strict=True))}
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


def said_in(metadata: Mapping[str, str], where: str) -> tuple[dict[str, Any], tuple[str, str]]:
    """The network that a file's metadata say, its schedule and its prediction type.

    Args:
        where: the file, as an error names it.

    Raises UsageError for metadata that do not say them.
    """
    try:
        network = parse_json(metadata["network"])
        if not isinstance(network, dict):
            raise ValueError("network is no mapping")
        schedule, prediction_type = (metadata[name] for name in KIND)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{where} has broken metadata ({error}): import it again") from error
    schedule_of(schedule)
    if prediction_type not in get_args(PredictionType):
        raise unknown("prediction_type", prediction_type, get_args(PredictionType), where)
    return network, (schedule, prediction_type)


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
