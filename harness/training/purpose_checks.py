"""The check that training sees nothing of what judges it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from harness.diffusion.randomness import Keyed
from harness.training.case import Case, weights

JUDGING = ("evaluate", "tune")
"""The purposes whose noise judges students."""


@contextmanager
def keys_drawn() -> Iterator[set[str]]:
    """Collects the keys that numbers are drawn from inside: purpose, seed, step, name, NUL between.

    Threads count too.
    """
    found, draw = set[str](), Keyed._uniform

    def noting(self: Keyed, name: str, index: Tensor, count: int) -> Tensor:
        found.add(self._prefix + name)
        return draw(self, name, index, count)

    Keyed._uniform = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Keyed._uniform = draw  # type: ignore[method-assign]


def purpose_of(key: str) -> str:
    """The purpose in a key of `keys_drawn`."""
    return key.partition("\0")[0]


def blind(case: Case) -> None:
    """Training draws nothing that judges it, and another seed of evaluation changes no weight."""
    found, spec = [], case.task.spec
    for more in (0, 1):
        evaluation = spec.evaluation.model_copy(update={"seed": spec.evaluation.seed + more})
        task = type(case.task)(spec.model_copy(update={"evaluation": evaluation}), case.task.folder)
        other = replace(case, task=task, folder=case.folder / f"{more}", flops=dict(case.flops))
        with keys_drawn() as keys:
            method = other.build()
            other.trainer(method).train(until=3)
        peeked = sorted(key for key in keys if purpose_of(key) in JUDGING)
        assert not peeked, (
            f"training draws {peeked[0].split(chr(0))[-1]!r} of purpose {purpose_of(peeked[0])!r}: "
            "take noise from the batch"
        )
        found.append(weights(method))
    unequal = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    assert not unequal, (
        f"another seed of evaluation changes what is trained: {', '.join(unequal[:3])}"
    )
