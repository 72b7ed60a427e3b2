"""`python -m benchmarks.device`: runs each part in a process of its own, with a deadline."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import click
import torch

from benchmarks.device.rows import Report, Setting, Values, run_rows
from harness.provenance import capture_environment

STARTED = time.time()
PARTS = {"checks": 0.32, "run": 0.5, "speed": 0.66, "teacher": 1.0}
"""The parts in order, each with the fraction of the total time at which it should end."""
MARGIN, GRACE = 30.0, 20.0
"""Seconds kept free at the end, and seconds past its deadline after which a part is killed."""


@click.command()
@click.option("--minutes", default=8.0, show_default=True, help="Length of the whole run.")
@click.option("--device", default="cuda", show_default=True, help="The device under test.")
@click.option("--toy", is_flag=True, help="Sizes that a CPU measures in a minute.")
@click.option(
    "--out",
    default=Path("results/device"),
    type=click.Path(path_type=Path),
    show_default=True,
    help="Folder of the results.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder that holds FashionMNIST/raw, for the part `teacher`.",
)
@click.option(
    "--parts",
    default=",".join(PARTS),
    show_default=True,
    help="Which parts run, with commas between.",
)
@click.option("--only", default="", hidden=True, help="The part that this process runs.")
@click.option(
    "--until",
    default=0.0,
    hidden=True,
    help="When that part should end, in seconds since the epoch.",
)
def main(
    minutes: float,
    device: str,
    toy: bool,
    out: Path,
    data_dir: Path | None,
    parts: str,
    only: str,
    until: float,
) -> None:
    """Test and benchmark the harness on a device, then train a teacher in the time that is left."""
    if unknown := set(parts.split(",")) - PARTS.keys():
        raise click.BadParameter(
            f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}",
            param_hint="--parts",
        )
    if only:
        run_part(
            only, Setting(torch.device(device), toy, out, until), Report(out / file_name(device))
        )
        return
    command = [sys.executable, "-m", "benchmarks.device", *sys.argv[1:]]
    if data_dir is not None:
        os.environ["HARNESS_DATA"] = str(data_dir.resolve())
    length = 60 * minutes - MARGIN
    with tempfile.TemporaryDirectory() as cache:  # cold, and shared by the parts
        os.environ["HARNESS_CACHE"] = cache
        for part in parts.split(","):
            end = STARTED + PARTS[part] * length
            supervise(
                part,
                [*command, "--only", part, "--until", str(end)],
                end,
                Report(out / file_name(device)),
                about(device),
            )
    print(f"written: {out / file_name(device)}", flush=True)


def supervise(part: str, command: list[str], until: float, report: Report, about: Values) -> None:
    """Runs a part in a process of its own and notes how it ended, whatever happens to it."""
    report.start(part, about)
    started = time.monotonic()
    process = subprocess.Popen(command)
    try:
        code = process.wait(timeout=max(until - time.time(), 0.0) + GRACE)
        reason = "" if code == 0 else f"its process ended with exit code {code}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        reason = f"it was killed after {time.monotonic() - started:.0f} s, when its time was over"
    report.end(part, time.monotonic() - started, reason)


def run_part(part: str, setting: Setting, report: Report) -> None:
    """Runs a part in this process."""
    rows = import_module(f"benchmarks.device.{part}").rows(setting)
    run_rows(part, rows, setting, report)


def card_name(device: str) -> str:
    """What the device is called: a GPU's name, asked of its driver, or the CPU."""
    return smi("name") or torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def file_name(device: str) -> str:
    """Name of the JSON file, such as `nvidia-h100-80gb-hbm3.json`."""
    return re.sub(r"[^a-z0-9]+", "-", card_name(device).lower()).strip("-") + ".json"


def smi(field: str) -> str:
    """A field of nvidia-smi for the first GPU, or nothing where there is no nvidia-smi."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def about(device: str) -> Values:
    """Provenance of a part: machine, date, versions and command."""
    here = capture_environment(torch.device("cpu"))
    return {
        "card": card_name(device),
        "driver": smi("driver_version"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": here.cpu,
        "commit": os.environ.get("HARNESS_COMMIT") or here.commit,
        "code": here.code,
        "command": shlex.join(["python", "-m", "benchmarks.device", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
