"""What ranks do in `test_ranks.py`; new processes import this."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from harness import ranks
from harness.data import trajectories as store_module
from harness.data.cache import cached_samples
from harness.errors import UsageError
from harness.methods import Method
from harness.metrics.described import describe
from harness.metrics.evaluator import Evaluator
from harness.networks.recomputing import checkpoint_activations
from harness.tasks import Task
from harness.training.case import Case
from harness.training.rank_checks import write_outcomes

CPU = torch.device("cpu")


def described() -> dict[str, Tensor]:
    """What a network says of 25 pictures in batches of 8, of which it sees 4 at once."""

    def parts(images: Tensor) -> dict[str, Tensor]:
        features = images.float().flatten(1)[:, :6].square()
        return {"features": features, "spatial": features + 1, "logits": features[:, :3] / 1e3}

    network: Any = SimpleNamespace(device=CPU, at_once=4, parts=parts)
    pictures = torch.arange(25 * 3 * 4).remainder(251).reshape(25, 3, 2, 2)
    drawn = lambda batch: (batch + 1).to(torch.uint8)  # noqa: E731
    return describe(network, pictures.split(8), 25, drawn=drawn).tensors()


def trajectories(task: Task) -> Tensor:
    """The states of a store of shards of 5; each rank computes every n-th shard."""
    made, compute = list[int](), store_module.compute

    def noted(recipe: Any, conditions: Any, teacher: Any, items: Tensor, device: Any) -> Any:
        made.extend(items.tolist())
        return compute(recipe, conditions, teacher, items, device)

    with patch.object(store_module, "compute", noted):
        store = store_module.open_store(
            task.recipe, task.teacher(CPU), CPU, shard_size=5, batch_size=2
        )
    assert {item // 5 % ranks.count() for item in made} == {ranks.number()}
    return store.batch(torch.arange(len(store))).states


def quality(task: Task) -> dict[str, Tensor]:
    """Metrics of noise as the samples of the task's evaluation."""
    images = task.evaluation_inputs(0)[0]
    found = Evaluator(task, lambda k: images, CPU).evaluate({0: images})
    return {name: torch.tensor(metric.mean) for name, metric in found.items()}


def share(task: Task, folder: Path) -> None:
    """Every way in which ranks share work."""
    me, all_of_us = ranks.number(), ranks.count()
    calls = list[int]()

    def squared(number: int) -> Tensor:
        calls.append(number)
        return torch.tensor(number**2)

    assert [int(x) for x in ranks.each(squared, range(7))] == [n**2 for n in range(7)]
    assert calls == list(range(7))[me::all_of_us]

    def refused() -> None:
        raise UsageError(f"rank {ranks.number()} refuses")

    with pytest.raises(UsageError, match="rank 0 refuses"):
        ranks.told_by_first(refused)
    alone = lambda: (ranks.count(), list(ranks.each(lambda n: n + me, range(3))))  # noqa: E731
    assert ranks.told_by_first(alone) == (1, [0, 1, 2])
    assert ranks.anywhere(me == 1, False) == [True, False]
    numbers, whole = torch.full((2, 2), float(me)), torch.tensor(me)
    ranks.add([numbers, whole])
    total = sum(range(all_of_us))
    assert (numbers.tolist(), int(whole)) == ([[total] * 2] * 2, total)

    made = list[int]()
    cached = cached_samples({"of": "ranks"}, lambda: (made.append(me), torch.ones(3))[1])
    assert (made, cached.tolist()) == ([me], [1.0] * 3)
    shared = {"described": described(), "states": trajectories(task), "quality": quality(task)}
    torch.save(shared, folder / f"shared-{me}.pt")


def checkpointed(cases: dict[str, Case], folder: Path) -> None:
    """Writes what sharded ranks have of cases whose blocks run again in the backward pass."""
    build = Case.build

    def built(case: Case, *args: Any, **kwargs: Any) -> Method:
        method = build(case, *args, **kwargs)
        checkpoint_activations(player.module for player in method.players.values())
        return method

    with patch.object(Case, "build", built):
        write_outcomes(cases, folder, sharded=True)
