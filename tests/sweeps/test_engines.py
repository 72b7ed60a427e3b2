"""Sweeps whose processes are killed: each run resumes, finishes once, and equals a quiet one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner

from harness.cli.main import main
from harness.errors import UsageError
from harness.records import read_record
from harness.runs.config import parse_config
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.sweeps.engines import Job, Ray, run_child, shares_of

CPU = torch.device("cpu")
STEPS, PAUSE = 6, 3
PAUSING = f"""
import signal, time
from harness.training.trainer import Trainer

one_step = Trainer.one_step

def pausing(self):
    if self.step == {PAUSE} and not (self.folder / "go").exists():
        self._save([])
        handler = signal.getsignal(signal.SIGTERM)
        mark = self.folder / "signalled"
        signal.signal(signal.SIGTERM, lambda *given: (mark.touch(), handler(*given)))
        (self.folder / "waits").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.02)
    with (self.folder / "steps").open("a") as file:
        print(self.step, file=file)
    return one_step(self)

Trainer.one_step = pausing
"""
"""A plug-in: training writes a checkpoint and waits for a file, and notes that SIGTERM has come."""


class Sweep:
    """A sweep of the tiny task in a folder, by real processes."""

    def __init__(self, folder: Path, task: Path):
        self.folder, self.results = folder, folder / "results"
        self.base = {
            "task": str(task),
            "method": "step-distillation",
            "num_steps": 2,
            "budget": f"steps={STEPS}",
            "noise_sets": 1,
        }
        self.started: list[subprocess.Popen] = []
        (folder / "pausing.py").write_text(PAUSING)

    def start(
        self,
        content: dict[str, Any],
        *more: str,
        inside: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen:
        """The driver of a sweep file."""
        path = self.folder / "sweep.yaml"
        path.write_text(yaml.safe_dump({"base": self.base, **content}))
        words = [
            sys.executable,
            "-m",
            "harness",
            "sweep",
            str(path),
            "--results",
            str(self.results),
            "--device",
            "cpu",
        ]
        words += ["--plugin", str(self.folder / "pausing.py"), *more]
        one_thread = {**(env or os.environ), "OMP_NUM_THREADS": "1"}  # as many as a quiet run
        self.started.append(subprocess.Popen([*inside, *words], env=one_thread))
        return self.started[-1]

    def waiting(self, count: int = 1) -> list[Path]:
        """The runs that wait in their training, once there are so many."""

        def found() -> list[Path]:
            assert self.started[-1].poll() is None, "the driver has ended"
            return paths if len(paths := self.paths("waits")) == count else []

        return wait_until(found)

    def go(self) -> None:
        for path in self.paths("waits"):
            (path.parent / "go").touch()

    def paths(self, name: str) -> list[Path]:
        return sorted(self.results.glob(f"runs/*/{name}"))

    def check(self, count: int) -> None:
        """Every run is finished once, took each step once, and has the metrics of a quiet one."""
        records = [read_record(path) for path in self.paths("record.json")]
        assert [record.status for record in records] == ["finished"] * count
        assert [path.read_text().split() for path in self.paths("steps")] == [
            list(map(str, range(STEPS)))
        ] * count
        assert [path.read_text().count("is finished") for path in self.paths("run.log")] == [
            1
        ] * count
        for record in records:
            config = parse_config(
                {
                    **self.base,
                    "seed": record.config["seed"],
                    "purpose": record.config.get("purpose", "evaluate"),
                    "options": record.options,
                }
            )
            quiet = Run(resolve(config), self.folder / "quiet", CPU).execute()
            assert (quiet.run_id, quiet.metrics) == (record.run_id, record.metrics)


@pytest.fixture
def sweep(tiny_folder: Path, tmp_path: Path) -> Iterator[Sweep]:
    made = Sweep(tmp_path, tiny_folder / "tiny.yaml")
    yield made
    made.go()
    for process in made.started:
        process.kill()
        process.wait()


def wait_until(true: Callable[[], Any]) -> Any:
    """The first true answer; a test's own time limit ends the wait."""
    while not (found := true()):
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_a_killed_child_is_started_again_and_resumes(sweep: Sweep) -> None:
    driver = sweep.start({"seeds": [0, 1]}, "--workers", "2")
    sweep.waiting(2)
    child, _ = psutil.Process(driver.pid).children()
    child.kill()
    sweep.go()
    assert driver.wait() == 0
    sweep.check(2)
    assert sorted(path.read_text().count("starts: code") for path in sweep.paths("run.log")) == [
        1,
        2,
    ]


def kill_driver(driver: subprocess.Popen, sweep: Sweep) -> None:
    """Kills a driver while its only child waits; returns once that child has ended."""
    (child,) = psutil.Process(driver.pid).children()
    driver.kill()
    wait_until(lambda: sweep.paths("signalled"))
    sweep.go()
    psutil.wait_procs([child])


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_child_and_the_same_command_goes_on(sweep: Sweep) -> None:
    driver = sweep.start({})
    sweep.waiting()
    kill_driver(driver, sweep)
    (log,) = sweep.paths("run.log")
    assert (
        f"stopped by signal {signal.SIGTERM} at step {PAUSE + 1}; the same command resumes it"
        in log.read_text()
    )
    assert sweep.start({}).wait() == 0
    sweep.check(1)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_driver_that_is_stopped_waits_for_a_checkpoint(
    number: signal.Signals, sweep: Sweep
) -> None:
    driver = sweep.start({})
    sweep.waiting()
    driver.send_signal(number)
    wait_until(lambda: sweep.paths("signalled"))
    sweep.go()
    assert driver.wait() == 130
    (log,) = sweep.paths("run.log")
    assert (
        f"stopped by signal {signal.SIGTERM} at step {PAUSE + 1}; the same command resumes it"
        in log.read_text()
    )
    assert sweep.paths("checkpoint/state.pt")


@pytest.mark.slow
def test_a_search_whose_driver_is_killed_goes_on_with_its_trial(sweep: Sweep) -> None:
    space = {"options.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    content = {"search": {"trials": 1, "objectives": {"fid": "minimize"}, "space": space}}
    driver = sweep.start(content)
    sweep.waiting()
    kill_driver(driver, sweep)
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{sweep.results / 'harness.db'}")

    def trials() -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(
            study_name=study.study_name, storage=f"sqlite:///{sweep.results / 'harness.db'}"
        ).trials

    (before,) = trials()
    assert before.state.name == "RUNNING"
    assert sweep.start(content).wait() == 0
    (after,) = trials()
    assert (after.state.name, after.params) == ("COMPLETE", before.params)
    sweep.check(1)


@pytest.mark.slow
def test_jobs_of_a_cluster(sweep: Sweep) -> None:
    """By submitit's own local cluster; a job that is killed is submitted again."""
    pytest.importorskip("submitit")
    driver = sweep.start(
        {}, "--engine", "slurm", "--engine-set", "cluster=local", "--engine-set", "timeout_min=30"
    )
    sweep.waiting()
    (child,) = [
        one
        for one in psutil.Process(driver.pid).children(recursive=True)
        if "_job" in one.cmdline()
    ]
    child.kill()
    sweep.go()
    assert driver.wait() == 0
    sweep.check(1)
    assert "training: " in "".join(
        path.read_text() for path in (sweep.results / "jobs").rglob("*_log.err")
    )


class Cluster:
    """A Ray cluster in a network of its own, with the loopback alone: Ray listens everywhere."""

    def __init__(self, folder: Path):
        made = "ip link set lo up && echo up && exec sleep infinity"
        self.holder = subprocess.Popen(
            ["unshare", "-rn", "sh", "-c", made], stdout=subprocess.PIPE, text=True
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "up\n"
        self.inside = ["nsenter", "-t", str(self.holder.pid), "-U", "--preserve-credentials", "-n"]
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(folder),
            "RAY_ADDRESS": "127.0.0.1:6399",
            "HOME": str(folder),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def node(self, *where: str) -> psutil.Process:
        """Starts a node with one CPU; returns its raylet."""
        before = set(self.processes())
        words = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            *where,
            "--num-cpus=1",
            "--object-store-memory=100000000",
        ]
        environment = {
            name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"
        }
        subprocess.run(
            [*self.inside, *words, "--disable-usage-stats"],
            env=environment,
            check=True,
            capture_output=True,
        )
        (raylet,) = (
            process for process in set(self.processes()) - before if process.name() == "raylet"
        )
        return raylet

    def processes(self) -> list[psutil.Process]:
        """All in this network."""
        found, network = [], Path(f"/proc/{self.holder.pid}/ns/net").readlink()
        for process in psutil.process_iter():
            with suppress(OSError, psutil.NoSuchProcess):
                if Path(f"/proc/{process.pid}/ns/net").readlink() == network:
                    found.append(process)
        return found

    def close(self) -> None:
        ended = self.processes()
        for process in ended:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.holder.wait()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """An empty cluster; its folder has a short name, since sockets have."""
    pytest.importorskip("ray")
    if (
        shutil.which("nsenter") is None
        or subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no private network can be made here (unshare -rn)")
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    made = Cluster(folder)
    yield made
    made.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_ray_node_that_is_killed(sweep: Sweep, cluster: Cluster) -> None:
    """The run of a killed node resumes on the other one; a driver that is stopped saves its run."""
    cluster.node("--head", "--port=6399", "--include-dashboard=false")
    second = cluster.node("--address=127.0.0.1:6399")
    driver = sweep.start(
        {"seeds": [0, 1]},
        "--workers",
        "2",
        "--engine",
        "ray",
        inside=cluster.inside,
        env=cluster.environment,
    )
    sweep.waiting(2)
    (job,) = (
        one for one in cluster.processes() if "_job" in one.cmdline() and second in one.parents()
    )
    second.kill()
    wait_until(
        lambda: (
            not job.is_running() or job.status() == psutil.STATUS_ZOMBIE or sweep.paths("signalled")
        )
    )
    sweep.go()
    assert driver.wait() == 0
    sweep.check(2)
    assert sorted(path.read_text().count("starts: code") for path in sweep.paths("run.log")) == [
        1,
        2,
    ]

    stopped = sweep.start(
        {"seeds": [2]}, "--engine", "ray", inside=cluster.inside, env=cluster.environment
    )
    sweep.waiting(3)
    stopped.terminate()
    wait_until(lambda: sweep.paths("signalled"))
    sweep.go()
    assert stopped.wait() == 130
    assert len(sweep.paths("checkpoint/state.pt")) == 1


def test_shares_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    assert shares_of(CPU, 2) == [{"OMP_NUM_THREADS": str(max(1, threads // 2))}] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares_of(torch.device("cuda"), 3)] == [
        "0",
        "1",
        "0",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares_of(torch.device("cuda"), 2)] == [
        "4",
        "6",
    ]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares_of(torch.device("cuda:1"), 2)] == [
        "6",
        "6",
    ]


def test_a_child_that_is_refused_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_child(Job(("report", str(tmp_path / "nowhere")))) == UsageError.exit_code
    assert "harness: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--engine-set", "timeout_min=1"], "--engine-set belongs to --engine slurm or ray"),
        (["--engine", "slurm", "--engine-set", "timeout_min"], "has no '='; give KEY=VALUE"),
        (
            ["--engine", "slurm", "--engine-set", "cluster=local", "--engine-set", "timeout=1"],
            "cannot use Slurm: Parameter 'timeout'",
        ),
        (["--engine", "slurm", "--engine-set", "cluster=nowhere"], "cannot use Slurm: "),
        (["--engine", "slurm"], "cannot use Slurm: "),
    ],
)
def test_an_engine_that_cannot_be_used(
    more: list[str], complaint: str, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # where there is a Slurm after all
    file = sweep.folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": sweep.base}))
    done = CliRunner().invoke(
        main, ["sweep", str(file), "--results", str(sweep.results), "--device", "cpu", *more]
    )
    assert (done.exit_code, complaint in done.output) == (2, True), done.output


def test_ray_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is started: it would listen on every interface."""
    ray = pytest.importorskip("ray")

    def init(address: str, **options: Any) -> None:
        assert address == "auto"
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        UsageError,
        match="no Ray cluster answers: start one by `ray start --head`, or name it in RAY_ADDRESS",
    ):
        Ray({})


def test_engines_import_no_torch() -> None:
    """Jobs of Slurm and workers of Ray import them, to start a child that imports it."""
    code = "import sys, harness.sweeps.engines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
