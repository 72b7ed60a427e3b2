"""Commands on a tiny task that faults hit, each in a folder that returns to its beginning."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from click.testing import CliRunner
from injection import Arm, Process, content, nothing, watch
from judged import write_autoencoder

from harness.cli.main import main
from harness.training.tiny_task import NETWORK, tiny_spec

COUNT = 12
"""Images that are encoded."""


@dataclass
class Scenario:
    """A command, and what it needs.

    Attributes:
        words: the command line; FOLDER is the folder of everything, and RUN a finished run.
        made: what is made before, by methods of `Place`.
        forks: whether it starts children.
    """

    words: str
    made: tuple[str, ...] = ()
    forks: bool = False


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
    "export": Scenario(
        "student export RUN --task FOLDER/tasks/tiny.yaml --results FOLDER/results", ("run",)
    ),
    "sweep": Scenario(
        "sweep FOLDER/sweep.yaml --device cpu --results FOLDER/results", ("sweep",), forks=True
    ),
    "search": Scenario(
        "sweep FOLDER/search.yaml --device cpu --results FOLDER/results", ("search",), forks=True
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
        assert done.exit_code == 0, f"{done.output} {done.exception!r}"

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

    def check(self, what: str = "") -> None:
        """The same command finishes, and leaves what an undisturbed one leaves.

        Args:
            what: what happened before, as the error says it.
        """
        assert self.start() == 0, f"{what}: {self.log.read_text()}"
        found = content(self.work)
        assert found == self.expected, f"{what}: " + "; ".join(
            f"{path} is {found.get(path)}, not {self.expected.get(path)}"
            for path in sorted(found.keys() | self.expected.keys())
            if found.get(path) != self.expected.get(path)
        )
