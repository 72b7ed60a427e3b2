"""What a user's own code does with the package; mypy reads it strictly, nothing runs it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from harness.errors import UsageError
from harness.methods import METHODS, Batch, Method, MethodConfig, Update
from harness.metrics import metric
from harness.records import Record
from harness.report.rows import load_records, rows_of
from harness.solvers import SOLVERS, Solver
from harness.tasks import Task, load_task


class Config(MethodConfig):
    weight: float = 1.0
    """A factor of the loss."""


@METHODS.register("client")
class Client(Method):
    """A method."""

    Config = Config
    sources = frozenset({"data"})

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data
        images, _ = batch.data
        return (batch.normal("noise", images.shape[1:]) - images).square().mean(), {}


@metric("client", direction="none", heading="client")
def brightness(images: Tensor) -> float:
    """Mean pixel."""
    return float(images.mean())


def solver(name: str) -> type[Solver]:
    return SOLVERS[name]


def best(results: Path) -> Sequence[Record]:
    try:
        task: Task = load_task("digits")
    except UsageError:
        return []
    rows = [row for row in rows_of(load_records(results)) if row.num_steps == task.trajectory_steps]
    return rows[0].finished
