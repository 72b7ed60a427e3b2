"""`harness data encode`: finds images, autoencoder and folder, then encodes both parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from harness.data.encode import Encoding, encode
from harness.data.readers import Reader
from harness.data.sets import Wanted, load_split
from harness.errors import UsageError
from harness.files import data_folder, digest, file_hash
from harness.networks.autoencoder import (
    WEIGHTS,
    Autoencoder,
    autoencoder_config,
    channels_of,
    factor_of,
    stated_scaling,
)
from harness.networks.library import hub_folder
from harness.progress import Progress
from harness.tasks import Task, task_files


@dataclass(frozen=True)
class Asked:
    """What the command is given; what is None comes from the task, or is the default.

    Attributes:
        images: a folder of pictures or shards, or a `.tar` or `.npz` file.
        size: height and width of the cropped images.
        held_out: a share or a path, as in a task.
        autoencoder: a folder of diffusers, or a name on the hub.
        out: the folder of the latents.
        flips: whether mirrored images are a second view.
    """

    images: str | None = None
    size: int | None = None
    held_out: float | str | None = None
    autoencoder: str | None = None
    out: Path | None = None
    flips: bool = False
    posterior: Literal["mean", "sample"] = "mean"
    dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0
    shard_size: int = 4096
    batch_size: int = 32


def encode_images(
    asked: Asked,
    task: Task | None,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    report: Callable[[str], Progress] | None = None,
) -> dict[str, Any]:
    """Encodes the training and the held-out part of an image set.

    Returns:
        The folder; by part the number of images, of shards that are there and of all shards.

    Raises UsageError for anything that is missing or does not fit.
    """
    folder = _autoencoder_folder(asked, task)
    config = autoencoder_config(folder)
    factor = factor_of(config)
    channels, colours = channels_of(config)
    wanted = _wanted(asked, task, colours, factor)
    how = _encoding(asked, task, channels, wanted.shape[1], factor)
    out, split = _out(asked, task), load_split(wanted)
    encoder, about = _encoder(asked, task, folder, device_of_rank(device))
    images = split.train.images
    about["classes"] = list(images.classes) if isinstance(images, Reader) else []
    about["crop"] = f"ADM's centre crop to {wanted.shape[1]} pixels"
    found: dict[str, Any] = {"folder": str(out)}
    for part, real in (("train", split.train), ("held_out", split.held_out)):
        there, shards = encode(
            real,
            encoder,
            out / part,
            how if part == "train" else replace(how, mirrored=False),
            {"part": part, **about},
            rank=rank,
            ranks=ranks,
            progress=report(part) if report else None,
        )
        found[part] = {"images": len(real), "shards_there": there, "shards": shards}
    return found


def _encoding(asked: Asked, task: Task | None, channels: int, size: int, factor: int) -> Encoding:
    """How images of a size become latents, a `factor`th of it high and wide."""
    if size % factor:
        raise UsageError(f"--size is {size}, but the autoencoder needs a multiple of {factor}")
    return Encoding(
        (channels, size // factor, size // factor),
        asked.posterior,
        asked.flips or bool(task and task.spec.data.flip),
        asked.dtype,
        asked.seed,
        asked.shard_size,
        asked.batch_size,
    )


def _encoder(
    asked: Asked, task: Task | None, folder: Path, device: torch.device
) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder, and what the manifest says of it.

    The task's is checked against the SHA-256 and the numbers that the task gives.
    """
    stated = task.spec.autoencoder if task and asked.autoencoder is None else None
    config = autoencoder_config(folder)
    scaling, shift = (stated.scaling, stated.shift) if stated else stated_scaling(config)
    encoder = Autoencoder(folder, stated.sha256 if stated else None, scaling, shift, device)
    about = {
        "sha256": file_hash(folder / WEIGHTS),  # of the file, also where the task states none
        "config": digest({k: v for k, v in config.items() if not k.startswith("_")}),
        "scaling": scaling,
        "shift": shift,
    }
    return encoder, {"autoencoder": about}


def _wanted(asked: Asked, task: Task | None, channels: int, factor: int) -> Wanted:
    """The image set to encode."""
    of_task = task.wanted if task else None
    if asked.images is None:
        if of_task is None or of_task.name == "latents":
            raise UsageError(
                "no images are named; give --images, or a --task whose data are images"
            )
        if of_task.shape[0] != channels:
            raise UsageError(
                f"images of set {of_task.name} have {of_task.shape[0]} channels, "
                f"but the autoencoder takes {channels}"
            )
        return replace(of_task, flip=False)
    if of_task and of_task.name == "latents":
        size = asked.size or of_task.shape[1] * factor
    elif asked.size or of_task:
        size = asked.size or of_task.shape[1]  # type: ignore[union-attr]
    else:
        raise UsageError("--images needs --size, the height and width of the cropped images")
    return Wanted(
        kind_of(Path(asked.images)),
        (channels, size, size),
        of_task.num_classes if of_task else None,
        of_task.seed if of_task else 0,
        str(Path(asked.images).absolute()),
        held_out=_absolute(asked.held_out),
        classes=of_task.classes if of_task else (),
    )


def _absolute(held_out: float | str | None) -> float | str | None:
    return str(Path(held_out).absolute()) if isinstance(held_out, str) else held_out


def kind_of(path: Path) -> str:
    """The kind of an image set: npz, webdataset or folder. Raises UsageError if it is missing."""
    if not path.exists():
        raise UsageError(f"there is no {path}; --images names a folder, or a .tar or .npz file")
    if path.suffix == ".npz":
        return "npz"
    shards = path.suffix == ".tar" or any(path.glob("*.tar")) or any(path.glob("train/*.tar"))
    return "webdataset" if shards else "folder"


def _out(asked: Asked, task: Task | None) -> Path:
    """Where the latents go: what is asked for, or the place where the task reads them."""
    if asked.out is not None:
        return asked.out
    if task is None or task.spec.data.set != "latents" or task.spec.data.path is None:
        raise UsageError("no folder is named; give --out, or a --task whose data are latents")
    return place_in(task, task.spec.data.path)


def place_in(task: Task, name: str) -> Path:
    """Where a task reads what a command makes.

    Files of a task that ships lie in the data folder, since the package is not written to.
    """
    folder = task.folder or Path()
    ships = folder.resolve() == task_files.FOLDER.resolve()
    return (data_folder() if ships else folder) / name


def _autoencoder_folder(asked: Asked, task: Task | None) -> Path:
    """The folder of the autoencoder that is asked for, or the task's; fetched from the hub.

    Raises UsageError if it is neither here nor on the hub.
    """
    name = asked.autoencoder
    if name is None:
        if task is None or task.spec.autoencoder is None:
            raise UsageError(
                "no autoencoder is named; give --autoencoder, a folder or a name on the hub"
            )
        return task.wanted.where(task.spec.autoencoder.folder)
    if Path(name).is_dir() or name.count("/") != 1:
        return Path(name)
    return hub_folder(name, ["config.json", WEIGHTS])


def device_of_rank(device: torch.device) -> torch.device:
    """The GPU of a process that torchrun started, where none is named."""
    local = os.environ.get("LOCAL_RANK")
    plain = device.type == "cuda" and device.index is None
    return torch.device("cuda", int(local)) if plain and local else device


def rank_of(text: str | None) -> tuple[int, int]:
    """This process's rank and the number of ranks: `k/n`, or RANK and WORLD_SIZE of torchrun.

    Raises UsageError for anything else.
    """
    environment = f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    rank, _, ranks = (text or environment).partition("/")
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        raise UsageError(f"--rank is {text or environment!r}, but should be 0/4 to 3/4 for 4 ranks")
    return int(rank), int(ranks)
