"""GenEval's files: samples in a folder for each prompt, and lines with a judge's verdicts.

    FOLDER/00000/metadata.jsonl      {"tag": "counting", "include": [...], "prompt": "two ..."}
    FOLDER/00000/samples/0000.png    0001.png, ...
    results.jsonl                    {"filename": ..., "tag": ..., "prompt": ..., "correct": ...}

Ghosh et al. 2023, arXiv 2310.11513; names and keys are those of github.com/djghosh13/geneval.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.data.pictures import FolderPictures, NpzPictures, Pictures, PngPictures, write_png
from harness.data.prompt_files import check_prompt
from harness.data.scene_prompts import COLOURS, OBJECTS, RELATIONS, Prompt
from harness.documents import parse_json, read_text
from harness.errors import UsageError, shown
from harness.files import digest, file_hash, write_text

METADATA, SAMPLES = "metadata.jsonl", "samples"
RESULTS = "results.jsonl"
"""The usual name of a file of verdicts."""
TAG = re.compile(r"[\w -]{1,64}")
"""What names a kind of prompts."""


def metadata_of(prompt: Prompt) -> dict[str, Any]:
    """What GenEval's judges are told of a prompt about scenes.

    As in its `create_prompts.py`, a position counts from the object that stands first in the list,
    which is the second one of the prompt. A count has an upper bound too.
    """
    include: list[dict[str, Any]] = [
        {"class": OBJECTS[one.object], "count": one.count}
        | ({} if one.colour is None else {"color": COLOURS[one.colour]})
        for one in prompt.things
    ]
    found: dict[str, Any] = {"tag": prompt.category, "include": include}
    if prompt.relation is not None:
        include.reverse()
        include[1]["position"] = [RELATIONS[prompt.relation], 0]
    if prompt.category == "counting":
        found["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return {**found, "prompt": prompt.text}


class PromptFolders(PngPictures):
    """Samples in GenEval's layout. Pictures are ordered by their numbers, then by prompt.

    Files of other names, such as `grid.png`, are left alone.

    Attributes:
        metadata: what each folder's file says, in the order of the folders' numbers.
        numbers: the place in `metadata` of each picture's prompt, [n].

    Raises UsageError for a folder without samples or metadata, for metadata that are no JSON or
    lack a prompt, and for pictures of different shapes.
    """

    def __init__(self, path: Path):
        folders = _numbered(path)
        self.metadata = tuple(_read_metadata(folder / METADATA) for folder in folders)
        self._told = [file_hash(folder / METADATA) for folder in folders]
        found = []
        for number, folder in enumerate(folders):
            files = [x for x in folder.glob(f"{SAMPLES}/*.png") if x.stem.isdecimal()]
            if not files:
                raise UsageError(f"{folder / SAMPLES} has no samples: put 0000.png there")
            found += [(int(file.stem), number, file) for file in files]
        found.sort()
        self.numbers = torch.tensor([number for _, number, _ in found])
        super().__init__(path, [file for *_, file in found])

    @property
    def prompts(self) -> list[str]:
        """The prompt of each picture."""
        return [self.metadata[number]["prompt"] for number in self.numbers.tolist()]

    @property
    def sha256(self) -> str:
        return digest([super().sha256, self._told])


def _numbered(path: Path) -> list[Path]:
    """The subfolders whose names are numbers, in their order."""
    folders = [each for each in path.iterdir() if each.is_dir() and each.name.isdecimal()]
    return sorted(folders, key=lambda folder: (int(folder.name), folder.name))


def read_pictures(path: Path, num_classes: int) -> Pictures:
    """The set of a file or folder, in GenEval's layout or by class.

    Raises UsageError as the three classes do.
    """
    if not path.is_dir():
        return NpzPictures(path)
    if any((each / SAMPLES).is_dir() or (each / METADATA).exists() for each in _numbered(path)):
        return PromptFolders(path)
    return FolderPictures(path, num_classes)


def write_folders(
    folder: Path, batches: Iterable[Tensor], numbers: Tensor, metadata: Sequence[dict[str, Any]]
) -> None:
    """Writes pictures in GenEval's layout.

    Args:
        batches: uint8 [B, 1 or 3, H, W].
        numbers: the prompt of each picture, [n].
        metadata: of all prompts, by number.
    """
    written: dict[int, int] = {}
    pictures = (picture for batch in batches for picture in batch.cpu())
    for number, picture in zip(numbers.tolist(), pictures, strict=True):
        place, count = folder / f"{number:05}", written.get(number, 0)
        if count == 0:
            place.mkdir(parents=True)
            (place / METADATA).write_text(json.dumps(metadata[number]) + "\n", encoding="utf-8")
        write_png(place / SAMPLES / f"{count:04}.png", picture)
        written[number] = count + 1


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a picture.

    Attributes:
        tag: the kind of its prompt.
        correct: whether the prompt is followed.
        filename: of the picture; "" where the line names none.
    """

    tag: str
    prompt: str
    correct: bool
    filename: str = ""


def read_results(path: Path) -> list[Verdict]:
    """The verdicts of a file of result lines, in its order.

    Raises UsageError, which names the line, for a file that is missing, empty or no JSON lines,
    for a line without `tag`, `prompt` or `correct`, and for a picture with two verdicts.
    """
    found, seen = [], set[str]()
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        verdict = _verdict(_mapping(line, where := f"{path} line {number}"), where)
        if verdict.filename and verdict.filename in seen:
            raise UsageError(
                f"{where} judges {verdict.filename[:200]!r}, as a line before it does: delete one"
            )
        seen.add(verdict.filename)
        found.append(verdict)
    if not found:
        raise UsageError(f"{path} has no result lines")
    return found


def write_results(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes result lines."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _verdict(content: dict[str, Any], where: str) -> Verdict:
    tag, correct, filename = (content.get(name) for name in ("tag", "correct", "filename"))
    if not isinstance(tag, str) or not TAG.fullmatch(tag):
        raise UsageError(
            f"{where}: tag is {shown(tag, 60)}, but it should be a short name such as 'counting'"
        )
    if not isinstance(correct, bool):
        raise UsageError(
            f"{where}: correct is {shown(correct, 60)}, but it should be true or false"
        )
    named = filename if isinstance(filename, str) else ""
    return Verdict(tag, _prompt(content, where), correct, named)


def _read_metadata(file: Path) -> dict[str, Any]:
    """The one mapping in a file of metadata."""
    content = _mapping(_text(file), str(file))
    _prompt(content, str(file))
    return content


def _prompt(content: dict[str, Any], where: str) -> str:
    """The prompt of a mapping. Raises UsageError where it is missing or cannot be one."""
    text = content.get("prompt")
    if not isinstance(text, str):
        raise UsageError(f'{where} has no prompt: write a mapping such as {{"prompt": "a dog"}}')
    check_prompt(text, f"{where}: its prompt")
    return text


def _mapping(text: str, where: str) -> dict[str, Any]:
    """A mapping in JSON."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: write one mapping on one line") from error
    if not isinstance(content, dict):
        raise UsageError(f"{where} should be a mapping, but it is {shown(content, 60)}")
    return content


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: write the file in that encoding") from error
