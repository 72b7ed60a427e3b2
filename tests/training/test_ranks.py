"""Several ranks train as one process does; they are real processes that gloo connects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from faulty_ranks import without_mean, without_passes, without_sums
from method_cases import CASES, case_of
from rank_workers import checkpointed

from harness.cli.main import main
from harness.methods import METHODS
from harness.tasks import Task
from harness.training.rank_checks import compare, in_ranks, outcome, write_outcomes

TRAINED = {name for name, (method, _) in CASES.items() if METHODS[method].sources}
GAN = "ard with a GAN stage"
FOURS = {"drifting", "freeflow", "twinflow"}
"""Cases whose samples come in fours, of which a batch of 8 has too few for four ranks."""
SHORT = {"ard", "dmd2", "imm", "ladd", "pdd", "scm", GAN}
"""Cases of every run: those with several players, groups, derivatives and sums of their own."""


def compared(
    count: int,
    names: Sequence[str],
    task: Task,
    folder: Path,
    work: Callable[..., None],
    sharded: bool = False,
    micro: int | None = None,
) -> None:
    """Raises AssertionError unless each case trains alike on so many ranks and on one."""
    cases = {name: case_of(name, task, folder / name) for name in names}
    assert all(case.sources for case in cases.values())  # trajectories are there before the ranks
    in_ranks(count, work, cases, folder, *((sharded, micro) if work is write_outcomes else ()))
    for name, case in cases.items():
        one = outcome(case, micro_batch_size=micro)
        compare(one, [torch.load(folder / f"{name}-{k}.pt") for k in range(count)])


@pytest.mark.parametrize(
    ("count", "names"),
    [
        pytest.param(2, sorted(SHORT), id="2 ranks"),
        pytest.param(2, sorted(TRAINED - SHORT), marks=pytest.mark.slow, id="all others"),
        pytest.param(4, sorted(TRAINED - FOURS), marks=pytest.mark.slow, id="4 ranks"),
    ],
)
def test_all_methods_train_alike(count: int, names: list[str], tiny: Task, tmp_path: Path) -> None:
    compared(count, names, tiny, tmp_path, write_outcomes)


SHARDED = {
    name
    for name in TRAINED
    if METHODS[CASES[name][0]].shards(None) and "lora_rank" not in CASES[name][1]
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["ard"], id="one"),
        pytest.param(sorted(SHARDED), marks=pytest.mark.slow, id="all"),
    ],
)
def test_sharded_methods_train_alike(names: list[str], tiny: Task, tmp_path: Path) -> None:
    """Two ranks that hold a part of each network train as one process does."""
    compared(2, names, tiny, tmp_path, write_outcomes, True)


@pytest.mark.slow
def test_sharded_blocks_may_run_again(tiny: Task, tmp_path: Path) -> None:
    """With activation checkpointing a block gathers its weights once more in the backward pass."""
    compared(2, ["ard", "dmd2"], tiny, tmp_path, checkpointed)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_micro_batches_of_ranks(sharded: bool, tiny: Task, tmp_path: Path) -> None:
    compared(2, ["ard", "dmd2", "lcm", GAN], tiny, tmp_path, write_outcomes, sharded, 2)


@pytest.mark.parametrize(
    ("work", "name", "problem"),
    [
        pytest.param(without_sums, GAN, "moved of student differ", marks=pytest.mark.slow),
        pytest.param(
            without_mean, "reflow", "ranks have different weights", marks=pytest.mark.slow
        ),
        pytest.param(without_passes, "lcm", "the bill is", marks=pytest.mark.slow),
    ],
)
def test_what_ranks_do_not_tell_each_other_is_found(
    work: Callable[..., None], name: str, problem: str, tiny: Task, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=problem):
        compared(2, [name], tiny, tmp_path, work)


@pytest.mark.slow
def test_a_method_of_a_plug_in_is_checked_on_ranks(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from harness.methods import METHODS\nfrom harness.methods.reflow import Reflow\n\n"
        '@METHODS.register("mine")\nclass Mine(Reflow):\n    """Another name."""\n'
    )
    done = CliRunner().invoke(main, ["test-method", str(file), "--ranks"])
    assert done.exit_code == 0, done.output
    assert "mine: ok     ranks_agree" in done.output
