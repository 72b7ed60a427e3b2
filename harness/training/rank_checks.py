"""The check that several ranks train a method as one process does.

The ranks are processes of their own, which gloo connects through a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from harness.plugins import load_plugin
from harness.provenance import PLUGIN_SOURCES
from harness.training.case import BATCH, STEPS, Case, losses, weights
from harness.training.sharding import gathered_no_more, whole

WEIGHTS, MOVED, LOSSES = 1e-6, 1e-3, 1e-4
"""Largest relative differences: of all weights, of what training moved them by, and of a loss.

Sums in another order round differently in float32. Training moves weights little, so the second
bound is the stricter one.
"""


def in_ranks(count: int, work: Callable[..., None], *args: Any) -> None:
    """Calls `work(*args)` in so many new processes, the ranks of one run."""
    with tempfile.TemporaryDirectory() as folder:
        given = count, Path(folder) / "meeting", list(PLUGIN_SOURCES), work, args
        mp.spawn(_start, given, nprocs=count)


def _start(
    number: int,
    count: int,
    meeting: Path,
    plugins: list[Path],
    work: Callable[..., None],
    args: Any,
) -> None:
    torch.set_num_threads(1)
    for plugin in plugins:
        load_plugin(plugin)
    dist.init_process_group("gloo", f"file://{meeting}", rank=number, world_size=count)
    work(*args)
    dist.destroy_process_group()


def outcome(case: Case, sharded: bool = False, **settings: Any) -> dict[str, Any]:
    """What training by SGD makes of a case: Adam would divide rounding noise by rounding noise."""
    teacher = case.task.teacher(case.device)
    method = case.build(teacher)
    start = weights(method)
    for player in method.players.values():
        player.optimizer = torch.optim.SGD(player.trained, lr=0.01)
    trainer = case.trainer(method, teacher=teacher.denoiser.network, sharded=sharded, **settings)
    trainer.train(until=STEPS)
    gathered_no_more(trainer.sharded)
    found = whole(weights(method))
    bill = {name: vars(trainer.bill)[name] for name in ("images", "flops", "teacher_evaluations")}
    return {
        "weights": found,
        "moved": {name: value - start[name] for name, value in found.items()},
        "losses": torch.tensor(losses(trainer), dtype=torch.float64),
        "bill": bill,
    }


def write_outcomes(
    cases: Mapping[str, Case], folder: Path, sharded: bool = False, micro: int | None = None
) -> None:
    """Writes what a rank has of each case to `NAME-RANK.pt`."""
    for name, case in cases.items():
        found = outcome(case, sharded, micro_batch_size=micro)
        torch.save(found, folder / f"{name}-{dist.get_rank()}.pt")


def far(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The distance of all tensors together, relative to the size of the expected ones."""
    apart = [(found[name].double() - value.double()).flatten() for name, value in expected.items()]
    whole = [value.double().flatten() for value in expected.values()]
    return float(torch.cat(apart).norm() / torch.cat(whole).norm().clamp(min=1e-300))


def compare(one: Mapping[str, Any], several: Sequence[Mapping[str, Any]]) -> None:
    """Raises AssertionError unless all ranks have what one process has."""
    first = several[0]
    for other in several[1:]:
        unequal = [
            k for k, v in first["weights"].items() if not torch.equal(v, other["weights"][k])
        ]
        assert not unequal, f"ranks have different weights: {', '.join(unequal[:3])}"
    assert first["bill"] == one["bill"], f"the bill is {first['bill']}, but alone {one['bill']}"
    assert any(value.any() for value in one["moved"].values()), "training moves no weight"
    for player in dict.fromkeys(name.partition(".")[0] for name in one["moved"]):
        for what, bound in (("weights", WEIGHTS), ("moved", MOVED)):
            mine, expected = (
                {k: v for k, v in found[what].items() if k.partition(".")[0] == player}
                for found in (first, one)
            )
            apart = far(mine, expected)
            assert apart <= bound, (
                f"{what} of {player} differ by {apart:.1e} from those of one process: "
                "is the loss a mean over samples, and does `sums` name what `end_step` reads?"
            )
    apart = float(
        ((first["losses"] - one["losses"]) / one["losses"].abs().clamp(min=1e-12)).abs().max()
    )
    assert apart <= LOSSES, f"losses differ by {apart:.1e} from those of one process"


def ranks_agree(case: Case) -> None:
    """Two ranks train as one process does: equal weights, losses and bill after 10 steps of SGD."""
    config = case.config
    if config.whole_batch or BATCH % (2 * config.sample_group):
        return
    folder = case.folder / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    one = outcome(case)
    in_ranks(2, write_outcomes, {"case": replace(case, flops={})}, folder)
    compare(one, [torch.load(folder / f"case-{k}.pt", weights_only=True) for k in range(2)])
