"""State dicts in files of others: what torch.save wrote, and safetensors.

A checkpoint is a nested dict. This module finds the network in it and takes wrappers off its keys.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UsageError
from harness.files import header_of, read_tensors
from harness.seals import check_zip

GROUPS = ("ema", "model", "state_dict")
"""Where a checkpoint keeps a network, the best first: averaged weights, then trained ones."""
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes of DataParallel and AveragedModel, of torch.compile, and of training scripts."""
ALONE = "save the state dict alone, torch.save(network.state_dict(), FILE)"
"""What to do about a checkpoint of more than plain tensors."""
STUDENT = "student"
"""The key in the metadata of the files of our students, below which is how they are sampled."""
BROKEN = (RuntimeError, EOFError, LookupError, ValueError, OSError, TypeError, AttributeError)
BROKEN += (AssertionError, MemoryError, OverflowError, struct.error, zipfile.BadZipFile)  # type: ignore[assignment]
"""What torch.load raises for a file that is no checkpoint, or half of one."""


@dataclass(frozen=True)
class StateDict:
    """A network's weights as a file has them.

    Attributes:
        tensors: weights by name, without the names of wrappers.
        group: the place in the checkpoint, such as "ema"; "" for a plain state dict.
        wrappers: the prefixes that were taken off.
        args: the options of the training script, if the checkpoint has them.
        metadata: of a safetensors file. One that names its `network` has that network's own names.
    """

    tensors: dict[str, Tensor]
    group: str = ""
    wrappers: tuple[str, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_state_dict(path: Path) -> StateDict:
    """The weights in a safetensors file, or in a file that torch.save wrote.

    Of pickled objects only tensors, plain values and `argparse.Namespace` are read.

    Raises UsageError if the file is missing or broken, holds other objects, or has no network.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        found = StateDict(read_tensors(path), metadata=header_of(path)[0])
        return found if "network" in found.metadata else _unwrapped(path, found)
    if path.stat().st_size == 0:
        raise UsageError(_not_a_checkpoint(path))
    content = load_pickled(path)
    state, group = _network_in(path, content)
    return _unwrapped(path, StateDict(state, group, args=_arguments(content)))


def load_pickled(path: Path) -> Any:
    """What torch.save wrote, on the CPU, without running code of the file.

    Raises UsageError for a broken or damaged file, and for objects other than tensors, plain values
    and `argparse.Namespace`.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange protocols and sparse tensors
            mapped = _stored(path) or None  # reads only what is used
            check_zip(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise UsageError(_not_a_checkpoint(path)) from error
        raise UsageError(
            f"{path} holds a pickled {found[1]}, and reading it could run code: {ALONE}"
        ) from error
    except BROKEN as error:
        raise UsageError(_not_a_checkpoint(path)) from error


def _stored(path: Path) -> bool:
    """Whether a file is a zip archive. Raises ValueError for one that would be unpacked.

    torch.save packs nothing, so no file of its own grows in memory.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is a compressed archive")
    return True


def _not_a_checkpoint(path: Path) -> str:
    return (
        f"{path} is not a file that torch.save wrote, or it is broken: "
        "give a .pt with a state dict, a .safetensors file or a folder of diffusers"
    )


def _arguments(content: Any) -> dict[str, Any]:
    args = content.get("args") if isinstance(content, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return args if isinstance(args, dict) else {}


def _network_in(path: Path, content: Any) -> tuple[dict[str, Tensor], str]:
    """The innermost state dict, and its place in the checkpoint."""
    if not isinstance(content, Mapping) or not content:
        raise UsageError(
            f"{path} holds a {type(content).__name__}, not the state dict of a network"
        )
    if all(isinstance(value, Tensor) for value in content.values()):
        _check_tensors(path, content)
        return dict(content), ""
    for group in GROUPS:
        if isinstance(content.get(group), Mapping):
            state, inner = _network_in(path, content[group])
            return state, f"{group}.{inner}" if inner else group
    if {"state", "param_groups"} <= content.keys():
        raise UsageError(f"{path} holds the state of an optimizer, not a network")
    names = ", ".join(sorted(name for name in content if isinstance(name, str))[:5])
    raise UsageError(
        f"{path} holds no network under {', '.join(GROUPS)}; it has {names}: "
        "save the state dict alone"
    )


def _check_tensors(path: Path, state: Mapping[Any, Tensor]) -> None:
    """Raises UsageError for a tensor of more numbers than the file holds, or of no plain kind.

    A single stored number can be viewed as 10^12, and copying that would fill the memory.
    """
    for name, tensor in state.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        plain = plain and not tensor.is_quantized
        if not isinstance(name, str) or not plain:
            raise UsageError(f"{path} holds {str(name)[:200]}, which is no plain tensor: {ALONE}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UsageError(
                f"{path} holds {name} {list(tensor.shape)}, but fewer numbers are stored: {ALONE}"
            )


def _unwrapped(path: Path, found: StateDict) -> StateDict:
    """The same without wrappers' names, and without AveragedModel's counter `n_averaged`."""
    state = {name: value for name, value in found.tensors.items() if name != "n_averaged"}
    taken: list[str] = []
    while wrapper := _wrapper_of(state):
        taken.append(wrapper)
        bare = {_without(name, wrapper): value for name, value in state.items()}
        if len(bare) < len(state):
            raise UsageError(f"{path} holds two networks: some names differ only in {wrapper!r}")
        state = bare
    return StateDict(state, found.group, tuple(taken), found.args, found.metadata)


def _wrapper_of(state: Mapping[str, Tensor]) -> str | None:
    """A prefix of every name; torch.compile's may also stand in the middle of some."""
    if any("_orig_mod" in name.split(".") for name in state):
        return "_orig_mod."
    return next((w for w in WRAPPERS if state and all(n.startswith(w) for n in state)), None)


def _without(name: str, wrapper: str) -> str:
    if wrapper == "_orig_mod.":
        return ".".join(part for part in name.split(".") if part != "_orig_mod")
    return name.removeprefix(wrapper)
