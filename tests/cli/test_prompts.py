"""`harness data prompts`: from a file of prompts to the conditions of a task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import Harness, sentence
from prompt_folders import WIDTH, write_pipeline

from harness.networks.prompt_encoders import PromptEncoder
from harness.tasks import load_task
from harness.training.tiny_task import tiny_spec

PROMPTS = ["a red dog", "x", "the quick brown fox"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, the folder of a pipeline, and a task that reads its prompts."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    write_pipeline("PixArtAlphaPipeline", Path("pipeline"))
    content = tiny_spec(tmp_path)
    network = {name: v for name, v in content["network"].items() if name != "num_classes"}
    prompts = {"file": "scenes/prompts.safetensors", "length": 12}
    content |= {"name": "text", "network": {**network, "text_width": WIDTH}, "prompts": prompts}
    Path("text.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_a_plan_names_the_prompts_that_are_missing(here: Path, harness: Harness) -> None:
    done = harness("run", "--task", "text.yaml", "--method", "step-distillation", "--dry-run")
    assert done.code == 2
    assert "2 of the 3 files" in done.err  # the teacher of the tiny task reads no text
    assert "scenes/prompts.safetensors: missing" in done.out
    assert "in float16" in done.out
    assert "memory of a GPU" in done.out


def test_a_task_reads_what_the_command_wrote(here: Path, harness: Harness) -> None:
    done = harness(
        "data",
        "prompts",
        "prompts.txt",
        "--encoder",
        "pipeline",
        "--task",
        "text.yaml",
        "--tokens",
        12,
        "--json",
    )
    assert done.code == 0, done.err
    found, task = json.loads(done.out), load_task("text.yaml")
    assert Path(found["file"]) == Path("scenes/prompts.safetensors")
    assert found["shapes"]["table"] == [3, 12, WIDTH]
    assert found["notes"] == [
        "1 of 3 prompts are longer than the 12 tokens that tokenizer reads, and are cut there; "
        "the first is line 3"
    ]
    assert task.hashes["conditions"] == found["sha256"] == task.recipe.conditions
    encoder = PromptEncoder(Path("pipeline"), 12)
    wanted, cond = encoder.encode(PROMPTS), task.conditions.of(torch.tensor([2, 0]))
    assert cond.text is not None
    assert cond.text_mask is not None
    assert cond.text.dtype == torch.float32
    torch.testing.assert_close(cond.text, wanted["text"][[2, 0]], rtol=1e-3, atol=1e-3)
    assert torch.equal(cond.text_mask, wanted["mask"][[2, 0]])
    null = task.null.text
    assert null is not None
    torch.testing.assert_close(null, encoder.encode([""])["text"], rtol=1e-3, atol=1e-3)


def test_unknown_characters_are_said(here: Path, harness: Harness) -> None:
    Path("prompts.txt").write_text("a dog\nein Bär\n")
    command = ("data", "prompts", "prompts.txt", "--encoder", "pipeline", "--out", "p.safetensors")
    assert harness(*command).out.startswith(
        "1 of 2 prompts have characters that T5 does not know, and reads as one unknown token; "
        "the first is line 2\n"
    )
    assert "the first is line 2: change it" in sentence(harness(*command, "--strict"), 2)


def test_what_is_printed_is_the_entry_of_a_task(here: Path, harness: Harness) -> None:
    command = ("data", "prompts", "prompts.txt", "--encoder", "pipeline", "--out", "p.safetensors")
    done = harness(*command, "--rank", "0/2", "--shard-size", 2)
    assert (done.code, done.out) == (0, "3 prompts, 1 shards left to other ranks\n")
    done = harness(*command, "--rank", "1/2", "--shard-size", 2)
    assert done.code == 0, done.err
    entry = yaml.safe_load(done.out.splitlines()[-1])
    content = yaml.safe_load(Path("text.yaml").read_text())
    Path("text.yaml").write_text(yaml.safe_dump(content | entry))
    assert load_task("text.yaml").conditions.count == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--strict", "--tokens", 12, "--out", "p.safetensors"), "line 3: change it"),
        (("--out", "p.pt"), "must end in .safetensors"),
        ((), "no file is named; give --out"),
        (("--out", "p.safetensors", "--encoder", "none"), "has no readable model_index.json"),
    ],
)
def test_wrong_usage_is_one_sentence(
    more: tuple[object, ...], words: str, here: Path, harness: Harness
) -> None:
    done = harness("data", "prompts", "prompts.txt", "--encoder", "pipeline", *more)
    assert words in sentence(done, 2)
