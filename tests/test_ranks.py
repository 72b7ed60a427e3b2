"""How ranks share work: turns, answers of the first, sums, caches, trajectories and features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rank_workers import described, quality, share, trajectories

from harness import ranks
from harness.data.trajectories import store_folder
from harness.errors import UsageError
from harness.methods import METHODS
from harness.runs.config import parse_config
from harness.runs.resolve import resolve
from harness.tasks import Task
from harness.training.distributed import share_of
from harness.training.rank_checks import in_ranks
from harness.training.sharding import check_shard


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_ranks_share_equals_the_work_of_one(
    count: int, tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ranks(count, share, tiny, tmp_path)
    shards = json.loads((store_folder(tiny.recipe) / "manifest.json").read_text())["shards"]
    assert len(shards) == 3
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "other"))
    one, states, alone = described(), trajectories(tiny), quality(tiny)
    assert {"fid", "kid", "recall", "class_diversity"} <= alone.keys()
    for number in range(count):
        found = torch.load(tmp_path / f"shared-{number}.pt")
        assert found["described"].keys() == one.keys()
        assert all(torch.equal(found["described"][name], one[name]) for name in one)
        assert torch.equal(found["states"], states)
        assert found["quality"] == alone


def test_a_batch_that_ranks_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 3)
    assert share_of(12, 2) == 4
    with pytest.raises(
        UsageError, match="64, but 3 ranks share it in groups of 8: give a multiple of 24"
    ):
        share_of(64, 8)


def test_what_needs_the_whole_batch_takes_one_rank(
    tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"history_layers": 2, "gan_from": 0.5, "gan_lag": 0}
    asked = parse_config({"method": "ard", "task": "tiny", "num_steps": 2, "options": options})
    resolve(asked)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UsageError, match="need the whole batch at once: run it on one rank"):
        resolve(asked)


def test_what_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    ard, ctm = METHODS["ard"], METHODS["ctm"]
    with pytest.raises(UsageError, match="start the run by torchrun"):
        check_shard(ard, ard.Config())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    check_shard(ard, ard.Config())
    with pytest.raises(UsageError, match="--shard does not know adapters"):
        check_shard(ard, ard.Config(lora_rank=2))
    with pytest.raises(UsageError, match="passes depends on a rank's samples"):
        check_shard(ctm, ctm.Config())


def test_ranks_refuse_a_budget_in_seconds(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UsageError, match="seconds are measured on one process"):
        resolve(parse_config({"method": "reflow", "task": "tiny", "budget": "seconds=10"}))


def test_a_command_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from harness.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(main, ["sweep", "ablations/history.yaml"])
    assert (done.exit_code, done.output) == (
        2,
        "harness: sweep is for one process: start it without torchrun\n",
    )
