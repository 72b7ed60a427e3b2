"""Resuming runs: finished, interrupted, held by other workers, or started by other code."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CPU, config, new_run

from harness import provenance
from harness.errors import Busy, Interrupted, RunFailed, UsageError
from harness.files import read_tensors, tensors_digest
from harness.records import read_record
from harness.runs import identity, run
from harness.runs.locks import held
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.tasks import Task


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes any training from now on an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it trains")

    return lambda: monkeypatch.setattr(run, "Trainer", refuse)


@pytest.fixture
def other_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on the code has another digest."""

    def change() -> None:
        for module in (provenance, identity):
            monkeypatch.setattr(module, "code_digest", lambda *rooms: "another")

    return change


def test_a_finished_run_is_returned_without_training(
    tiny: Task, tmp_path: Path, no_training: Callable
) -> None:
    first = new_run(tmp_path).execute()
    no_training()
    assert new_run(tmp_path).execute() == first
    with pytest.raises(RunFailed, match="it trains"):
        new_run(tmp_path, seed=1).execute()


def test_any_failure_is_a_record(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that nobody thought of; the next look at the run does not find an older reason."""
    one = new_run(tmp_path)
    for key in ("first", "second"):
        monkeypatch.setattr(run, "Evaluator", lambda *args, key=key: {}[key])
        with pytest.raises(RunFailed, match=f"KeyError: '{key}'"):
            one.execute()
        record = read_record(one.folder / "record.json")
        assert (record.status, record.reason) == ("failed", f"KeyError: '{key}'")
    assert "Traceback" in (one.folder / "run.log").read_text()


def test_a_full_disk_is_no_failure_of_a_run(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves no record, which a search would take for a bad value."""

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "a file")

    one = new_run(tmp_path)
    monkeypatch.setattr(run, "Evaluator", full)
    with pytest.raises(UsageError, match="stopped: a file: No space left on device; once that"):
        one.execute()
    assert not (one.folder / "record.json").exists()


def test_a_run_that_was_killed_at_its_end_loses_its_checkpoint(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the next start deletes it; the checkpoint of other code is another run's."""
    one, folder = new_run(tmp_path), new_run(tmp_path).folder / "checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_forget_checkpoint", lambda self: None)  # killed before
        record = one.execute()
    assert (folder / "state.pt").exists()
    shutil.copytree(folder, tmp_path / "copy")
    assert new_run(tmp_path).execute() == record
    assert not folder.exists()
    folder.mkdir()
    assert new_run(tmp_path).execute() == record
    assert not folder.exists()
    shutil.copytree(tmp_path / "copy", folder)
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**state, "identity": "another"}, folder / "state.pt")
    assert new_run(tmp_path).execute() == record
    assert (folder / "state.pt").exists()


def test_a_run_that_many_share_is_waited_for(
    tiny: Task, tmp_path: Path, no_training: Callable
) -> None:
    """A process that gets the lock after another one made the run takes that record."""
    one, other = new_run(tmp_path), new_run(tmp_path)
    waiting = ThreadPoolExecutor(1)
    with held(tmp_path, *one.locks):
        with pytest.raises(Busy, match="another process works on"):
            other.execute()
        found = waiting.submit(other.execute, wait=True)
        with pytest.raises(TimeoutError):
            found.result(timeout=0.3)
    record = one.execute(wait=True)
    assert found.result() == record


def test_other_code_runs_it_again(tiny: Task, tmp_path: Path, other_code: Callable) -> None:
    first = new_run(tmp_path).execute()
    assert first.environment.code == provenance.code_digest()
    other_code()
    again = new_run(tmp_path).execute()
    assert again.environment.code == "another"
    assert again.run_id == first.run_id


def test_reuse_takes_what_other_code_made(
    tiny: Task, tmp_path: Path, no_training: Callable, other_code: Callable
) -> None:
    first = new_run(tmp_path).execute()
    other_code()
    no_training()
    assert new_run(tmp_path).execute(reuse=True) == first
    with pytest.raises(RunFailed, match="it trains"):
        new_run(tmp_path).execute()


def stop_training(stage: str) -> Callable[[int, int], None]:
    """A report that sends SIGTERM when training first says how far it is."""
    return lambda done, total: os.kill(os.getpid(), signal.SIGTERM) if stage == "training" else None


def note_training(seen: list[int]) -> Callable[[str], Callable[[int, int], None]]:
    """A report that notes the steps at which training says how far it is."""
    return lambda stage: lambda done, total: seen.append(done) if stage == "training" else None


def test_an_interrupted_run_resumes_and_equals_an_uninterrupted_one(
    tiny: Task, tmp_path: Path
) -> None:
    straight = new_run(tmp_path / "straight", budget="steps=14")
    whole = straight.execute()
    halves = new_run(tmp_path / "halves", stop_training, budget="steps=14")
    with pytest.raises(Interrupted, match="at step 10; the same command resumes it"):
        halves.execute()
    assert not (halves.folder / "record.json").exists()
    assert (halves.folder / "checkpoint" / "state.pt").exists()

    seen: list[int] = []
    resumed = new_run(tmp_path / "halves", note_training(seen), budget="steps=14")
    record = resumed.execute()
    assert seen == [14]
    assert record.metrics == whole.metrics
    assert record.exposure == whole.exposure
    assert (resumed.folder / "curves.jsonl").read_bytes() == (
        straight.folder / "curves.jsonl"
    ).read_bytes()
    weights = [read_tensors(each.folder / "student.safetensors") for each in (resumed, straight)]
    assert tensors_digest(weights[0]) == tensors_digest(weights[1])
    same = {
        "steps",
        "images",
        "flops",
        "trajectory_flops",
        "teacher_evaluations",
        "ema_initial_weight",
    }
    assert record.cost.training.model_dump(include=same) == whole.cost.training.model_dump(
        include=same
    )
    assert not (resumed.folder / "checkpoint").exists()


def test_a_run_that_was_moved_resumes_where_it_stopped(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied results folder resumes with an empty cache, as on another machine.

    Nothing in a checkpoint names a path.
    """
    whole = new_run(tmp_path / "straight", budget="steps=14").execute()
    with pytest.raises(Interrupted):
        new_run(tmp_path / "here", stop_training, budget="steps=14").execute()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "other cache"))
    seen: list[int] = []
    record = new_run(tmp_path / "there", note_training(seen), budget="steps=14").execute()
    assert seen == [14]
    assert record.metrics == whole.metrics


def test_a_checkpoint_of_other_code_is_not_resumed(
    tiny: Task, tmp_path: Path, other_code: Callable
) -> None:
    with pytest.raises(Interrupted):
        new_run(tmp_path, stop_training, budget="steps=14").execute()
    other_code()
    seen: list[int] = []
    new_run(tmp_path, note_training(seen), budget="steps=14").execute()
    assert seen == [10, 14]


def test_exposure_names_the_trajectories_that_there_were(tiny: Task, tmp_path: Path) -> None:
    larger = tiny.spec.evaluation.model_copy(update={"batch_size": 64})
    record = Run(
        resolve(config(), Task(tiny.spec.model_copy(update={"evaluation": larger}))), tmp_path, CPU
    ).execute()
    assert record.exposure.n == 40
    assert record.exposure.on_own_history[0] == record.exposure.on_teachers_history[0]
    assert len(record.exposure.on_own_history) == 2
