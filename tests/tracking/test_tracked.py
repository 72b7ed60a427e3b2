"""Following a run: what a tracker is told, once; no number and no run depends on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import ARD, Harness, sentence
from PIL import Image
from recorder import Recorder
from tiny_runs import config, new_run
from written import record

from harness import ranks
from harness.cli.console import Display
from harness.errors import Interrupted, UsageError
from harness.methods.parts.players import cosine
from harness.progress import NOBODY, Follower, Subject
from harness.records import Record
from harness.runs.finished import student_weights
from harness.runs.run import Run
from harness.sweeps.child import Order, Tracking
from harness.sweeps.engines import Engine, Job
from harness.tasks import Task
from harness.tracking import tracked
from harness.tracking.tracked import Tracked, check_tracker
from harness.training.trainer import Trainer


def followed_run(folder: Path, tracker: Follower, say: Any = pytest.fail, **changes: Any) -> Run:
    run = new_run(folder, **{"budget": "steps=16", **changes})
    run.follower = Tracked("recorder", tracker, "", say)
    return run


def stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Sends this process SIGINT in a training step."""
    one_step = Trainer.one_step

    def stopped(self: Trainer) -> dict[str, float]:
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(self)

    patch.setattr(Trainer, "one_step", stopped)


# what is told


def test_a_tracker_is_told_each_point_once_and_no_number_depends_on_it(
    tiny: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    harness: Harness,
) -> None:
    """A run that is interrupted after step 12, where the tracker has been told of step 10."""
    before, after = Recorder(), Recorder()
    with monkeypatch.context() as patch:
        stop_after(12, patch)
        with pytest.raises(Interrupted):
            followed_run(tmp_path / "followed", before).execute()
    run = followed_run(tmp_path / "followed", after)
    made = run.execute()
    name = f"{made.run_id}-{made.environment.code[:8]}"
    assert before.events[0] == after.events[0] == ("begin", name, "")
    assert (before.events[-1], after.events[-1]) == (("end", False, None), ("end", True, None))
    assert capsys.readouterr().out == ""  # what trackers print goes to stderr
    told = Recorder()
    told.events = before.events[1:-1] + after.events[1:-1]
    check_told(told, run, made)
    assert told.steps("levels") == [0, 2, 4, 8, 16]
    norms = told.contents("levels")
    assert [len(point) for point in norms] == [2] * 5  # its steps are at 1 and 1/2
    assert all(one != other for one, other in pairwise(norms))
    assert told.contents("samples") == [(20 * 44, 44)] * 3 + [(20 * 44, 2 * 44)]

    monkeypatch.setattr("harness.runs.run.gradient_norms", lambda *args: pytest.fail("looked"))
    plain = new_run(tmp_path / "plain", budget="steps=16")
    assert plain.execute().run_id == made.run_id
    assert plain.execute().metrics == made.metrics
    assert plain.execute().first_losses == made.first_losses
    assert plain.execute().cost.training.flops == made.cost.training.flops
    here, expected = student_weights(run.folder), student_weights(plain.folder)
    assert here.keys() == expected.keys()
    assert all(torch.equal(here[name], expected[name]) for name in here)

    again = Recorder()  # is told nothing, since the tracker knows it all
    followed_run(tmp_path / "followed", again).execute()
    assert again.events == []

    told = Recorder()  # is told from the folder, of which a damaged line does not count
    with (plain.folder / "curves.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    (plain.folder / f"tracked-recorder-{name[-8:]}.jsonl").write_text('{"group": "mine"}\n["fin')
    followed_run(tmp_path / "plain", told).execute()
    assert told.events[0] == ("begin", name, "mine")
    check_told(told, plain, plain.execute())
    assert told.contents("samples") == [(20 * 44, 2 * 44)]
    check_sweep(tmp_path / "plain", harness, monkeypatch)


def check_told(told: Recorder, run: Run, made: Record) -> None:
    """A tracker knows the curve, the milestones and the row of the run of 16 steps."""
    assert told.steps("train") == [10, 16]
    config: Any = run.resolved.config
    rates = [config.lr * cosine(config.warmup)(step / 16) for step in (10, 16)]
    assert [point["learning_rate"] for point in told.contents("train")] == pytest.approx(rates)
    assert all(point["gradient_norm"] > 0 for point in told.contents("train"))
    beside = {"gradient_norm", "learning_rate"}
    assert made.first_losses.keys() == told.contents("train")[0].keys() - beside
    assert told.steps("quality") == [2, 4, 8, 16]
    assert told.contents("quality") == [point.quality for point in made.milestones]
    assert told.steps("samples")[-1] == 16
    assert told.steps("final") == [16]
    (row,), bill = told.contents("final"), made.cost.training
    assert row["fid"] == made.metrics["fid"].mean
    assert row["training_flops"] == bill.flops + bill.trajectory_flops
    assert row["latency_seconds"] == made.cost.latency.seconds


def check_sweep(results: Path, harness: Harness, patch: pytest.MonkeyPatch) -> None:
    """A sweep is a group, to which a run that was finished before belongs.

    The second run is not made: its order is looked at.
    """
    told, orders = Recorder(), list[Order]()

    class Noting(Engine):
        def run(self, job: Job) -> int:
            orders.append(Order.model_validate_json(job.words[1]))
            return 0

        def stop(self) -> None:
            pass

    patch.setattr("harness.cli.cmd_sweep.check_tracker", lambda name: None)
    patch.setattr(tracked, "_class_of", lambda name: lambda: told)
    patch.setattr("harness.cli.cmd_sweep.Local", lambda shares: Noting())
    patch.setattr("harness.sweeps.sweep.record_of", lambda run, died: record("ard"))
    file = results / "two seeds.yaml"
    base = config(budget="steps=16").model_dump(exclude={"seed"}, exclude_unset=True)
    file.write_text(yaml.safe_dump({"base": base, "seeds": [0, 1]}))
    done = harness("sweep", file, "--track", "wandb", "--results", results)
    assert done.code == 0, done.err
    assert told.contents("begin") == ["two seeds"]
    assert told.steps("final") == [16]
    assert [order.tracking for order in orders] == [Tracking(name="wandb", group="two seeds")]
    assert [order.config.seed for order in orders] == [1]


def test_a_run_that_was_not_tracked_at_first_is_told_from_its_checkpoint() -> None:
    told = Recorder()
    trainer = Trainer.__new__(Trainer)
    trainer.follower = told
    trainer.curve = [{"step": 10, "loss": 1.5}]
    trainer.milestones = [{"step": 2, "images": 16, "flops": 1.0, "quality": {"fid": 3.0}}]
    trainer._tell_past()
    assert told.events == [("train", 10, {"loss": 1.5}), ("quality", 2, {"fid": 3.0})]


# what does not depend on it


@pytest.mark.parametrize("kind", ["begin", "train", "samples", "end"])
def test_a_tracker_that_raises_is_told_once_and_no_more(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    told = Recorder(raises=kind)
    follower = Tracked("recorder", told, "", said.append)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        follower.begin(Subject(name, "code", tmp_path / name, tmp_path, {}))
        for step in (1, 2):
            follower.numbers("train", step, {"loss": 1.0, "bad": float("nan")})
            follower.picture(step, lambda: Image.new("RGB", (1, 1)))
        follower.end(True)
    assert said == ["--track recorder stops, the run goes on: ConnectionError: no network"]
    expected = {
        "begin": [],
        "train": ["begin"],
        "samples": ["begin", "train"],
        "end": ["begin", "train", "samples", "train", "samples"],
    }
    assert [event[0] for event in told.events] == expected[kind]
    assert all(values == {"loss": 1.0} for values in told.contents("train"))


def test_a_slow_and_broken_tracker_neither_bills_nor_stops_a_run(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's clock moves by a millisecond a look, and by the hour of each point."""
    now, said = [0.0], list[str]()

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    class Broken(Recorder):
        def numbers(self, kind: Any, step: int, values: Mapping[str, float]) -> None:
            now[0] += 3600
            if kind == "quality":
                raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.training.trainer.time.perf_counter", clock)
    made = followed_run(tmp_path, Broken(), said.append, budget="steps=2").execute()
    assert made.status == "finished"
    assert now[0] > 3600
    assert made.cost.training.seconds < 1
    assert said == [
        "--track recorder stops, the run goes on: OSError: [Errno 28] No space left on device"
    ]


def test_only_the_first_rank_tracks(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "_execute", lambda self: self.follower)
    run = followed_run(tmp_path, Recorder())
    assert run.execute() is run.follower
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    assert run.execute() is NOBODY


# the command line


def test_a_missing_package_is_told_before_anything_is_computed(
    tiny: Task, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of its name in the working directory, which wandb makes, is no package."""
    monkeypatch.setattr(tracked, "find_spec", lambda name: None)
    results = tmp_path / "results"
    done = harness(*ARD, "--track", "wandb", "--results", results)
    expected = (
        "--track wandb needs a package that is not installed: "
        "pip install 'distillation-harness[wandb]'"
    )
    assert sentence(done, 2) == expected
    file = tmp_path / "sweep.yaml"
    file.write_text("cells: [{method: ard}]")
    done = harness("sweep", file, "--track", "wandb", "--results", results)
    assert sentence(done, 2) == expected
    assert not results.exists()


def test_a_folder_of_a_packages_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb makes such a folder in the working directory."""
    (tmp_path / "absent").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"distillation-harness\[absent\]"):
        check_tracker("absent")


def test_a_run_on_the_command_line_tracks_itself_but_not_its_reference(
    tiny: Task, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followers: list[Any] = []

    def execute(self: Run, *args: Any, **more: Any) -> Record:
        followers.append(self.follower)
        return record("ard")

    monkeypatch.setattr(tracked, "check_tracker", lambda name: None)
    monkeypatch.setattr(Run, "execute", execute)
    words = [*ARD, "--history-layers", 2, "--track", "tensorboard", "--json", "--results", tmp_path]
    assert harness(*words).code == 0
    reference, wanted = followers
    assert reference is NOBODY
    assert isinstance(wanted.one, Display)
    assert (wanted.other.name, wanted.other.group) == ("tensorboard", "")
