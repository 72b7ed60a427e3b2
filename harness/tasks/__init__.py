"""Tasks: what is benchmarked, one YAML each. Floor 5: may import floors 0 to 4."""

from harness.tasks.task import MixtureTask, Task, TaskSpec, load_task, task_names

__all__ = ["MixtureTask", "Task", "TaskSpec", "load_task", "task_names"]
