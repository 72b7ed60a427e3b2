"""The device script at toy sizes on the CPU: every part runs, and what fails is a row."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.device.__main__ import PARTS, main, run_part, supervise
from benchmarks.device.rows import Report, Setting, Values, run_rows
from benchmarks.device.teacher import OutOfTime, at_most

CPU = torch.device("cpu")


def setting(folder: Path, seconds: float = 1e6) -> Setting:
    return Setting(CPU, True, folder, time.time() + seconds)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """A file in which the part `checks` has started."""
    found = Report(tmp_path / "cpu.json")
    found.start("checks", {"card": "cpu"})
    return found


@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=[pytest.mark.slow] if p == "speed" else []) for p in PARTS]
)
def test_a_part_runs_at_toy_sizes(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    report = Report(tmp_path / "cpu.json")
    report.start(part, {})
    run_part(part, setting(tmp_path), report)
    rows = report.read()["parts"][part]["rows"]
    assert rows
    assert {row["row"]: row.get("reason") for row in rows if row["status"] == "failed"} == {}
    if part == "teacher":
        assert (tmp_path / "digits-teacher.safetensors").is_file()
        assert "guidance_scan" in (tmp_path / "digits-teacher.yaml").read_text()


def test_each_row_is_written_at_once_and_one_that_fails_is_a_row(
    report: Report, tmp_path: Path
) -> None:
    on_disk = []

    def first() -> Values:
        return {"value": 1.0}

    def second() -> Values:
        on_disk.extend(row["row"] for row in report.read()["parts"]["checks"]["rows"])
        raise RuntimeError("no kernel image is available")

    calls = {
        "first": first,
        "second": second,
        "third": lambda: {"error": 0.5, "limits": {"error": 0.1}},
    }
    run_rows("checks", iter(calls.items()), setting(tmp_path), report)
    rows = json.loads(report.path.read_text())["parts"]["checks"]["rows"]
    assert on_disk == ["first"]
    assert [row["status"] for row in rows] == ["finished", "failed", "failed"]
    assert rows[1]["reason"].startswith(
        "RuntimeError: no kernel image is available (test_device_benchmark.py:"
    )
    assert rows[2]["reason"] == "error is 0.5, above 0.1"


def test_a_value_that_is_not_a_number_is_above_its_limit(report: Report, tmp_path: Path) -> None:
    run_rows(
        "checks",
        iter([("row", lambda: {"error": float("nan"), "limits": {"error": 0.1}})]),
        setting(tmp_path),
        report,
    )
    assert report.read()["parts"]["checks"]["rows"][0]["status"] == "failed"


def test_without_time_a_row_is_skipped(report: Report, tmp_path: Path) -> None:
    run_rows("checks", iter([("row", lambda: {"value": 1.0})]), setting(tmp_path, -1.0), report)
    (row,) = report.read()["parts"]["checks"]["rows"]
    assert (row["status"], row["reason"]) == ("skipped", "no time was left")


@pytest.mark.parametrize(
    ("code", "grace", "reason"),
    [
        ("import os; os._exit(7)", 500.0, "its process ended with exit code 7"),
        ("import time; time.sleep(600)", 0.0, "it was killed after"),
    ],
)
def test_a_part_that_dies_or_hangs_leaves_its_reason(
    code: str, grace: float, reason: str, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.device.__main__.GRACE", grace)
    supervise("run", [sys.executable, "-c", code], time.time(), report, {"card": "cpu"})
    parts = report.read()["parts"]
    assert parts["run"]["status"] == "failed"
    assert parts["run"]["reason"].startswith(reason)
    assert parts["checks"]["card"] == "cpu"


def test_the_command_runs_its_parts_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.device.__main__.smi", lambda field: "")
    started = []
    monkeypatch.setattr(
        "benchmarks.device.__main__.supervise",
        lambda part, *more: started.append((part, more[0][-4:])),
    )
    done = CliRunner().invoke(
        main, ["--toy", "--device", "cpu", "--out", str(tmp_path), "--parts", "run,teacher"]
    )
    assert done.exit_code == 0, done.output
    assert [(part, words[:2]) for part, words in started] == [
        ("run", ["--only", "run"]),
        ("teacher", ["--only", "teacher"]),
    ]
    assert CliRunner().invoke(main, ["--parts", "nothing"]).exit_code == 2


def test_what_takes_too_long_is_stopped() -> None:
    with pytest.raises(OutOfTime, match="took longer than 0 s"), at_most(0.01):
        time.sleep(600)
