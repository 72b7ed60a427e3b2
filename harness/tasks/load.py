"""Tasks by name or by file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.documents import read_yaml
from harness.errors import UsageError, unknown
from harness.tasks import task_files
from harness.tasks.mixture import MixtureTask
from harness.tasks.spec import Part, TaskSpec
from harness.tasks.task import Task


def task_names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in task_files.FOLDER.glob("*.yaml"))


def load_task(name: str) -> Task:
    """The task of a name, or of a YAML file.

    Raises UsageError for an unknown name or a broken file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else task_files.FOLDER / f"{name}.yaml"
    if not path.is_file():
        if path.parent == task_files.FOLDER:
            if (own := Path(f"{name}.yaml")).is_file():
                raise UsageError(f"{name} is no shipped task, but {own} is here: give {own}")
            raise unknown("task", name, task_names())
        raise UsageError(f"there is no task file {path}")
    spec = spec_of(read_task(path), f"task file {path} is broken")
    found = MixtureTask(spec, path.parent) if spec.mixture else Task(spec, path.parent)
    found.check_places()
    return found


def spec_of(content: dict[str, Any], problem: str) -> TaskSpec:
    """A task's typed content.

    Args:
        problem: what an error says first.

    Raises UsageError if a field is missing, unknown or wrong.
    """
    try:
        return TaskSpec.model_validate(content)
    except UsageError as error:
        raise UsageError(f"{problem}: {error}") from error
    except ValidationError as error:
        found = [
            [".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")]
            for each in error.errors()
        ]
        reasons = "; ".join(": ".join(filter(None, pair)) for pair in found)
        raise UsageError(f"{problem}: {reasons}") from error


def read_task(path: Path) -> dict[str, Any]:
    """The content of a task's file.

    With `like`, fields that are missing come from the other task, except its tuned defaults.
    """
    content = read_yaml(path)
    if (name := content.get("like")) is None:
        return content
    if name not in task_names():
        raise unknown("task", str(name), task_names(), f"like of {path}")
    other = read_yaml(task_files.FOLDER / f"{name}.yaml")
    if "like" in other:
        raise UsageError(f"{path} is like {name}, which is like another one: name that one")
    return {**other, "defaults": {}, **content}


def borrows(found: Task, part: Part) -> bool:
    """Whether a task's network is that of the task that its field `like` names."""
    other = found.spec.like
    return other is not None and getattr(load_task(other).spec, part) == getattr(found.spec, part)
