"""What a folder of images or latents tells about a task: shape and number of classes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from harness.data.folders import SUFFIXES
from harness.data.readers import open_picture
from harness.documents import parse_json, read_text
from harness.errors import UsageError

Shape = tuple[int, int, int]
SETS: dict[str, tuple[Shape, int]] = {
    "cifar10": ((3, 32, 32), 10),
    "digits": ((1, 8, 8), 10),
    "fashion-mnist": ((1, 28, 28), 10),
}
"""Shape and number of classes of the sets that need no path."""
LOOKED_AT = 16
"""Pictures that are opened to learn channels and size."""
GREY = ("1", "L", "I", "I;16", "LA")
"""Pillow's modes without colour."""


def of_images(folder: Path, size: int | None) -> tuple[Shape, int]:
    """Shape [C, H, W] and number of classes of an image folder.

    Each subfolder is a class; `train` beside another part holds the classes itself.

    Args:
        size: side to which pictures are cropped; None takes that of the pictures.

    Raises:
        UsageError: if there is no picture, or if pictures differ in size and none is given.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = [entry for entry in root.iterdir() if entry.is_dir()]
    found = list(islice(_opened(root), LOOKED_AT))
    if not found:
        raise UsageError(f"{folder} holds no picture; known are {', '.join(SUFFIXES)}")
    modes, sizes = {mode for mode, _ in found}, [size for _, size in found]
    if size is None and (len(set(sizes)) > 1 or sizes[0][0] != sizes[0][1]):
        seen = " and ".join(f"{w} x {h}" for w, h in sorted(set(sizes))[:2])
        raise UsageError(
            f"pictures in {folder} have {seen} pixels: "
            "give --image-size N, the side to which they are cropped"
        )
    side = size or sizes[0][0]
    return (1 if modes <= set(GREY) else 3, side, side), max(1, len(classes))


def of_latents(folder: Path) -> tuple[Shape, int, dict[str, Any], bool]:
    """Of latents that `harness data encode` wrote: shape [C, H, W], number of classes, autoencoder.

    The autoencoder is its SHA-256, scaling and shift. Last stands whether mirrored ones are there.

    Raises:
        UsageError: if the folder has no finished latents.
    """
    root = folder / "train" if (folder / "train").is_dir() else folder
    try:
        manifest = parse_json(read_text(root / "manifest.json"))
        channels, height, width = map(int, manifest["shape"])
        classes = len(manifest.get("classes", ())) or 1 + max(map(int, manifest["labels"]))
        made_by = manifest.get("autoencoder", {})
        autoencoder = {name: made_by[name] for name in ("sha256", "scaling", "shift")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{root} has no finished latents ({type(error).__name__}: {error}): "
            "harness data encode makes them of an image folder"
        ) from error
    return (channels, height, width), classes, autoencoder, bool(manifest.get("mirrored"))


def _opened(root: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Mode and size of the pictures below a folder, one of each class first."""
    for path in _pictures(root):
        try:
            with open_picture(path) as picture:
                found = picture.mode, picture.size
        except Exception as error:  # Pillow's decoders raise anything on broken files
            raise UsageError(f"{path} is not a readable picture: {error}") from error
        yield found


def _pictures(root: Path) -> Iterator[Path]:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) or [root]
    found = [(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES) for folder in folders]
    while found:
        for each in list(found):
            path = next(each, None)
            if path is None:
                found.remove(each)
            else:
                yield path
