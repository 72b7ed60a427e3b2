"""The prompts of a task: embeddings in a file, or written ones that its own encoder reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from harness.data.cache import cached_tensors
from harness.data.scene_prompts import MOST_WORDS, WORDS, Prompt, words_of
from harness.data.scenes import JUDGED, PROMPTS, judged_prompts, training_prompts
from harness.diffusion.conditions import Condition, Conditions
from harness.errors import UsageError
from harness.files import digest, read_tensors
from harness.networks.text import TextEncoder, padded
from harness.provenance import code_digest


def from_file(path: Path, sha256: str | None) -> Conditions:
    """The embeddings of a file, as `PromptSpec` describes it; they stay there until they are used.

    Raises UsageError if the file is missing or broken, or has another SHA-256.
    """
    found = read_tensors(path, sha256)
    _check(path, found)
    prompts, none = (
        Condition(
            text=found[name],
            text_mask=found[f"{name}_mask"].bool() if f"{name}_mask" in found else None,
            pooled=found.get(f"{name}_pooled"),
        )
        for name in ("table", "null")
    )
    return Conditions(len(found["table"]), prompts, none)


def _check(path: Path, found: Mapping[str, torch.Tensor]) -> None:
    """Raises UsageError unless tensors are a table of prompts and the embedding of none."""
    rows = {name: list(found[name].shape) for name in ("table", "null") if name in found}
    fine = len(rows) == 2 and all(len(shape) == 3 for shape in rows.values())
    if not fine or rows["null"] != [1, *rows["table"][1:]] or not rows["table"][0]:
        raise UsageError(
            f"{path} has {rows}, but should have table [count, length, width] and "
            "null [1, length, width]: harness data prompts makes it"
        )
    for part, ndim in (("mask", 2), ("pooled", 2)):
        for name, shape in rows.items():
            extra = found.get(f"{name}_{part}")
            if extra is not None and (extra.dim() != ndim or len(extra) != shape[0]):
                raise UsageError(
                    f"{path} has {name}_{part} {list(extra.shape)} beside {name} {shape}"
                )


def written(judged: bool) -> tuple[Prompt, ...]:
    """The prompts of scenes: of training, or of evaluation."""
    return judged_prompts(JUDGED) if judged else training_prompts(PROMPTS)


def tokens_of(prompts: Sequence[Prompt]) -> Conditions:
    """Prompts as tokens [count, length]; the last is the empty prompt, which is the null one."""
    numbers = [[WORDS.index(word) for word in words_of(prompt.text)] for prompt in prompts]
    tokens, mask = padded([*numbers, []], MOST_WORDS)
    whole = Condition(text=tokens, text_mask=mask)
    return Conditions(len(prompts), whole[: len(prompts)], whole[len(prompts) :])


def texts_hash(encoder: str) -> str:
    """SHA-256 of all prompts of scenes and of their encoder's weights."""
    return digest([[p.text for judged in (False, True) for p in written(judged)], encoder])


@torch.no_grad()
def embedded(tokens: Conditions, encoder: TextEncoder, key: str) -> Conditions:
    """Prompts as their encoder's outputs [count, length, width], kept in the cache.

    Args:
        key: names prompts and encoder.
    """
    assert tokens.prompts is not None
    whole = torch.cat([tokens.prompts.text, tokens.null.text])  # type: ignore[list-item]
    mask = torch.cat([tokens.prompts.text_mask, tokens.null.text_mask])  # type: ignore[list-item]

    def compute() -> dict[str, torch.Tensor]:
        parts = zip(whole.split(1024), mask.split(1024), strict=True)
        return {"text": torch.cat([encoder(*part) for part in parts])}

    found = cached_tensors({"prompts": key, "code": code_digest("networks")}, compute)["text"]
    both = Condition(text=found, text_mask=mask)
    return Conditions(tokens.count, both[: tokens.count], both[tokens.count :])
