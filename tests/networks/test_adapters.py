"""Adapters on every backbone: peft's numbers, history in either order, merging, what trains."""

from __future__ import annotations

import copy
import sys
from functools import partial

import pytest
import torch
from tiny_diffusers import CLASSES, built, condition_for, states_for
from torch import Tensor, nn

from harness.errors import UsageError
from harness.networks.adapters import (
    adapter_weights,
    adapters_of,
    add_adapters,
    merged,
    target_names,
)
from harness.networks.backbones import Backbone
from harness.networks.history import with_history

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
STATES, RANK, ALPHA = 3, 2, 6.0


def adapted(network: Backbone, teacher: Backbone, random: bool = True) -> Backbone:
    """The network with adapters, whose B is drawn anew since zeros hide errors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_adapters(network, teacher.state_dict(), RANK, ALPHA)
        for layer in adapters_of(network).values() if random else ():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return network.double().requires_grad_(False)


def history(network: Backbone) -> Backbone:
    return with_history(network, STATES, 1)


def trained(network: nn.Module) -> set[str]:
    return {name for name, weight in network.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("name", CLASSES)
def test_history_and_adapters_go_together_in_either_order(name: str) -> None:
    x, t, cond = *states_for(name, STATES), condition_for(name)
    first = adapted(history(built(name)), built(name))
    second = history(adapted(built(name), built(name)))
    one, other = (network(x, t, cond)[0] for network in (first, second))
    assert torch.equal(one, other)
    close(merged(first)(x, t, cond)[0], one)
    assert float((one - history(built(name))(x, t, cond)[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", CLASSES)
def test_new_adapters_change_nothing_and_merged_ones_are_plain_weights(name: str) -> None:
    x, t, cond = *states_for(name, 1), condition_for(name)
    inputs = (x[:, 0], t[:, 0], cond)
    plain, network = built(name), adapted(built(name), built(name), random=False)
    assert torch.equal(network(*inputs), plain(*inputs))
    once = merged(adapted(built(name), built(name)))
    assert once.state_dict().keys() == plain.state_dict().keys()
    assert merged(plain) is plain


def test_an_adapter_adds_alpha_over_rank_b_a() -> None:
    network, plain = adapted(built(CLASSES[0]), built(CLASSES[0])), built(CLASSES[0])
    (name, layer), *_ = adapters_of(network).items()
    kept = adapter_weights(network)
    A, B = kept[f"{name}.lora_A.weight"], kept[f"{name}.lora_B.weight"]
    x = torch.linspace(-1, 1, A.shape[1], dtype=torch.float64)
    close(layer(x), plain.get_submodule(name)(x) + B @ (A @ x))
    close(B, layer.lora_B["default"].weight * ALPHA / RANK)
    close(merged(network).get_submodule(name).weight, plain.get_submodule(name).weight + B @ A)


def test_adapters_and_what_the_teacher_lacks_train() -> None:
    name = CLASSES[0]
    teacher = built(name)
    network = with_history(built(name, scalars=("step",), extra_channels=3), 2, 1)
    network.load_teacher(teacher.state_dict())
    add_adapters(network, teacher.state_dict(), RANK, ALPHA, ("attn1.to_q",))
    others = {n for n in trained(network) if ".lora_" not in n}
    assert {n.partition(".")[0] for n in others if "pos_embed" not in n} == {"scalar_embedders"}
    assert "model.pos_embed.proj.weight" in others
    assert "model.pos_embed.proj.bias" not in others
    assert len(trained(network)) - len(others) == 2 * len(network.blocks)


def test_where_each_step_has_a_head_all_heads_train() -> None:
    teacher = built(CLASSES[0])
    network = with_history(built(CLASSES[0]), 2, 1, per_step_heads=True)
    add_adapters(network, teacher.state_dict(), RANK, ALPHA)
    heads = {n for n in trained(network) if ".lora_" not in n}
    kinds = ("weight", "bias")
    assert heads == {f"{head}.{kind}" for head in ("model.proj_out_2", "head2") for kind in kinds}


def test_targets_are_ends_of_names() -> None:
    network = built(CLASSES[0])
    everything = target_names(network)
    assert all(name.startswith("model.transformer_blocks.") for name in everything)
    queries = target_names(network, ["attn1.to_q"])
    assert queries == [f"model.transformer_blocks.{i}.attn1.to_q" for i in range(2)]
    assert target_names(network, ["to_q", "attn1.to_q"]) == queries
    assert target_names(network, [queries[1]]) == queries[1:]
    for wrong, hint in (
        ("n1.to_q", "did you mean attn1.to_q"),
        ("proj_out_2", "known: attn1.to_k"),
    ):
        with pytest.raises(UsageError, match=f"unknown linear layer of the blocks .*{hint}"):
            target_names(network, [wrong])


def test_copies_are_networks_of_their_own() -> None:
    name = CLASSES[1]
    x, t, cond = *states_for(name, STATES), condition_for(name)
    network = adapted(history(built(name)), built(name))
    expected: Tensor = network(x, t, cond)[0]
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(copied(x, t, cond)[0], expected)


def test_without_peft_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"lora_rank needs peft: pip install .*\[diffusers\]'"):
        adapted(built(CLASSES[0]), built(CLASSES[0]))
