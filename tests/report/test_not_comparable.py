"""What decides a number and differs between two records keeps them out of one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import changed
from written import record

from harness.data.images import ImageSet
from harness.metrics import spaces
from harness.metrics.evaluator import Evaluator
from harness.records import Metric, Record, write_record
from harness.report.markdown import page
from harness.report.rows import load_records
from harness.report.task_report import reports_of
from harness.tasks import Task
from harness.training.tiny_task import tiny_text_spec

CPU = torch.device("cpu")


def judged(task: Task, seed: int, n: int = 0, device: torch.device = CPU) -> Record:
    """A record with the FID that an evaluator of the task would give it."""
    evaluator = Evaluator(task, lambda k: torch.zeros(1), CPU)
    evaluator.device = device
    n = n or task.spec.evaluation.samples
    fid = Metric(
        values={0: 5.0 + seed, 1: 6.0 + seed},
        n=n,
        direction="lower",
        identity=evaluator.identity("fid", n),
    )
    return record(seed=seed, task=task.spec.name, metrics={"fid": fid})


def told(records: list[Record], folder: Path) -> tuple[str, str]:
    """The page of a results folder: its tables, and its section of what does not compare."""
    for one in records:
        write_record(folder / "runs" / one.run_id / "record.json", one)
    text = page(reports_of(load_records(folder)))
    apart = text.partition("Not comparable with these")[2].partition("### Notes")[0]
    return text.partition("### Not")[0], apart


def refused(task: Task, other: Record, folder: Path) -> str:
    """Why a record of seed 2 stands beside the table of two records of a task."""
    alone = told([judged(task, seed) for seed in (0, 1)], folder / "alone")
    assert alone[1] == ""
    tables, apart = told([judged(task, seed) for seed in (0, 1)] + [other], folder / "all")
    assert tables == alone[0]  # its number is in no mean
    assert "7.50" in apart
    return apart


def relabelled(task: Task) -> Task:
    """The task with one label of its real images changed."""
    other, train = Task(task.spec, task.folder), task.split.train
    labels = train.labels.clone()
    labels[3] = (labels[3] + 1) % 10
    other.__dict__["split"] = replace(task.split, train=ImageSet(train.images, labels))
    return other


CHANGES: dict[str, tuple[Callable[[Task], Task], str]] = {
    "a label of the reference": (relabelled, "another reference"),
    "an image of the reference": (
        lambda task: changed(task, data={"split_seed": 1}),
        "another reference",
    ),
    "labels of evaluation": (
        lambda task: changed(task, evaluation={"labels": "drawn"}),
        "labels drawn instead of balanced",
    ),
    "noise": (lambda task: changed(task, evaluation={"seed": 1}), "noise_seed 1 instead of 0"),
    "N": (lambda task: changed(task, evaluation={"samples": 41}), "n 41 instead of 40"),
    "rounding": (lambda task: changed(task, evaluation={"rounding": "floor"}), "rounding"),
    "guidance": (lambda task: changed(task, guidance={"scale": 1.5}), "another guidance"),
    "neighbours": (
        lambda task: changed(task, evaluation={"neighbours": 100}),
        "neighbours 100 instead of None",
    ),
    "subsets": (
        lambda task: changed(task, evaluation={"kid_subset_size": 10}),
        "kid_subset_size 10 instead of 20",
    ),
    "the purpose": (lambda task: task.judged_for("tune"), "noise_purpose tune instead of None"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_evaluation_is_not_comparable(what: str, tiny: Task, tmp_path: Path) -> None:
    change, reason = CHANGES[what]
    assert reason in refused(tiny, judged(change(tiny), 2), tmp_path)


def test_another_evaluation_of_the_same_kind_is_comparable(tiny: Task, tmp_path: Path) -> None:
    same = Task(tiny.spec.model_copy(update={"summary": "other words"}), tiny.folder)
    tables, apart = told([judged(tiny, 0), judged(tiny, 1), judged(same, 2)], tmp_path)
    assert apart == ""
    assert "6.50" in tables  # the mean of all three


@pytest.mark.parametrize("part", ["teacher", "features"])
def test_another_network_is_not_comparable(
    part: str, tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = changed(tiny, **{part: {"sha256": "0" * 64}})
    monkeypatch.setattr(other, "classifier", lambda device: tiny.classifier(device))
    assert f"another {part}" in refused(tiny, judged(other, 2), tmp_path)


def test_another_prompt_is_not_comparable(tiny_text: Task, tmp_path: Path) -> None:
    prompts = tiny_text_spec(tmp_path / "tasks" / "text", seed=1)["prompts"]
    other = changed(tiny_text, prompts=prompts)
    assert "another conditions" in refused(tiny_text, judged(other, 2), tmp_path)


@pytest.mark.parametrize("setting", ["matrices", "convolutions", "device"])
def test_another_arithmetic_is_not_comparable(setting: str, tiny: Task, tmp_path: Path) -> None:
    """TF32 in matrix products or in convolutions, and another kind of device."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, gpu = (cuda.allow_tf32, cudnn.allow_tf32), torch.device("cuda")
    try:
        cuda.allow_tf32, cudnn.allow_tf32 = False, False
        plain = [judged(tiny, seed, device=gpu) for seed in (0, 1)]
        cuda.allow_tf32, cudnn.allow_tf32 = setting == "matrices", setting == "convolutions"
        other = judged(tiny, 2, device=CPU if setting == "device" else gpu)
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before
    tables, apart = told([*plain, other], tmp_path)
    reason = "device cpu instead of cuda" if setting == "device" else "tf32 True instead of False"
    assert reason in apart
    assert "7.50" in apart
    assert "6.00" in tables


def test_a_stale_cache_is_not_read(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of the reference that another set, rounding or network left there do not count."""
    monkeypatch.setattr(spaces, "FEW", 1000)
    others = [relabelled(tiny), changed(tiny, data={"split_seed": 1})]
    others += [changed(tiny, evaluation={"rounding": "floor"})]
    for other in others:
        Evaluator(other, lambda k: torch.zeros(1), CPU)
    stale = len(list((tmp_path / "cache" / "samples").iterdir()))
    found = Evaluator(tiny, lambda k: torch.zeros(1), CPU).reference
    assert (stale, len(list((tmp_path / "cache" / "samples").iterdir()))) == (3, 4)
    monkeypatch.setattr(spaces, "FEW", 10_000)
    assert torch.equal(found, Evaluator(tiny, lambda k: torch.zeros(1), CPU).reference)
    monkeypatch.setattr(spaces, "code_digest", lambda room: "other code")
    monkeypatch.setattr(spaces, "FEW", 1000)
    Evaluator(tiny, lambda k: torch.zeros(1), CPU)
    assert len(list((tmp_path / "cache" / "samples").iterdir())) == 5
