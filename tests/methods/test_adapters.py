"""Students with low-rank adapters: every method trains and resumes them, or has no such option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers import CLASSES, network_of
from tiny_runs import ARD, config

from harness.diffusion.randomness import keyed_initialisation
from harness.errors import UsageError
from harness.files import file_hash, write_tensors
from harness.methods import METHODS, Method
from harness.methods.parts.adapters import LoRAOptions
from harness.networks.backbones import build
from harness.runs.config import parse_options
from harness.runs.resolve import options_on, resolve
from harness.tasks import Task
from harness.tasks.spec import Weights
from harness.training import contract
from harness.training.case import Case, weights

RANK = {"lora_rank": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS.names()} | {
    "ard": ("ard", ARD),
    "ard with a head for each step and its noise": (
        "ard",
        {**ARD, "heads": "per_step", "noise_channels": True},
    ),
    "ard with a GAN stage": (
        "ard",
        {**ARD, "gan_from": 0.0, "gan_warmup_steps": 1, "gan_virtual_batch": 2},
    ),
    "ard with distribution matching": ("ard", {**ARD, "dmd_from": 0.0, "dmd_every": 2}),
    "ladd": ("ladd", {"gan_virtual_batch": 2}),
    "dmd2": ("dmd2", {"student_every": 2}),
    "drifting": ("drifting", {"group": 4}),
    "imm": ("imm", {"group": 2, "gap": 6}),
}
WITHOUT = {"denoising", "teacher"}
"""Methods that have no student which starts from a teacher."""
STUDENTS = [name for name in CASES if name not in WITHOUT]


def case_of(name: str, task: Task, folder: Path, **more: Any) -> Case:
    method, options = CASES[name]
    steps = min(METHODS[method].default_num_steps, 2)
    return Case(method, task, folder, {**options, **more}, num_steps=steps)


def frozen(method: Method) -> dict[str, torch.Tensor]:
    """Copies of the student's weights that do not train, by name."""
    player = method.student_player
    training = set(map(id, player.trained))
    named = player.module.named_parameters()
    return {name: w.detach().clone() for name, w in named if id(w) not in training}


@pytest.mark.parametrize("name", STUDENTS)
def test_untrained_it_equals_the_student_that_trains_all_weights(
    name: str, tiny: Task, tmp_path: Path
) -> None:
    whole, adapted = (case_of(name, tiny, tmp_path, **more) for more in ({}, RANK))
    assert torch.equal(adapted.sample(adapted.build()), whole.sample(whole.build()))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("ard", "dmd2", "lcm") else [pytest.mark.slow])
        for name in STUDENTS
    ],
)
def test_it_trains_its_adapters_alone_and_resumes_bit_for_bit(
    name: str, tiny: Task, tmp_path: Path
) -> None:
    case = case_of(name, tiny, tmp_path, **RANK)
    straight, first, resumed = case.build(), case.build(), case.build()
    before, start = frozen(straight), weights(straight)
    assert any(key.endswith("qkv.base_layer.weight") for key in before)
    case.trainer(straight).train(until=3)
    case.trainer(first, tmp_path / "run").train(until=2)
    case.trainer(resumed, tmp_path / "run").train(until=3)
    expected, found = weights(straight), weights(resumed)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert torch.equal(case.sample(straight), case.sample(resumed))
    assert all(torch.equal(value, before[key]) for key, value in frozen(straight).items())
    moved = {key for key in start if not torch.equal(start[key], expected[key])}
    assert any(key.startswith("student.ema.") and ".lora_B." in key for key in moved)


@pytest.mark.parametrize("name", ["ard with a GAN stage", "progressive", "lcm"])
@pytest.mark.parametrize("check", [contract.isolation, contract.averaged, contract.accumulation])
def test_it_keeps_the_contract(
    name: str, check: contract.Check, tiny: Task, tmp_path: Path
) -> None:
    check(case_of(name, tiny, tmp_path / "case", **RANK))


def test_optimizer_and_average_hold_what_trains(tiny: Task, tmp_path: Path) -> None:
    method = case_of("lcm", tiny, tmp_path, **RANK).build()
    player = method.student_player
    assert player.ema is not None
    average = dict(player.ema.module.named_parameters())
    for name, weight in player.module.named_parameters():
        trains = any(weight is one for one in player.trained)
        assert trains == (".lora_" in name or name.startswith("scalar_embedders."))
        assert (average[name] is weight) == (not trains)


@pytest.mark.parametrize("class_name", CLASSES[:1])
@pytest.mark.parametrize("name", ["ard", "reflow"])
def test_on_a_teacher_of_diffusers(name: str, class_name: str, tiny: Task, tmp_path: Path) -> None:
    network = network_of(class_name, in_channels=1, out_channels=2)
    with keyed_initialisation(0, "teacher"):
        write_tensors(tmp_path / "teacher.safetensors", build(network).state_dict())
    path = tmp_path / "teacher.safetensors"
    old = tiny.trained("teacher").training
    teacher = Weights(file=str(path), sha256=file_hash(path), training=old)
    update = {"network": network, "teacher": teacher}
    case = case_of(name, Task(tiny.spec.model_copy(update=update)), tmp_path / "case", **RANK)
    method = case.build()
    before = frozen(method)
    case.trainer(method).train(until=2)
    assert all(torch.equal(value, before[key]) for key, value in frozen(method).items())


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_method_without_a_teacher_to_start_from_refuses(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown option 'lora_rank' in options of {name}"):
        parse_options(name, RANK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**RANK, "init": "random"}, "but init is 'random': leave one of them out"),
        ({"lora_alpha": 4}, "lora_alpha is given without lora_rank"),
        ({"lora_targets": "qkv"}, "lora_targets is given without lora_rank"),
        ({"lora_rank": 0}, "lora_rank is 0, but it should be greater than or equal to 1"),
        ({**RANK, "lora_targets": "qkv,"}, "lora_targets.0 is '', but String should have"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options("reflow", options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_target_that_the_network_lacks(tiny: Task, tmp_path: Path) -> None:
    case = case_of("reflow", tiny, tmp_path, **RANK, lora_targets="to_q")
    with pytest.raises(
        UsageError, match="unknown linear layer of the blocks 'to_q' in lora_target"
    ):
        case.build()


def test_a_formula_as_the_teacher_takes_no_adapters() -> None:
    from harness.tasks import load_task

    wanted = config(method="reflow", task="mixture", options=RANK)
    with pytest.raises(
        UsageError, match="lora_rank needs a teacher that is a network, but that of"
    ):
        options_on(load_task("mixture"), wanted)


@pytest.mark.parametrize("name", STUDENTS)
def test_without_adapters_nothing_says_so_and_no_run_has_another_name(name: str) -> None:
    method, options = CASES[name]
    plain = METHODS[method].Config(**options)
    assert isinstance(plain, LoRAOptions)
    assert not [key for key in plain.model_dump() if key.startswith("lora_")]
    adapted = METHODS[method].Config(**options, **RANK, lora_targets="mlp.fc2,attn.qkv")
    assert adapted.model_dump(mode="json") == {
        **plain.model_dump(mode="json"),
        "lora_rank": 2,
        "lora_targets": ["attn.qkv", "mlp.fc2"],
    }
    assert METHODS[method].Config(**adapted.model_dump()) == adapted
    assert adapted.merged() == plain


def test_the_name_of_a_run_follows_its_adapters(tiny: Task) -> None:
    ids = {
        resolve(config(options={**ARD, **more}), tiny).run_id
        for more in ({}, RANK, {"lora_rank": 4}, {**RANK, "lora_alpha": 4.0})
    }
    assert len(ids) == 4
