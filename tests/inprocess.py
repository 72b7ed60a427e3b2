"""An engine for tests: jobs run in this process, where a test's patches count."""

from __future__ import annotations

import torch

from harness.errors import HarnessError
from harness.runs.log import silent
from harness.sweeps.child import Order
from harness.sweeps.driver import Driver
from harness.sweeps.engines import Engine, Job


class Here(Engine):
    """Runs jobs in the thread that asks."""

    def run(self, job: Job) -> int:
        try:
            Order.model_validate_json(job.words[1]).execute(torch.device("cpu"), silent)
        except HarnessError as error:
            return error.exit_code
        return 0

    def stop(self) -> None:
        """Nothing runs beside the test."""


def driver(workers: int = 1) -> Driver:
    return Driver(Here(), workers)
