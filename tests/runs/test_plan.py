"""What a run costs, counted without its files, and what its disk must hold."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from harness.data import shards
from harness.errors import UsageError
from harness.methods.parts.adapters import LoRAOptions
from harness.runs.config import parse_config, parse_options
from harness.runs.plan import WIDTH, Narrow, narrowed, plan
from harness.runs.resolve import resolve
from harness.runs.run import run
from harness.tasks import Task, load_task
from harness.training.estimate import rehearsal, store_bill, total_flops
from harness.training.settings import Execution

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["ard", "consistency-distillation"])
def test_a_network_of_that_width_is_counted_exactly(method: str) -> None:
    """The teacher of digits is as narrow as the network on which training is counted."""
    config = {"method": method, "task": "digits", "budget": "steps=20"}
    resolved = resolve(parse_config(config))
    found, task = plan(resolved), resolved.task
    assert Narrow(task).network_options == task.network_options
    trainer = rehearsal(method, resolved.config, task, 4, resolved.settings, CPU)
    assert found.flops["training"] == pytest.approx(total_flops(trainer), rel=1e-6)
    assert (found.steps, found.images) == (20, 20 * 64)
    if method == "ard":
        recipe = resolved.recipe
        flops = store_bill(task.teacher(CPU), recipe, task)[1]
        assert found.flops["trajectories"] == pytest.approx(flops, rel=1e-6)
        assert found.disk == recipe.count * (2 * recipe.steps + 1) * 64 * 4


def test_ard_costs_what_its_paper_says() -> None:
    """4 states a sample, each a pass forward and twice that backward, and 1.15 % for history."""
    config = {"method": "ard", "task": "imagenet256", "budget": "steps=100"}
    found = plan(resolve(parse_config(config)))
    assert found.sampling.macs / 1e9 == pytest.approx(479.92, abs=0.01)
    passes = found.flops["training"] / found.images / (2 * found.sampling.plain_macs / 4)
    assert passes == pytest.approx(3 * 4, rel=0.03)
    assert found.flops["trajectories"] == pytest.approx(100_000 * 25 * 2 * 237.24e9, rel=1e-3)


@pytest.mark.slow
def test_checkpointed_blocks_keep_their_inputs_and_one_of_them_everything() -> None:
    """A block of DiT keeps some 40 numbers of a token and channel; its input is one of them."""
    resolved = resolve(parse_config({"method": "ard", "task": "imagenet256"}))
    every, few = (
        found.memory
        for found in (plan(resolved), plan(resolved, Execution(checkpoint_activations=True)))
    )
    assert every is not None
    assert few is not None
    assert few.networks == every.networks
    assert 1 / 28 < few.sample / every.sample < 0.15


def test_adapters_are_as_narrow_as_their_network() -> None:
    """They keep their part of the width, and names of layers are the wide network's."""
    plain = parse_options("step-distillation", {})
    assert narrowed(plain, 1 / 18) is plain
    config = parse_options("step-distillation", {"lora_rank": 72, "lora_targets": "attn1.to_q"})
    assert isinstance(config, LoRAOptions)
    narrow = narrowed(config, WIDTH / 1152)
    assert isinstance(narrow, LoRAOptions)
    assert (narrow.lora_rank, narrow.lora_targets) == (4, ())
    assert config.lora_rank == 72


@pytest.mark.slow
def test_training_hardly_depends_on_the_width_at_which_it_is_counted() -> None:
    """DiT-S/2 itself on CIFAR-10's images, beside the narrow network in its place."""
    config = {"method": "step-distillation", "task": "cifar10", "budget": "steps=10"}
    resolved = resolve(parse_config(config))
    whole = Narrow(resolved.task)
    whole.shape, whole.network_options = resolved.task.shape, resolved.task.network_options
    trainer = rehearsal("step-distillation", resolved.config, whole, 4, resolved.settings, CPU)
    found = plan(resolved).flops["training"]
    assert found == pytest.approx(total_flops(trainer), rel=0.05)


def test_too_little_disk_is_refused_before_the_reference_is_made(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage(10))
    config = {"method": "ard", "task": "tiny", "num_steps": 2, "options": {"history_layers": 1}}
    resolved = resolve(parse_config({**config, "budget": "steps=2"}), load_task("tiny"))
    with pytest.raises(UsageError, match="set HARNESS_CACHE to a larger disk"):
        run(resolved, tmp_path / "results", CPU)
    assert not list(tmp_path.glob("results/runs/*/record.json"))
