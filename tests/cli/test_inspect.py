"""`harness list`, `describe`, `env`, `cost` and `teacher`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import Harness

from harness import __version__
from harness.methods import METHODS
from harness.solvers import SOLVERS
from harness.tasks import Task, load_task, task_names


def test_lists(harness: Harness) -> None:
    assert json.loads(harness("list", "methods", "--json").out).keys() == set(METHODS.names())
    assert json.loads(harness("list", "solvers", "--json").out).keys() == set(SOLVERS.names())
    assert json.loads(harness("list", "tasks", "--json").out) == {
        name: load_task(name).spec.summary for name in task_names()
    }
    assert json.loads(harness("list", "metrics", "--json").out)["fid"].startswith(
        "Frechet distance"
    )
    for name in METHODS.names():
        assert name in harness("list", "methods").out


@pytest.mark.parametrize("name", METHODS.names())
def test_describe(name: str, harness: Harness) -> None:
    found = json.loads(harness("describe", name, "--json").out)
    assert found["name"] == name
    assert found["options"].keys() == METHODS[name].Config.model_fields.keys()
    assert found["doc"]
    text = harness("describe", name).out
    for option in found["options"]:
        assert f"--{option.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [("heun", "second order"), ("fid", "direction: lower"), ("tiny", "trajectories:")],
)
def test_describe_solvers_metrics_and_tasks(
    name: str, text: str, tiny: Task, harness: Harness
) -> None:
    assert text in harness("describe", name).out
    assert json.loads(harness("describe", name, "--json").out)["name"] == name


def test_describe_an_unknown_name(harness: Harness) -> None:
    done = harness("describe", "hein")
    assert (done.code, done.err) == (2, "harness: unknown name 'hein'; did you mean heun?\n")


def test_describe_a_network_of_the_paper(harness: Harness) -> None:
    """The paper's table 4 has 675 M parameters and 118.64 Gflops, which count MACs."""
    found = json.loads(harness("describe", "DiT-XL/2", "--json").out)
    assert (found["depth"], found["hidden_size"], found["num_heads"]) == (28, 1152, 16)
    assert found["parameters"] == pytest.approx(675.1e6, rel=1e-3)
    assert found["gmacs_per_pass"] == pytest.approx(118.62, abs=0.01)
    assert "gmacs_per_pass: 118.62" in harness("describe", "DiT-XL/2").out
    done = harness("describe", "DiT-XL/3")
    assert (done.code, "unknown network 'DiT-XL/3'; did you mean DiT-XL/" in done.err) == (2, True)


def test_env_names_versions(harness: Harness) -> None:
    found = json.loads(harness("env", "--json").out)
    assert found["harness"] == __version__
    assert found["packages"].keys() >= {"torch", "torch-fidelity"}
    assert "torch" in harness("env", "--device", "cpu").out
    assert __version__ in harness("--version").out


@pytest.mark.parametrize("method", ["denoising", "teacher", "step-distillation", "ard"])
def test_cost_counts_each_kind_of_layer(method: str, harness: Harness) -> None:
    found = json.loads(
        harness("cost", "--method", method, "--network", "DiT-S/8", "--num-steps", 2, "--json").out
    )
    assert sum(found["by_kind"].values()) == found["macs"]
    assert found["by_kind"]["MLP"] == 2 * 12 * 16 * 8 * 384**2  # steps, layers, tokens, 8 d^2
    assert found["by_kind"]["other"] == 0


def test_a_card_that_does_not_fit_exits_with_1(tiny: Task, harness: Harness) -> None:
    done = harness("teacher", "verify", "--task", "tiny")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("harness: features: held_out_accuracy is ")
    assert done.err.splitlines()[-1].endswith("its card says 0.5: not the same")


def test_teacher_train_prints_files_and_hashes(
    tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    done = harness(
        "teacher", "train", "--task", "tiny", "--results", tmp_path / "results", "--json"
    )
    found = json.loads(done.out)
    assert sorted(Path(path).name for path in found) == [
        "features.safetensors",
        "teacher.safetensors",
    ]
    assert all(Path(path).is_file() for path in found)


def test_networks_of_a_task_given_as_a_file_go_to_the_results(
    tiny: Task, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Path] = []
    monkeypatch.setattr(
        "harness.runs.teacher_training.train_networks",
        lambda task, folder, *others: given.append(folder) or [],
    )
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump({**tiny.spec.model_dump(mode="json", exclude_none=True), "name": "own"})
    )
    assert (
        harness(
            "teacher", "train", "--task", tmp_path / "own.yaml", "--results", tmp_path / "results"
        ).code
        == 0
    )
    assert given == [tmp_path / "results" / "teachers" / "own"]
