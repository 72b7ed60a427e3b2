"""A task of scenes from training its networks to a judged student, at a small size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.cli.cmd_teacher import into_file
from harness.data import scenes
from harness.errors import UsageError
from harness.files import read_tensors
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.runs.run import run
from harness.runs.teacher_training import train_networks, verify
from harness.tasks import Task, load_task
from harness.tasks.prompts import written
from harness.tasks.task_files import FOLDER

CPU = torch.device("cpu")
FOLLOWED = {"prompts_followed", "followed_seen", "followed_held_out", "followed_position"}


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fewer real scenes, which all are seen, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "REFERENCE", 300)
        patch.setattr(scenes, "REAL", 60)
        patch.setenv("HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def untrained(folder: Path) -> Path:
    """The file of a small task of scenes whose networks are still to be trained."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / "scenes.yaml").read_text())
    content["name"] = "few"
    content["network"] |= {"hidden_size": 16, "depth": 1, "num_heads": 2, "text_width": 8}
    content["prompts"]["encoder"] |= {"width": 8, "depth": 1, "num_heads": 2}
    del content["prompts"]["encoder"]["sha256"]
    for part in ("teacher", "features"):
        del content[part]["sha256"]
        content[part]["training"] = {"steps": 2, "batch_size": 4, "seed": 0}
    content["guidance_scan"], content["guidance_scan_samples"] = [1.0, 2.0], 60
    content["trajectories"] |= {"steps": 4, "count": 8}
    content["evaluation"] |= {"samples": 260, "noise_sets": 2, "kid_subset_size": 30}
    content["evaluation"] |= {"milestone_samples": 50, "latency_batch": 2}
    content["reference"]["num_steps"] = 4
    content["batch_size"] = 4
    path = folder / "few.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task's file with networks of two training steps, as `harness teacher train` leaves it."""
    path = untrained(tmp_path_factory.mktemp("few"))
    task = load_task(str(path))
    made = train_networks(task, path.parent / "trained", CPU)
    assert into_file(task, str(path), made) == ["features", "teacher", "guidance", "prompts"]
    return path


def test_a_task_without_its_encoder_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no text encoder yet: harness teacher train"):
        load_task(str(untrained(tmp_path))).conditions  # noqa: B018


def test_training_writes_a_teacher_its_encoder_and_a_judge(file: Path) -> None:
    task = load_task(str(file))
    assert task.conditions.count == 12_288
    assert task.judged_conditions.count == 250
    assert task.conditions.prompts.text.shape == (12_288, 9, 8)  # type: ignore[union-attr]
    assert task.teacher(CPU).denoiser.network.text_embedder.in_features == 8
    lines = verify(task, CPU)
    assert any("guidance_scan.2.0.prompts_followed" in line for line in lines)
    assert any("scenes-judge: followed_held_out_scenes" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["step-distillation", "consistency-training"])
def test_a_student_is_judged_by_its_prompts(method: str, file: Path, tmp_path: Path) -> None:
    config = RunConfig(method=method, task=str(file), num_steps=2, budget="steps=2", noise_sets=2)
    resolved = resolve(config, results=tmp_path / "results")
    record, reference = run(resolved, tmp_path / "results", CPU)
    assert (record.status, reference.status) == ("finished", "finished")
    assert FOLLOWED | {"prompt_diversity", "fid_teacher", "fid"} <= record.metrics.keys()
    assert {f"{name}_floor" for name in FOLLOWED} <= record.metrics.keys()
    assert not {name for name in record.metrics if "label" in name or "class" in name}
    assert len(record.metrics["prompts_followed"].values) == 2
    assert reference.metrics["fid_teacher"].mean == pytest.approx(0, abs=1e-6)
    assert record.hashes["conditions"] == resolved.task.conditions_hash
    assert ("data" in record.hashes) == (method == "consistency-training")


def test_evaluation_asks_for_seen_and_held_out_prompts_in_turn(file: Path) -> None:
    task = load_task(str(file))
    numbers, prompts = task.evaluation_numbers(1), written(judged=True)
    assert numbers.tolist() == [(260 + i) % 250 for i in range(260)]
    assert sum(prompts[number].held_out for number in numbers.tolist()) == 104
    assert task.evaluation_labels(1) is None
    _, cond = task.evaluation_inputs(1, slice(3))
    wanted = task.judged_conditions.of(numbers[:3])
    assert cond.text is not None
    assert torch.equal(cond.text, wanted.text)  # type: ignore[arg-type]


def test_another_encoder_is_another_condition_and_a_changed_one_is_refused(file: Path) -> None:
    task = load_task(str(file))
    spec = task.spec.prompts
    path = task.path(spec.encoder)  # type: ignore[union-attr]
    other = spec.encoder.model_copy(update={"sha256": "0" * 64})  # type: ignore[union-attr]
    changed = Task(
        task.spec.model_copy(update={"prompts": spec.model_copy(update={"encoder": other})}),  # type: ignore[union-attr]
        task.folder,
    )
    assert changed.conditions_hash != task.conditions_hash
    with pytest.raises(UsageError, match="has SHA-256"):
        changed.conditions  # noqa: B018
    assert read_tensors(path)["token.weight"].dtype == torch.float16


def test_the_shipped_networks_fit() -> None:
    task = load_task("scenes")
    x_T, cond = task.evaluation_inputs(0, slice(2))
    with torch.no_grad():
        samples = task.teacher(CPU)(x_T, torch.tensor(1.0), cond).x_0
    assert samples.isfinite().all()
    sizes = [task.path(w).stat().st_size for w in (task.spec.teacher, task.spec.features)]  # type: ignore[arg-type]
    assert sum(sizes) < 8e6
