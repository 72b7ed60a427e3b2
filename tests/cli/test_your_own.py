"""The commands of docs/your-own.md, from a folder of pictures and a checkpoint to a table."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import Harness
from PIL import Image

from harness.networks.backbones.dit import DiT
from harness.tasks import load_task

PAGE = Path(__file__).parents[2] / "docs" / "your-own.md"


def blocks(language: str) -> list[str]:
    """The page's code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page's reader has; the task that a new one is like is the tiny one."""
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    (tiny_folder / "digits.yaml").write_text(yaml.safe_dump({**content, "name": "digits"}))
    folder = tmp_path / "here"
    random = np.random.default_rng(0)
    for number, name in enumerate(("cats", "dogs", "owls")):
        (folder / "photos" / name).mkdir(parents=True)
        for item in range(60):
            pixels = random.integers(0, 64, (16, 16, 3)) + 64 * number
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(folder / "photos" / name / f"{item:02}.png")
    torch.manual_seed(0)
    network = DiT(16, 4, 3, 48, 4, 4, num_classes=3, learn_sigma=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = network.state_dict()
    content = {
        "model": state,
        "ema": {f"module.{name}": value for name, value in state.items()},
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="DiT-tiny/4", num_heads=4, num_classes=3),
    }
    torch.save(content, folder / "0050000.pt")
    monkeypatch.chdir(folder)
    return folder


def test_the_page(here: Path, harness: Harness) -> None:
    (printed,) = blocks("text")
    asked = [shlex.split(line) for block in blocks("") for line in block.splitlines()]
    assert [words[1] for words in asked] == ["task", "teacher", "run", "run", "report"]
    for words in asked:
        assert words[0] == "harness"
        done = harness(*words[1:])
        assert done.code == 0, done.err
        if words[1] == "task":
            times = re.compile(r" +about .*")
            assert times.sub("", done.out) == times.sub("", printed)
    for words in ("## photos", "| teacher", "| ard", "| step-distillation"):
        assert words in done.out
    task = load_task("photos.yaml")
    assert task.spec.features.training is not None
    cards = list((here / "results" / "runs").glob("*/record.json"))
    records = [json.loads(card.read_text()) for card in cards]
    assert {record["status"] for record in records} == {"finished"}
    assert {record["hashes"]["teacher"] for record in records} == {task.spec.teacher.sha256}
