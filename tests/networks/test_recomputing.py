"""Blocks that run again in the backward pass: the same gradients, and fewer tensors kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from method_cases import case_of
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.counting import count_flops
from harness.networks import compiling
from harness.networks.backbones import build
from harness.networks.history import EMPTY, History, with_history
from harness.networks.recomputing import activations_kept, checkpoint_activations
from harness.tasks import Task
from harness.training.case import losses, weights

STATES = 3


def network() -> History:
    options = {
        "image_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 4,
        "num_heads": 2, "num_classes": 10,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = with_history(build(options).double(), STATES, 2)
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.1)
    return found


def all_at_once(found: History, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    return found(x, time, cond)[0]


def step_by_step(found: History, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Cached steps: later ones have left other states when the backward pass runs blocks again."""
    outputs, cache = [], EMPTY
    for state in range(STATES):
        at = slice(state, state + 1)
        output, cache = found(x[:, at], time[:, at], cond, cache)
        outputs.append(output)
    return torch.cat(outputs, 1)


INPUTS = (
    torch.linspace(-1, 1, 2 * STATES * 64, dtype=torch.float64).view(2, STATES, 1, 8, 8).sin(),
    torch.tensor([[999.0, 600.0, 300.0]] * 2, dtype=torch.float64),
    Condition(torch.tensor([1, 2])),
)


@pytest.mark.parametrize("passes", [all_at_once, step_by_step])
def test_gradients_are_the_same_to_the_last_bit(passes: Callable[..., Tensor]) -> None:
    plain, again = network(), network()
    checkpoint_activations([again])
    for found in (plain, again):
        passes(found, *INPUTS).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]


def test_arithmetic_is_a_third_more_and_counts_once() -> None:
    found = network()

    def flops() -> float:
        return count_flops(lambda: all_at_once(found, *INPUTS).square().mean().backward())

    before = flops()
    checkpoint_activations([found])
    assert flops() == pytest.approx(before * 4 / 3, rel=0.05)
    with activations_kept():
        assert flops() == before


def test_a_block_keeps_its_inputs_alone() -> None:
    """What its layers make is freed before the backward pass."""
    kept = []
    for again in (False, True):
        found, made = network(), list[weakref.ref[Tensor]]()
        if again:
            checkpoint_activations([found])
        for block in found.blocks:
            block.mlp.act.register_forward_hook(  # type: ignore[union-attr]
                lambda module, args, output, made=made: made.append(weakref.ref(args[0]))
            )
        output = all_at_once(found, *INPUTS)
        kept.append(sum(ref() is not None for ref in made))
        del output
    assert kept == [4, 0]


def test_what_runs_again_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_inside = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda run, **options: compile_inside(run, backend="eager", **options)
    )
    monkeypatch.setattr(compiling, "check_compiler", lambda: None)
    plain, again = network(), network()
    checkpoint_activations([again])
    monkeypatch.setattr(compiling, "WHOLE", 0)
    compiling.compile_networks([again])
    torch._dynamo.utils.counters.clear()
    for found in (plain, again):
        all_at_once(found, *INPUTS).square().mean().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["ard", "ard with distribution matching", "dmd2", "scm", "imm"])
def test_training_is_the_same(name: str, tiny: Task, tmp_path: Path) -> None:
    found = []
    for again in (False, True):
        case = case_of(name, tiny, tmp_path / str(again))
        method = case.build()
        if again:
            checkpoint_activations(player.module for player in method.players.values())
        trainer = case.trainer(method)
        trainer.train(until=3)
        found.append((weights(method), losses(trainer), trainer.bill.flops))
    (plain, curve, bill), (other, same_curve, same_bill) = found
    assert curve == same_curve
    assert bill == same_bill
    assert all(torch.equal(plain[key], other[key]) for key in plain)
