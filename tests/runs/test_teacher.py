"""Making and verifying the networks that ship with a task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from harness.errors import CheckFailed, UsageError
from harness.files import file_hash, read_tensors
from harness.runs import teacher_training as teacher
from harness.runs.teacher_training import features_quality, teacher_quality, train_networks, verify
from harness.tasks import Task, TaskSpec
from harness.tasks.spec import Guidance, Training, Weights
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

CPU = torch.device("cpu")


def write_card(task: Task, weights: Weights, quality: dict[str, Any]) -> None:
    task.path(weights).with_suffix(".yaml").write_text(yaml.safe_dump({"quality": quality}))


@pytest.fixture
def carded(tiny: Task) -> Task:
    """The tiny task with true cards and the one guidance scale that it uses."""
    task = Task(tiny.spec.model_copy(update={"guidance_scan": [1.25]}))
    write_card(task, task.spec.features, features_quality(task, CPU))
    write_card(task, task.spec.teacher, teacher_quality(task, CPU))
    return task


def test_training_writes_weights_and_cards_that_belong_together(tiny: Task, tmp_path: Path) -> None:
    made = train_networks(tiny, tmp_path / "made", CPU)
    assert [m.path.name for m in made] == ["features.safetensors", "teacher.safetensors"]
    for one in made:
        card = yaml.safe_load(one.path.with_suffix(".yaml").read_text())
        assert card["sha256"] == one.sha256 == file_hash(one.path)
        assert card == one.card
        assert Training(**card["training"]) == Training(steps=4, batch_size=8, seed=0)
        assert card["data"]["images"] == 1437
        assert card["data"]["held_out"] == 360
        assert all(value.dtype == torch.float16 for value in read_tensors(one.path).values())
    features, network = (one.card["quality"] for one in made)
    assert features.keys() == {"train_accuracy", "held_out_accuracy", "fid_held_out", "fid_halves"}
    assert 0 <= features["held_out_accuracy"] <= 1
    assert network["guidance_scan"].keys() == {1.0, 1.25}
    assert network["best_guidance_scale"] in (1.0, 1.25)


def test_a_network_is_trained_as_its_task_says(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrainSettings] = []

    class Noting(Trainer):
        def __init__(
            self, method: Any, sources: Any, settings: TrainSettings, *args: Any, **more: Any
        ):
            asked.append(settings)
            super().__init__(
                method, sources, dataclasses.replace(settings, compile=False), *args, **more
            )

    monkeypatch.setattr(teacher, "Trainer", Noting)
    training = Training(steps=2, batch_size=4, seed=3, precision="bf16", compile=True)
    spec = tiny.spec.model_copy(
        update={
            "teacher": tiny.spec.teacher.model_copy(update={"training": training}),
            "guidance_scan": [1.0],
        }
    )
    train_networks(Task(spec), tmp_path / "made", CPU)
    plain, wanted = TrainSettings(4, 8, 0), TrainSettings(2, 4, 3, precision="bf16", compile=True)
    assert asked == [plain, wanted]


def test_the_best_scale_is_that_of_the_lowest_fid(
    tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ByScale:
        """Finds the FID to be the distance of the scale from 1.5."""

        def __init__(self, task: Task, reference_samples: Any, device: torch.device):
            self.fid = abs(task.spec.guidance.scale - 1.5)

        def of_samples(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
            return dict.fromkeys(("fid", "kid", "label_agreement"), self.fid)

    monkeypatch.setattr(teacher, "Evaluator", ByScale)
    quality = teacher.teacher_quality(
        Task(tiny.spec.model_copy(update={"guidance_scan": [1.0, 1.5, 4.0]})), CPU
    )
    assert quality["best_guidance_scale"] == 1.5
    assert {scale: numbers["fid"] for scale, numbers in quality["guidance_scan"].items()} == {
        1.0: 0.5,
        1.5: 0.0,
        4.0: 2.5,
    }


def test_a_scan_may_see_the_first_samples_alone(
    tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.Tensor] = []
    whole = teacher.sample_set

    def noted(*args: Any) -> torch.Tensor:
        asked.append(whole(*args))
        return asked[-1]

    monkeypatch.setattr(teacher, "sample_set", noted)
    spec = tiny.spec.model_copy(update={"guidance_scan": [1.0]})
    part = teacher_quality(Task(spec.model_copy(update={"guidance_scan_samples": 20})), CPU)
    assert (part["n"], teacher_quality(Task(spec), CPU)["n"]) == (20, tiny.spec.evaluation.samples)
    some, every = asked
    assert len(some) == 20
    torch.testing.assert_close(some, every[:20], rtol=1e-3, atol=1e-3 * float(every.abs().max()))


@pytest.mark.parametrize("count", [5, 41])
def test_a_scan_stays_within_a_noise_set(tiny: Task, count: int) -> None:
    with pytest.raises(
        ValidationError, match=f"guidance_scan_samples is {count}, but must be 20 .* to 40"
    ):
        TaskSpec.model_validate(
            {**tiny.spec.model_dump(exclude_none=True), "guidance_scan_samples": count}
        )


def test_a_schedule_that_ends_in_pure_noise_needs_another_prediction_than_eps(tiny: Task) -> None:
    spec = {**tiny.spec.model_dump(exclude_none=True), "schedule": "flow"}
    assert TaskSpec.model_validate({**spec, "prediction_type": "v"})
    with pytest.raises(ValidationError, match="nothing of x_0 is left at t = 1: give v"):
        TaskSpec.model_validate({**spec, "prediction_type": "eps"})


def test_what_was_trained_is_what_its_card_says(tiny: Task, tmp_path: Path) -> None:
    made = dict(
        zip(("features", "teacher"), train_networks(tiny, tmp_path / "made", CPU), strict=True)
    )
    weights = {
        name: getattr(tiny.spec, name).model_copy(
            update={"file": str(one.path.resolve()), "sha256": one.sha256}
        )
        for name, one in made.items()
    }
    task = Task(tiny.spec.model_copy(update=weights))
    assert features_quality(task, CPU) == made["features"].card["quality"]
    assert teacher_quality(task, CPU) == made["teacher"].card["quality"]


def test_training_again_takes_what_is_trained(tiny: Task, tmp_path: Path) -> None:
    first = train_networks(tiny, tmp_path / "made", CPU)
    stages: list[str] = []
    again = train_networks(
        tiny, tmp_path / "made", CPU, lambda stage: lambda done, total: stages.append(stage)
    )
    assert [one.sha256 for one in again] == [one.sha256 for one in first]
    assert not {"classification", "denoising"} & set(stages)


def test_true_cards_pass(carded: Task) -> None:
    lines = verify(carded, CPU)
    assert all("not the same" not in line for line in lines)
    compared = {line.partition(" is ")[0] for line in lines}
    assert compared >= {
        "features: held_out_accuracy",
        "features: fid_held_out",
        "teacher: guidance_scan.1.25.fid",
        "teacher: best_guidance_scale",
    }


@pytest.mark.parametrize("which", ["features", "teacher"])
def test_a_changed_card_is_found(which: str, carded: Task) -> None:
    path = carded.path(getattr(carded.spec, which)).with_suffix(".yaml")
    card = yaml.safe_load(path.read_text())
    if which == "features":
        card["quality"]["held_out_accuracy"] += 0.05
    else:
        card["quality"]["guidance_scan"][1.25]["label_agreement"] += 0.05
    path.write_text(yaml.safe_dump(card))
    with pytest.raises(CheckFailed, match=rf"{which}: .* its card says .*: not the same"):
        verify(carded, CPU)


def test_a_scale_that_is_not_the_best_is_found(carded: Task) -> None:
    spec = carded.spec
    other = Task(
        spec.model_copy(update={"guidance": spec.guidance.model_copy(update={"scale": 1.5})})
    )
    with pytest.raises(CheckFailed, match=r"the best guidance scale is 1\.25, the task uses 1\.5"):
        verify(other, CPU)


@pytest.mark.parametrize("which", ["features", "teacher"])
def test_changed_weights_are_refused_by_their_sha256(which: str, carded: Task) -> None:
    path = carded.path(getattr(carded.spec, which))
    expected = getattr(carded.spec, which).sha256
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UsageError, match=rf"SHA-256 {file_hash(path)}, but {expected} was expected"
    ) as caught:
        verify(carded, CPU)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_told(carded: Task) -> None:
    carded.path(carded.spec.teacher).unlink()
    with pytest.raises(UsageError, match=r"no file .*teacher\.safetensors for its teacher"):
        verify(carded, CPU)


def test_a_missing_card_is_told(carded: Task) -> None:
    carded.path(carded.spec.teacher).with_suffix(".yaml").unlink()
    with pytest.raises(UsageError, match=r"teacher\.yaml"):
        verify(carded, CPU)


def borrowing(tiny: Task, monkeypatch: pytest.MonkeyPatch, **own: Any) -> Task:
    """A task like the tiny one, with parts of its own."""
    monkeypatch.setattr("harness.tasks.load.load_task", lambda name: tiny)
    return Task(tiny.spec.model_copy(update={"like": "tiny", **own}), tiny.folder)


def test_borrowed_networks_are_neither_trained_nor_verified(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny.spec.teacher.model_copy(update={"file": "own.safetensors"})
    task = borrowing(
        tiny,
        monkeypatch,
        teacher=weights,
        schedule="flow",
        prediction_type="v",
        guidance_scan=[1.0],
    )
    (made,) = train_networks(task, tmp_path / "made", CPU)
    assert made.path.name == "own.safetensors"
    assert not (tmp_path / "made" / "features").exists()

    task = borrowing(
        tiny,
        monkeypatch,
        teacher=weights.model_copy(update={"file": str(made.path), "sha256": made.sha256}),
        schedule="flow",
        prediction_type="v",
        guidance_scan=[1.0],
        guidance=Guidance(scale=1.0),
    )
    assert all(line.startswith("own: ") for line in verify(task, CPU))


def test_a_task_without_networks_of_its_own_is_refused(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = borrowing(tiny, monkeypatch)
    for asked in (lambda: train_networks(task, tmp_path, CPU), lambda: verify(task, CPU)):
        with pytest.raises(UsageError, match="networks of tiny: name that one"):
            asked()
