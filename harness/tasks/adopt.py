"""Puts networks into a task's file: a teacher from others, or what was just trained for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness.asides import write_aside
from harness.errors import UsageError
from harness.files import check_name
from harness.networks.checkpoints import Teacher, write_teacher
from harness.tasks.edit import edited, set_entries
from harness.tasks.load import read_task, spec_of
from harness.tasks.spec import Part
from harness.tasks.task_files import check_place

UNKNOWN = "0" * 64
"""A SHA-256 while the file is not yet written."""


def teacher_entries(teacher: Teacher, file: str, sha256: str) -> dict[str, Any]:
    """The entries of a task that describe a teacher from others."""
    return {
        "network": teacher.network,
        "schedule": teacher.schedule,
        "prediction_type": teacher.prediction_type,
        "teacher": {"file": file, "sha256": sha256},
    }


def adopt_teacher(task_file: Path, teacher: Teacher) -> tuple[Path, str]:
    """Writes a teacher beside a task's file, and its entries into the file.

    Returns:
        The file of weights and its SHA-256.

    Raises:
        UsageError: if the teacher does not suit the task's data, or if files cannot be written.
    """
    content = read_task(task_file)
    name = check_name(str(content.get("name", task_file.stem)), f"the name in {task_file}")
    file = weights_file(name, "teacher")
    problem = f"{teacher.facts['source']} does not suit task file {task_file}"
    entries, path = teacher_entries(teacher, file, UNKNOWN), task_file.parent / file
    spec_of({**content, **entries}, problem)
    edited(task_file, entries)
    check_free(path)
    sha256 = write_teacher(teacher, path)
    set_entries(task_file, teacher_entries(teacher, file, sha256))
    return path, sha256


def adopt_trained(task_file: Path, made: Mapping[Part, tuple[Path, str]], **more: Any) -> None:
    """Copies trained networks and their cards beside a task's file, and sets their hashes in it.

    Args:
        made: file of weights and SHA-256 by part.
        more: further entries of the task.

    Raises UsageError if files cannot be written.
    """
    content, entries = read_task(task_file), dict(more)
    for part, (path, sha256) in made.items():
        check_place(content[part]["file"], [task_file.parent], task_file.stem)
        target = task_file.parent / content[part]["file"]
        for suffix in (".safetensors", ".yaml"):
            copied = path.with_suffix(suffix)
            write_aside(target.with_suffix(suffix), partial(shutil.copyfile, copied))
        entries[part] = {**content[part], "sha256": sha256}
    set_entries(task_file, entries)


def adopt_encoder(task_file: Path, path: Path, sha256: str | None) -> dict[str, Any]:
    """Copies a trained text encoder beside a task's file; the task's new entry `prompts`.

    Raises UsageError if the file cannot be written.
    """
    prompts = read_task(task_file)["prompts"]
    check_place(prompts["encoder"]["file"], [task_file.parent], task_file.stem)
    write_aside(task_file.parent / prompts["encoder"]["file"], partial(shutil.copyfile, path))
    return {**prompts, "encoder": {**prompts["encoder"], "sha256": sha256}}


def weights_file(name: str, part: Part) -> str:
    """Where a task's network lies, relative to the task's file."""
    return f"weights/{name}-{part}.safetensors"


def check_free(path: Path) -> None:
    """Raises UsageError if a file exists."""
    if path.exists():
        raise UsageError(f"{path} exists: move it away, or take another name")
