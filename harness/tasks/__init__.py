"""Tasks: what is benchmarked, one YAML file each."""

from harness.tasks.load import borrows, load_task, task_names
from harness.tasks.mixture import MixtureTask
from harness.tasks.spec import TaskSpec
from harness.tasks.task import Task

__all__ = ["MixtureTask", "Task", "TaskSpec", "borrows", "load_task", "task_names"]
