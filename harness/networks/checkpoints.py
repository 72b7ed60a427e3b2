"""Teachers from others: official DiT and SiT files, folders of diffusers, and our own files.

What comes out is the same for all: the `network` of a task, and weights that fit it exactly.
A file's shapes tell its sizes. They do not tell a DiT from a SiT, so that is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import schedule_of
from harness.errors import UsageError
from harness.files import file_hash, read_tensors, write_tensors
from harness.networks import diffusers_folders as folders
from harness.networks.backbones import build, sizes_of
from harness.networks.backbones.families import DIT
from harness.networks.checkpoint_files import STUDENT, StateDict, read_state_dict
from harness.networks.fit import check_fit, load_into, some
from harness.networks.library import hub_folder
from harness.networks.said import said_in
from harness.networks.sizes import sizes_of as sizes_of_weights

Kind = Literal["dit", "sit"]
KINDS: dict[str, tuple[str, str]] = {"dit": ("vp", "eps"), "sit": ("flow", "v")}
"""Schedule and prediction type of official checkpoints.

DiT: Peebles & Xie 2022, arXiv 2212.09748. SiT: Ma et al. 2024, arXiv 2401.08740, whose linear path
and velocity are the defaults of its code.
"""


@dataclass(frozen=True)
class Teacher:
    """A teacher that was read from a file or folder.

    Attributes:
        network: the task's `network`.
        weights: the network's weights by name, in the types of the source.
        schedule, prediction_type: the task's.
        facts: where everything came from, in words, by subject.
    """

    network: dict[str, Any]
    weights: dict[str, Tensor]
    schedule: str
    prediction_type: str
    facts: dict[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network denoises; 0 for any height and width."""
        channels, side = sizes_of(self.network)
        height, width = side if isinstance(side, list | tuple) else (side or 0, side or 0)
        return channels or 0, height, width

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for a network that has none."""
        sizes = self.network.get("config", self.network)
        if self.network.get("class") == "DiTTransformer2DModel":
            return sizes.get("num_embeds_ada_norm", 1000)
        return sizes.get("num_classes", 0)

    @property
    def conditioned_on_text(self) -> bool:
        """Whether the network needs prompts."""
        if self.network.get("backbone") == "diffusers":
            return self.network["class"] != "DiTTransformer2DModel"
        return "text_width" in self.network

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(value.numel() for value in self.weights.values())


def read_teacher(source: str, kind: Kind | None = None, num_heads: int | None = None) -> Teacher:
    """Reads a teacher.

    Args:
        source: a file (.pt, .safetensors), a folder of diffusers, or a repository on the hub.
        kind: "dit" or "sit", where neither the file's options nor its name tell.
        num_heads: attention heads, where the width does not tell.

    Raises:
        UsageError: for what cannot be read, or does not fit a known network, in one sentence.
    """
    teacher = _read(source, kind, num_heads)
    if broken := [name for name, value in teacher.weights.items() if not value.isfinite().all()]:
        raise UsageError(f"{source} has weights that are not finite: {some(broken)}")
    return teacher


def _read(source: str, kind: Kind | None, num_heads: int | None) -> Teacher:
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, str(path))
    if not path.exists() and folders.is_hub_name(source):
        return _from_folder(hub_folder(source, folders.DOWNLOADED), f"{source} on the hub")
    found = read_state_dict(path)
    if STUDENT in found.metadata:
        raise UsageError(
            f"{path} is a student of this harness, not a teacher: name the teacher's file"
        )
    if "network" in found.metadata:
        return _own(found, str(path), kind)
    return _official(found, path, kind, num_heads)


def write_teacher(teacher: Teacher, path: Path) -> str:
    """Writes a safetensors file that says what it holds, checks it, and returns its SHA-256.

    Raises UsageError if the file cannot be written.
    """
    metadata = {
        "network": json.dumps(teacher.network),
        "schedule": teacher.schedule,
        "prediction_type": teacher.prediction_type,
    }
    write_tensors(path, teacher.weights, metadata)
    written = read_tensors(path)
    if not all(torch.equal(written[name], value) for name, value in teacher.weights.items()):
        raise UsageError(f"{path} does not hold what was written: the disk may be full or broken")
    return file_hash(path)


def skeleton(network: dict[str, Any]) -> nn.Module:
    """A task's network on the meta device, for the names and shapes of its weights.

    Raises UsageError for arguments that the network does not take.
    """
    with torch.device("meta"):
        return build(network)


def output_size(teacher: Teacher) -> float | None:
    """Root mean square of the outputs for noise at three timesteps, in float32.

    None for a network that needs more than classes.

    Raises UsageError if an output is not finite.
    """
    if teacher.network.get("class", DIT) != DIT:
        return None
    network = build(teacher.network).eval()
    load_into(network, {k: v.float() for k, v in teacher.weights.items()}, teacher.facts["source"])
    index = torch.arange(3)
    x = Keyed("probe", 0).normal("x", index, teacher.shape)
    time = schedule_of(teacher.schedule).network_time(torch.tensor([1.0, 0.5, 0.001]))
    with torch.no_grad():
        out = network(x, time, Condition(index.clamp(max=max(0, teacher.num_classes - 1))))
    if not out.isfinite().all():
        raise UsageError(
            f"{teacher.facts['source']} has outputs that are not finite for noise at t = 1, 0.5 or "
            "0.001: is --num-heads right?"
        )
    return float(out[:, : x.shape[1]].square().mean().sqrt())


def _from_folder(folder: Path, where: str) -> Teacher:
    own = folders.transformer_folder(folder)
    network = folders.read_config(own)
    weights = folders.read_weights(own)
    check_fit(skeleton(network).model.state_dict(), weights, where)  # type: ignore[union-attr]
    schedule, prediction_type = folders.trained_as(folder, network)
    facts = {"source": where, "class": f"{network['class']} of diffusers"}
    weights = {f"model.{name}": value for name, value in weights.items()}  # the backbone's names
    return Teacher(network, weights, schedule, prediction_type, facts)


def _own(found: StateDict, where: str, kind: Kind | None) -> Teacher:
    """A file of `write_teacher`."""
    if kind is not None:
        raise UsageError(f"{where} says itself what it holds: leave --kind out")
    network, kind_of_teacher = said_in(found.metadata, where)
    check_fit(skeleton(network).state_dict(), found.tensors, where)
    return Teacher(
        network,
        found.tensors,
        *kind_of_teacher,
        {"source": where, "kind": "said by the file's metadata"},
    )


def _official(found: StateDict, path: Path, kind: Kind | None, num_heads: int | None) -> Teacher:
    """A state dict with the official keys of DiT, which are also SiT's and ours."""
    sizes = sizes_of_weights(found.tensors, found.args, str(path), num_heads)
    check_fit(skeleton(sizes).state_dict(), found.tensors, str(path))
    kind, why = _given(kind, path, found.args) if kind else kind_of(path, found.args)
    if kind == "sit":
        _check_sit(path, found.args)
        sizes = {"convention": "sit", **sizes}
    facts = {"source": str(path), "taken": found.group or "the whole file"}
    if found.wrappers:
        facts["prefixes taken off"] = ", ".join(found.wrappers)
    facts["kind"] = f"{kind}, {why}"
    return Teacher(sizes, found.tensors, *KINDS[kind], facts)


def _given(kind: Kind, path: Path, args: Mapping[str, Any]) -> tuple[Kind, str]:
    """The kind that a person gives. Raises UsageError if the file's options say the other one."""
    model = _text(args, "model")
    if (said := _kinds_in(model)) and kind not in said:
        raise UsageError(f"--kind is {kind}, but {path} was trained as {model}: leave --kind out")
    return kind, "as given"


def _kinds_in(text: str) -> list[Kind]:
    """The kinds that a text names as words."""
    known: tuple[Kind, ...] = ("dit", "sit")
    return [kind for kind in known if re.search(rf"(?i)(?<![a-z]){kind}(?![a-z])", text)]


def kind_of(path: Path, args: Mapping[str, Any]) -> tuple[Kind, str]:
    """Whether weights are a DiT's or a SiT's, and what says so.

    Raises UsageError if nothing tells: a wrong guess gives samples without a warning.
    """
    told = {
        "by the model in its options": _text(args, "model"),
        "by the name of the file": path.name,
    }
    for why, text in told.items():
        kinds = _kinds_in(text)
        if len(kinds) == 1:
            return kinds[0], why
    raise UsageError(
        f"{path} may be a DiT's (noise prediction) or a SiT's (velocity), which have the same "
        "weights: give --kind dit or --kind sit"
    )


def _text(args: Mapping[str, Any], name: str) -> str:
    """An option of a training script that is text; others, which may be anything, are empty."""
    found = args.get(name)
    return found[:100] if isinstance(found, str) else ""


def _check_sit(path: Path, args: Mapping[str, Any]) -> None:
    """Raises UsageError for a SiT of another path or prediction than the ones known here."""
    for option, value in (("path_type", "Linear"), ("prediction", "velocity")):
        if args.get(option, value) != value:
            raise UsageError(
                f"{path} was trained with {option} {_text(args, option) or 'of another kind'}, "
                f"but a SiT is read here with {option} {value}"
            )
