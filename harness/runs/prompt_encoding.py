"""`harness data prompts`: finds prompts, text encoder and file, then encodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from harness.data.prompt_files import Prompt, read_prompts
from harness.data.prompt_table import Storing, encode_prompts
from harness.errors import UsageError
from harness.files import file_hash, header_of
from harness.networks.library import hub_folder
from harness.networks.prompt_encoders import DOWNLOADED, PromptEncoder
from harness.progress import Progress
from harness.runs.encoding import device_of_rank, place_in
from harness.tasks import Task
from harness.tasks.spec import PromptSpec


@dataclass(frozen=True)
class Asked:
    """What the command is given; what is None comes from the task, or is the default.

    Attributes:
        prompts: a file of prompts, one a line, or JSON lines.
        encoder: the folder of a diffusers pipeline, or its name on the hub.
        out: the safetensors file to write.
        tokens: tokens that T5 reads.
        precision: of the encoders' weights.
        strict: whether a prompt that an encoder would cut or does not know is an error.
    """

    prompts: Path
    encoder: str
    out: Path | None = None
    tokens: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    strict: bool = False
    dtype: Literal["float32", "float16"] = "float16"
    shard_size: int = 256
    batch_size: int = 8


def encode_file(
    asked: Asked,
    task: Task | None,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    report: Callable[[str], Progress] | None = None,
) -> dict[str, Any]:
    """Encodes the prompts of a file.

    Returns:
        `file`, `prompts`, `shards_there`, `shards`, `notes` on prompts that were cut, and once the
        file is there its `shapes` and `sha256`.

    Raises UsageError for anything that is missing or does not fit.
    """
    prompts, out = read_prompts(asked.prompts), _out(asked, task)
    dtype = torch.float32 if asked.precision == "fp32" else torch.bfloat16
    encoder = PromptEncoder(_folder(asked.encoder), asked.tokens, device_of_rank(device), dtype)
    if task is not None:
        _check_length(encoder, task)
    notes = _notes(encoder, prompts, asked)
    there, shards = encode_prompts(
        prompts,
        encoder,
        out,
        Storing(asked.dtype, asked.shard_size, asked.batch_size),
        {**encoder.identity, "precision": asked.precision},
        rank=rank,
        ranks=ranks,
        progress=report("prompts") if report else None,
    )
    found = {"file": str(out), "prompts": len(prompts), "shards_there": there, "shards": shards}
    if out.exists():
        shapes = {name: list(shape) for name, shape in sorted(header_of(out)[1].items())}
        found |= {"shapes": shapes, "sha256": file_hash(out)}
    return {**found, "notes": notes}


def _folder(name: str) -> Path:
    """A pipeline's folder; one of the hub is downloaded or found in its cache."""
    if Path(name).is_dir() or name.count("/") != 1:
        return Path(name)
    return hub_folder(name, DOWNLOADED)


def _out(asked: Asked, task: Task | None) -> Path:
    """The file to write: what is asked for, or the place where the task reads it."""
    if asked.out is not None:
        if asked.out.suffix != ".safetensors":
            raise UsageError(f"--out is {asked.out}, but its name must end in .safetensors")
        return asked.out
    if task is None or not isinstance(task.spec.prompts, PromptSpec):
        raise UsageError("no file is named; give --out, or a --task whose prompts are a file")
    return place_in(task, task.spec.prompts.file)


def _check_length(encoder: PromptEncoder, task: Task) -> None:
    """Raises UsageError if the outputs have another length than a task says."""
    prompts = task.spec.prompts
    wanted = prompts.length if isinstance(prompts, PromptSpec) else None
    found = encoder.encode([""])["text"].shape[1]
    if wanted not in (None, found):
        raise UsageError(
            f"prompts of task {task.spec.name} have {wanted} tokens, but those of {encoder.name} "
            f"with --tokens {encoder.tokens} have {found}: give another pipeline or other --tokens"
        )


def _notes(encoder: PromptEncoder, prompts: list[Prompt], asked: Asked) -> list[str]:
    """A sentence for each tokenizer that reads less than a prompt, and one on unknown characters.

    Raises UsageError for the first of them under --strict.
    """
    texts = [prompt.text for prompt in prompts]
    found = {
        f"are longer than the {encoder.limits[name]} tokens that {name} reads, and are cut there": n
        for name, n in encoder.cut(texts).items()
    }
    found["have characters that T5 does not know, and reads as one unknown token"] = (
        encoder.unknown(texts)
    )
    notes = [
        f"{len(numbers)} of {len(prompts)} prompts {what}; the first is line {numbers[0] + 1}"
        for what, numbers in found.items()
        if numbers
    ]
    if notes and asked.strict:
        raise UsageError(f"{asked.prompts}: {notes[0]}: change it, or leave --strict out")
    return notes
