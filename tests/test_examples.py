"""The files of examples/ do what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from examples import own_data, own_network, own_sampler, read_results
from harness import provenance
from harness.cli.main import main
from harness.methods import METHODS
from harness.networks.backbones import build
from harness.tasks import Task, load_task

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CPU = torch.device("cpu")


def harness(*words: object) -> str:
    """The output of `harness ...` in this process."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes the method that an example registers, and forgets its source."""
    monkeypatch.setattr(provenance, "PLUGIN_SOURCES", {})
    monkeypatch.setattr("harness.plugins.PLUGIN_SOURCES", provenance.PLUGIN_SOURCES)
    yield
    METHODS._entries.pop("jump", None)


def test_the_list_names_each_file() -> None:
    named = re.findall(r"\[(\w+\.py)\]", (EXAMPLES / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("[a-z]*.py"))


@pytest.mark.slow
def test_own_method(tiny: Task, tmp_path: Path, unloaded: None) -> None:
    words = ["--task", "tiny", "--num-steps", 1, "--budget", "steps=2", "--results", tmp_path]
    said = harness("run", "--plugin", EXAMPLES / "own_method.py", "--method", "jump", *words)
    assert "jump" in said


def test_own_data(tmp_path: Path) -> None:
    task = load_task(str(own_data.main(tmp_path / "bars")))
    train, held_out = len(task.split.train), len(task.split.held_out)
    assert train + held_out == 400
    assert 70 <= held_out <= 90
    images, labels = task.split.train.images[:50], task.split.train.labels[:50]
    rows, columns = images.mean(3).amax((1, 2)), images.mean(2).amax((1, 2))
    assert ((columns > rows) == (labels >= 5)).all()


def test_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that it starts runs in this process."""

    def here(words: list[str], cwd: Path, check: bool) -> None:
        monkeypatch.chdir(cwd)
        harness(*words[words.index("harness") + 1 :])

    monkeypatch.setattr(own_network.subprocess, "run", here)
    task = load_task(str(own_network.main(tmp_path / "new")))
    network = build(task.network_options)
    network.load_state_dict(task.teacher(CPU).denoiser.network.state_dict())
    mine = own_network.network().state_dict()
    found = network.state_dict()
    assert {name for name in mine if not torch.equal(mine[name], found[name])} == set()


def test_own_sampler(tiny: Task, tmp_path: Path) -> None:
    noise = torch.zeros(2, 1, 8, 8)
    samples = own_sampler.sample(noise, torch.tensor([1, 6]))
    assert samples.mean(3).argmax(2).flatten().tolist() == [1, 6]
    words = ["--task", "tiny", "--num-steps", 1, "--name", "mine", "--results", tmp_path]
    said = harness("evaluate", "--callable", "examples.own_sampler:sample", *words)
    assert "mine" in said


def test_reading_results() -> None:
    """Each line's label and number stand in one row of the task's page."""
    lines = read_results.best(ROOT / "results")
    assert {line.partition(":")[0] for line in lines} >= {
        f"digits, {steps} steps" for steps in (1, 2, 4)
    }
    for line in lines:
        task, rest = line.split(", ", 1)
        label, _, number = rest.partition(": ")[2].rpartition(", ")
        page = (ROOT / "results" / task / "details.md").read_text()
        value = number.split(" ", 1)[1]
        assert any(label in row and value in row for row in page.splitlines()), line
