"""History on transformers of diffusers: what holds for our DiT holds for them.

Networks are float64 here, so that "equal" means equal to rounding on every machine.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from histories import in_parts
from tiny_diffusers import CLASSES, built, condition_for, states_for
from torch import Tensor, nn

from harness.errors import UsageError
from harness.networks import history as history_module
from harness.networks.history import (
    Cache,
    History,
    Memory,
    Rerouting,
    Summing,
    with_history,
)
from harness.networks.linear_attention import LinearAttention
from harness.networks.masks import Visible, causal, keep_first, window
from harness.networks.passes import count_passes
from harness.networks.swapping import swap

DIT, PIXART, SD3, FLUX, SANA, QWEN = CLASSES
STATES = 3
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
classes = pytest.mark.parametrize("name", CLASSES)


def history(name: str, layers: int = 2, visible: Visible = causal, heads: bool = True) -> History:
    """A history network whose heads differ."""
    network = with_history(built(name), STATES, layers, visible, heads)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for head in network.memory.heads[1:]:
            assert isinstance(head, nn.Linear)
            head.weight.normal_(std=0.3)
    return network


@classes
@pytest.mark.parametrize("visible", [causal, window(1), keep_first])
def test_a_masked_pass_equals_cached_steps(name: str, visible: Visible) -> None:
    network, (x, t), cond = history(name, 2, visible), states_for(name, STATES), condition_for(name)
    masked, filled = network(x, t, cond)
    stepped, grown = in_parts(network, x, t, cond, [1] * STATES)
    close(stepped, masked)
    close(in_parts(network, x, t, cond, [2, 1])[0], masked)
    assert filled.states == grown.states == STATES
    for one, other in zip(filled.keys_values, grown.keys_values, strict=True):
        close(one, other)


@classes
def test_without_history_each_state_goes_through_the_plain_network(name: str) -> None:
    network, plain = history(name, 0, heads=False), built(name)
    x, t, cond = *states_for(name, STATES), condition_for(name)
    output, cache = network(x, t, cond)
    assert cache == Cache(STATES)
    for state in range(STATES):
        close(output[:, state], plain(x[:, state], t[:, state], cond))


@classes
def test_later_states_see_earlier_ones_alone(name: str) -> None:
    network, (x, t), cond = history(name), states_for(name, STATES), condition_for(name)
    output, _ = network(x, t, cond)
    changed = x.clone()
    changed[:, 1] += 1
    moved = (network(changed, t, cond)[0] - output).abs().amax((0, 2, 3, 4))
    assert moved[0] == 0
    assert moved[1:].min() > 1e-3


@classes
def test_copies_and_pickles_are_networks_of_their_own(name: str) -> None:
    """A copy that ran the original's attention would fail here, and so would its heads."""
    network, (x, t), cond = history(name), states_for(name, STATES), condition_for(name)
    expected, _ = network(x, t, cond)
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    for copied in copies:
        assert type(copied) is type(network)
        assert torch.equal(copied(x, t, cond)[0], expected)
        close(in_parts(copied, x, t, cond, [1] * STATES)[0], expected)


@classes
def test_a_teacher_is_loaded_into_every_head(name: str) -> None:
    teacher, student = built(name), history(name, 1)
    student.load_teacher(teacher.state_dict())
    for state in range(STATES):
        assert torch.equal(student.head_of(state).weight, teacher.head.weight)
    assert student.last_layer(student.head_of(1)) is student.head_of(1)
    assert {k for k in student.state_dict() if k not in teacher.state_dict()} == {
        f"head{step}.{part}" for step in (2, 3) for part in ("weight", "bias")
    }


@classes
def test_gradients_of_cached_steps_are_those_of_the_masked_pass(name: str) -> None:
    """Gradients flow through the cache to the earlier states' keys and values."""
    network, (x, t), cond = history(name), states_for(name, STATES), condition_for(name)
    network.requires_grad_(True)
    weight = network.attentions[0].to_v.weight
    found = []
    for cuts in ([STATES], [1] * STATES):
        (gradient,) = torch.autograd.grad(
            in_parts(network, x, t, cond, cuts)[0][:, -1].square().sum(), weight
        )
        found.append(gradient)
    assert found[0].abs().max() > 1e-3
    close(found[0], found[1])


@pytest.mark.parametrize("name", [PIXART, SANA, QWEN])
def test_padding_has_no_effect(name: str) -> None:
    network, (x, t), cond = history(name), states_for(name, STATES), condition_for(name)
    changed = cond.text.clone()
    changed[0, 3:] += 100
    assert torch.equal(network(x, t, replace(cond, text=changed))[0], network(x, t, cond)[0])


def dense_bias(states: int, tokens: int, padded: Tensor) -> Tensor:
    """The bias [B, S T, S T] of a causal block mask whose keys lack the padded tokens [B, T]."""
    blocks = torch.ones(states, states, dtype=torch.bool).tril()
    seen = blocks.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    seen = seen & ~padded.repeat(1, states).unsqueeze(1)
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)


def seen_states(states: int, visible: Visible) -> Tensor:
    """Which states [S, S] each state sees."""
    seen = torch.zeros(states, states, dtype=torch.bool)
    for state in range(states):
        seen[state, list(visible(state))] = True
    return seen


def attend_densely(
    q: Tensor, k: Tensor, v: Tensor, first: int, visible: Visible, mask: Any = None, **options: Any
) -> Tensor:
    """`attend_blocks` as one sequence of all states under a dense mask."""
    assert first == 0
    batch, states, _, tokens, _ = q.shape
    blocks = seen_states(states, visible)
    seen = blocks.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    if mask is not None:
        own = mask.expand(batch * states, 1, 1, tokens).unflatten(0, (batch, states))
        seen = seen & own.reshape(batch, 1, 1, states * tokens)
    whole = (x.transpose(1, 2).flatten(2, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*whole, seen, **options)
    return out.unflatten(2, (states, tokens)).transpose(1, 2)


@pytest.mark.parametrize("visible", [causal, window(1), keep_first])
@pytest.mark.parametrize("name", [name for name in CLASSES if name != SANA])
def test_outputs_and_gradients_are_those_of_a_dense_mask(
    name: str, visible: Visible, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every parameter that has a gradient."""
    network, (x, t), cond = history(name, 2, visible), states_for(name, STATES), condition_for(name)
    network.requires_grad_(True)
    found = []
    for attend in (None, attend_densely):
        if attend:
            monkeypatch.setattr(history_module, "attend_blocks", attend)
        output, _ = network(x, t, cond)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        network.zero_grad()
        (weights * output).sum().backward()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in network.named_parameters()
            if parameter.grad is not None
        }
        found.append({"output": output.detach(), **gradients})
    one, other = found
    assert len(one) > 20
    for key, value in one.items():
        close(value, other[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("cuts", [[STATES], [1, STATES - 1]])
@pytest.mark.parametrize("visible", [causal, window(1), keep_first])
def test_linear_attention_sums_what_a_dense_mask_shows(visible: Visible, cuts: list[int]) -> None:
    """Against products of all queries and keys, outputs and gradients."""
    batch, tokens, width = 2, 5, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = Attention(width, heads=2, dim_head=8).double()
        x = torch.randn(batch, STATES, tokens, width, dtype=torch.float64)
    attention = LinearAttention(own)
    q, k, v = (
        layer(x.flatten(1, 2)).unflatten(-1, (2, 8)).transpose(1, 2)
        for layer in (own.to_q, own.to_k, own.to_v)
    )
    blocks = seen_states(STATES, visible)
    seen = blocks.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    products = q.relu() @ k.relu().transpose(2, 3) * seen
    out = (products @ v / products.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
    expected = own.to_out[0](out).unflatten(1, (STATES, tokens))

    memory, outputs = Memory(visible), []
    swap(attention, Summing, memory=memory, past=(), kept=())
    for part in x.split(cuts, 1):
        memory.states, attention.past = part.shape[1], attention.kept
        outputs.append(attention(part.flatten(0, 1)).unflatten(0, (batch, -1)))
        memory.before += part.shape[1]
    found = torch.cat(outputs, 1)
    assert attention.kept[0].shape == (batch, STATES, 2, 9, 8)  # however many tokens
    close(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = [
        torch.autograd.grad((weights * result).sum(), list(own.parameters()))
        for result in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        close(one, other)


@pytest.mark.parametrize("first", [0, 1])
def test_masks_of_keys_hold_in_every_visible_state(first: int) -> None:
    """Against one sequence of all states under a dense mask, outputs and gradients."""
    batch, tokens, width = 2, 5, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = Attention(width, heads=2, dim_head=8).double()
        x = torch.randn(batch, STATES, tokens, width, dtype=torch.float64)
    padded = torch.zeros(batch, tokens, dtype=torch.bool)
    padded[0, 3:] = True
    whole = attention(x.flatten(1, 2), attention_mask=dense_bias(STATES, tokens, padded))
    expected = whole.unflatten(1, (STATES, tokens))

    memory, parameters = Memory(causal), list(attention.parameters())
    swap(attention, Rerouting, memory=memory, past=(), kept=())
    own, outputs = dense_bias(1, tokens, padded), []
    for part in x.split([first, STATES - first] if first else [STATES], 1):
        memory.states, attention.past, attention.kept = part.shape[1], attention.kept, ()
        mask = own.repeat_interleave(part.shape[1], 0)
        outputs.append(attention(part.flatten(0, 1), attention_mask=mask))
        memory.before += part.shape[1]
    found = torch.cat([o.unflatten(0, (batch, -1)) for o in outputs], 1)
    close(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = [
        torch.autograd.grad((weights * out).sum(), parameters) for out in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def test_a_mask_without_a_batch_holds_for_all() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        q = torch.randn(4, 2, 3, 8, dtype=torch.float64)
    mask = torch.tensor([[[[True, True, False]]]])
    layer = Attention(16, heads=2, dim_head=8)
    swap(layer, Rerouting, memory=Memory(causal, states=2), past=(), kept=())
    expected = layer.attend_states(q, q, q, attn_mask=mask.expand(4, 1, 1, 3))
    assert torch.equal(layer.attend_states(q, q, q, attn_mask=mask), expected)
    assert not torch.allclose(layer.attend_states(q, q, q), expected)


def test_a_second_attention_of_a_history_layer_is_an_error() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, F.scaled_dot_product_attention(q, q, q))

    layer = Twice()
    swap(layer, Rerouting, memory=Memory(causal, states=1), past=(), kept=())
    with pytest.raises(UsageError, match="twice"):
        layer(torch.zeros(1, 2, 3, 8))


def test_a_history_layer_that_is_not_reached_is_an_error() -> None:
    """This processor multiplies matrices itself."""
    network, (x, t), cond = history(DIT), states_for(DIT, STATES), condition_for(DIT)
    network.attentions[1].set_processor(AttnProcessor())
    with pytest.raises(UsageError, match=r"history_layers is 2, but .* \[0\] were reached"):
        network(x, t, cond)


@classes
def test_every_state_is_a_pass(name: str) -> None:
    network, (x, t), cond = history(name), states_for(name, STATES), condition_for(name)
    with count_passes(network) as passes:
        network(x, t, cond)
    assert passes.total == 2 * STATES


def compiled(network: History) -> Any:
    """The network as one graph; a break is an error."""
    torch.compiler.reset()
    return torch.compile(network, fullgraph=True, backend="eager")


def test_a_masked_pass_is_one_graph() -> None:
    network = with_history(built(DIT, num_layers=1), STATES, 1)
    x, t, cond = *states_for(DIT, STATES), condition_for(DIT)
    with torch.no_grad():
        close(compiled(network)(x, t, cond)[0], network(x, t, cond)[0])


@pytest.mark.slow
@classes
def test_masked_passes_and_cached_steps_are_graphs(name: str) -> None:
    network, (x, t), cond = history(name, 1), states_for(name, STATES), condition_for(name)
    graphs = compiled(network)
    with torch.no_grad():
        close(graphs(x, t, cond)[0], network(x, t, cond)[0])
        close(in_parts(graphs, x, t, cond, [1] * STATES)[0], network(x, t, cond)[0])
