"""Memory of training: closed formulas, and the same count with and without values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.diffusion.conditions import Condition
from harness.methods import METHODS
from harness.networks.backbones import build
from harness.runs.config import parse_config
from harness.runs.cost import method_on_meta, paper_problem, pass_bytes, training_memory
from harness.runs.plan import Narrow, problem_of
from harness.runs.resolve import resolve
from harness.tasks import load_task
from harness.training.estimate import rehearsal
from harness.training.memory import kept_bytes, loss_bytes, networks_bytes

CPU = torch.device("cpu")


def test_what_a_backward_pass_needs_counts_once() -> None:
    """Two linear layers keep their inputs; the ReLU between keeps its output, the second input."""
    layers = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(3, 4)
    assert kept_bytes(lambda: layers(x), layers.parameters()) == 4 * (3 * 4 + 3 * 5)
    weights = kept_bytes(lambda: layers(x)) - kept_bytes(lambda: layers(x), layers.parameters())
    assert weights == 4 * 5 * 2  # x needs no gradient, so the first layer's weights are not kept


def test_an_attention_keeps_no_table_of_weights() -> None:
    """Queries, keys, values, outputs and a number for each query, with or without values."""
    tokens, width = 64, 8
    for device in ("cpu", "meta"):
        q, k, v = (
            torch.randn(1, 2, tokens, width, device=device, requires_grad=True) for _ in "qkv"
        )
        attend = nn.functional.scaled_dot_product_attention
        kept = kept_bytes(lambda: attend(q, k, v))  # noqa: B023
        assert kept == 4 * 2 * tokens * (4 * width + 1)


@pytest.mark.parametrize("text_width", [0, 6])
def test_a_pass_without_values_keeps_as_much(text_width: int) -> None:
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 3, "num_heads": 2, "depth": 2}
    read = {"text_width": 6} if text_width else {"num_classes": 3}
    found = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            network = build({**sizes, "hidden_size": 16, **read})
            text = torch.zeros(1, 5, 6) if text_width else None
            cond = Condition(labels=torch.zeros(1, dtype=torch.long), text=text)
            x, time = torch.zeros(1, 3, 8, 8), torch.zeros(1)
            found[device] = kept_bytes(lambda: network(x, time, cond), network.parameters())  # noqa: B023
    assert found["cpu"] == pytest.approx(found["meta"], rel=0.01)
    assert found["cpu"] > 2 * 10 * 16 * 16 * 4  # some ten tensors [16 tokens, width 16] a block


def test_networks_are_counted_by_their_parameters() -> None:
    """A student's numbers, gradients and two moments; its average; the teacher."""
    problem = paper_problem("DiT-S/8", 64, True, 10, 4)
    config = METHODS["step-distillation"].Config()
    network, method = method_on_meta("step-distillation", config, problem, 4)
    count = sum(p.numel() for p in network.parameters())
    assert networks_bytes(method, network) == 4 * (4 + 1 + 1) * count
    found = training_memory("step-distillation", config, problem, 4, passes=4.0)
    assert found.sample == 4 * pass_bytes(problem)
    assert found.of(3) == found.networks + 3 * found.sample


def test_a_loss_keeps_its_passes() -> None:
    """Step distillation keeps one pass for each of its steps, ARD a little more."""
    kept = {}
    for method in ("step-distillation", "ard"):
        config = {"method": method, "task": "digits", "budget": "steps=10"}
        resolved = resolve(parse_config(config))
        narrow = Narrow(load_task("digits"))
        trainer = rehearsal(method, resolved.config, narrow, 4, resolved.settings, CPU)
        kept[method] = loss_bytes(trainer) / pass_bytes(problem_of(narrow, 0))
    assert kept["step-distillation"] == pytest.approx(4, rel=0.05)
    assert kept["step-distillation"] < kept["ard"] < 5.5
