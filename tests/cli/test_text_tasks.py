"""The tasks of large text-to-image teachers: whole plans and costs without any file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Harness, sentence
from prompt_folders import CLIP_TOKENS, WIDTH, write_pipeline

from harness.errors import UsageError
from harness.methods import METHODS
from harness.networks.backbones.text import text_widths
from harness.networks.prompt_encoders import PIPELINES
from harness.runs.config import parse_config
from harness.runs.needed import needed_files
from harness.runs.resolve import resolve
from harness.tasks import load_task, task_names
from harness.tasks.load import read_task
from harness.tasks.task_files import FOLDER

TASKS = [name for name in task_names() if load_task(name).spec.prompts and name.endswith("-1024")]
TOKENS = {"pixart-1024": 120, "sd3-1024": 77 + 256, "flux-1024": 512}
"""Tokens of the pipelines: T5's, after CLIP's 77 in SD3."""
TEXT = {"pixart-1024": (4096, 0), "sd3-1024": (4096, 2048), "flux-1024": (4096, 768)}
"""Widths of T5-XXL's outputs, and of the pooled vectors of one or two CLIPs."""


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of any task is there."""
    for name in ("HARNESS_DATA", "HARNESS_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_it_needs(name: str, harness: Harness, tmp_path: Path) -> None:
    task = load_task(name)
    files = {file.what: file for file in needed_files(task)}
    wanted = {"data", "prompts", "teacher", "features", "autoencoder"}
    assert files.keys() == wanted
    assert {what for what in wanted if files[what].state == "missing"} == wanted - {"features"}
    assert all(files[what].note == task.spec.sources[what] for what in wanted - {"features"})
    assert task.spec.prompts is not None
    assert task.spec.prompts.length == TOKENS[name]
    assert text_widths(task.network_options) == TEXT[name]
    done = harness("run", "--task", name, "--method", "ard", "--results", tmp_path / "results")
    assert "Traceback" not in sentence(done, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_dry_run_is_a_whole_plan(name: str, harness: Harness) -> None:
    done = harness("run", "--task", name, "--method", "ard", "--history-layers", 6, "--dry-run")
    assert done.code == 2
    assert f"4 of the 5 files of task {name} are missing or wrong" in done.err
    for words in ("GMACs", "trajectories: 10000", "prompts: ", "memory of a GPU", "GPU-hours"):
        assert words in done.out


@pytest.mark.slow
def test_the_plan_of_pixart_in_closed_form(harness: Harness) -> None:
    """Disk by shapes; a pass by the formula of a block with cross-attention and a GELU MLP."""
    run = ("run", "--task", "pixart-1024", "--method", "step-distillation", "--budget", "steps=10")
    done = harness(*run, "--dry-run", "--json")
    assert done.code == 2
    found = json.loads(done.out)["plan"]
    assert found["prompts_disk"] == 10_000 * 120 * 4096 * 2
    assert found["disk"] == 10_000 * (2 * 24 + 1) * 4 * 128 * 128 * 2
    T, L, d, blocks = 64 * 64, 120, 1152, 28
    block = 12 * T * d**2 + 2 * T**2 * d + 2 * T * d**2 + 2 * L * d**2 + 2 * T * L * d
    assert found["sampling"]["macs"] / 4 == pytest.approx(blocks * block, rel=0.003)
    assert found["memory"]["networks"] == 4 * 6 * found["sampling"]["parameters"]


@pytest.mark.slow
def test_history_on_pixart_costs_its_closed_formula(harness: Harness) -> None:
    done = harness(
        "cost", "--task", "pixart-1024", "--method", "ard", "--history-layers", 6, "--json"
    )
    assert done.code == 0, done.err
    found, tokens = json.loads(done.out), 64 * 64
    assert found["macs"] - found["plain_macs"] == 2 * tokens**2 * 1152 * 6 * (1 + 2 + 3)
    assert found["cache"] == 2 * 6 * 3 * tokens * 1152 * 4


@pytest.mark.slow
def test_texts_count_once_a_sample_in_a_tasks_cost(harness: Harness) -> None:
    """Later steps spare PixArt's projection, keys and values, and SD3's projection."""

    def macs(task: str, steps: int) -> tuple[int, int]:
        cost = ("cost", "--task", task, "--method", "step-distillation", "--num-steps", steps)
        found = json.loads(harness(*cost, "--json").out)
        return found["macs"], found["plain_macs"]

    L, d = TOKENS["pixart-1024"], 1152
    spared = {
        "pixart-1024": L * (4096 * d + d**2) + 28 * 2 * L * d**2,
        "sd3-1024": TOKENS["sd3-1024"] * 4096 * 1536,
    }
    for task, once in spared.items():
        (four, plain), (one, _) = macs(task, 4), macs(task, 1)
        assert four == plain == 4 * one - 3 * once


def test_cost_of_a_task_or_of_a_network(harness: Harness) -> None:
    cost = ("cost", "--method", "ard", "--task")
    done = harness(*cost, "digits", "--image-size", 512)
    assert sentence(done, 2) == "--task digits says its network: leave --image-size out"
    assert "is exact: there is no network" in sentence(harness(*cost, "mixture"), 2)
    done = harness("cost", "--method", "ard", "--task", "digits", "--history-layers", 3)
    assert done.code == 0, done.err
    assert "ard on digits, 4 steps" in done.out
    assert "keys and values of earlier states" in done.out


def test_prompts_of_another_encoder_are_wrong_before_anything_is_computed(
    tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder of SD3 gives other widths than PixArt's; a tiny task takes the tiny ones."""
    monkeypatch.chdir(tmp_path)
    content: dict[str, Any] = read_task(FOLDER / "sd3-1024.yaml")
    sizes = {"joint_attention_dim": WIDTH, "pooled_projection_dim": 12}
    content["network"] = {**content["network"], "config": content["network"]["config"] | sizes}
    content["prompts"] = {"file": "prompts.safetensors", "length": CLIP_TOKENS + 9}
    Path("small.yaml").write_text(yaml.safe_dump({**content, "name": "small"}))
    Path("prompts.txt").write_text("a dog\na cat\n")
    for name in ("StableDiffusion3Pipeline", "PixArtAlphaPipeline"):
        assert name in PIPELINES
        write_pipeline(name, Path(name))
    command = ("data", "prompts", "prompts.txt", "--tokens", 9, "--encoder")
    error = sentence(harness(*command, "PixArtAlphaPipeline", "--task", "small.yaml"), 2)
    assert "have 16 tokens, but those of PixArtAlphaPipeline with --tokens 9 have 9" in error
    out = ("--out", "prompts.safetensors")
    assert harness(*command, "PixArtAlphaPipeline", *out).code == 0
    found = {file.what: file for file in needed_files(load_task("small.yaml"))}
    assert found["prompts"].state == "wrong"
    assert (
        "has prompts with table of [9, 16], but task small needs [16, 16]" in found["prompts"].note
    )
    Path("prompts.safetensors").unlink()
    assert harness(*command, "StableDiffusion3Pipeline", "--task", "small.yaml").code == 0
    found = {file.what: file for file in needed_files(load_task("small.yaml"))}
    assert found["prompts"].state == "there"


def test_a_method_that_needs_labels_is_refused_without_the_prompts() -> None:
    (method, *_) = [name for name in METHODS.names() if METHODS[name].needs_labels]
    with pytest.raises(UsageError, match="needs class labels, but task pixart-1024"):
        resolve(parse_config({"method": method, "task": "pixart-1024"}))
