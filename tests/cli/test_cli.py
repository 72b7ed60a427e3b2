"""The command line in this process: exit codes, one sentence on stderr, JSON on stdout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from harness import __version__
from harness.cli import cmd_run
from harness.cli.main import main
from harness.errors import Interrupted
from harness.methods import METHODS
from harness.records import read_record, write_record
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.solvers import SOLVERS
from harness.tasks import Task, load_task, task_names


class Done(NamedTuple):
    code: int
    out: str
    err: str


Harness = Callable[..., Done]
ARD = ("run", "--task", "tiny", "--method", "ard", "--num-steps", "2")


@pytest.fixture
def harness(capsys: pytest.CaptureFixture[str]) -> Harness:
    """Runs `harness ...` in this process; any exception but SystemExit fails the test."""

    def call(*args: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Done(ended.value.code, captured.out, captured.err)

    return call


def sentence(done: Done, code: int) -> str:
    """The error of a refused command: one line on stderr, and nothing on stdout."""
    assert done.code == code
    assert done.out == ""
    assert done.err.startswith("harness: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    return done.err.removeprefix("harness: ").strip()


@pytest.fixture
def results(tiny: Task, harness: Harness, tmp_path: Path) -> Path:
    """A results folder with a run and its reference."""
    folder = tmp_path / "results"
    done = harness(*ARD, "--history-layers", 2, "--results", folder)
    assert done.code == 0, done.err
    return folder


# wrong usage


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["run", "--method", "ardd"], "unknown method 'ardd'; did you mean ard"),
        (["run"], "no method is named; give --method, one of: "),
        ([*ARD, "--task", "tinny"], "unknown task 'tinny'; did you mean tiny?"),
        ([*ARD, "--set", "histroy_layers=2"], "unknown option 'histroy_layers' in options of ard; did you mean history_layers"),
        ([*ARD, "--set", "lr"], "--set lr has no '='; give KEY=VALUE"),
        ([*ARD, "--history-layers", "9"], "history_layers is 9, but the teacher has 3 layers: give 0 to 3"),
        ([*ARD, "--history-layers", "many"], "options of ard: history_layers is 'many', but it should be a valid integer"),
        ([*ARD, "--history-layers", "2", "--num-steps", "3"], "num_steps is 3, but must divide the 4 evaluations"),
        ([*ARD, "--seed", "-1"], "run config: seed is '-1', but it should be greater than or equal to 0"),
        ([*ARD, "--history-layers", "2", "--budget", "much"], "budget is 'much', but must be one of: quick, table, steps=NUMBER"),
        ([*ARD, "--gan-lag", "2"], "options of ard: gan_lag is '2', but it should be less than or equal to 1"),
        ([*ARD, "--history-layers", "2", "--gan-from", "0.5", "--gan-lag", "0", "--micro-batch-size", "4"], "micro_batch_size is 4"),
        ([*ARD, "--device", "abacus"], "device 'abacus' is not available here; give cpu"),
        ([*ARD, "--device", "meta"], "device 'meta' is not available here; give cpu"),
        ([*ARD, "--config", "/nowhere.yaml"], "cannot read /nowhere.yaml: No such file or directory"),
        (["run", "--task", "tiny", "--method", "teacher", "--solver", "ddimm"], "unknown solver 'ddimm'; did you mean ddim?"),
        (["describe", "ad"], "unknown name 'ad'; did you mean ard"),
        (["teacher", "verify", "--task", "tinny"], "unknown task 'tinny'; did you mean tiny?"),
        (["report", "/nowhere"], "there is no record below /nowhere; `harness run` makes one"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_sentence(args: list[str], error: str, tiny: Task, harness: Harness) -> None:
    assert sentence(harness(*args), 2).startswith(error)


@pytest.mark.parametrize(
    ("args", "near"),
    [
        ([*ARD, "--histroy-layers", "2"], "--history-layers"),
        (["run", "--task", "tiny", "--method", "teacher", "--sovler", "ddim"], "--solver"),
        (["reprot"], "report"),
        (["list", "method"], "methods"),
        (["report", "--format", "word"], "markdown"),
        (["run", "--method"], "--method"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_errors_of_click_exit_with_2_too(args: list[str], near: str, tiny: Task, harness: Harness) -> None:
    done = harness(*args)
    assert (done.code, done.out) == (2, "")
    assert near in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: b: c", "is not YAML"),
        ("method: ard\nseed: 1\nseed: 2", "key 'seed' stands there twice"),
        ("method: ard\noptions: {lr: 1, lr: 2}", "key 'lr' stands there twice"),
        ("- ard", "must hold a mapping from names to values"),
        ("", "must hold a mapping from names to values"),
        ("method: ard\nnum_step: 2", "unknown option 'num_step' in run config; did you mean num_steps"),
        ("method: ard\noptions: {layers: 2}", "unknown option 'layers' in options of ard"),
        ("method: ardd", "unknown method 'ardd'"),
        ("method: ard\nnum_steps: [2]", "num_steps is [2], but it should be a valid integer"),
        ("method: 5", "method"),
        ("method: [ard]", "method"),
        ("method: ard\noptions: [1, 2]", "options"),
        ("method: ard\noptions: none", "options"),
    ],
)
def test_a_broken_config_is_one_sentence(text: str, error: str, tiny: Task, harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert error in sentence(harness("run", "--task", "tiny", "--config", path), 2)


def test_bytes_that_are_no_text_are_refused(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in sentence(harness("run", "--config", path), 2)


# run


def test_help_shows_the_options_of_the_named_method(tiny: Task, harness: Harness) -> None:
    ard = harness("run", "--method", "ard", "--help")
    assert ard.code == 0
    assert "--history-layers" in ard.out
    assert "the paper's N" in " ".join(ard.out.split())
    assert "--num-steps" in ard.out
    teacher = harness("run", "--method", "teacher", "--help")
    assert "--history-layers" not in teacher.out
    assert "--solver" in teacher.out
    assert "--history-layers" not in harness("run", "--help").out


def test_help_shows_the_defaults_of_a_task(harness: Harness, tmp_path: Path) -> None:
    def help_of(*words: Any) -> str:
        return " ".join(harness("run", *words, "--help").out.split())

    assert "default: 6, on fashion-mnist 3]" in help_of("--method", "ard", "--task", "fashion-mnist")
    (tmp_path / "config.yaml").write_text("{method: ard, task: fashion-mnist}")
    assert "default: 6, on fashion-mnist 3]" in help_of("--config", tmp_path / "config.yaml")
    assert "default: 6]" in help_of("--method", "ard")
    assert ", on digits 0.000278]" in help_of("--method", "ect")
    assert "default: 6]" in help_of("--method", "ard", "--task", "fashion")
    assert ", on digits" not in harness("cost", "--method", "ect", "--help").out  # it has no task


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_leaves_no_option_behind(flag: str, tiny: Task, harness: Harness) -> None:
    before = list(cmd_run.run_command.params)
    assert harness("run", "--method", "ard", flag).code == 0
    assert cmd_run.run_command.params == before


def test_a_run_prints_its_row_beside_the_references(tiny: Task, harness: Harness, tmp_path: Path) -> None:
    done = harness(*ARD, "--history-layers", 2, "--results", tmp_path / "results")
    assert done.code == 0
    for part in ("teacher", "ard", "FID", "held-out", "record.json"):
        assert part in done.out
    assert re.match(r"about \d+ s on 1 threads, metrics not counted: reference samples .*, training .*\n", done.err)
    assert "training: 3/3" in done.err
    assert "about" not in harness(*ARD, "--history-layers", 2, "--results", tmp_path / "results").err  # it is there
    assert len(list((tmp_path / "results" / "runs").glob("*/record.json"))) == 2


def test_json_is_one_document_on_stdout(results: Path, harness: Harness) -> None:
    done = harness(*ARD, "--history-layers", 2, "--results", results, "--json")
    record = json.loads(done.out)
    assert (record["method"], record["status"]) == ("ard", "finished")
    path = results / "runs" / record["run_id"] / "record.json"
    assert json.loads(path.read_text()) == record


def settings(done: Done) -> dict[str, Any]:
    """The config and options of the record that a run printed as JSON."""
    assert done.code == 0, done.err
    record = json.loads(done.out)
    return {**record["config"], **record["options"], "method": record["method"]}


def test_values_from_file_flags_and_assignments(tiny: Task, harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"method": "ard", "task": "tiny", "num_steps": 4, "seed": 5, "options": {"history_layers": 1, "lr": 0.5}})
    )
    args = ["--config", path, "--results", tmp_path / "r", "--json", "--num-steps", 2, "--lr", 0.25, "--set", "budget=steps=1"]
    found = settings(harness("run", *args, "--set", "weight-decay=0.1"))
    expected = {"method": "ard", "num_steps": 2, "seed": 5, "history_layers": 1, "lr": 0.25, "total_steps": 1, "weight_decay": 0.1}
    assert {key: found[key] for key in expected} == expected


def test_the_command_line_and_python_ask_for_the_same_run(results: Path) -> None:
    config = RunConfig(method="ard", task="tiny", num_steps=2, options={"history_layers": 2})
    assert (results / "runs" / resolve(config).run_id / "record.json").exists()


def test_a_failed_run_exits_with_3(tiny: Task, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runs.run.sampler_of", lambda method, grad=False: lambda x_T, cond, noise: x_T * float("nan"))
    done = harness(*ARD, "--history-layers", 2, "--results", tmp_path / "r")
    assert done.code == 3
    assert done.err.splitlines()[-1].endswith("failed: samples of noise set 0 are not finite")


STOPS = [Interrupted("stopped by signal 15; the same command resumes it"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", STOPS, ids=["signal", "key"])
def test_an_interrupted_run_exits_with_130(error: BaseException, tiny: Task, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("harness.runs.run.run", stop)
    done = harness(*ARD, "--history-layers", 2)
    assert done.code == 130
    assert done.err.splitlines()[-1].startswith("harness: ")
    assert "the same command resumes" in done.err
    assert "Traceback" not in done.err


# report


def test_a_report_in_every_form(results: Path, harness: Harness, tmp_path: Path) -> None:
    markdown = harness("report", results)
    assert markdown.code == 0
    assert "## tiny" in markdown.out
    assert "| ard, history_layers 2 " in markdown.out
    csv = harness("report", results, "--format", "csv").out.splitlines()
    assert csv[0].startswith("task,method,steps,training")
    assert csv[1].startswith("tiny,teacher,4,none")
    records = json.loads(harness("report", results, "--json").out)
    assert {record["method"] for record in records} == {"teacher", "ard"}
    assert harness("report", results, "-o", tmp_path / "page.md").out == ""
    assert (tmp_path / "page.md").read_text().strip() == markdown.out.strip()


def test_publishing_writes_a_page_that_can_be_reported_again(results: Path, harness: Harness) -> None:
    done = harness("report", results, "--publish")
    assert done.code == 0
    assert f"wrote {results / 'tiny' / 'README.md'}" in done.err
    text = (results / "tiny" / "README.md").read_text()
    assert "![samples](samples/ard-2-" in text
    assert harness("report", results / "tiny").out == harness("report", results).out


def test_mixed_identities_exit_with_4(results: Path, harness: Harness) -> None:
    path = next((results / "runs").glob("ard-*")) / "record.json"
    record = read_record(path)
    fid = record.metrics["fid"]
    record.metrics["fid"] = fid.model_copy(update={"identity": {**fid.identity, "task_version": 2}})
    write_record(path, record)
    assert sentence(harness("report", results), 4).endswith("they differ in task_version; keep them below results folders of their own")


# list, describe, env, teacher


def test_lists(harness: Harness) -> None:
    assert json.loads(harness("list", "methods", "--json").out).keys() == set(METHODS.names())
    assert json.loads(harness("list", "solvers", "--json").out).keys() == set(SOLVERS.names())
    assert json.loads(harness("list", "tasks", "--json").out) == {name: load_task(name).spec.summary for name in task_names()}
    assert json.loads(harness("list", "metrics", "--json").out)["fid"] == "lower is better"
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


@pytest.mark.parametrize(("name", "text"), [("heun", "second order"), ("fid", "direction: lower"), ("tiny", "trajectories:")])
def test_describe_solvers_metrics_and_tasks(name: str, text: str, tiny: Task, harness: Harness) -> None:
    assert text in harness("describe", name).out
    assert json.loads(harness("describe", name, "--json").out)["name"] == name


def test_describe_an_unknown_name(harness: Harness) -> None:
    done = harness("describe", "hein")
    assert (done.code, done.err) == (2, "harness: unknown name 'hein'; did you mean heun?\n")


def test_help_lists_the_allowed_words(harness: Harness) -> None:
    text = " ".join(harness("run", "--method", "ard", "--help").out.split())
    assert "one of: states, predictions, renoised; default: predictions" in text
    assert "one of: fp32, bf16; default: fp32" in text


def test_env_names_versions(harness: Harness) -> None:
    found = json.loads(harness("env", "--json").out)
    assert found["harness"] == __version__
    assert found["packages"].keys() >= {"torch", "torch-fidelity"}
    assert "torch" in harness("env", "--device", "cpu").out
    assert __version__ in harness("--version").out


@pytest.mark.parametrize("method", ["denoising", "teacher", "step-distillation", "ard"])
def test_cost_counts_each_kind_of_layer(method: str, harness: Harness) -> None:
    found = json.loads(harness("cost", "--method", method, "--network", "DiT-S/8", "--num-steps", 2, "--json").out)
    assert sum(found["by_kind"].values()) == found["macs"]
    assert found["by_kind"]["MLP"] == 2 * 12 * 16 * 8 * 384**2  # steps, layers, tokens, 8 d^2
    assert found["by_kind"]["other"] == 0


def test_a_card_that_does_not_fit_exits_with_1(tiny: Task, harness: Harness) -> None:
    done = harness("teacher", "verify", "--task", "tiny")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("harness: features: held_out_accuracy is ")
    assert done.err.splitlines()[-1].endswith("its card says 0.5: not the same")


def test_teacher_train_prints_files_and_hashes(tiny: Task, harness: Harness, tmp_path: Path) -> None:
    done = harness("teacher", "train", "--task", "tiny", "--results", tmp_path / "results", "--json")
    found = json.loads(done.out)
    assert sorted(Path(path).name for path in found) == ["features.safetensors", "teacher.safetensors"]
    assert all(Path(path).is_file() for path in found)


def test_networks_of_a_task_given_as_a_file_go_to_the_results(
    tiny: Task, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Path] = []
    monkeypatch.setattr("harness.runs.teacher_training.train_networks", lambda task, folder, *others: given.append(folder) or [])
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**tiny.spec.model_dump(mode="json", exclude_none=True), "name": "own"}))
    assert harness("teacher", "train", "--task", tmp_path / "own.yaml", "--results", tmp_path / "results").code == 0
    assert given == [tmp_path / "results" / "teachers" / "own"]


def test_without_arguments_help_is_shown(harness: Harness) -> None:
    done = harness("--help")
    assert done.code == 0
    for command in ("run", "report", "list", "describe", "env", "teacher"):
        assert command in done.out


def test_shells_can_complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_HARNESS_COMPLETE", "bash_source")
    with pytest.raises(SystemExit):
        main([], prog_name="harness")
    assert "_harness_completion" in capsys.readouterr().out


def test_a_dry_run_shows_and_makes_nothing(tiny: Task, tmp_path: Path, harness: Harness) -> None:
    words = [*ARD, "--history-layers", "2", "--results", tmp_path / "results", "--device", "cpu", "--dry-run"]
    first = harness(*words)
    assert first.code == 0
    for part in (": new", "total_steps: 3", "history_layers: 2", "trajectories: to be made", "training", "network passes"):
        assert part in first.out
    assert not (tmp_path / "results").exists()
    harness(*words[:-1])
    again = harness(*words)
    assert ": finished" in again.out
    assert "about" not in again.out
    assert json.loads(harness(*words, "--json").out)["state"] == "finished"


def test_an_interrupt_during_the_imports_is_no_traceback() -> None:
    started = subprocess.run([sys.executable, "-c", INTERRUPTED, "env"], capture_output=True, text=True)
    assert (started.returncode, started.stdout) == (130, "")
    assert started.stderr.strip() == "harness: interrupted; the same command resumes a run"


INTERRUPTED = """
import builtins
import harness.__main__
original = builtins.__import__
def interrupted(name, *more, **rest):
    if name == "torch":
        raise KeyboardInterrupt
    return original(name, *more, **rest)
builtins.__import__ = interrupted
harness.__main__.main()
"""
