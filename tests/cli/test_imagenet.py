"""ImageNet's whole chain at a thousandth of its size: real formats, random weights."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import Harness, sentence
from judged import TinyInception, change_config, write_autoencoder, write_inception
from PIL import Image
from safetensors.torch import load_file, save_file

from harness.data.sets import Wanted, load_split
from harness.files import file_hash
from harness.metrics import spaces
from harness.networks.autoencoder import WEIGHTS
from harness.networks.backbones.dit import DiT
from harness.runs.needed import needed_files
from harness.tasks import load_task, task_files
from harness.tasks.load import read_task

SIZES = {"depth": 2, "hidden_size": 16, "num_heads": 4, "patch_size": 2, "image_size": 4}
NETWORK = {**SIZES, "in_channels": 4, "num_classes": 3, "learn_sigma": True}
PIXELS = np.random.default_rng(0).integers(0, 256, (36, 11, 9, 3), dtype=np.uint8)
RUN = ("run", "--task", "small.yaml", "--method", "ard", "--history-layers", 2)


def task_content(data: Path) -> dict[str, Any]:
    """The task imagenet256 with small numbers; its files stay where they are."""
    features = write_inception(data)
    return {
        "name": "small",
        "version": 1,
        "like": "imagenet256",
        "summary": "imagenet256 at a thousandth of its size",
        "data": {
            "set": "latents",
            "path": "imagenet256/latents",
            "split_seed": 0,
            "shape": [4, 4, 4],
            "num_classes": 3,
            "flip": True,
        },
        "network": NETWORK,
        "features": features,
        "autoencoder": {"folder": "imagenet256/vae", "scaling": 0.18215},
        "trajectories": {"solver": "ddim", "steps": 24, "count": 6, "seed": 0, "dtype": "float16"},
        "evaluation": {
            **load_task("imagenet256").spec.evaluation.model_dump(mode="json"),
            "samples": 40,
            "kid_subset_size": 6,
            "batch_size": 20,
            "latency_batch": 2,
            "milestone_samples": 10,
        },
        "guidance_scan_samples": None,
        "reference": {"method": "teacher", "num_steps": 2},
        "batch_size": 4,
        "budgets": {"quick": {"steps": 2, "noise_sets": 1}},
        "defaults": {"ard": {"protocol": "released", "grid": "released"}},
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder, and a current folder with images, a DiT's file and the task."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(spaces, "Inception", TinyInception)
    here, data = tmp_path / "here", tmp_path / "data"
    (data / "imagenet256").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    for item, pixels in enumerate(PIXELS):
        folder = here / "train" / f"n0144{item % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{item}.JPEG")
    write_autoencoder(data / "imagenet256")
    (data / "imagenet256" / "autoencoder").rename(data / "imagenet256" / "vae")
    change_config(data / "imagenet256" / "vae", scaling_factor=0.18215, shift_factor=None)
    torch.manual_seed(0)
    network = DiT(**NETWORK)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, num_classes=3)
    torch.save({"ema": network.state_dict(), "args": args}, here / "DiT-XL-2-256x256.pt")
    np.savez(data / "imagenet256" / "VIRTUAL_imagenet256_labeled.npz", PIXELS[:, :8, :8])
    (here / "small.yaml").write_text(yaml.safe_dump(task_content(data)))
    return data


def test_the_whole_chain(data: Path, harness: Harness) -> None:
    """Encode, import, plan, distil, decode, judge, export, judge what comes back."""
    plan = harness(*RUN, "--dry-run")
    assert plan.code == 2
    assert "2 of the 5 files of task small are missing or wrong" in plan.err
    assert f"teacher: {data / 'imagenet256' / 'dit-xl-2.safetensors'}: missing" in plan.out
    assert "harness teacher import DiT-XL-2-256x256.pt" in plan.out
    assert "4 network passes" in plan.out

    inside = data / "imagenet256"
    encode = ("--autoencoder", inside / "vae", "--out", inside / "latents", "--flips")
    done = harness("data", "encode", "--images", "train", "--size", 8, *encode)
    assert done.code == 0, done.err
    out = inside / "dit-xl-2.safetensors"
    importing = ("teacher", "import", "DiT-XL-2-256x256.pt", "--num-heads", 4, "--out", out)
    done = harness(*importing)
    assert done.code == 0, done.err
    done = harness(*RUN, "--dry-run")
    assert done.code == 0, done.err

    done = harness(*RUN, "--save-samples", "npz", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= record["metrics"].keys()
    identity = record["metrics"]["fid"]["identity"]
    assert "floor(127.5 x + 128)" in json.dumps(identity)
    assert record["hashes"]["autoencoder"]

    folder = Path("results") / "runs" / record["run_id"]
    export = ("student", "export", record["run_id"], "--out", "student")
    assert "which does not ship: give its file by --task" in sentence(harness(*export), 2)
    done = harness(*export, "--task", "small.yaml")
    assert done.code == 0, done.err
    (weights,) = Path("student").glob("*.safetensors")
    done = harness(
        "evaluate", "--task", "small.yaml", "--student", weights, "--json", "--name", "back"
    )
    assert done.code == 0, done.err
    back = json.loads(done.out)
    assert back["metrics"]["fid"]["values"] == record["metrics"]["fid"]["values"]
    (samples,) = folder.glob("**/*.npz")
    done = harness("evaluate", "--task", "small.yaml", "--samples", samples, "--json")
    assert done.code == 0, done.err
    read = json.loads(done.out)["metrics"]["fid"]["values"]
    assert read == pytest.approx(record["metrics"]["fid"]["values"], rel=1e-6)
    assert harness("report").code == 0


def test_wrong_files_are_named_before_anything_is_computed(data: Path, harness: Harness) -> None:
    inside = data / "imagenet256"
    other = DiT(**{**NETWORK, "hidden_size": 32}).state_dict()
    torch.save({"ema": other}, "DiT-other.pt")
    done = harness("teacher", "import", "DiT-other.pt", "--num-heads", 4, "--out",
                   inside / "dit-xl-2.safetensors")  # fmt: skip
    assert done.code == 0, done.err
    change_config(inside / "vae", latent_channels=16)
    (inside / "VIRTUAL_imagenet256_labeled.npz").write_bytes(b"nothing")
    found = {file.what: file for file in needed_files(load_task("small.yaml"))}
    assert [found[what].state for what in ("data", "features")] == ["missing", "there"]
    wrong = {what: file.note for what, file in found.items() if file.state == "wrong"}
    assert wrong.keys() == {"teacher", "autoencoder", "reference"}
    assert "misshapen: pos_embed [1, 4, 32] in place of [1, 4, 16]" in wrong["teacher"]
    assert "16" in wrong["autoencoder"]
    assert "VIRTUAL_imagenet256_labeled.npz" in wrong["reference"]
    done = harness(*RUN, "--dry-run")
    assert (done.code, "4 of the 5 files" in done.err) == (2, True)


@pytest.mark.parametrize("name", ["imagenet256", "imagenet256-sit"])
def test_the_latents_command_holds_out_val(name: str, data: Path) -> None:
    """The folder of `--images` has train and val, so nothing of train is held out."""
    words = load_task(name).spec.sources["data"].split()
    named = words[words.index("--images") + 1]
    for part in ("train", "val"):
        folder = Path("IMAGENET") / part
        shutil.copytree("train", folder)
    split = load_split(Wanted("folder", (3, 8, 8), 3, path=str(Path(named).absolute())))
    assert (len(split.train), len(split.held_out)) == (36, 36)


def test_latents_of_a_shipped_task_lie_in_the_data_folder(
    data: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is not written to; another autoencoder does not go on with the folder."""
    whole = {k: v for k, v in read_task(Path("small.yaml")).items() if k != "like"}
    Path("small.yaml").write_text(yaml.safe_dump(whole))
    monkeypatch.setattr(task_files, "FOLDER", Path.cwd())
    encode = ("data", "encode", "--task", "small", "--images", "train", "--size", 8)
    assert harness(*encode).code == 0
    inside = data / "imagenet256"
    sha256 = file_hash(inside / "vae" / WEIGHTS)
    for part in ("train", "held_out"):
        manifest = json.loads((inside / "latents" / part / "manifest.json").read_text())
        assert manifest["autoencoder"]["sha256"] == sha256
    assert not Path("imagenet256").exists()
    assert needed_files(load_task("small"))[0].state == "there"
    state = load_file(inside / "vae" / WEIGHTS)
    save_file({name: 2 * value for name, value in state.items()}, inside / "vae" / WEIGHTS)
    error = sentence(harness(*encode), 2)
    assert "holds latents with another autoencoder" in error


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("cifar10", marks=pytest.mark.slow),
        pytest.param("imagenet64", marks=pytest.mark.slow),
        "imagenet256",
        pytest.param("imagenet256-sit", marks=pytest.mark.slow),
    ],
)
def test_the_tasks_of_the_papers_say_what_they_need(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: Harness
) -> None:
    """Without any file there is a whole plan, and a run is one sentence."""
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    files = needed_files(load_task(name))
    missing = [file for file in files if file.state == "missing"]
    assert all(file.note for file in missing)
    downloaded = {file.what for file in files if file.state == "download"}
    assert downloaded == {"features", *(["data"] if name == "cifar10" else [])}
    assert len(missing) + len(downloaded) == len(files)
    done = harness("run", "--task", name, "--method", "ard", "--dry-run")
    assert done.code == 2
    assert f"{len(missing)} of the {len(files)} files of task {name}" in done.err
    assert done.out.count(": a run downloads it") == len(downloaded)
    assert "GPU-hours" in done.out
    assert done.out.count(" ranks: ") == 3
    run = harness("run", "--task", name, "--method", "ard", "--results", tmp_path / "results")
    assert "Traceback" not in sentence(run, 2)
