"""Several workers at one sweep: jobs of a cluster, and a sweep during which everything is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
import torch
import yaml
from click.testing import CliRunner

from harness.cli.main import main
from harness.errors import UsageError
from harness.records import read_record
from harness.report.rows import load_records, rows_of
from harness.runs.leases import TABLE, leases_of
from harness.sweeps.submit import parameters_of, submit


def sweep_file(folder: Path, steps: int, seeds: list[int]) -> str:
    base = {"task": "mixture", "method": "step-distillation", "budget": f"steps={steps}", "noise_sets": 1, "batch_size": 32}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": base, "seeds": seeds}))
    return str(path)


def wait_until(true: Callable[[], Any], seconds: float = 600) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def logs(results: Path, run: str = "step-distillation-*") -> list[str]:
    return [path.read_text() for path in sorted((results / "runs").glob(f"{run}/run.log"))]


def test_jobs_of_a_cluster_share_the_work(tmp_path: Path) -> None:
    results = tmp_path / "results"
    words = ["sweep", sweep_file(tmp_path, 2, [0, 1]), "--results", str(results), "--device", "cpu", "--workers", "2"]
    words += ["--storage", f"sqlite:///{tmp_path / 'elsewhere.db'}"]
    done = CliRunner().invoke(main, [*words, "--submit", "local", "--submit-set", "timeout_min=10", "--json"])
    assert done.exit_code == 0, done.output
    assert "HARNESS_STORAGE" not in os.environ
    ids = json.loads(done.stdout)
    assert len(set(ids)) == 2
    wait_until(lambda: all((results / "jobs" / f"{job}_0_result.pkl").exists() for job in ids))
    assert [text.count("training is done") for text in logs(results)] == [1, 1]
    assert all(f" {max(1, torch.get_num_threads() // 2)} threads" in text for text in logs(results))
    assert (tmp_path / "elsewhere.db").exists()  # jobs were told where
    assert not (results / "harness.db").exists()
    assert "2 of 2 runs finished" in "".join((results / "jobs" / f"{job}_0_log.out").read_text() for job in ids)


def test_a_job_that_ends_badly_says_so(tmp_path: Path) -> None:
    (job,) = submit(["sweep", str(tmp_path / "nowhere.yaml")], 1, "local", tmp_path / "jobs", {})
    with pytest.raises(Exception, match=r"harness sweep .*nowhere.yaml ended with exit code 2"):
        job.result()


@pytest.mark.parametrize(("more", "complaint"), [
    (["--submit", "slurm"], "--submit slurm needs --storage postgresql+psycopg"),
    (["--submit", "slurm", "--storage", "sqlite:///x.db"], "--submit slurm needs --storage postgresql"),
    (["--submit-set", "timeout_min=1"], "--submit-set belongs to --submit"),
    (["--submit", "local", "--submit-set", "timeout_min"], "has no '='; give KEY=VALUE"),
    (["--submit", "local", "--submit-set", "timeout=1"], "cannot submit to local: Parameter 'timeout'"),
    (["--submit", "local", "--submit-set", "timeout_min=long"], 'cannot submit to local: Parameter "timeout_min" expected type'),
])  # fmt: skip
def test_what_cannot_be_submitted(more: list[str], complaint: str, tmp_path: Path) -> None:
    words = ["sweep", sweep_file(tmp_path, 2, [0]), "--results", str(tmp_path / "results"), *more]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, complaint in done.output) == (2, True), done.output


def test_a_search_is_checked_before_workers_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cli.cmd_sweep.run_workers", lambda *words: pytest.fail("workers were started"))
    search = {"trials": 2, "objectives": {"frechet_distance": "minimize"}, "space": {"options.nothing": [1, 2]}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({"base": {"task": "mixture", "method": "ard"}, "search": search}))
    done = CliRunner().invoke(main, ["sweep", str(tmp_path / "search.yaml"), "--results", str(tmp_path), "--workers", "2"])
    assert (done.exit_code, "nothing" in done.output) == (2, True), done.output


def test_parameters_are_yaml_and_a_cluster_must_be_there(tmp_path: Path) -> None:
    assert parameters_of(["timeout_min=5", "slurm_partition=gpu"]) == {"timeout_min": 5, "slurm_partition": "gpu"}
    with pytest.raises(UsageError, match="cannot submit to slurm: "):
        submit(["sweep"], 1, "slurm", tmp_path, {})
    with pytest.raises(UsageError, match="cannot submit to nowhere: "):
        submit(["sweep"], 1, "nowhere", tmp_path, {})


def test_a_sweep_during_which_everything_is_killed(tmp_path: Path, server: Any) -> None:
    """SIGKILL to a worker, to PostgreSQL and to the starter: each run is finished once, and the table is that of a quiet sweep."""
    file, storage, seeds = sweep_file(tmp_path, 100, [0, 1, 2]), server.database(), [0, 1, 2]
    quiet, loud = tmp_path / "quiet", tmp_path / "loud"
    words = [sys.executable, "-m", "harness", "sweep", file, "--device", "cpu", "--results"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*words, str(quiet)], check=True, env=environment, capture_output=True)

    starter = subprocess.Popen([*words, str(loud), "--workers", "2", "--storage", storage], env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: sum("training starts" in text for text in logs(loud)) == 2)
    workers = psutil.Process(starter.pid).children()
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    server.kill()
    time.sleep(1)
    server.start()
    starter.kill()  # its other worker goes on alone
    starter.wait()
    assert workers[1].status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    subprocess.run([*words, str(loud), "--storage", storage], check=True, env=environment, capture_output=True)  # and a new one joins it
    wait_until(lambda: not workers[1].is_running() or workers[1].status() == psutil.STATUS_ZOMBIE)

    assert len(logs(loud)) == len(seeds)
    assert all(len([line for line in text.splitlines() if line.endswith("is finished")]) == 1 for text in logs(loud))
    assert sum(text.count(" starts: code ") for text in logs(loud)) == len(seeds) + 1  # the killed worker's run was taken over
    with leases_of(loud, storage).engine.connect() as connection:
        states = dict(connection.execute(sa.select(TABLE.c.name, TABLE.c.state)).all())
    assert {state for name, state in states.items() if name.startswith("step-distillation")} == {"finished"}
    records = [{path.parent.name: read_record(path) for path in folder.glob("runs/*/record.json")} for folder in (quiet, loud)]
    assert records[0].keys() == records[1].keys()
    assert all(records[1][name].metrics == record.metrics for name, record in records[0].items())
    assert len(rows_of(load_records(loud))) == len(rows_of(load_records(quiet)))
