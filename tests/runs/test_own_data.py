"""Runs on a task whose images are files: folder, shards and npz are one set."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from harness.cli.main import main
from harness.tasks import Task, load_task

PIXELS = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
LABELS = np.arange(80) // 8


def png(item: int) -> bytes:
    made = io.BytesIO()
    Image.fromarray(PIXELS[item]).save(made, "PNG")
    return made.getvalue()


def write_folder(path: Path) -> None:
    for item, label in enumerate(LABELS):
        (path / f"c{label}").mkdir(parents=True, exist_ok=True)
        (path / f"c{label}" / f"{item:03d}.png").write_bytes(png(item))


def write_shard(path: Path) -> None:
    path.mkdir()
    with tarfile.open(path / "0.tar", "w") as tar:
        for item, label in enumerate(LABELS):
            for suffix, content in (("png", png(item)), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{item:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, PIXELS[..., None], LABELS)


WRITE = {"folder": write_folder, "webdataset": write_shard, "npz": write_npz}
"""Writes the 80 pictures of ten classes, by kind."""


def task_file(folder: Path, content: dict[str, Any], kind: str, **data: Any) -> Path:
    WRITE[kind](folder / f"{kind}-images")
    file = folder / f"{kind}.yaml"
    about = {**content["data"], "set": kind, "path": f"{kind}-images", **data}
    file.write_text(yaml.safe_dump({**content, "name": "mine", "data": about}))
    return file


@pytest.fixture
def spec(tiny: Task, tiny_folder: Path) -> dict[str, Any]:
    return yaml.safe_load((tiny_folder / "tiny.yaml").read_text())


def run(file: Path, method: str, folder: Path, *words: str) -> dict[str, Any]:
    asked = ["run", "--task", file, "--method", method, "--num-steps", "2", *words]
    where = ["--results", folder / "results", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main, [str(word) for word in (*asked, *where)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_kinds_of_files_are_one_set(spec: dict, tmp_path: Path) -> None:
    tasks = [
        load_task(str(task_file(tmp_path, spec, kind))) for kind in ("folder", "webdataset", "npz")
    ]
    first = tasks[0].split
    assert (len(first.train), len(first.held_out)) == (60, 20)
    for task in tasks:
        for part in ("train", "held_out"):
            found, expected = getattr(task.split, part), getattr(first, part)
            assert torch.equal(found.images[:], expected.images[:])
            assert torch.equal(found.labels, expected.labels)
        assert task.data_std == tasks[0].data_std
    assert len({task.reference_hash for task in tasks}) == 3  # of the files


def test_files_train_and_judge(spec: dict, tmp_path: Path) -> None:
    """A method that learns from data, on pictures that are read while it trains."""
    file = task_file(tmp_path, spec, "folder", flip=True)
    record = run(file, "ect", tmp_path)
    assert record["status"] == "finished"
    assert record["metrics"]["fid_floor"]["n"] == 20
    assert record["hashes"]["reference"] == load_task(str(file)).reference_hash


def test_the_place_of_the_images_is_no_part_of_the_task(spec: dict, tmp_path: Path) -> None:
    file = task_file(tmp_path, spec, "npz")
    first = load_task(str(file))
    (tmp_path / "npz-images").rename(tmp_path / "elsewhere.npz")
    file.write_text(file.read_text().replace("npz-images", "elsewhere.npz"))
    second = load_task(str(file))
    assert second.digest == first.digest
    for change in ({"flip": True}, {"held_out": 0.5}, {"classes": ["a"]}):
        data = {**second.spec.data.model_dump(), **change}
        changed = second.spec.model_copy(update={"data": type(second.spec.data)(**data)})
        assert Task(changed).digest != first.digest


def test_float16_trajectories_of_a_task(tiny: Task) -> None:
    asked = tiny.spec.trajectories.model_copy(update={"dtype": "float16"})
    halved = Task(tiny.spec.model_copy(update={"trajectories": asked}), tiny.folder)
    assert halved.recipe == replace(tiny.recipe, dtype="float16")
    assert (halved.digest == tiny.digest, halved.hashes == tiny.hashes) == (False, True)
