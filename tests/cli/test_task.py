"""`harness task new`: from data and a checkpoint to a task that runs, without copying a hash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import Harness, sentence
from foreign import folder_of
from PIL import Image

from harness.cli.cmd_task import data_entry, duration
from harness.errors import UsageError
from harness.files import file_hash
from harness.networks.backbones.dit import DiT
from harness.tasks import load_task
from harness.tasks.new import patch_size
from harness.tasks.sources import of_images, of_latents
from harness.training.tiny_task import NETWORK

CPU = torch.device("cpu")
MIXTURE = Path(__file__).parents[2] / "harness" / "tasks" / "mixture.yaml"


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, while the package's tasks are the tiny one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def checkpoint(path: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    network = DiT(**{**NETWORK, **changes})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"ema": network.state_dict()}, path)


NEW = ("task", "new", "mine", "--set", "digits", "--like", "tiny")


def test_a_task_is_written_trained_and_run(here: Path, harness: Harness) -> None:
    """No hash is copied by hand on the way."""
    done = harness(*NEW)
    assert done.code == 0, done.err
    assert "mine.yaml: 1437 images of 10 classes, shape [1, 8, 8], and 360 held out" in done.out
    lines = [line.strip().rpartition(" about ") for line in done.out.splitlines()[-3:]]
    assert [command.strip() for command, _, _ in lines] == [
        "harness teacher train --task mine.yaml",
        "harness run --task mine.yaml --method ard",
        "harness report",
    ]
    run = ("run", "--task", "mine.yaml", "--method", "ard", "--num-steps", "2")
    assert "has no teacher yet" in sentence(harness(*run), 2)
    text = (here / "mine.yaml").read_text()
    done = harness("teacher", "train", "--task", "mine.yaml")
    assert done.code == 0, done.err
    assert "mine.yaml has them now: teacher, guidance" in done.out
    after = (here / "mine.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in after.splitlines() if line.startswith("#")] == comments
    task = load_task("mine.yaml")
    weights = here / "weights" / "mine-teacher.safetensors"
    assert task.spec.teacher.sha256 == file_hash(weights)
    card = yaml.safe_load(weights.with_suffix(".yaml").read_text())
    assert task.spec.guidance.scale == card["quality"]["best_guidance_scale"]
    done = harness(*run)
    assert done.code == 0, done.err
    assert harness("report").code == 0


def test_every_entry_has_a_comment(here: Path, harness: Harness) -> None:
    assert harness(*NEW).code == 0
    lines = (here / "mine.yaml").read_text().splitlines()
    heads = [i for i, line in enumerate(lines) if line[0].isalpha()]
    bare = [lines[i].partition(":")[0] for i in heads if i == 0 or not lines[i - 1].startswith("#")]
    assert bare == ["version", "summary"]


def test_a_teacher_from_others_is_in_the_file(here: Path, harness: Harness) -> None:
    checkpoint(here / "SiT.pt")
    done = harness(*NEW, "--teacher", "SiT.pt", "--num-heads", NETWORK["num_heads"], "--json")
    assert done.code == 0, done.err
    steps = json.loads(done.out)["next"]
    assert [step["command"] for step in steps] == [
        "harness run --task mine.yaml --method ard --dry-run",
        "harness run --task mine.yaml --method ard",
        "harness report",
    ]
    assert all(step["seconds"] > 0 for step in steps)
    spec = load_task("mine.yaml").spec
    assert (spec.schedule, spec.prediction_type) == ("flow", "v")
    assert spec.network == {"convention": "sit", **NETWORK}
    assert spec.teacher.sha256 == file_hash(here / "weights" / "mine-teacher.safetensors")
    assert spec.guidance.scale == 1.5
    assert spec.defaults == {"ard": {"history_layers": 1}}
    text = (here / "mine.yaml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("# From others")]
    assert f"{line}\nteacher: " in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("task", "new", "mine"), "give one of --images DIR, --latents DIR and --set NAME"),
        ((*NEW, "--images", "x"), "give one of --images DIR, --latents DIR and --set NAME"),
        (("task", "new", "My task", "--set", "digits"), "must be of small letters"),
        (("task", "new", "mine", "--images", "none"), "there is no folder none"),
        (("task", "new", "mine", "--latents", "."), "has no finished latents"),
        ((*NEW, "--autoencoder", "x"), "--autoencoder decodes latents"),
        (("task", "new", "mine", "--set", "digits", "--like", "exact"), "has no trained teacher"),
        ((*NEW, "--like", "tinny"), "unknown task 'tinny'; did you mean tiny"),
        ((*NEW, "--teacher", "none.pt"), "there is no file none.pt"),
    ],
)
def test_wrong_usage_is_a_sentence(
    args: tuple[str, ...], words: str, here: Path, tiny_folder: Path, harness: Harness
) -> None:
    shutil.copyfile(MIXTURE, tiny_folder / "exact.yaml")
    assert words in sentence(harness(*args), 2)
    assert not list(here.iterdir())


def test_a_teacher_of_other_data_is_refused(here: Path, harness: Harness) -> None:
    checkpoint(here / "DiT.pt", in_channels=4)
    args = ("--teacher", "DiT.pt", "--num-heads", NETWORK["num_heads"])
    error = sentence(harness(*NEW, *args), 2)
    assert "does not suit the data: network is for [4, 8, 8], but data.shape is [1, 8, 8]" in error
    pictures(here / "photos", "RGB", (8, 8))
    error = sentence(harness("task", "new", "mine", "--images", "photos", *args), 2)
    assert "denoises latents of shape [4, 8, 8], not images: harness data encode" in error
    assert not (here / "mine.yaml").exists()
    assert not (here / "weights").exists()


def test_a_teacher_that_needs_prompts_is_refused(here: Path, harness: Harness) -> None:
    folder_of("PixArtTransformer2DModel", here / "pixart")
    error = sentence(harness(*NEW, "--teacher", "pixart"), 2)
    assert "pixart needs prompts, which a new task does not have" in error


def test_nothing_is_overwritten(here: Path, harness: Harness) -> None:
    assert harness(*NEW).code == 0
    assert "mine.yaml exists: move it away" in sentence(harness(*NEW), 2)


def pictures(folder: Path, mode: str, size: tuple[int, int]) -> None:
    for name in ("cats", "dogs", "owls"):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new(mode, size, number).save(folder / name / f"{number}.png")


def test_shape_and_classes_of_an_image_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "grey", "L", (12, 12))
    pictures(tmp_path / "split" / "train", "RGB", (12, 12))
    pictures(tmp_path / "wide", "RGB", (16, 12))
    assert of_images(tmp_path / "grey", None) == ((1, 12, 12), 3)
    assert of_images(tmp_path / "split", None) == ((3, 12, 12), 3)
    assert of_images(tmp_path / "grey" / "cats", 8) == ((1, 8, 8), 1)
    with pytest.raises(UsageError, match="have 16 x 12 pixels: give --image-size N"):
        of_images(tmp_path / "wide", None)
    assert of_images(tmp_path / "wide", 8) == ((3, 8, 8), 3)
    (tmp_path / "grey" / "cats" / "0.png").write_text("no picture")
    (tmp_path / "grey" / "cats" / "1.png").unlink()
    with pytest.raises(UsageError, match=r"0\.png is not a readable picture"):
        of_images(tmp_path / "grey", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no picture"):
        of_images(tmp_path / "empty", None)


def test_shape_and_classes_of_latents(tmp_path: Path) -> None:
    """As `harness data encode` writes them: a part each, classes by name or by label alone."""
    made_by = {"sha256": "abc", "scaling": 0.18215, "shift": 0.0}
    content = {"shape": [4, 8, 8], "classes": [], "labels": {"0": 3, "4": 1}}
    (tmp_path / "train").mkdir()
    manifest = tmp_path / "train" / "manifest.json"
    manifest.write_text(json.dumps({**content, "autoencoder": {**made_by, "config": "d"}}))
    assert of_latents(tmp_path) == ((4, 8, 8), 5, made_by, False)
    names = ["a", "b", "c", "d", "e", "f"]
    manifest.write_text(json.dumps({**content, "classes": names, "autoencoder": made_by}))
    assert of_latents(tmp_path / "train")[1] == 6
    manifest.write_text(json.dumps({**content, "mirrored": True, "autoencoder": made_by}))
    assert data_entry(None, tmp_path, None, None, None)["flip"] is True
    manifest.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"train has no finished latents .KeyError: 'sha256'"):
        of_latents(tmp_path)


def test_patches_make_at_most_64_tokens() -> None:
    sides = {8: 2, 28: 4, 32: 4, 64: 8, 7: 7, 6: 2}
    assert {side: patch_size(side, side) for side in sides} == sides


def test_times_in_words() -> None:
    seconds = {0.2: "1 s", 90: "90 s", 600: "10 minutes", 1e4: "3 hours", 1e6: "12 days"}
    assert {s: duration(s) for s in seconds} == {s: f"about {t}" for s, t in seconds.items()}
