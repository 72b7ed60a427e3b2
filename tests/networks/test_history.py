"""The history DiT: masked passes, cached steps, exact masks and the cost of adaLN.

A masked pass equals cached steps, no state sees a later one, and adaLN runs once per state.

Networks are float64 here, so that "equal" means equal to rounding on every machine.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from histories import in_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import keyed_initialisation
from harness.networks.backbones import Backbone, build
from harness.networks.backbones.dit import DiT
from harness.networks.history import History, with_history
from harness.networks.masks import Visible, attend_blocks, causal, keep_first, window
from harness.training.tiny_task import NETWORK

T = TypeVar("T", bound=Backbone)


def diagonal(query: int) -> tuple[int, ...]:
    """M1: itself alone, which is step distillation."""
    return (query,)


def gap(query: int) -> tuple[int, ...]:
    """A mask from no paper: the state itself, the one two before it, and the noise.

    It leaves holes between the visible blocks.
    """
    return tuple(sorted({0, max(query - 2, 0), query}))


MASKS: dict[str, Visible] = {
    "causal": causal,
    "window": window(1),
    "keep_first": keep_first,
    "diagonal": diagonal,
    "gap": gap,
}
OPTIONS = {**NETWORK, "depth": 2, "num_classes": 3}
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)
masks = pytest.mark.parametrize("visible", MASKS.values(), ids=MASKS)


def randomised(network: T) -> T:
    """The same network in float64, with random weights where a fresh one has zeros.

    They differ between heads.
    """
    with keyed_initialisation(1, "speaking"):
        for name, parameter in network.named_parameters():
            if "adaLN" in name or name.startswith("final_layer"):
                torch.nn.init.normal_(parameter, std=0.3)
    return network.double().requires_grad_(False)


def history(
    states: int,
    layers: int,
    visible: Visible = causal,
    per_step_heads: bool = False,
    **options: Any,
) -> History:
    """A history DiT whose output depends on everything that it sees."""
    with keyed_initialisation(0, "history"):
        return randomised(
            with_history(build({**OPTIONS, **options}), states, layers, visible, per_step_heads)
        )


def inputs(network: History, states: int) -> tuple[Tensor, Tensor, Condition]:
    """Random states [2, S, C, H, W], labels, and times [2, S] that differ between samples."""
    random = torch.Generator().manual_seed(states)
    size = [g * network.patch_size for g in network.grid]
    x = torch.randn(2, states, network.in_channels, *size, generator=random, dtype=torch.float64)
    return (
        x,
        torch.linspace(999, 250, 2 * states, dtype=torch.float64).reshape(2, states),
        Condition(torch.tensor([0, 3])),
    )


@st.composite
def networks(draw: st.DrawFn) -> History:
    """History DiTs of every kind."""
    depth, patch = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    return history(
        draw(st.integers(1, 5), label="states"),
        draw(st.integers(0, depth), label="history_layers"),
        visible=draw(st.sampled_from(list(MASKS.values()))),
        per_step_heads=draw(st.booleans(), label="per_step_heads"),
        depth=depth,
        patch_size=patch,
        image_size=draw(st.sampled_from([2 * patch, (2 * patch, 3 * patch)])),
        in_channels=draw(st.integers(1, 2)),
        learn_sigma=draw(st.booleans()),
    )


@examples
@given(networks())
def test_a_masked_pass_equals_cached_steps(network: History) -> None:
    x, t, cond = inputs(network, network.num_states)
    masked, filled = network(x, t, cond)
    stepped, grown = in_parts(network, x, t, cond, [1] * network.num_states)
    assert masked.std() > 0.1
    close(stepped, masked)
    assert filled.states == grown.states == network.num_states
    assert len(filled.keys_values) == len(grown.keys_values) == network.history_layers
    for one, other in zip(filled.keys_values, grown.keys_values, strict=True):
        close(one, other)


def test_masks_are_the_papers() -> None:
    assert [causal(query) for query in range(3)] == [(0,), (0, 1), (0, 1, 2)]
    assert [window(1)(query) for query in range(4)] == [(0,), (0, 1), (1, 2), (2, 3)]
    assert [window(0)(query) for query in range(4)] == [diagonal(query) for query in range(4)]
    assert [window(3)(query) for query in range(4)] == [causal(query) for query in range(4)]
    assert [keep_first(query) for query in range(3)] == [(0,), (0, 1), (0, 2)]


@masks
@pytest.mark.parametrize("cuts", [[2, 2], [1, 3], [3, 1]])
def test_states_may_come_in_groups(visible: Visible, cuts: list[int]) -> None:
    network = history(4, 1, visible=visible, per_step_heads=True)
    x, t, cond = inputs(network, 4)
    close(in_parts(network, x, t, cond, cuts)[0], network(x, t, cond)[0])


def test_a_callers_cache_is_left_as_it_is() -> None:
    network = history(3, 2)
    x, t, cond = inputs(network, 3)
    _, cache = network(x[:, :1], t[:, :1], cond)
    before = [tensor.clone() for pair in cache.keys_values for tensor in pair]
    first, _ = network(x[:, 1:2], t[:, 1:2], cond, cache)
    again, _ = network(x[:, 1:2], t[:, 1:2], cond, cache)
    assert cache.states == 1
    assert torch.equal(first, again)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            before, (tensor for pair in cache.keys_values for tensor in pair), strict=True
        )
    )


def test_a_cache_holds_the_lowest_layers_alone() -> None:
    network = history(3, 1, depth=3)
    x, t, cond = inputs(network, 3)
    _, cache = network(x, t, cond)
    assert [[tuple(tensor.shape) for tensor in pair] for pair in cache.keys_values] == [
        [(2, 3, 2, 4, 8)] * 2
    ]


@pytest.mark.parametrize(
    ("layers", "visible"), [(0, causal), (2, diagonal)], ids=["no layers", "diagonal mask"]
)
def test_without_history_each_state_goes_through_a_plain_dit(layers: int, visible: Visible) -> None:
    network, plain = history(4, layers, visible=visible), DiT(**OPTIONS).double()
    plain.load_state_dict(network.state_dict())
    x, t, cond = inputs(network, 4)
    output, _ = network(x, t, cond)
    for state in range(4):
        close(output[:, state], plain(x[:, state], t[:, state], cond))


def test_with_history_the_first_state_alone_is_a_plain_dits() -> None:
    network, plain = history(4, 2), DiT(**OPTIONS).double()
    plain.load_state_dict(network.state_dict())
    x, t, cond = inputs(network, 4)
    output, _ = network(x, t, cond)
    close(output[:, 0], plain(x[:, 0], t[:, 0], cond))
    for state in (1, 2, 3):
        assert (output[:, state] - plain(x[:, state], t[:, state], cond)).abs().max() > 1e-3


@masks
def test_an_output_depends_on_the_states_that_it_may_see_and_no_others(visible: Visible) -> None:
    """One history layer, so that nothing is seen through another state."""
    network = history(4, 1, visible=visible, depth=2)
    x, t, cond = inputs(network, 4)
    for state in range(4):
        leaf = x.clone().requires_grad_()
        output, _ = network(leaf, t, cond)
        output[:, state].square().sum().backward()
        seen = [key for key in range(4) if leaf.grad[:, key].any()]
        assert seen == list(visible(state))


@masks
def test_later_states_never_reach_earlier_outputs(visible: Visible) -> None:
    network = history(4, 2, visible=visible)
    x, t, cond = inputs(network, 4)
    output, _ = network(x, t, cond)
    for state in (1, 2, 3):
        changed_x, changed_t = x.clone(), t.clone()
        changed_x[:, state:] += 1
        changed_t[:, state:] /= 2
        changed, _ = network(changed_x, changed_t, cond)
        assert torch.equal(changed[:, :state], output[:, :state])
        assert not torch.allclose(changed[:, state], output[:, state])


@masks
@pytest.mark.parametrize("first", [0, 2])
def test_attention_equals_a_dense_mask(visible: Visible, first: int) -> None:
    states, tokens = 4, 3
    random = torch.Generator().manual_seed(0)
    # q, k and v are each [batch, state, heads, token, width].
    q, k, v = torch.randn(3, 2, states, 2, tokens, 8, generator=random, dtype=torch.float64)
    blocks = torch.zeros(states, states, dtype=torch.bool)
    for query in range(states):
        blocks[query, list(visible(query))] = True
    dense = blocks.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    q_all, k_all, v_all = (x.transpose(1, 2).flatten(2, 3) for x in (q, k, v))
    expected = (
        F.scaled_dot_product_attention(q_all, k_all, v_all, attn_mask=dense)
        .unflatten(2, (states, tokens))
        .transpose(1, 2)
    )
    close(attend_blocks(q[:, first:], k, v, first, visible), expected[:, first:])


def test_modulation_is_computed_once_a_state() -> None:
    network = history(3, 1, per_step_heads=True)
    x, t, cond = inputs(network, 3)
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_modules():
        if name.endswith("adaLN_modulation"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: tuple(args[0].shape)})
            )
    network(x, t, cond)
    blocks = {f"blocks.{i}.adaLN_modulation": (6, 16) for i in range(2)}
    heads = {f"final_layer{i}.adaLN_modulation": (2, 16) for i in ("", 2, 3)}
    assert seen == blocks | heads


@pytest.mark.parametrize("visible", [causal, diagonal])
def test_every_state_has_its_own_time(visible: Visible) -> None:
    network = history(3, 1, visible=visible)
    x, t, cond = inputs(network, 3)
    output, _ = network(x, t, cond)
    t[:, 1] += 100
    changed, _ = network(x, t, cond)
    assert torch.equal(changed[:, 0], output[:, 0])
    assert not torch.allclose(changed[:, 1], output[:, 1])
    assert torch.equal(changed[:, 2], output[:, 2]) == (visible is diagonal)


def test_each_state_has_its_own_head() -> None:
    network = history(3, 0, per_step_heads=True)
    x, t, cond = inputs(network, 3)
    output, _ = network(x, t, cond)
    torch.nn.init.zeros_(network.final_layer2.linear.weight)
    changed, _ = network(x, t, cond)
    assert [torch.equal(changed[:, i], output[:, i]) for i in range(3)] == [True, False, True]


@pytest.mark.parametrize("per_step_heads", [False, True])
def test_a_student_starts_from_its_teacher(per_step_heads: bool) -> None:
    with keyed_initialisation(2, "teacher"):
        teacher = randomised(DiT(**OPTIONS))
    student = with_history(DiT(**OPTIONS), 3, 0, per_step_heads=per_step_heads).double()
    student.load_teacher(teacher.state_dict())
    x, t, cond = inputs(student, 3)
    output, _ = student(x, t, cond)
    for state in range(3):
        close(output[:, state], teacher(x[:, state], t[:, state], cond))


def test_extra_input_channels_change_nothing_at_the_start() -> None:
    with keyed_initialisation(2, "teacher"):
        teacher = randomised(DiT(**OPTIONS))
    student = with_history(DiT(**OPTIONS, extra_channels=2), 3, 0).double()
    student.load_teacher(teacher.state_dict())
    x, t, cond = inputs(student, 3)
    output, _ = student(torch.cat([x, torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)], 2), t, cond)
    assert output.shape == x.shape
    close(output[:, 0], teacher(x[:, 0], t[:, 0], cond))


@pytest.mark.parametrize("layers", [-1, 3])
def test_more_history_layers_than_layers_are_refused(layers: int) -> None:
    with pytest.raises(ValueError, match="from 0 to the depth 2"):
        with_history(DiT(**OPTIONS), 4, layers)


def test_a_masked_pass_is_one_graph() -> None:
    network = history(3, 1, depth=1, per_step_heads=True)
    x, t, cond = inputs(network, 3)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    close(compiled(x, t, cond)[0], network(x, t, cond)[0])


def test_copies_and_pickles_are_networks_of_their_own() -> None:
    network = history(3, 1, per_step_heads=True)
    x, t, cond = inputs(network, 3)
    expected, _ = network(x, t, cond)
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    for parameter in network.parameters():
        parameter.zero_()
    for copied in copies:
        assert torch.equal(copied(x, t, cond)[0], expected)
        close(in_parts(copied, x, t, cond, [1, 1, 1])[0], expected)


def test_keys_are_those_of_the_plain_network_and_of_further_heads() -> None:
    plain, student = DiT(**OPTIONS).state_dict(), history(3, 1, per_step_heads=True).state_dict()
    assert list(plain) == [name for name in student if name in plain]
    further = {name.split(".")[0] for name in student if name not in plain}
    assert further == {"final_layer2", "final_layer3"}


def test_gradients_of_cached_steps_are_those_of_the_masked_pass() -> None:
    network = history(3, 2)
    x, t, cond = inputs(network, 3)
    weight = network.blocks[0].attn.qkv.weight.requires_grad_()
    whole, stepped = (
        torch.autograd.grad(in_parts(network, x, t, cond, cuts)[0][:, -1].square().sum(), weight)[0]
        for cuts in ([3], [1, 1, 1])
    )
    assert whole.abs().max() > 1e-3
    close(stepped, whole)
