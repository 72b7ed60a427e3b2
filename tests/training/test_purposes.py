"""Noise of training, trajectories, evaluation and searches never meets; who peeks is caught."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import CPU, config

from harness import provenance
from harness.cli.main import main
from harness.data.trajectories import open_store
from harness.methods import METHODS
from harness.metrics.evaluator import Evaluator
from harness.metrics.sampling import sample_set
from harness.runs.build import Reference, build, sampler_of
from harness.runs.config import FIRST_TUNING_SEED
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.tasks import Task
from harness.training import contract
from harness.training.case import Case
from harness.training.purpose_checks import blind, keys_drawn, purpose_of
from harness.training.trainer import Trainer

NO_NOISE = {"evaluate\x000\x000\x00floor", "split", "std", "blank"}
"""Keys that are no noise. Three choose real images, which are the same for searches and tables; the
last fills the images of a rehearsal, which counts FLOPs and trains nothing."""
CASES = {
    "ard": {"history_layers": 2},
    "step-distillation": {},
    "consistency-distillation": {},  # its sampler draws noise on the way
    "imm": {"group": 2, "gap": 6},
}


def collected(work: Callable[[], Any]) -> set[str]:
    """The keys of noise that a piece of work draws."""
    with keys_drawn() as keys:
        work()
    return {key for key in keys if key not in NO_NOISE and purpose_of(key) not in NO_NOISE}


def phases(name: str, task: Task, seed: int) -> dict[str, set[str]]:
    """The keys of each phase of a run of a method, one phase after the other."""
    asked = config(
        method=name,
        options=CASES[name],
        budget="steps=3",
        seed=seed,
        purpose=task.purpose,
    )
    resolved = resolve(asked, task)
    teacher, sources = task.teacher(CPU), {"data": task.split.train}

    def trajectories() -> None:
        sources["trajectory"] = open_store(resolved.recipe, teacher, CPU)

    def train() -> None:
        Trainer(method, sources, resolved.settings, None, CPU).train()

    def evaluate() -> None:
        evaluator = Evaluator(task, Reference(task, CPU).samples, CPU)
        samples = {k: sample_set(sampler_of(method), task, k, CPU) for k in (0, 1)}
        evaluator.evaluate(samples)

    found = {"trajectory": collected(trajectories)}
    method = build(resolved, teacher, CPU)
    return {**found, "train": collected(train), task.purpose: collected(evaluate)}


def philox_key(key: str) -> bytes:
    """The 64 bits that become the generator's key."""
    return hashlib.sha256(key.encode()).digest()[:8]


@pytest.mark.parametrize("name", CASES)
def test_purposes_share_no_key(name: str, tiny: Task) -> None:
    table = phases(name, tiny, 0)
    search = phases(name, tiny.judged_for("tune"), FIRST_TUNING_SEED)
    sets = [*table.values(), *({"search " + k: v for k, v in search.items()}).values()]
    assert all(sets)
    whole = set().union(*sets)
    assert sum(map(len, sets)) == len(whole)  # no key is in two sets
    assert len(set(map(philox_key, whole))) == len(whole)
    assert {purpose_of(key) for key in table["train"]} <= {"train", "order"}
    for found, purpose in ((table, "trajectory"), (table, "evaluate"), (search, "tune")):
        assert {purpose_of(key) for key in found[purpose]} == {purpose}


def test_a_whole_run_and_a_whole_trial_share_no_key(tiny: Task, tmp_path: Path) -> None:
    """With milestones, exposure and latency, and the run of the reference."""

    def execute(**changes: Any) -> None:
        for name in ("ard", "consistency-distillation"):  # trajectories, and noise of training
            options = {"options": CASES[name], "budget": "steps=4", "noise_sets": 1}
            asked = config(method=name, **options, **changes)
            Run(resolve(asked), tmp_path, CPU).execute()

    table = collected(execute)
    trial = collected(lambda: execute(purpose="tune", seed=FIRST_TUNING_SEED))
    assert not table & trial
    assert {purpose_of(key) for key in table} == {"train", "order", "trajectory", "evaluate"}
    assert {purpose_of(key) for key in trial} == {"train", "order", "trajectory", "tune"}


# Cheats

CHEAT = '''
"""A method that sees what judges it."""

import torch

from harness.diffusion.randomness import Keyed
from harness.methods import METHODS
from harness.methods.step_distillation import StepDistillation


@METHODS.register("peeking")
class Peeking(StepDistillation):
    """Step distillation that also looks at the noise of evaluation."""

    def __init__(self, config, teacher, task, num_steps, total_steps):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.task = task
        {kept}

    def loss(self, batch):
        loss, metrics = super().loss(batch)
        {peek}
        return loss * (1 + seen.mean().abs()), metrics
'''
CHEATS = {
    "its own key": ("pass", 'seen = Keyed("evaluate", 0).normal("x_T", batch.index, (1, 8, 8))'),
    "the key of searches": ("pass", 'seen = Keyed("tune", 0).normal("x_T", batch.index, (4,))'),
    "the task": ("pass", "seen = self.task.evaluation_inputs(0)[0]"),
    "what it kept": ("self.kept = task.evaluation_inputs(0)[0]", "seen = self.kept"),
    "noise on the way": ("pass", 'seen = self.task.evaluation_noise(0, slice(4))("step 0")'),
    "a generator of its own": (
        "generator = torch.Generator().manual_seed(task.spec.evaluation.seed); "
        "self.kept = torch.randn(4, generator=generator)",
        "seen = self.kept",
    ),
}


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes what a test registers."""
    monkeypatch.setattr(provenance, "PLUGIN_SOURCES", {})
    monkeypatch.setattr("harness.plugins.PLUGIN_SOURCES", provenance.PLUGIN_SOURCES)
    before = {name: METHODS[name] for name in METHODS.names()}
    yield
    METHODS._entries = before


def plugin(cheat: str, folder: Path) -> Path:
    kept, peek = CHEATS[cheat]
    path = folder / "peeking.py"
    path.write_text(CHEAT.format(kept=kept, peek=peek))
    return path


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_method_that_peeks_is_caught(
    cheat: str, tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.plugins import load_plugin

    blind(Case("step-distillation", tiny, tmp_path / "honest"))
    load_plugin(plugin(cheat, tmp_path))
    own = cheat == "a generator of its own"
    complaint = "another seed of evaluation changes" if own else r"of purpose '(evaluate|tune)'"
    with pytest.raises(AssertionError, match=complaint):
        blind(Case("peeking", tiny, tmp_path / "peeking"))


def test_the_command_names_the_peeking_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other check passes: the method is as good as any."""
    honest = [contract.names, contract.finite, contract.seeded, contract.resume, contract.blind]
    monkeypatch.setattr(contract, "checks_of", lambda name: honest)
    words = ["test-method", str(plugin("the task", tmp_path)), "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    found = json.loads(done.stdout.partition("\nharness:")[0])["peeking"]
    problems = {one["check"]: one["problem"] for one in found if one["problem"]}
    assert problems.keys() == {"blind"}
    assert "training draws 'x_T' of purpose 'evaluate': take noise" in problems["blind"]


def test_collecting_keys_leaves_the_numbers_as_they_are(tiny: Task) -> None:
    plain = tiny.evaluation_inputs(0)[0]
    with keys_drawn() as keys:
        assert torch.equal(tiny.evaluation_inputs(0)[0], plain)
    assert keys == {"evaluate\x000\x000\x00x_T"}
    tiny.evaluation_noise(0, slice(2))("step 0")
    assert len(keys) == 1
