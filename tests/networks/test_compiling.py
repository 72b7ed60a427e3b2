"""Which parts of a network go through torch.compile, and that they are released again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiling import run_graphs_eagerly
from method_cases import case_of
from torch import nn

from harness.diffusion.conditions import Condition
from harness.networks.backbones import build
from harness.networks.compiling import WHOLE, compile_networks, compiled, uncompiled
from harness.networks.history import History, with_history
from harness.tasks import Task


def network(depth: int, history_layers: int = 0) -> History:
    options = {
        "image_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": depth,
        "num_heads": 2, "num_classes": 10,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = with_history(build(options), 2, history_layers)
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.05)
    return found


def output(found: History) -> torch.Tensor:
    x, time = torch.linspace(-1, 1, 256).view(2, 2, 1, 8, 8), torch.tensor([[999.0, 500.0]] * 2)
    return found(x, time, Condition(torch.tensor([1, 2])))[0]


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    run_graphs_eagerly(monkeypatch)


def test_a_deep_network_is_compiled_by_block_and_a_small_one_whole() -> None:
    small, deep = network(WHOLE), network(WHOLE + 1)
    assert compile_networks([small]) == [small]
    assert compile_networks([deep]) == list(deep.blocks)


def test_all_history_layers_share_a_graph_and_all_others_too() -> None:
    found = network(WHOLE + 4, history_layers=5)
    plain = output(found)
    compile_networks([found])
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(output(found), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["lcm", "dmd2"])
def test_passes_of_a_compiled_teacher_are_billed(name: str, tiny: Task, tmp_path: Path) -> None:
    found = []
    for compile in (False, True):
        case = case_of(name, tiny, tmp_path / str(compile))
        teacher = tiny.teacher(torch.device("cpu"))
        trainer = case.trainer(
            case.build(teacher), teacher=teacher.denoiser.network, compile=compile
        )
        trainer.train(until=2)
        found.append(trainer.bill.teacher_evaluations)
    assert found[0] == found[1] > 0


def test_a_network_is_compiled_inside_alone() -> None:
    found = network(2)
    torch._dynamo.utils.counters.clear()
    with compiled(found, wanted=False):
        output(found)
    assert not torch._dynamo.utils.counters["stats"]
    with compiled(found):
        with uncompiled():
            output(found)
        assert not torch._dynamo.utils.counters["stats"]
        output(found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    output(found.double().float())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
