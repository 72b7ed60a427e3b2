"""`harness teacher import` and `train` on a user's task file; tasks whose networks do not fit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import Harness, sentence
from foreign import folder_of

from harness.files import file_hash, read_tensors
from harness.networks.backbones.dit import DiT
from harness.tasks import load_task
from harness.training.tiny_task import NETWORK

CPU = torch.device("cpu")


@pytest.fixture
def mine(tiny_folder: Path, tmp_path: Path) -> Path:
    """A user's task file, with comments, outside the package's folder."""
    folder = tmp_path / "mine"
    folder.mkdir()
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    content = json.loads(json.dumps(content))  # no anchors
    text = yaml.safe_dump({**content, "name": "mine"}, sort_keys=False)
    (folder / "mine.yaml").write_text(
        "# my task\n" + text.replace("guidance:", "# scale\nguidance:")
    )
    return folder / "mine.yaml"


def official(path: Path, model: str = "DiT-tiny/4", **changes: Any) -> dict[str, torch.Tensor]:
    """Writes what DiT's train.py would: averaged weights in DDP, and its options."""
    torch.manual_seed(0)
    network = DiT(**{**NETWORK, **changes})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = network.state_dict()
    args = argparse.Namespace(model=model, num_heads=NETWORK["num_heads"])
    ema = {f"module.{name}": value for name, value in state.items()}
    torch.save({"model": state, "ema": ema, "args": args}, path)
    return state


def test_a_teacher_is_imported_into_a_task(mine: Path, harness: Harness) -> None:
    state = official(mine.parent / "DiT.pt", learn_sigma=True)
    before = mine.read_text()
    done = harness("teacher", "import", mine.parent / "DiT.pt", "--task", mine)
    assert done.code == 0, done.err
    for words in ("taken: ema", "prefixes taken off: module.", "kind: dit, by the model"):
        assert words in done.out
    assert f"next: harness run --method ard --dry-run --task {mine}" in done.out
    assert "# my task\n" in mine.read_text()
    assert "# scale\nguidance:" in mine.read_text()
    task = load_task(str(mine))
    assert task.spec.teacher.file == "weights/mine-teacher.safetensors"
    assert task.spec.teacher.training is None
    assert task.spec.network == {**NETWORK, "learn_sigma": True}
    kept = {"network", "schedule", "prediction_type", "teacher"}
    old, new = (yaml.safe_load(text) for text in (before, mine.read_text()))
    assert {k: v for k, v in old.items() if k not in kept} == {
        k: v for k, v in new.items() if k not in kept
    }
    loaded = task.teacher(CPU).denoiser.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", ["sit", "diffusers"])
def test_teachers_of_each_kind_run_in_a_task(kind: str, mine: Path, harness: Harness) -> None:
    """SiT's weights under its convention, and a transformer of diffusers."""
    path = mine.parent / "teacher"
    if kind == "sit":
        official(path.with_suffix(".pt"), "SiT-tiny/4")
        args = (path.with_suffix(".pt"), "--kind", "sit")
    else:
        folder_of("DiTTransformer2DModel", path)
        mine.write_text(mine.read_text().replace("shape:\n  - 1\n", "shape:\n  - 4\n"))
        args = (path,)
    done = harness("teacher", "import", *args, "--task", mine)
    assert done.code == 0, done.err
    task = load_task(str(mine))
    teacher = task.teacher(CPU)
    weights = read_tensors(mine.parent / "weights" / "mine-teacher.safetensors")
    state = teacher.denoiser.network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    x, cond = task.evaluation_inputs(0)
    found = teacher(x[:2], torch.tensor(0.5), cond[:2])
    assert found.x_0.shape == x[:2].shape
    assert found.x_0.isfinite().all()


def test_a_pipeline_of_flux_is_imported(mine: Path, harness: Harness) -> None:
    """Its shift is that of latents of 128 x 128; the guidance scale becomes an entry."""
    folder = mine.parent / "flux"
    folder_of("FluxTransformer2DModel", folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    mine.write_text(mine.read_text().replace("shape:\n  - 1\n", "shape:\n  - 4\n"))
    done = harness("teacher", "import", folder, "--task", mine)
    assert done.code == 0, done.err
    spec = load_task(str(mine)).spec
    assert (spec.schedule, spec.prediction_type) == ("flow-3.15819", "v")
    assert spec.network["guidance"] == 3.5
    mine.write_text(mine.read_text().replace("guidance: 3.5", "guidance: 7"))
    assert load_task(str(mine)).teacher(CPU).denoiser.network.model.guidance == 7


def test_a_second_import_overwrites_nothing(mine: Path, harness: Harness) -> None:
    official(mine.parent / "DiT.pt")
    args = ("teacher", "import", mine.parent / "DiT.pt", "--task", mine)
    assert harness(*args).code == 0
    text = mine.read_text()
    assert "mine-teacher.safetensors exists: move it away" in sentence(harness(*args), 2)
    assert mine.read_text() == text


def test_a_file_that_cannot_be_edited_is_left_alone(mine: Path, harness: Harness) -> None:
    """The network's anchor is used below."""
    official(mine.parent / "DiT.pt")
    text = mine.read_text().replace("network:", "network: &it") + "defaults: {ard: *it}\n"
    mine.write_text(text)
    error = sentence(harness("teacher", "import", mine.parent / "DiT.pt", "--task", mine), 2)
    assert "set network, schedule, prediction_type, teacher by hand" in error
    assert mine.read_text() == text
    assert not (mine.parent / "weights").exists()


def test_the_weights_alone(tmp_path: Path, harness: Harness) -> None:
    state = official(tmp_path / "DiT.pt")
    out = tmp_path / "teacher.safetensors"
    done = harness("teacher", "import", tmp_path / "DiT.pt", "--out", out, "--json")
    assert done.code == 0, done.err
    entries = json.loads(done.out)["entries"]
    assert json.loads(done.out)["written"] == str(out)
    assert entries["teacher"] == {"file": str(out), "sha256": file_hash(out)}
    assert entries["network"] == NETWORK
    found = read_tensors(out)
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 16}, "network is for [1, 16, 16], but data.shape is [1, 8, 8]"),
        ({"num_classes": 12}, "network has 12 classes, but data.num_classes is 10"),
    ],
)
def test_a_teacher_of_other_data_is_refused(
    changes: dict[str, Any], words: str, mine: Path, harness: Harness
) -> None:
    official(mine.parent / "DiT.pt", **changes)
    before = mine.read_text()
    error = sentence(harness("teacher", "import", mine.parent / "DiT.pt", "--task", mine), 2)
    assert f"DiT.pt does not suit task file {mine}: {words}" in error
    assert mine.read_text() == before
    assert not (mine.parent / "weights").exists()


def test_where_to_write_is_asked_for(mine: Path, harness: Harness) -> None:
    for options in ((), ("--task", mine, "--out", "x.safetensors")):
        error = sentence(harness("teacher", "import", "DiT.pt", *options), 2)
        assert error == "give either --task FILE.yaml or --out FILE.safetensors"


def test_what_a_network_cannot_load_is_a_sentence(
    mine: Path, harness: Harness, tmp_path: Path
) -> None:
    """Weights of another size, a wrong hash and a missing file, in the command that runs."""
    run = ("run", "--task", mine, "--method", "teacher", "--results", tmp_path / "results")
    content = yaml.safe_load(mine.read_text())

    def refused(**changes: Any) -> str:
        mine.write_text(yaml.safe_dump({**content, **changes}))
        return sentence(harness(*run), 2)

    error = refused(network={**NETWORK, "depth": 4})
    assert "teacher of task mine (" in error
    assert "missing: blocks.3." in error
    assert "and 5 more" in error
    error = refused(network={**NETWORK, "hidden_size": 32})
    assert "misshapen: pos_embed [1, 4, 16] in place of [1, 4, 32]" in error
    assert "another size" in error
    error = refused(teacher={**content["teacher"], "sha256": "0" * 64})
    assert "has SHA-256" in error
    error = refused(teacher={**content["teacher"], "file": "none.safetensors"})
    assert f"task mine has no file {mine.parent / 'none.safetensors'} for its teacher" in error
    untrained = {k: v for k, v in content["teacher"].items() if k != "sha256"}
    assert "has no teacher yet: harness teacher train" in refused(teacher=untrained)
    nothing = {"file": "none.safetensors"}
    assert "task mine needs none.safetensors, which is neither" in refused(teacher=nothing)
