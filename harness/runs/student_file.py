"""The file of a student: its weights, and in the metadata how they are built and sampled.

Two students may have equal tensors and different networks: history has no weights of its own. So a
file says what it is, and what is asked of it is compared with that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from harness.documents import parse_json
from harness.errors import UsageError
from harness.files import header_of
from harness.methods import METHODS
from harness.networks.checkpoint_files import STUDENT
from harness.records import Name, read_record
from harness.runs.config import RunConfig, parse_config, parse_options
from harness.runs.resolve import Resolved
from harness.tasks import load_task, task_names


class StudentFacts(BaseModel):
    """What a student's weights do not say themselves."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    run_id: Name
    method: Name
    options: dict[str, Any]
    """Options of the method."""
    num_steps: int
    task: Name
    task_version: int
    network: dict[str, Any] = {}
    """The task's description of its network; none in what older runs kept."""
    schedule: str = ""
    """The task's noise schedule; empty in older files."""
    prediction_type: str = ""
    """What the teacher's network predicts; empty in older files."""

    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file."""
        return {"run_id": self.run_id, STUDENT: self.model_dump_json()}


def facts_of(resolved: Resolved) -> StudentFacts:
    """The facts on the student of a run."""
    return StudentFacts(
        run_id=resolved.run_id,
        method=resolved.method,
        options=resolved.config.model_dump(mode="json"),
        num_steps=resolved.num_steps,
        task=resolved.task.spec.name,
        task_version=resolved.task.spec.version,
        network=resolved.task.network_options,
        schedule=resolved.task.spec.schedule,
        prediction_type=resolved.task.spec.prediction_type,
    )


def read_facts(path: Path) -> StudentFacts | None:
    """The facts in a file's metadata, or in the record beside it; None if nothing is said.

    Raises UsageError for a file that is missing or broken.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the safetensors file of a student")
    if not path.is_file():
        raise UsageError(f"there is no file of weights {path}")
    metadata, _ = header_of(path)
    try:
        if STUDENT in metadata:
            return StudentFacts.model_validate(parse_json(metadata[STUDENT]))
    except ValueError as error:
        raise UsageError(
            f"{path} has metadata of a student that this version cannot read: export it again"
        ) from error
    beside = path.parent / "record.json"
    if "run_id" not in metadata or not beside.is_file():
        return None
    record = read_record(beside)
    if record.run_id != metadata["run_id"]:
        return None
    kept = record.model_dump(include={"run_id", "method", "options", "task", "task_version"})
    return StudentFacts(**kept, num_steps=record.config["num_steps"])


def student_config(path: Path, given: dict[str, Any]) -> RunConfig:
    """The config under which a file's student is sampled: what the file says, or else `given`.

    Args:
        given: those of method, task, num_steps and options that a person asks for.

    Raises UsageError for a request that contradicts the file, in one sentence.
    """
    facts = read_facts(path)
    if facts is None:
        if "method" not in given:
            raise UsageError(
                f"{path} does not say how it is sampled: --student needs --method for it"
            )
        return parse_config({"num_steps": 1, **given})
    if (method := given.get("method", facts.method)) != facts.method:
        raise UsageError(f"method is {method}, but {path} is a student of {facts.method}")
    _refuse_other_options(path, facts, given.get("options", {}))
    num_steps = given.get("num_steps", facts.num_steps)
    options = parse_options(facts.method, facts.options, f"metadata of {path}")
    if num_steps != facts.num_steps and not METHODS[method].trained_once(options):
        raise UsageError(
            f"num_steps is {num_steps}, but {path} was trained for {facts.num_steps} steps"
        )
    task = given.get("task", facts.task)
    _refuse_other_task(path, facts, task)
    return parse_config(
        {"method": method, "task": task, "num_steps": num_steps, "options": facts.options}
    )


def _refuse_other_options(path: Path, facts: StudentFacts, given: dict[str, Any]) -> None:
    """Raises UsageError for the first option that differs from the file's."""
    own = parse_options(facts.method, facts.options, f"metadata of {path}")
    asked = parse_options(facts.method, {**facts.options, **given})
    for name in given:
        if getattr(asked, name) != (theirs := getattr(own, name)):
            raise UsageError(
                f"{name} is {given[name]}, but {path} is a student with {name} {theirs}: "
                "leave it out"
            )


def _refuse_other_task(path: Path, facts: StudentFacts, name: str) -> None:
    """Raises UsageError for a task, or a part of it, that is not the file's."""
    if name == facts.task and name not in task_names() and not Path(name).is_file():
        raise UsageError(
            f"{path} is a student of task {name}, which does not ship: give its file by --task"
        )
    task = load_task(name)
    if (task.spec.name, task.spec.version) != (facts.task, facts.task_version):
        raise UsageError(
            f"task is {task.spec.name}, version {task.spec.version}, but {path} is a student of "
            f"{facts.task}, version {facts.task_version}"
        )
    for part, own, here in (
        ("network", facts.network, task.network_options),
        ("schedule", facts.schedule, task.spec.schedule),
        ("prediction_type", facts.prediction_type, task.spec.prediction_type),
    ):
        if own and own != here:
            raise UsageError(f"the {part} of task {name} is {here}, but {path} has {own}")
