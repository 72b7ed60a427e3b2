"""Workers of a sweep as jobs of a cluster, by submitit. Floor 9."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.errors import RunFailed, UsageError
from harness.files import environment_with
from harness.sweeps.sweep import environment_of_workers


def work(words: Sequence[str]) -> int:
    """What a job does: `harness WORDS`, whose failed runs are records and no failure of the job."""
    code = subprocess.run([sys.executable, "-m", "harness", *words], check=False).returncode
    if code not in (0, RunFailed.exit_code):
        raise RuntimeError(f"harness {' '.join(words)} ended with exit code {code}")
    return code


def submit(words: Sequence[str], workers: int, cluster: str, logs: Path, parameters: dict[str, Any], storage: str = "") -> list[Any]:
    """Hands in so many jobs that share the work of `harness WORDS`.

    Args:
        cluster: "slurm", or "local" for processes that share the threads of this machine.
        logs: folder of what jobs print.
        parameters: submitit's, such as timeout_min or slurm_partition.
        storage: as in `harness.sweeps.sweep.environment_of_workers`; jobs get the environment of whoever hands them in.

    Returns:
        The jobs of submitit, with `job_id` and `result()`.

    Raises:
        UsageError: without submitit, where the cluster cannot be reached, and for parameters that it does not know.
    """
    try:
        import submitit
    except ImportError as error:
        raise UsageError("--submit needs submitit: install distillation-harness[slurm]") from error
    try:
        with environment_with(**environment_of_workers(workers, storage, here=cluster == "local")):
            executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
            executor.update_parameters(**parameters)
            with executor.batch():
                return [executor.submit(work, list(words)) for _ in range(workers)]
    except (RuntimeError, ValueError, OSError, NameError, AssertionError, subprocess.SubprocessError) as error:
        raise UsageError(f"cannot submit to {cluster}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def parameters_of(assignments: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs, values as in YAML. Raises UsageError without a '='."""
    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--submit-set {assignment} has no '='; give KEY=VALUE")
        found[key] = yaml.safe_load(value)
    return found
