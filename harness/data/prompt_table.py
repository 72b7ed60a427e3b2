"""Outputs of a text encoder for a list of prompts, computed once: `harness data prompts`.

The shards of several ranks become one safetensors file, which a task's `prompts` names. It has
`table` [count, length, width], `table_mask` and `table_pooled` where the encoder gives them, the
same of the empty prompt under `null`, and the prompts themselves in its header.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from harness.data.cache import locked_folder
from harness.data.filling import check_plan, fill
from harness.data.prompt_files import Prompt, check_prompt
from harness.data.shards import Shards, error_of, halved
from harness.documents import parse_json
from harness.errors import UsageError
from harness.files import digest, header_of, write_tensors
from harness.progress import Progress

TEXT = "text"
ROUNDED = (TEXT, "pooled")
"""The outputs that are stored as `dtype` says; a mask is stored as it is."""


class TextEncoder(Protocol):
    """What makes conditions of prompts."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`text` [B, length, width], and `mask` [B, length] and `pooled` [B, width], if any."""


@dataclass(frozen=True)
class Storing:
    """How a table is stored.

    Attributes:
        dtype: float16 halves the file, which then states its error.
        shard_size, batch_size: prompts in a shard, and in one call of the encoder.
    """

    dtype: Literal["float32", "float16"] = "float16"
    shard_size: int = 256
    batch_size: int = 8


def encode_prompts(
    prompts: Sequence[Prompt],
    encoder: TextEncoder,
    path: Path,
    how: Storing,
    about: dict[str, Any],
    *,
    rank: int = 0,
    ranks: int = 1,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Encodes the shards of one rank that are missing; whoever sees all writes the file.

    Args:
        path: the safetensors file; shards lie in a folder beside it until it is written.
        about: what the header says of the encoder, JSON-like. It decides, with the prompts and
            `how`, whether shards may be continued.

    Returns:
        The number of shards that are there, and of all.

    Raises:
        UsageError: if the file or the folder has other prompts, or if the disk is too small.
    """
    texts = [prompt.text for prompt in prompts]
    kept = {name: value for name, value in asdict(how).items() if name != "batch_size"}
    listed = [asdict(prompt) for prompt in prompts]
    plan = {**about, "count": len(prompts), "prompts": digest(listed), **kept}
    shards = -(-len(prompts) // how.shard_size)
    if path.exists():
        check_plan(made_by(path), plan, f"{path} holds prompts")
        return shards, shards
    null = _encode(encoder, [""], how)
    size = sum(tensor.nbytes for tensor in null.values())
    folder = path.with_suffix(".shards")

    def make(shard: range) -> Iterator[dict[str, Tensor]]:
        for first in range(shard.start, shard.stop, how.batch_size):
            yield _encode(encoder, texts[first : min(first + how.batch_size, shard.stop)], how)

    # The file and the shards are there at the same time.
    paths = fill(
        folder,
        plan,
        len(prompts),
        how.shard_size,
        make,
        what="prompts",
        size=2.0 * size,
        rank=rank,
        ranks=ranks,
        progress=progress,
    )
    there = sum(shard.exists() for shard in paths)
    if there == shards:
        _join(path, folder, paths, null, {"plan": plan, "prompts": listed}, how)
    return (shards if path.exists() else there), shards


def made_by(path: Path) -> dict[str, Any]:
    """What a table's header says of its prompts and their encoder; empty for other files."""
    return dict(_said(path).get("plan", {}))


def prompts_of(path: Path) -> list[Prompt]:
    """The prompts of a table, by their numbers; empty for a file of others.

    Raises UsageError if the file is missing or broken.
    """
    try:
        found = [
            Prompt(each["text"], dict(each["about"])) for each in _said(path).get("prompts", ())
        ]
        for number, prompt in enumerate(found):
            check_prompt(prompt.text, f"prompt {number} of {path}")
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UsageError(f"{path} has a broken header: make it again") from error
    return found


def _said(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(header_of(path)[0].get("prompts", "{}"))
    except ValueError as error:
        raise UsageError(f"{path} has a broken header: make it again") from error
    return found if isinstance(found, dict) else {}


def _encode(encoder: TextEncoder, texts: Sequence[str], how: Storing) -> dict[str, Tensor]:
    """The encoder's outputs as they are stored."""
    found = encoder.encode(texts)
    rounded = [name for name in ROUNDED if name in found]
    return halved(found, rounded) if how.dtype == "float16" else found


def _join(
    path: Path,
    folder: Path,
    paths: Sequence[Path],
    null: dict[str, Tensor],
    said: dict[str, Any],
    how: Storing,
) -> None:
    """Writes the file from all shards and deletes them, unless another rank did."""
    with locked_folder(folder, "name another --out"):
        if path.exists():
            return
        shards = Shards(paths, how.shard_size)
        names = [name for name in null if name != "errors"]
        tensors = {_named("table", name): shards.whole(name) for name in names}
        tensors |= {_named("null", name): null[name] for name in names}
        if how.dtype == "float16":
            rounded = [name for name in ROUNDED if name in names]
            said["error"] = error_of(paths, rounded)
        write_tensors(path, tensors, {"prompts": json.dumps(said)})
        shutil.rmtree(folder, ignore_errors=True)


def _named(first: str, part: str) -> str:
    return first if part == TEXT else f"{first}_{part}"
