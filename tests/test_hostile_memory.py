"""What refusing a bomb costs: little memory above the imports, and no byte beyond the limits.

Nothing here is timed: work is bounded by what is read, and what is read has limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bombs
import pytest
import torch
import yaml

from harness.documents import MOST_LINE, MOST_TEXT
from harness.training.tiny_task import tiny_spec

MOST = 500 * 10**6
"""Bytes above the level of the imports."""
pytestmark = pytest.mark.slow  # a process of its own, and bombs on the disk

CHILD = """
import json, os, pathlib, sys
sys.path[:0] = json.loads(os.environ["HARNESS_TEST_PATH"])
import torch, diffusers
import harness.cli.cmd_run, harness.cli.cmd_evaluate, harness.networks.checkpoints
import harness.runs.external, harness.runs.encoding, harness.report.html, harness.sweeps.search
from harness.cli.main import main
own = pathlib.Path("/proc/self")
def kept(kind):  # VmRSS is what the process has now, VmHWM the most it had since it was cleared
    lines = dict(line.split(":") for line in (own / "status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])
found = {}
for name, words in json.loads(sys.stdin.read()).items():
    before = kept("VmRSS")
    (own / "clear_refs").write_text("5")
    try:
        main(words)
    except SystemExit as ended:
        found[name] = [ended.code, kept("VmHWM") - before]
print(json.dumps(found))
"""
SEARCH = "search: {trials: 1, objectives: {fid: minimize}, space: {batch_size: {low: 1, high: "


def attacks(folder: Path) -> dict[str, list[str]]:
    """Command lines by attack; each reads a file or a number that would fill the memory."""
    content = tiny_spec(folder)
    out = str(folder / "out.safetensors")

    def task(name: str, **changes: object) -> str:
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**content, "name": name, **changes}))
        return str(path)

    def file(name: str, write: Callable[[Path], object]) -> str:
        write(folder / name)
        return str(folder / name)

    own = task("own")
    deep = {**content["network"], "depth": 10**6}
    wide = {**content["network"], "hidden_size": 2**16, "depth": 10**4}
    rows = bombs.GIGABYTES // 2**24 * 2**24 // 64
    head = bombs.npy_header((rows, 8, 8, 1), "|u1")
    bomb = file("bomb.npz", lambda path: bombs.packed_zeros(path, "arr_0.npy", head))
    sparse = file("sparse.yaml", lambda path: truncated(path, 10**11))
    lines = file("records.jsonl", lambda path: truncated(path, 10**11))
    expanded = {"pos_embed": torch.zeros(1).expand(10**6, 10**6)}
    autoencoder = folder / "autoencoder"
    autoencoder.mkdir()
    (autoencoder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    encode = ["--size", "8", "--autoencoder", str(autoencoder), "--out", str(folder / "latents")]
    large = {**content["data"], "shape": [1, 10**6, 10**6]}
    run = ["run", "--method", "teacher", "--results", str(folder / "r"), "--task"]
    pickled = file("deep.pkl", lambda path: bombs.packed_zeros(path, "archive/data.pkl", b"\x80\2"))
    return {
        "zip bomb as samples": ["evaluate", "--task", own, "--samples", bomb],
        "zip bomb as data": ["data", "encode", "--images", bomb, *encode],
        "zip bomb as checkpoint": ["teacher", "import", pickled, "--out", out],
        "one number as 10^12": [
            *("teacher", "import", file("dit.pt", lambda path: torch.save(expanded, path))),
            *("--out", out),
        ],
        "YAML bomb": ["run", "--config", file("l.yaml", lambda p: p.write_text(bombs.laughs(25)))],
        "YAML without an end": ["run", "--config", "/dev/zero"],
        "YAML of 100 GB": ["sweep", sparse],
        "prompts without an end": ["data", "prompts", "/dev/zero", "--encoder", "x", "--out", out],
        "records of 100 GB": ["report", str(Path(lines).parent)],
        "10^6 layers": [*run, task("deep", network=deep)],
        "3 PB of weights": [*run, task("wide", network=wide)],
        "images of 10^6 px": [
            *run,
            task("px", data=large),
        ],
        "a range to 9 x 10^18": [
            "sweep",
            file(
                "s.yaml",
                lambda path: path.write_text(
                    f"base: {{task: {own}, method: step-distillation, num_steps: 2}}\n"
                    f"{SEARCH}9000000000000000000}}}}}}"
                ),
            ),
            "--dry-run",
        ],
        "10^9 steps": [*run[:2], "reflow", *run[3:], own, "--budget", "steps=1000000000"],
    }


def truncated(path: Path, size: int) -> None:
    """A file of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Exit code and bytes of each attack, one after the other in one child."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("bombs")
    given = attacks(folder)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            "HARNESS_TEST_PATH": json.dumps(sys.path),
            "HARNESS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("harness: ") == len(given), done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == given.keys()
    return found


def test_every_attack_is_refused(costs: dict[str, list[int]]) -> None:
    assert {name for name, (code, _) in costs.items() if code != 2} == set()


def test_refusing_takes_little_memory(costs: dict[str, list[int]]) -> None:
    """The peak of each lies less than 500 MB above what the process had before it."""
    assert {name: grown for name, (_, grown) in costs.items() if grown > MOST} == {}


def test_the_limits_leave_room(costs: dict[str, list[int]]) -> None:
    """A text that is just small enough is read into less than the limit, twice over."""
    assert 2 * MOST_LINE < MOST
    assert MOST_TEXT < MOST
