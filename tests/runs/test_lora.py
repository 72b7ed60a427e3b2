"""Runs of adapters: what their records count, and their students as files for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import yaml
from click.testing import CliRunner
from commands import Done, sentence
from safetensors.torch import load_file
from tiny_diffusers import CLASSES, built, condition_for, network_of, states_for
from tiny_runs import ARD, CPU, config, new_run
from torch import nn

from harness.cli.main import main
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import keyed_initialisation
from harness.errors import UsageError
from harness.files import file_hash, read_tensors, write_tensors
from harness.methods import Method
from harness.metrics.compute import parameters
from harness.networks.adapters import adapter_weights, adapters_of, add_adapters
from harness.networks.backbones import build as network_from
from harness.records import Record, read_record
from harness.runs.build import build
from harness.runs.cost import paper_problem, sampling_cost_on_meta
from harness.runs.lora_file import NAME, write_lora
from harness.runs.resolve import Resolved, resolve
from harness.tasks import Task

RANK = {"lora_rank": 2, "lora_alpha": 3.0}


def call(*words: object) -> Done:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert not isinstance(done.exception, Exception), done.exception
    return Done(done.exit_code, done.stdout, done.stderr)


def run_of(folder: Path, **changes: Any) -> tuple[Record, Path]:
    """The record and the folder of a short run."""
    run = new_run(folder / "results", budget="steps=3", batch_size=4, **changes)
    return run.execute(), run.folder


def on_diffusers(tiny_folder: Path, name: str = CLASSES[0]) -> None:
    """Gives the tiny task a teacher of diffusers."""
    task = tiny_folder / "tiny.yaml"
    content = yaml.safe_load(task.read_text())
    network = network_of(name, in_channels=1, out_channels=2)
    path = tiny_folder / "weights" / "teacher.safetensors"
    with keyed_initialisation(0, "teacher"):
        write_tensors(path, network_from(network).state_dict())
    content["network"], content["teacher"]["sha256"] = network, file_hash(path)
    task.write_text(yaml.safe_dump(content))


def student(**changes: Any) -> tuple[Resolved, Method]:
    """A student whose adapters are drawn anew."""
    resolved = resolve(config(**changes, budget="steps=0"))
    built = build(resolved, resolved.task.teacher(CPU), CPU)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in adapters_of(built.sampled_network).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return resolved, built


def load_as_the_card_says(transformer: nn.Module, path: Path) -> nn.Module:
    """The model card's few lines."""
    found = load_file(path)
    adapters = {name.removeprefix("transformer."): weight for name, weight in found.items()}
    layers = sorted({name.partition(".lora_")[0] for name in adapters})
    rank = next(len(weight) for name, weight in adapters.items() if ".lora_A." in name)
    wanted = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
    peft.inject_adapter_in_model(wanted, transformer)
    result = peft.set_peft_model_state_dict(transformer, adapters)
    assert not result.unexpected_keys
    return transformer


def test_a_record_counts_what_trains_and_what_merging_saves(tiny: Task, tmp_path: Path) -> None:
    plain, _ = run_of(tmp_path)
    record, folder = run_of(tmp_path, options={**ARD, **RANK})
    assert plain.cost is not None
    assert record.cost is not None
    width, depth = 16, 3
    layers = [(1, 3), (1, 1), (1, 4), (4, 1), (1, 6)]  # inputs and outputs, in widths
    adapters = sum(2 * (a + b) * width for a, b in layers) * depth
    assert record.cost.trained_parameters == adapters
    assert record.cost.parameters == plain.cost.parameters + adapters
    assert plain.cost.trained_parameters == plain.cost.parameters
    assert plain.cost.merged_macs_per_sample is None
    assert record.cost.merged_macs_per_sample == plain.cost.macs_per_sample
    assert record.cost.macs_per_sample > plain.cost.macs_per_sample
    assert read_record(folder / "record.json") == record


def test_the_cost_without_weights_counts_the_same() -> None:
    from harness.methods import METHODS

    problem = paper_problem("DiT-S/8", 64, True, 10, 2)
    plain, adapted = (
        sampling_cost_on_meta("ard", METHODS["ard"].Config(**options), problem, 2)
        for options in ({}, {"lora_rank": 4})
    )
    assert plain.trained_parameters == plain.parameters
    assert plain.merged_macs == plain.macs == adapted.merged_macs
    assert adapted.macs > plain.macs
    assert adapted.parameters == plain.parameters + adapted.trained_parameters
    assert adapted.nfe == plain.nfe == 2


def test_a_student_with_adapters_comes_back_and_its_merged_export_is_plain(
    tiny: Task, tmp_path: Path
) -> None:
    record, folder = run_of(tmp_path, options={**ARD, **RANK})
    done = call("student", "export", record.run_id, "--results", tmp_path / "results", "--json")
    card, merged = (Path(path) for path in json.loads(done.out))
    assert "parameters were trained" in card.read_text()
    assert not [name for name in read_tensors(merged) if "lora" in name or "base_layer" in name]
    for path, options in ((folder / "student.safetensors", RANK), (merged, {})):
        words = ["--student", path, "--results", tmp_path / "out", "--device", "cpu", "--json"]
        found = json.loads(call("evaluate", *words).out)
        assert {key: v for key, v in found["options"].items() if "lora" in key} == options
        fid = found["metrics"]["fid"]["values"]["0"]
        assert fid == pytest.approx(record.metrics["fid"].values[0], rel=1e-4)
    refused = call("evaluate", "--student", merged, "--method", "ard", "--lora-rank", 2)
    assert "is a student with lora_rank None: leave it out" in sentence(refused, 2)


def test_another_runs_student_goes_on_with_its_adapters(tiny: Task, tmp_path: Path) -> None:
    record, folder = run_of(tmp_path, options={**ARD, **RANK})
    parent = read_tensors(folder / "student.safetensors")
    wanted = config(options={**ARD, **RANK}, budget="steps=0", init_from=record.run_id)
    resolved = resolve(wanted, results=tmp_path / "results")
    again = build(resolved, resolved.task.teacher(CPU), CPU).sampled_network.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in parent.items())
    plain = resolve(wanted.model_copy(update={"options": ARD}), results=tmp_path / "results")
    with pytest.raises(UsageError, match="has another network than this one"):
        build(plain, plain.task.teacher(CPU), CPU)


def test_merged_adapters_go_to_the_folder_of_diffusers(tiny: Task, tmp_path: Path) -> None:
    from harness.runs.diffusers_folder import write_folder

    resolved, built = student(method="reflow", options=RANK)
    write_folder(built, resolved, tmp_path)  # which compares samples
    names = read_tensors(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not [name for name in names if "lora" in name]


def with_a_file(name: str, path: Path) -> tuple[Any, Any]:
    """A teacher of a class, and a student of it whose adapters are written to a file."""
    teacher, network = (built(name, torch.float32) for _ in range(2))
    add_adapters(network, teacher.state_dict(), 2, 3.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in adapters_of(network).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    kept = {
        f"transformer.{k.removeprefix('model.')}": v for k, v in adapter_weights(network).items()
    }
    write_tensors(path, kept)
    return teacher, network


@pytest.mark.parametrize("name", CLASSES)
def test_a_lora_file_turns_the_teacher_into_the_student(name: str, tmp_path: Path) -> None:
    teacher, network = with_a_file(name, tmp_path / NAME)
    (x, t), cond = states_for(name, 1), condition_for(name, dtype=torch.float32)
    inputs = (x[:, 0].float(), t[:, 0].float(), cond)
    expected, before = network(*inputs), teacher(*inputs)
    load_as_the_card_says(teacher.model, tmp_path / NAME)
    torch.testing.assert_close(teacher(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert float((before - expected).detach().abs().max()) > 1e-2


def test_diffusers_loads_the_file_itself(tmp_path: Path) -> None:
    name = "SD3Transformer2DModel"
    teacher, network = with_a_file(name, tmp_path / NAME)
    (x, t), cond = states_for(name, 1), condition_for(name, dtype=torch.float32)
    inputs = (x[:, 0].float(), t[:, 0].float(), cond)
    assert isinstance(teacher.model, diffusers.SD3Transformer2DModel)
    teacher.model.load_lora_adapter(str(tmp_path), weight_name=NAME, prefix="transformer")
    torch.testing.assert_close(teacher(*inputs), network(*inputs), rtol=1e-5, atol=1e-5)


def test_a_run_on_diffusers_exports_a_lora_file(tiny_folder: Path, tmp_path: Path) -> None:
    on_diffusers(tiny_folder)
    record, folder = run_of(tmp_path, method="reflow", options=RANK)
    results = tmp_path / "results"
    words = ["student", "export", record.run_id, "--format", "lora", "--results", results, "--json"]
    files = [Path(path) for path in json.loads(call(*words).out)]
    assert [path.name for path in files] == ["README.md", NAME]
    card = files[0].read_text()
    assert "set_peft_model_state_dict(transformer, adapters)" in card
    assert "tags:\n- diffusion\n- distillation\n- reflow\n- lora" in card
    resolved = resolve(config(method="reflow", options=RANK, budget="steps=0"))
    task, ours = resolved.task, build(resolved, resolved.task.teacher(CPU), CPU)
    ours.start_from(read_tensors(folder / "student.safetensors"))
    transformer = task.teacher(CPU).denoiser.network.model
    before = transformer.state_dict()["proj_out_2.weight"].clone()
    load_as_the_card_says(transformer, files[1])
    x_T, cond = (part[:3] for part in task.evaluation_inputs(0))
    time = torch.full((3,), 700.0)
    with torch.no_grad():
        expected = ours.sampled_network(x_T, time, Condition(cond.classes))
        found = transformer(x_T, timestep=time, class_labels=cond.classes).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(transformer.state_dict()["proj_out_2.weight"], before)
    assert parameters(transformer) == record.cost.parameters  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("foreign", "method", "options", "message"),
    [
        (False, "reflow", RANK, "but the teacher of task tiny is none"),
        (True, "shortcut", RANK, "the student has scalar_embedders."),
        (True, "ard", {**ARD, **RANK}, "the student has history, which its teacher lacks"),
        (True, "ard", {**RANK, "history_layers": 0, "heads": "per_step"}, "the student has head2."),
        (
            True,
            "ard",
            {**RANK, "history_layers": 0, "noise_channels": True},
            "the student has model.pos_embed.proj.weight",
        ),
        (
            True,
            "ard",
            {**RANK, "history_layers": 0, "parametrization": "direct"},
            "gives the next noisy state",
        ),
    ],
)
def test_what_a_lora_file_cannot_hold_is_refused(
    foreign: bool,
    method: str,
    options: dict[str, Any],
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    if foreign:
        on_diffusers(tiny_folder)
    resolved, made = student(method=method, options=options)
    with pytest.raises(UsageError) as caught:
        write_lora(made, resolved, "RUN", tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
