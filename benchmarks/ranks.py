"""What ranks gain: `python -m benchmarks.ranks [--ranks 2] [--pairs 11]` prints a table.

It times training steps of one rank and of all in turn. Strong scaling keeps the whole batch; weak
scaling keeps a rank's share of it. Each rank has one thread.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.ab import compare
from harness import ranks
from harness.methods import METHODS
from harness.tasks import load_task
from harness.training.estimate import rehearsal
from harness.training.rank_checks import in_ranks
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

BATCH, STEPS = 64, 3
"""Samples of one rank's batch, and steps that are timed together."""
HEAD = (
    "| ARD on digits, 4 steps, one thread a rank | samples a second, as a multiple of one rank's "
    "| seconds of a step: one rank / all | pairs |\n|---|---|---|---|\n"
)


def trainer_of(batch: int) -> Trainer:
    """A trainer whose data are noise."""
    settings = TrainSettings(total_steps=10_000, batch_size=batch, seed=0)
    config = METHODS["ard"].Config()
    return rehearsal("ard", config, load_task("digits"), 4, settings, torch.device("cpu"))


def train(trainer: Trainer) -> None:
    """Trains some steps."""
    for _ in range(STEPS):
        trainer.one_step()
        trainer.step += 1


def measure(pairs: int, out: Path) -> None:
    """Times pairs of one rank and all ranks, and writes the table."""
    alone: list[Trainer] = []
    ranks.told_by_first(lambda: alone.append(trainer_of(BATCH)))
    rows = []
    for name, batch in (("strong", BATCH), ("weak", BATCH * ranks.count())):
        together = trainer_of(batch)
        one_rank = partial(ranks.told_by_first, lambda: train(alone[0]))
        found = compare(one_rank, partial(train, together), pairs)
        gain = [batch / BATCH / ratio for ratio in (found.median, found.high, found.low)]
        one, every = (seconds / STEPS for seconds in found.seconds)
        rows.append(
            f"| {name}: {batch} samples on {ranks.count()} ranks, {BATCH} on one "
            f"| {gain[0]:.2f} [{gain[1]:.2f}, {gain[2]:.2f}] "
            f"| {one:.3f} / {every:.3f} | {found.pairs} |\n"
        )
    if ranks.is_first():
        out.write_text(HEAD + "".join(rows))


@click.command()
@click.option("--ranks", "count", default=2, help="Number of ranks.", show_default=True)
@click.option("--pairs", default=11, help="Pairs of measurements.", show_default=True)
def main(count: int, pairs: int) -> None:
    """Print what several ranks gain in training on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "table.md"
        in_ranks(count, measure, pairs, out)
        click.echo(out.read_text())


if __name__ == "__main__":
    main()
