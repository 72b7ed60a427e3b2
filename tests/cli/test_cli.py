"""`harness run` and `report`: help, exit codes, one sentence on stderr, JSON on stdout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ARD, Done, Harness

from harness.cli import cmd_run
from harness.cli.main import main
from harness.errors import Interrupted
from harness.records import read_record, write_record
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.tasks import Task

# help


def test_without_arguments_help_is_shown(harness: Harness) -> None:
    done = harness("--help")
    assert done.code == 0
    for command in ("run", "report", "list", "describe", "env", "teacher"):
        assert command in done.out


def test_shells_can_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_HARNESS_COMPLETE", "bash_source")
    with pytest.raises(SystemExit):
        main([], prog_name="harness")
    assert "_harness_completion" in capsys.readouterr().out


def test_help_lists_the_allowed_words(harness: Harness) -> None:
    text = " ".join(harness("run", "--method", "ard", "--help").out.split())
    assert "one of: states, predictions, renoised; default: states" in text
    assert "one of: fp32, bf16; default: fp32" in text


# run


def test_help_shows_the_options_of_the_named_method(tiny: Task, harness: Harness) -> None:
    ard = harness("run", "--method", "ard", "--help")
    assert ard.code == 0
    assert "--history-layers" in ard.out
    assert "(paper: N)" in " ".join(ard.out.split())
    assert "--num-steps" in ard.out
    teacher = harness("run", "--method", "teacher", "--help")
    assert "--history-layers" not in teacher.out
    assert "--solver" in teacher.out
    assert "--history-layers" not in harness("run", "--help").out


def test_help_shows_the_defaults_of_a_task(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def help_of(*words: Any) -> str:
        return " ".join(harness("run", *words, "--help").out.split())

    assert "default: 6, on fashion-mnist 3]" in help_of(
        "--method", "ard", "--task", "fashion-mnist"
    )
    (tmp_path / "config.yaml").write_text("{method: ard, task: fashion-mnist}")
    assert "default: 6, on fashion-mnist 3]" in help_of("--config", tmp_path / "config.yaml")
    assert "default: 6, on digits 1]" in help_of("--method", "ard")
    (tmp_path / "mine.yaml").write_text("{like: digits, defaults: {ect: {lr: 2.78e-4}}}")
    monkeypatch.chdir(tmp_path)  # a short path is not wrapped
    assert ", on mine.yaml 0.000278]" in help_of("--method", "ect", "--task", "mine.yaml")
    assert "default: 6]" in help_of("--method", "ard", "--task", "fashion")
    assert ", on digits" not in harness("cost", "--method", "ect", "--help").out  # it has no task


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_leaves_no_option_behind(flag: str, tiny: Task, harness: Harness) -> None:
    before = list(cmd_run.run_command.params)
    assert harness("run", "--method", "ard", flag).code == 0
    assert cmd_run.run_command.params == before


def test_a_run_prints_its_row_beside_the_references(
    tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    done = harness(*ARD, "--history-layers", 2, "--results", tmp_path / "results")
    assert done.code == 0
    for part in ("teacher", "ard", "FID", "held-out", "record.json"):
        assert part in done.out
    assert re.match(
        r"about \d+ s on 1 threads: reference samples .*, training .*\n",
        done.err,
    )
    assert "training: 3/3" in done.err
    # The run exists already.
    again = harness(*ARD, "--history-layers", 2, "--results", tmp_path / "results")
    assert "about" not in again.err
    assert len(list((tmp_path / "results" / "runs").glob("*/record.json"))) == 2


def test_json_is_one_document_on_stdout(results: Path, harness: Harness) -> None:
    done = harness(*ARD, "--history-layers", 2, "--results", results, "--json")
    record = json.loads(done.out)
    assert (record["method"], record["status"]) == ("ard", "finished")
    path = results / "runs" / record["run_id"] / "record.json"
    written = json.loads(path.read_text())
    assert {**record, "sha256": written["sha256"]} == written


def settings(done: Done) -> dict[str, Any]:
    """The config and options of the record that a run printed as JSON."""
    assert done.code == 0, done.err
    record = json.loads(done.out)
    return {**record["config"], **record["options"], "method": record["method"]}


def test_values_from_file_flags_and_assignments(
    tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "method": "ard",
                "task": "tiny",
                "num_steps": 4,
                "seed": 5,
                "options": {"history_layers": 1, "lr": 0.5},
            }
        )
    )
    args = [
        "--config",
        path,
        "--results",
        tmp_path / "r",
        "--json",
        "--num-steps",
        2,
        "--lr",
        0.25,
        "--set",
        "budget=steps=1",
    ]
    found = settings(harness("run", *args, "--set", "weight-decay=0.1"))
    expected = {
        "method": "ard",
        "num_steps": 2,
        "seed": 5,
        "history_layers": 1,
        "lr": 0.25,
        "total_steps": 1,
        "weight_decay": 0.1,
    }
    assert {key: found[key] for key in expected} == expected


def test_the_command_line_and_python_ask_for_the_same_run(results: Path) -> None:
    config = RunConfig(method="ard", task="tiny", num_steps=2, options={"history_layers": 2})
    assert (results / "runs" / resolve(config).run_id / "record.json").exists()


def test_a_failed_run_exits_with_3(
    tiny: Task, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "harness.runs.run.sampler_of",
        lambda method, grad=False: lambda x_T, cond, noise: x_T * float("nan"),
    )
    done = harness(*ARD, "--history-layers", 2, "--results", tmp_path / "r")
    assert done.code == 3
    assert done.err.splitlines()[-1].endswith("failed: samples of noise set 0 are not finite")


STOPS = [Interrupted("stopped by signal 15; the same command resumes it"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", STOPS, ids=["signal", "key"])
def test_an_interrupted_run_exits_with_130(
    error: BaseException, tiny: Task, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("harness.runs.run.run", stop)
    done = harness(*ARD, "--history-layers", 2)
    assert done.code == 130
    assert done.err.splitlines()[-1].startswith("harness: ")
    assert "the same command resumes" in done.err
    assert "Traceback" not in done.err


def test_a_dry_run_shows_and_makes_nothing(tiny: Task, tmp_path: Path, harness: Harness) -> None:
    words = [
        *ARD,
        "--history-layers",
        "2",
        "--results",
        tmp_path / "results",
        "--device",
        "cpu",
        "--dry-run",
    ]
    first = harness(*words)
    assert first.code == 0
    for part in (
        ": new",
        "total_steps: 3",
        "history_layers: 2",
        "trajectories: to be made",
        "training",
        "network passes",
    ):
        assert part in first.out
    assert not (tmp_path / "results").exists()
    harness(*words[:-1])
    again = harness(*words)
    assert ": finished" in again.out
    assert "about" not in again.out
    assert json.loads(harness(*words, "--json").out)["state"] == "finished"


def test_an_interrupt_during_the_imports_is_no_traceback() -> None:
    started = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "env"], capture_output=True, text=True
    )
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


def test_publishing_writes_a_page_that_can_be_reported_again(
    results: Path, harness: Harness
) -> None:
    done = harness("report", results, "--publish")
    assert done.code == 0
    assert f"wrote {results / 'tiny' / 'README.md'}" in done.err
    text = (results / "tiny" / "README.md").read_text()
    assert "![samples](samples/ard-2-" in text
    assert harness("report", results / "tiny").out == harness("report", results).out


def test_one_incomparable_record_stops_no_report(results: Path, harness: Harness) -> None:
    path = next((results / "runs").glob("ard-*")) / "record.json"
    record = read_record(path)
    fid = record.metrics["fid"]
    record.metrics["fid"] = fid.model_copy(update={"identity": {**fid.identity, "task_version": 2}})
    write_record(path, record)
    done = harness("report", results)
    assert done.code == 0
    assert "### All rows" in done.out
    assert "task_version 2 instead of 1" in done.out or "task_version 1 instead of 2" in done.out
    assert "differs in" in harness("report", results, "--format", "csv").out
