"""Plug-in files: the example of the docs, metrics, solvers, image sets, and broken files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from harness import provenance
from harness.cli.main import main
from harness.data.images import IMAGE_SETS
from harness.errors import UsageError
from harness.methods import METHODS
from harness.metrics import METRICS
from harness.plugins import load_plugin
from harness.solvers import SOLVERS
from harness.tasks import Task, load_task

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-method.md"
METRIC = '''
from harness.metrics import metric

@metric("brightness", direction="none", heading="brightness")
def brightness(images):
    """Mean pixel."""
    return images.double().mean()
'''
SOLVER = '''
from harness.solvers import SOLVERS, DDIM

@SOLVERS.register("twin")
class Twin(DDIM):
    """DDIM by another name."""
'''


IMAGES = """
import torch
from harness.data import images

def halves(seed):
    labels = torch.arange(80) % 10
    pictures = torch.ones(80, 1, 8, 8)
    pictures[:, :, 4:] = torch.linspace(-1, 1, 80).reshape(-1, 1, 1, 1)
    return images.Split(
        images.ImageSet(pictures[:40], labels[:40]), images.ImageSet(pictures[40:], labels[40:])
    )

images.IMAGE_SETS["halves"] = halves
"""


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes what a test registers."""
    monkeypatch.setattr(provenance, "PLUGIN_SOURCES", {})
    monkeypatch.setattr("harness.plugins.PLUGIN_SOURCES", provenance.PLUGIN_SOURCES)
    before = [
        (registry, {name: registry[name] for name in registry.names()})
        for registry in (METHODS, METRICS, SOLVERS)
    ]
    yield
    for registry, classes in before:
        registry._entries = classes


@pytest.fixture
def method_file(tmp_path: Path) -> Path:
    """The example of the page, saved as a reader would."""
    file = tmp_path / "my_method.py"
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    file.write_text(code[1])
    return file


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def teacher_run(plugin: Path, folder: Path) -> list[object]:
    """The command that samples the tiny task's teacher with a plug-in, into `folder`/results."""
    asked = ["run", "--plugin", plugin, "--task", "tiny", "--method", "teacher", "--num-steps", 4]
    return [*asked, "--results", folder / "results", "--device", "cpu", "--json"]


def test_the_pages_example_keeps_the_contract(method_file: Path) -> None:
    done = call("test-method", method_file, "--json")
    assert done.exit_code == 0, done.output
    outcomes = json.loads(done.output)["penalised"]
    assert len(outcomes) >= 14
    assert not any(outcome["problem"] for outcome in outcomes)


def test_an_example_that_takes_any_number_of_steps_fails(method_file: Path) -> None:
    """Four steps of a map from noise to data: after the first no noise is left."""
    refusal = re.compile(r"    @classmethod\n    def check.*?(?=    def __init__)", re.DOTALL)
    text = refusal.sub("", method_file.read_text())
    method_file.write_text(text.replace("default_num_steps = 1", "default_num_steps = 4"))
    done = call("test-method", method_file, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout.partition("\nharness:")[0])["penalised"]
    problems = {one["check"]: one["problem"] for one in found if one["problem"]}
    assert problems.keys() == {"default_steps", "trained_levels"}
    assert "at 4 steps, on an exact teacher, the state at t = 0.75" in problems["default_steps"]


def test_the_pages_example_runs_sweeps_and_reports_like_ours(
    method_file: Path, tiny: Task, tmp_path: Path
) -> None:
    results = ["--results", tmp_path / "results", "--device", "cpu"]
    asked = [
        "--plugin",
        method_file,
        "--method",
        "penalised",
        "--task",
        "tiny",
        "--num-steps",
        1,
        "--weight",
        0.5,
    ]
    done = call("run", *asked, *results, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert (record["status"], record["method"], record["options"]["weight"]) == (
        "finished",
        "penalised",
        0.5,
    )
    assert record["cost"]["nfe"] == 1
    sweep = tmp_path / "sweep.yaml"
    cells = [{"method": "penalised", "axes": {"options.weight": [0.5, 0.6]}}]
    sweep.write_text(yaml.safe_dump({"base": {"task": "tiny", "num_steps": 1}, "cells": cells}))
    dry = call("sweep", "--plugin", method_file, sweep, "--dry-run", *results)
    assert "1 of 2 runs are missing" in dry.output
    table = call("report", "--plugin", method_file, tmp_path / "results").output
    assert "penalised, weight 0.5" in table
    assert "Weight of the penalty" in call("describe", "--plugin", method_file, "penalised").output
    assert "penalised" in call("list", "--plugin", method_file, "methods").output
    assert "--weight" in call("run", *asked[:4], "--help").output


def test_the_pages_example_refuses_a_teacher_without_weights(method_file: Path) -> None:
    refused = call(
        "run",
        "--plugin",
        method_file,
        "--method",
        "penalised",
        "--task",
        "mixture",
        "--num-steps",
        1,
    )
    assert (refused.exit_code, "closed formula" in refused.output) == (2, True), refused.output


def test_a_records_code_is_the_plugins_too(method_file: Path) -> None:
    before = provenance.code_digest()
    load_plugin(method_file)
    once = provenance.code_digest()
    load_plugin(method_file)
    assert provenance.code_digest() == once != before
    method_file.write_text("")
    assert provenance.code_digest() == once  # what was loaded runs on


def test_a_faulty_method_fails_a_named_check(method_file: Path) -> None:
    method_file.write_text(
        method_file.read_text().replace("return error +", "return torch.rand(()) * error +")
    )
    done = call("test-method", method_file)
    assert done.exit_code == 1
    assert "generator     AssertionError: torch's generator moved" in done.output
    assert "checks failed: penalised" in done.output


def test_a_metric_has_a_column(tiny: Task, tmp_path: Path) -> None:
    file = tmp_path / "metric.py"
    file.write_text(METRIC)
    done = call(*teacher_run(file, tmp_path))
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)["metrics"]
    assert values["brightness"]["values"].keys() == {"0"}
    assert values["brightness_floor"]["direction"] == "none"
    assert "brightness" in call("report", tmp_path / "results").output
    assert "brightness" in call("list", "metrics").output


def test_a_solver_is_asked_for_by_name(tiny: Task, tmp_path: Path) -> None:
    file = tmp_path / "solver.py"
    file.write_text(SOLVER)
    asked = teacher_run(file, tmp_path)
    ours, theirs = (json.loads(call(*asked, "--solver", name).stdout) for name in ("ddim", "twin"))
    assert ours["metrics"]["fid"]["values"] == theirs["metrics"]["fid"]["values"]
    assert ours["run_id"] != theirs["run_id"]


def test_a_task_brings_its_own_images(
    tiny: Task, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.data.images.IMAGE_SETS", dict(IMAGE_SETS))
    plugin, file = tmp_path / "images.py", tmp_path / "mine.yaml"
    plugin.write_text(IMAGES)
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    file.write_text(
        yaml.safe_dump({**content, "name": "mine", "data": {**content["data"], "set": "halves"}})
    )
    asked = [
        "run",
        "--method",
        "step-distillation",
        "--num-steps",
        2,
        "--task",
        file,
        "--results",
        tmp_path / "results",
        "--json",
    ]
    refused = call(*asked)
    assert (refused.exit_code, "unknown image set 'halves'" in refused.output) == (2, True), (
        refused.output
    )
    done = call(*asked, "--plugin", plugin)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert (record["task"], record["metrics"]["fid_floor"]["n"]) == ("mine", 40)
    assert record["hashes"]["reference"] != tiny.reference_hash


def test_a_task_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nlike: digits\nguidance: {scale: 1.25}\n")
    task = load_task(str(file))
    assert (task.spec.name, task.spec.guidance.scale) == ("mine", 1.25)
    assert task.spec.data == load_task("digits").spec.data
    assert task.path(task.trained("teacher")).is_file()
    with pytest.raises(UsageError, match="there is no task file"):
        load_task(str(tmp_path / "other.yaml"))
    file.write_text("name: mine\nlike: digits\nguidanse: 1\n")
    with pytest.raises(UsageError, match="is broken"):
        load_task(str(file))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("task.yaml", "", "a task is a YAML file: give it as --task"),
        ("missing.py", None, "there is no file"),
        ("broken.py", "def", "cannot be loaded (SyntaxError"),
        (
            "failing.py",
            "import nothing_like_it",
            "cannot be loaded (ModuleNotFoundError: No module named 'nothing_like_it')",
        ),
        (
            "taken.py",
            SOLVER.replace("twin", "ddim"),
            "cannot be loaded (ValueError: solver 'ddim' is registered twice",
        ),
    ],
)
def test_what_cannot_be_loaded(
    name: str, content: str | None, complaint: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    done = call("list", "--plugin", tmp_path / name, "methods")
    assert done.exit_code == 2
    assert complaint in done.output
    assert done.output.count("\n") == 1


@pytest.mark.parametrize(
    ("parent", "code", "said"),
    [
        ("teacher import Teacher", 0, "mine: ok     padding"),
        ("imm import IMM", 2, "mine needs class labels, but task tiny-text is conditioned on text"),
    ],
)
def test_a_method_is_checked_on_prompts(parent: str, code: int, said: str, tmp_path: Path) -> None:
    file, (name, cls) = tmp_path / "mine.py", parent.split(" import ")
    file.write_text(
        f"from harness.methods import METHODS\nfrom harness.methods.{name} import {cls}\n\n"
        f'@METHODS.register("mine")\nclass Mine({cls}):\n    """Another name."""\n'
    )
    done = call("test-method", file, "--prompts")
    assert done.exit_code == code, done.output
    assert said in done.output


def test_a_file_without_a_method(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    done = call("test-method", tmp_path / "empty.py")
    assert done.exit_code == 2
    assert "registers no method" in done.output


@pytest.mark.parametrize(("old", "new", "problem"), [
    ("return error +", "return errr +", "NameError: name 'errr' is not defined (my_method.py:"),
    ('Update("student"', 'Update("studnt"', "an update names player 'studnt'; players are student"),
])  # fmt: skip
def test_any_fault_is_an_outcome(old: str, new: str, problem: str, method_file: Path) -> None:
    text = method_file.read_text()
    assert old in text
    method_file.write_text(text.replace(old, new))
    done = call("test-method", method_file)
    assert done.exit_code == 1
    assert problem in done.output
    assert "checks failed" in done.output
