"""Commands that are killed anywhere, or meet an error, lose nothing: the same command goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from faults import (
    Arm,
    Process,
    content,
    forked_children,
    killed_at,
    nothing,
    watch,
)
from judged import write_autoencoder

from harness.cli.main import main
from harness.metrics.latency import Latency
from harness.training.tiny_task import NETWORK, tiny_spec
from harness.training.trainer import Trainer

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a process that has met a GPU cannot be forked"
)
KILLED = (-9, -25)
"""Exit codes of processes that died: by SIGKILL, or in the middle of a write by SIGXFSZ."""
STUDENT = ("--method", "step-distillation", "--num-steps", "2", "--budget", "steps=4")
COUNT = 12


@dataclass
class Scenario:
    """A command, and what it needs.

    Attributes:
        words: the command line; FOLDER is the folder of everything.
        made: what is made before, by name of a method of `Place`.
    """

    words: str
    made: tuple[str, ...] = ()
    children: bool = False


SCENARIOS = {
    "run": Scenario(
        "run --task FOLDER/tasks/tiny.yaml --method step-distillation --num-steps 2 "
        "--budget steps=4 --noise-sets 1 --save-samples npz --snapshots 2 "
        "--device cpu --results FOLDER/results"
    ),
    "run, pictures": Scenario(
        "run --task FOLDER/tasks/tiny.yaml --method step-distillation --num-steps 2 "
        "--budget steps=4 --noise-sets 1 --save-samples png "
        "--device cpu --results FOLDER/results",
        ("run",),
    ),
    "teacher": Scenario(
        "teacher train --task FOLDER/tasks/untrained.yaml --device cpu --results FOLDER/results"
    ),
    "encoding": Scenario(
        "data encode --images FOLDER/images.npz --size 8 --autoencoder FOLDER/autoencoder "
        "--out FOLDER/latents --shard-size 4 --batch-size 2 --device cpu",
        ("images",),
    ),
    "evaluation": Scenario(
        "evaluate --task FOLDER/tasks/tiny.yaml --samples FOLDER/samples.npz --save-samples png "
        "--device cpu --results FOLDER/results",
        ("samples",),
    ),
    "report": Scenario("report FOLDER/results --publish", ("runs",)),
    "export": Scenario("student export RUN --results FOLDER/results", ("run",)),
    "sweep": Scenario(
        "sweep FOLDER/sweep.yaml --device cpu --results FOLDER/results", ("sweep",), children=True
    ),
    "search": Scenario(
        "sweep FOLDER/search.yaml --device cpu --results FOLDER/results", ("search",), children=True
    ),
}


@dataclass
class Place:
    """A folder in which commands of one scenario run again and again from the same beginning."""

    folder: Path
    name: str
    expected: dict[str, str] = field(default_factory=dict)

    @property
    def scenario(self) -> Scenario:
        return SCENARIOS[self.name]

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def words(self, name: str = "") -> list[str]:
        words = SCENARIOS[name or self.name].words.replace("FOLDER", str(self.work))
        if "RUN" in words:
            (run,) = self.work.glob("results/runs/step-distillation-*")
            words = words.replace("RUN", run.name)
        return words.split()

    def make(self) -> None:
        """Makes the beginning once, and finds what an undisturbed command leaves."""
        tasks = self.work / "tasks"
        tasks.mkdir(parents=True)
        spec = tiny_spec(tasks, {**NETWORK, "depth": 1, "hidden_size": 8})
        spec["evaluation"] |= {"samples": 20, "kid_subset_size": 10, "noise_sets": 1}
        spec["trajectories"]["count"] = 6
        (tasks / "tiny.yaml").write_text(yaml.safe_dump(spec))
        for part in ("teacher", "features"):
            spec[part] = {"file": f"{part}.safetensors", "training": dict(spec[part]["training"])}
        (tasks / "untrained.yaml").write_text(yaml.safe_dump({**spec, "name": "untrained"}))
        for part in self.scenario.made:
            getattr(self, part)()
        shutil.copytree(self.work, self.folder / "beginning")
        self.call(self.words())
        self.expected = content(self.work)
        self.reset()

    @staticmethod
    def call(words: list[str]) -> None:
        """A command in this process, which loads what its forked successors need."""
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output

    def run(self) -> None:
        self.call(self.words("run"))

    def runs(self) -> None:
        words = self.words("run")
        self.call(words)
        self.call([*words, "--seed", "1"])

    def images(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
        np.savez(self.work / "images.npz", arr_0=pixels, arr_1=np.arange(COUNT) % 3)
        write_autoencoder(self.work)

    def samples(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
        np.savez(self.work / "samples.npz", arr_0=pixels)

    def base(self) -> dict[str, Any]:
        return {
            "task": str(self.work / "tasks" / "tiny.yaml"),
            "method": "step-distillation",
            "num_steps": 2,
            "budget": "steps=4",
            "noise_sets": 1,
        }

    def sweep(self) -> None:
        text = yaml.safe_dump({"base": self.base(), "seeds": [0, 1]})
        (self.work / "sweep.yaml").write_text(text)

    def search(self) -> None:
        space = {
            "options.lr": {"low": 1e-4, "high": 1e-2, "log": True},
            "options.heads": ["shared", "per_step"],
        }
        search = {"trials": 3, "objectives": {"fid": "minimize"}, "space": space}
        text = yaml.safe_dump({"base": self.base(), "search": search})
        (self.work / "search.yaml").write_text(text)

    def reset(self) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(self.folder / "beginning", self.work)

    def start(self, arm: Arm = nothing) -> int:
        """The exit code of the command in a process of its own."""
        self.log.unlink(missing_ok=True)
        return Process(self.words(), self.log, arm).wait()

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def changes(self) -> int:
        """The number of changes of files that the command makes."""
        counts = self.folder / "counts"

        def note(count: int, event: str) -> None:
            counts.write_text(str(count))

        assert self.start(lambda: watch(self.work, note)) == 0
        self.reset()
        return int(counts.read_text())

    def check(self) -> None:
        """The same command finishes, and leaves what an undisturbed one leaves."""
        assert self.start() == 0, self.log.read_text()
        found = content(self.work)
        assert found == self.expected, sorted(
            f"{path}: {found.get(path)}, not {self.expected.get(path)}"
            for path in found.keys() | self.expected.keys()
            if found.get(path) != self.expected.get(path)
        )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Place]:
    """Makes the place of a scenario. Nothing is timed, and each training step is saved."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "work" / "cache"))
    monkeypatch.setattr("harness.runs.plan.macs_a_pass", None)  # and no estimate is made
    monkeypatch.setattr("harness.runs.preview.preview", None)
    monkeypatch.setattr(
        "harness.runs.evaluation.interleaved_latency", lambda *args, **more: Latency(1.0, 1.0, 1.0)
    )
    init = Trainer.__init__

    def saving(
        self: Trainer, method: Any, sources: Any, settings: TrainSettings, *args: Any, **more: Any
    ) -> None:
        init(self, method, sources, settings, *args, **more)
        object.__setattr__(self.settings, "checkpoint_seconds", -1.0)

    monkeypatch.setattr(Trainer, "__init__", saving)

    def make(name: str) -> Place:
        made = Place(tmp_path, name)
        if made.scenario.children:
            forked_children(monkeypatch, tmp_path / "children")
        made.make()
        return made

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCENARIOS if not SCENARIOS[name].children])
def test_killed_before_every_change_of_files(name: str, place: Callable[[str], Place]) -> None:
    made = place(name)
    count = made.changes()
    failures = []
    for number in range(1, count + 1):
        made.reset()
        assert made.start(killed_at(made.work, number)) in KILLED, made.log.read_text()
        try:
            made.check()
        except AssertionError as error:
            failures.append(f"{number}: {error}"[:600])
    print(f"{name}: {count} kills, {len(failures)} failures")
    assert not failures, "\n".join(failures)
