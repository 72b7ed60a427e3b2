"""Saved samples: other evaluators, and this one, get the same numbers from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from judged import TinyInception, latent_spec, latents, write_autoencoder, write_inception

from harness.cli.main import main
from harness.data.images import ImageSet, Split, to_uint8
from harness.data.pictures import write_npz, write_pngs
from harness.metrics import spaces
from harness.report.rows import load_records, rows_and_apart
from harness.tasks import Task, load_task
from harness.tasks import task as task_module

CPU = torch.device("cpu")
ARD = ("--method", "ard", "--num-steps", "2", "--history-layers", "2", "--budget", "steps=2")
ONE_SET = ("--noise-sets", "1")


@pytest.fixture(autouse=True)
def _no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate of time is left out where it fails."""
    monkeypatch.setattr("harness.runs.preview.preview", None)


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def record_of(folder: Path, *words: object) -> tuple[dict[str, Any], Path]:
    """The record that a command prints, and its folder."""
    done = call(*words, "--results", folder, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    return record, folder / "runs" / record["run_id"]


def fid_of(record: dict[str, Any]) -> float:
    return record["metrics"]["fid"]["values"]["0"]


@pytest.fixture
def latent(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A task of latents with an autoencoder, judged by a tiny Inception."""
    weights = tiny_folder / "weights"
    spec = latent_spec(
        weights, features=write_inception(weights), autoencoder=write_autoencoder(weights)
    )
    (tiny_folder / "latent.yaml").write_text(yaml.safe_dump(spec))
    split = Split(
        *(
            ImageSet(latents(count, name), torch.arange(count) % 10)
            for name, count in (("train", 60), ("held out", 30))
        )
    )
    monkeypatch.setattr(task_module, "load_split", lambda *args: split)
    monkeypatch.setattr(spaces, "Inception", TinyInception)
    return load_task("latent")


@pytest.mark.parametrize("name", ["tiny", "latent"])
def test_a_runs_fid_is_that_of_its_files(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Through npz and through PNG, also where samples are decoded latents."""
    task: Task = request.getfixturevalue(name)
    record, folder = record_of(
        tmp_path / "r", "run", "--task", name, *ARD, *ONE_SET, "--save-samples", "npz"
    )
    with np.load(folder / "samples-0.npz") as content:
        assert content["arr_0"].shape == (40, 8, 8, task.picture_shape[0])  # type: ignore[index]
        assert content["arr_1"].tolist() == [k % 10 for k in range(40)]
    assert (folder / "samples.png").is_file()
    # A finished run makes its samples again, with the student that it wrote.
    again, _ = record_of(
        tmp_path / "r", "run", "--task", name, *ARD, *ONE_SET, "--save-samples", "png"
    )
    assert again["run_id"] == record["run_id"]
    assert len(list((folder / "samples-0").glob("*/*.png"))) == 40
    for path in (folder / "samples-0.npz", folder / "samples-0"):
        found, _ = record_of(tmp_path / "e", "evaluate", "--task", name, "--samples", path)
        assert fid_of(found) == pytest.approx(fid_of(record), rel=1e-9), path
        assert found["metrics"]["fid"]["identity"] == record["metrics"]["fid"]["identity"]


def test_one_set_has_one_fid_through_npz_and_png(latent: Task, tmp_path: Path) -> None:
    labels = torch.arange(40) % 10
    coarse = to_uint8(torch.tanh(latents(40)[:, :3]))
    pictures = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    write_npz(tmp_path / "a.npz", [pictures], 40, labels)
    write_pngs(tmp_path / "a", [pictures], labels)
    values = [
        record_of(tmp_path / "r", "evaluate", "--task", "latent", "--samples", path)[0]["metrics"]
        for path in (tmp_path / "a.npz", tmp_path / "a")
    ]
    assert values[0] == values[1]
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= values[0].keys()


def test_samples_of_another_size_stand_apart(latent: Task, tmp_path: Path) -> None:
    """Inception resizes them; their identity holds the size, and a report says so."""
    for side in (8, 16):
        pictures = torch.zeros(40, 3, side, side, dtype=torch.uint8)
        pictures[:, :, : side // 2] = torch.arange(40).view(-1, 1, 1, 1)
        write_npz(tmp_path / f"of{side}.npz", [pictures], 40, None)
        record_of(
            tmp_path / "r",
            "evaluate",
            "--task",
            "latent",
            "--samples",
            tmp_path / f"of{side}.npz",
        )
    record_of(tmp_path / "r", "run", "--task", "latent", "--method", "teacher", "--num-steps", 2)
    (apart,) = rows_and_apart(load_records(tmp_path / "r"))[1]
    assert (apart.record.method, apart.reason) == ("of16", "size [3, 16, 16] instead of None")
    done = call("report", tmp_path / "r")
    assert done.exit_code == 0
    assert "size [3, 16, 16] instead of None" in done.stdout
    done = call("evaluate", "--task", "tiny", "--samples", tmp_path / "of16.npz")
    assert (done.exit_code, "but task tiny needs 8 x 8 with 1" in done.output) == (2, True)


def test_labels_that_are_not_balanced_are_said(latent: Task, tmp_path: Path) -> None:
    pictures = to_uint8(torch.tanh(latents(40)[:, :3])).repeat_interleave(2, 2)
    pictures, found = pictures.repeat_interleave(2, 3), []
    for name, labels in (("a", torch.arange(40) % 10), ("b", torch.arange(40) % 9), ("c", None)):
        write_npz(tmp_path / f"{name}.npz", [pictures], 40, labels)
        words = ("evaluate", "--task", "latent", "--samples", tmp_path / f"{name}.npz")
        found.append(record_of(tmp_path / "r", *words)[0]["metrics"]["fid"]["identity"]["labels"])
    assert found == ["balanced", "not balanced", "balanced"]


def test_a_function_of_the_current_directory(
    latent: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives latents, which are decoded; its samples are saved too."""
    (tmp_path / "in_this_folder.py").write_text("def f(x_T, labels):\n    return x_T / 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    record, folder = record_of(
        Path("r"),
        "evaluate",
        "--task",
        "latent",
        "--callable",
        "in_this_folder:f",
        "--stated",
        "nothing at all",
        "--save-samples",
        "png",
    )
    assert record["metrics"]["fid"]["values"].keys() == {"0", "1"}
    assert len(list((folder / "samples-1").glob("0003/*.png"))) == 4
    assert "as stated: nothing at all" in call("report", "r").stdout


@pytest.mark.parametrize("form", ["npz", "png"])
def test_an_edited_function_leaves_no_stale_file(
    form: str, tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has another run id. An edited helper has not, and its files are written anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def evaluated(function: str, helper: str) -> tuple[str, float]:
        Path("edited_function.py").write_text(function)
        Path("edited_helper.py").write_text(helper)
        for name in ("edited_function", "edited_helper"):
            sys.modules.pop(name, None)
        words = ("--task", "tiny", "--callable", "edited_function:f", "--save-samples", form)
        record, folder = record_of(tmp_path / "r", "evaluate", *words)
        saved = folder / ("samples-0.npz" if form == "npz" else "samples-0")
        again, _ = record_of(tmp_path / "e", "evaluate", "--task", "tiny", "--samples", saved)
        assert fid_of(again) == pytest.approx(fid_of(record), rel=1e-9)
        return record["run_id"], fid_of(record)

    source = "import edited_helper\n\n\ndef f(x_T, labels):\n    return edited_helper.g(x_T)"
    first = evaluated(source, "def g(x):\n    return x")
    helped = evaluated(source, "def g(x):\n    return x / 2")
    edited = evaluated(source + " / 2\n", "def g(x):\n    return x")
    assert first[0] == helped[0] != edited[0]
    assert first[1] != helped[1] == edited[1]


def test_a_run_that_is_made_again_leaves_no_stale_file(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under new code. A finished run keeps its files."""
    words = ("run", "--task", "tiny", *ARD, *ONE_SET)
    record, folder = record_of(tmp_path, *words, "--save-samples", "npz")
    stale = folder / "samples-0.npz"
    whole = stale.read_bytes()
    (folder / "samples-0").mkdir()
    stale.write_bytes(b"other samples")
    record_of(tmp_path, *words, "--save-samples", "npz")
    assert stale.read_bytes() == b"other samples"
    (folder / "record.json").unlink()
    again, _ = record_of(tmp_path, *words, "--save-samples", "npz")
    assert again["run_id"] == record["run_id"]
    assert stale.read_bytes() == whole
    (folder / "record.json").unlink()
    record_of(tmp_path, *words)
    assert [path.name for path in folder.glob("samples*")] == ["samples.png"]


def test_samples_that_are_no_pictures_are_not_saved(tmp_path: Path) -> None:
    done = call("run", "--task", "mixture", *ARD, "--save-samples", "npz", "--results", tmp_path)
    assert done.exit_code == 2
    assert "samples of task mixture are no images" in done.output
