"""What rests on the text alone is computed once a run of sampling: bit for bit, and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from formulas import text_macs
from tiny_diffusers import CLASSES, TEXT, built, condition_for, states_for
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import VPSchedule, few_step_levels
from harness.metrics.compute import count_macs
from harness.networks.backbones.dit import DiT
from harness.networks.backbones.prompted import Prompted
from harness.networks.history import EMPTY, with_history
from harness.networks.text import TextEncoder
from harness.solvers import DDIM, FeatureReuse, Heun, Solver, sample

SIZES: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "text_width": 6,
}
BATCH, LENGTH = 3, 5
ONCE = text_macs(LENGTH, 6, 16, 2)
"""MACs of one sample's text."""
INDEX = torch.arange(BATCH)


def drawn(network: Any, seed: int = 0) -> Any:
    """A network with random weights, none of which is zero."""
    with keyed_initialisation(seed, "once"):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network.requires_grad_(False)


def prompts(name: str = "text", rows: Tensor = INDEX) -> Condition:
    """Texts of 5, 4 and 3 outputs."""
    mask = torch.arange(LENGTH) < (LENGTH - rows % 3).unsqueeze(1)
    return Condition(text=Keyed("once", 0).normal(name, rows, (LENGTH, 6)), text_mask=mask)


def images(states: int = 1) -> Tensor:
    return Keyed("once", 1).normal("x", INDEX, (states, 1, 8, 8))


def teacher(scale: float) -> Guided:
    null = prompts("null", torch.arange(1))
    return Guided(Denoiser(drawn(DiT(**SIZES)), VPSchedule()), scale, null)


def step_by_step(solver: Solver, model: Any, x: Tensor, levels: Tensor, cond: Condition) -> Tensor:
    """What `sample` returns, with conditions that keep nothing."""
    state = solver.init(model, x, cond)
    for t, s in pairwise(levels):
        x, _, state = solver.step(model, x, t, s, cond, state, None)
    return x


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("solver", "passes"), [(DDIM(), 4), (Heun(), 7), (FeatureReuse(DDIM(), 2, 1), 4)]
)
def test_a_teacher_reads_each_text_once(solver: Solver, passes: int, scale: float) -> None:
    model, x, levels, cond = teacher(scale), images()[:, 0], few_step_levels(4), prompts()
    found = sample(solver, model, x, levels, cond)
    assert torch.equal(found, step_by_step(solver, model, x, levels, cond))
    once, often = (
        count_macs(lambda run=run: run(solver, model, x, levels, cond))  # type: ignore[misc]
        for run in (sample, step_by_step)
    )
    texts = BATCH if scale == 1 else 2 * BATCH
    # Two of feature caching's passes lack the upper of the two blocks.
    spared = 2 * LENGTH * 6 * 2 * 16 if isinstance(solver, FeatureReuse) else 0
    assert often - once == texts * ((passes - 1) * ONCE - spared)


def test_a_history_student_reads_each_text_once() -> None:
    network, x, cond = drawn(with_history(DiT(**SIZES), 4, 1)), images(4), prompts()
    t = torch.tensor([999.0, 750.0, 500.0, 250.0]).expand(BATCH, -1)

    def steps(cond: Condition) -> Tensor:
        outputs, cache = [], EMPTY
        for i in range(4):
            output, cache = network(x[:, i : i + 1], t[:, i : i + 1], cond, cache)
            outputs.append(output)
        return torch.cat(outputs, 1)

    assert torch.equal(steps(cond.keeping()), steps(cond))
    assert torch.equal(network(x, t, cond.keeping())[0], network(x, t, cond)[0])
    saved = count_macs(lambda: steps(cond)) - count_macs(lambda: steps(cond.keeping()))
    assert saved == 3 * BATCH * ONCE


def test_changed_weights_are_read_in_the_next_run() -> None:
    model, x, levels, cond = teacher(2.0), images()[:, 0], few_step_levels(2), prompts()
    before = sample(DDIM(), model, x, levels, cond)
    drawn(model.denoiser.network, 1)
    after = sample(DDIM(), model, x, levels, cond)
    assert torch.equal(after, step_by_step(DDIM(), model, x, levels, cond))
    assert not torch.equal(before, after)
    assert cond.kept is None


def test_networks_and_other_conditions_keep_apart() -> None:
    """Two networks share conditions; rows, copies and null conditions have other texts."""
    one, other = drawn(DiT(**SIZES)), drawn(DiT(**SIZES), 1)
    x, t, plain = images()[:, 0], torch.full((BATCH,), 500.0), prompts()
    cond = plain.keeping()
    for network in (one, other):
        for kept, bare in (
            (cond, plain),
            (cond[INDEX.flip(0)], plain[INDEX.flip(0)]),
            (cond.replaced(INDEX > 0, plain[:1]), plain.replaced(INDEX > 0, plain[:1])),
            (cond.to("cpu"), plain),
        ):
            for _ in range(2):
                assert torch.equal(network(x, t, kept), network(x, t, bare))


def test_numbers_of_a_step_are_read_in_each() -> None:
    """A guided network that is told a number, which changes from step to step."""
    network = drawn(DiT(**SIZES, scalars=("s",)))
    model = Guided(Denoiser(network, VPSchedule()), 2.0, prompts("null", torch.arange(1)))
    x, t, kept = images()[:, 0], torch.tensor(0.5), prompts().keeping()
    for value in (0.0, 300.0):
        s = torch.full((BATCH,), value)
        found, expected = (model(x, t, cond.with_scalars(s=s)).eps for cond in (kept, prompts()))
        assert torch.equal(found, expected)


def test_an_encoder_of_its_own_reads_once() -> None:
    encoder = TextEncoder(words=4, width=6, depth=1, num_heads=2)
    network = drawn(Prompted(encoder, DiT(**SIZES)))
    cond = replace(prompts(), text=torch.randint(0, 6, (BATCH, LENGTH)))
    x, t = images()[:, 0], torch.full((BATCH,), 500.0)
    kept = cond.keeping()
    for _ in range(2):
        assert torch.equal(network(x, t, kept), network(x, t, cond))
    kept = cond.keeping()
    first, second = (count_macs(lambda: network(x, t, kept)) for _ in range(2))
    own = count_macs(lambda: encoder(cond.text, cond.text_mask))
    assert first - second == own + BATCH * ONCE


def test_gradients_of_all_steps_reach_the_texts_weights() -> None:
    network = drawn(DiT(**SIZES)).double().requires_grad_(True)
    x, cond = images()[:, 0].double(), replace(prompts(), text=prompts().text.double())
    found = []
    for each in (cond.keeping(), cond):
        steps = [network(x, torch.full((BATCH,), t), each) for t in (900.0, 100.0)]
        loss = sum(output.square().mean() for output in steps)
        found.append(torch.autograd.grad(loss, list(network.parameters())))  # type: ignore[arg-type]
    for kept, plain in zip(*found, strict=True):
        torch.testing.assert_close(kept, plain, rtol=1e-10, atol=1e-12)


PIXART = 5 * TEXT * 16 + 5 * 16 * 16 + 2 * 2 * 5 * 16 * 16
"""MACs of one text of five outputs in PixArt's projection, and in keys and values of two blocks."""
SAVED = {
    "DiTTransformer2DModel": 0,
    "PixArtTransformer2DModel": PIXART,
    "SD3Transformer2DModel": 5 * TEXT * 16,
    "FluxTransformer2DModel": 5 * TEXT * 16,
    "SanaTransformer2DModel": PIXART,
    "QwenImageTransformer2DModel": 5 * TEXT * 16,
}
"""MACs of one sample's text that later passes spare: joint blocks change the text with the time."""


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_of_diffusers_read_once(name: str) -> None:
    network, (x, t), cond = built(name), states_for(name, 2), condition_for(name)

    def steps(cond: Condition) -> Tensor:
        return torch.stack([network(x[:, i], t[:, i], cond) for i in range(2)])

    with torch.no_grad():
        assert torch.equal(steps(cond.keeping()), steps(cond))
        once, often = (
            count_macs(lambda cond=cond: steps(cond))  # type: ignore[misc]
            for cond in (cond.keeping(), cond)
        )
        assert often - once == 2 * SAVED[name]
        # Twice as many states of the same samples
        kept = cond.keeping()
        for states in (x[:, :1], x):
            folded = states.flatten(0, 1), t[:, : states.shape[1]].flatten()
            assert torch.equal(network(*folded, kept), network(*folded, cond))


def test_a_compiled_network_reads_once_in_two_graphs() -> None:
    """One graph computes, the other reads; later runs add none."""
    torch.compiler.reset()
    network, counter = drawn(DiT(**SIZES)), CompileCounter()
    graphs: Callable[..., Tensor] = torch.compile(network, fullgraph=True, backend=counter)
    x = images()[:, 0]
    for name in ("first", "second", "third"):
        kept = prompts(name).keeping()
        for t in (900.0, 500.0, 100.0):
            time = torch.full((BATCH,), t)
            assert torch.equal(graphs(x, time, kept), network(x, time, prompts(name)))
        assert kept.kept
    assert counter.frame_count == 2
