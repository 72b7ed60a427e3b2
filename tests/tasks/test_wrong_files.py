"""Files of the right shapes that are not those of the task are refused, never read in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from judged import LATENT, latent_spec, write_autoencoder

from harness.data.arrays import Arrays
from harness.data.encode import Encoding, encode
from harness.data.images import ImageSet
from harness.errors import UsageError
from harness.files import file_hash, read_tensors
from harness.networks.autoencoder import WEIGHTS
from harness.networks.checkpoints import Teacher, write_teacher
from harness.runs.needed import Needed, needed_files
from harness.tasks import Task, load_task

CPU = torch.device("cpu")


def needed(task: Task, what: str) -> Needed:
    return next(file for file in needed_files(task) if file.what == what)


# teachers: a DiT and a SiT have the same names and shapes


def with_teacher(folder: Path, said: dict[str, Any], **kind: str) -> Task:
    """The tiny task in `mine.yaml`, whose teacher's file says a network and how it was trained."""
    content = yaml.safe_load((folder / "tiny.yaml").read_text())
    weights = read_tensors(Path(content["teacher"]["file"]))
    about = {"schedule": "vp", "prediction_type": "eps", **kind}
    teacher = Teacher({**content["network"], **said}, weights, facts={}, **about)
    write_teacher(teacher, folder / "said.safetensors")
    content |= {"name": "mine", "teacher": {"file": "said.safetensors"}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return load_task(str(folder / "mine.yaml"))


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (
            {"convention": "sit"},
            {"schedule": "flow", "prediction_type": "v"},
            "convention sit in place of dit, schedule flow in place of vp, "
            "prediction_type v in place of eps",
        ),
        ({"num_heads": 4}, {}, "num_heads 4 in place of 2"),
        ({}, {"prediction_type": "v"}, "prediction_type v in place of eps"),
    ],
)
def test_a_file_that_says_another_teacher_is_refused(
    said: dict[str, Any], kind: dict[str, str], words: str, tiny_folder: Path
) -> None:
    task = with_teacher(tiny_folder, said, **kind)
    with pytest.raises(UsageError, match=f"said.safetensors .*{words}"):
        task.teacher(CPU)
    found = needed(task, "teacher")
    assert (found.state, words in found.note) == ("wrong", True)


def test_one_network_in_other_words_is_the_tasks(tiny_folder: Path) -> None:
    """Defaults may be written out, and a side may be a pair."""
    task = with_teacher(tiny_folder, {"convention": "dit", "text_width": 0, "image_size": [8, 8]})
    task.teacher(CPU)
    assert needed(task, "teacher").state == "there"


# latents: their manifest names the autoencoder that made them


class Patches:
    """Latents are patches of the image's first channel."""

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(images[:, :1], 2)


def latent_task(folder: Path, **said: Any) -> Task:
    """A task of latents whose manifest says other things of the autoencoder than the task."""
    entry, out = write_autoencoder(folder), folder / "latents"
    made_by = {name: entry[name] for name in ("sha256", "scaling", "shift")} | said
    labels = torch.arange(20) % 10
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    images = ImageSet(Arrays(pixels, labels, (3, 8, 8)), labels)
    for part in ("train", "held_out"):
        encode(images, Patches(), out / part, Encoding(LATENT), {"autoencoder": made_by})
    data = {"set": "latents", "path": "latents", "split_seed": 0, "shape": list(LATENT)}
    plain = {**entry, "sha256": None, "folder": "autoencoder"}
    spec = latent_spec(folder, data={**data, "num_classes": 10}, autoencoder=plain)
    (folder / "latent.yaml").write_text(yaml.safe_dump(spec))
    return load_task(str(folder / "latent.yaml"))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"sha256": "0" * 64}, f"sha256 {'0' * 64}"),
        ({"scaling": 0.25}, "scaling 0.25 in place of 0.5"),
        ({"shift": 0.0}, "shift 0.0 in place of 0.25"),
    ],
)
def test_latents_of_another_autoencoder_are_refused(
    said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    task = latent_task(tmp_path, **said)
    with pytest.raises(UsageError, match=f"another autoencoder than the task's: {words}"):
        _ = task.split
    found = needed(task, "data")
    assert (found.state, words in found.note) == ("wrong", True)


def test_latents_of_the_tasks_own_autoencoder_are_there(tmp_path: Path) -> None:
    assert needed(latent_task(tmp_path), "data").state == "there"
    for path in (tmp_path / "autoencoder").iterdir():
        path.unlink()
    (tmp_path / "autoencoder").rmdir()
    again = load_task(str(tmp_path / "latent.yaml"))
    states = [needed(again, what).state for what in ("data", "autoencoder")]
    assert states == ["there", "missing"]


def test_another_autoencoder_in_the_same_place_is_told(tmp_path: Path) -> None:
    task = latent_task(tmp_path)
    weights = tmp_path / "autoencoder" / WEIGHTS
    weights.write_bytes(weights.read_bytes() + b" ")
    assert file_hash(weights)[:12] in needed(task, "data").note
