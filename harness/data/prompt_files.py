"""Prompts from a file: one a line, or JSON lines with `prompt` and whatever else belongs to it."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.documents import parse_json, read_bytes
from harness.errors import UsageError

JSON_LINES = ".jsonl"
"""The ending of files whose lines are JSON; all others hold a prompt a line."""
MOST_CHARACTERS = 4096
"""Characters of a prompt. The longest text encoder here reads 512 tokens, of some four each."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what the text encoder reads.
        about: what else its line says, JSON-like, such as GenEval's `tag` and `include`.
    """

    text: str
    about: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order.

    A file that ends in .jsonl has a JSON mapping with `prompt` on each line, as GenEval's
    `evaluation_metadata.jsonl`. Any other has a prompt on each line.

    Raises UsageError, which names the line, if the file is missing, has no prompts or is not
    UTF-8, and for a prompt that `check_prompt` refuses.
    """
    found = []
    for number, line in enumerate(_lines(path), 1):
        where = f"{path} line {number}"
        prompt = _of_json(line, where) if path.suffix == JSON_LINES else Prompt(line)
        check_prompt(prompt.text, where)
        found.append(prompt)
    return found


def check_prompt(text: str, where: str) -> None:
    """Raises UsageError for a prompt that is empty, far too long, or has control characters.

    Args:
        where: the place of the prompt, as the error names it.
    """
    if not text.strip():
        raise UsageError(f"{where} is empty: delete it, or say what a picture should show")
    if len(text) > MOST_CHARACTERS:
        raise UsageError(
            f"{where} has {len(text)} characters, but a prompt has at most {MOST_CHARACTERS}: "
            "is it a prompt?"
        )
    for place, character in enumerate(text, 1):
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise UsageError(
                f"{where} has the control character U+{ord(character):04X} at place {place}: "
                "delete it"
            )


def _lines(path: Path) -> list[str]:
    """The lines of a file without their ends; the last one may lack its end."""
    try:
        text = read_bytes(path).decode("utf-8-sig")  # Windows writes a mark of the order of bytes
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{path} line {line} is not UTF-8: write the file in that encoding"
        ) from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise UsageError(f"{path} has no prompts: write one on each line")
    return lines


def _of_json(line: str, where: str) -> Prompt:
    """The prompt of a line of JSON. Raises UsageError for anything else."""
    try:
        content = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise UsageError(f'{where} has no prompt: write a mapping such as {{"prompt": "a dog"}}')
    return Prompt(content.pop("prompt"), content)
