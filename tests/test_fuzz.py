"""Any input gives a value or one sentence: parsers under random and mutated input.

Each target takes what hypothesis makes, and may raise UsageError (or the errors that its callers
turn into one), but nothing else. The default run tries each some 100 times with fixed seeds;
`tox -e slow` tries new inputs, over 10,000 in all.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from foreign import official
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from safetensors.torch import save_file
from written import record

from harness.cli.main import main
from harness.data.arrays import mapped
from harness.data.geneval import read_results
from harness.data.pictures import NpzPictures
from harness.data.prompt_files import read_prompts
from harness.data.prompt_table import prompts_of
from harness.data.tars import index_of
from harness.documents import parse_json, parse_yaml, read_yaml
from harness.errors import HarnessError, UsageError, printable
from harness.networks.checkpoint_files import load_pickled, read_state_dict
from harness.networks.checkpoints import read_teacher
from harness.networks.sizes import sizes_of
from harness.records import published_records, read_record
from harness.report.baseline import read_baseline
from harness.report.rows import load_records
from harness.report.searches import searches_page
from harness.report.task_report import reports_of
from harness.runs.config import parse_config, parse_options
from harness.runs.resolve import resolve
from harness.runs.student_file import student_config
from harness.sweeps.outcome import read_outcomes
from harness.sweeps.spec import spec_of as search_of
from harness.sweeps.sweep import expand
from harness.tasks import Task, load_task

SHORT, LONG = 100, 1000
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
CPU = torch.device("cpu")

texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "..", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "<script>", "nan", "1e999"]
    ),
)
numbers = st.one_of(
    st.integers(),
    st.floats(allow_nan=True),
    st.sampled_from([0, -1, 10**9, 2**63, 10**30, 1e308, float("nan"), float("inf")]),
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated(draw: DrawFn, whole: Any) -> Any:
    """A document with one to three places that were replaced, deleted, repeated or renamed."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        place, parent, key = found, None, None
        while isinstance(place, dict | list) and place and draw(st.integers(0, 3)):
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            parent, key = place, draw(st.sampled_from(keys))
            place = place[key]
        if parent is None:
            continue
        how = draw(st.sampled_from(["value", "value", "delete", "rename", "near"]))
        if how == "delete":
            del parent[key]
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(texts)] = parent.pop(key)
        elif how == "near" and isinstance(place, int | float):
            parent[key] = draw(st.sampled_from([-place, place + 1, place * 10**6, place / 3]))
        else:
            parent[key] = draw(plain)
    return found


@st.composite
def damaged(draw: DrawFn, whole: bytes) -> bytes:
    """Bytes of which some are changed, cut off, repeated or zeroed."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(found)))
        piece = draw(st.binary(max_size=8))
        end = start + draw(st.integers(0, 64))
        change = draw(st.sampled_from([piece, b"", found[start:end] * 2, bytes(end - start)]))
        found[start:end] = change
    return bytes(found)


Target = tuple[SearchStrategy[Any], Callable[[Any, Path, Task], Any]]


def written(name: str, dump: Callable[[Any], str | bytes], read: Callable[[Path], Any]) -> Any:
    """A target that reads the file which a drawn value is written to."""

    def target(value: Any, folder: Path, task: Task) -> Any:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = dump(value)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read(path)

    return target


def json_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def yaml_of(value: Any) -> bytes:
    return yaml.safe_dump(value).encode("utf-8", "replace")


# the documents that are mutated


RECORD = json.loads(record().model_dump_json())
CONFIG = {
    "method": "ard",
    "task": "tiny",
    "num_steps": 2,
    "seed": 1,
    "budget": "steps=3",
    "batch_size": 8,
    "options": {"history_layers": 2, "lr": 0.001},
    "extra_features": ["inception"],
}
SWEEP = {
    "base": {"task": "tiny", "method": "ard", "options": {"history_layers": 2}},
    "axes": {"num_steps": [2, 4], "options.lr": [0.001, 0.01]},
    "seeds": [0, 1],
    "cells": [{"axes": {"budget": ["quick"]}, "seeds": [3]}, {"method": "teacher"}],
}
PUBLISHED = {
    **RECORD,
    "metrics": {name: {**metric, "identity": "x"} for name, metric in RECORD["metrics"].items()},
}
OUTCOME = {
    "study": "ard-2-x",
    "task": "tiny",
    "method": "ard",
    "num_steps": 2,
    "budget": "quick",
    "seeds": [1000],
    "objectives": {"fid": "minimize"},
    "space": {"options.lr": {"low": 0.1, "high": 0.2}},
    "asked": 1,
    "trials": [
        {
            "trial": 0,
            "state": "complete",
            "params": {"options.lr": 0.1},
            "values": {"fid": 1.0},
            "best": True,
            "run_ids": ["a"],
            "reason": "",
        }
    ],
    "confirm_budget": "",
    "confirmed": [],
    "winner": 0,
    "defaults": {"lr": 0.1},
}
COMMANDS = [
    ["list", "methods"],
    ["describe", "ard", "--json"],
    ["cost", "--method", "ard", "--num-steps", "2", "--network", "DiT-S/2"],
    ["run", "--task", "tiny", "--method", "teacher", "--num-steps", "2", "--dry-run"],
    ["run", "--task", "tiny", "--config", "c.yaml", "--budget", "steps=1", "--set", "lr=1"],
    ["report", "results", "--format", "html"],
    ["status", "results"],
    ["check", "--baseline", "b.json"],
    ["sweep", "s.yaml", "--workers", "2", "--engine", "ray", "--engine-set", "a=1"],
    ["evaluate", "--samples", "x.npz", "--name", "x", "--task", "tiny"],
    ["teacher", "import", "x.pt", "--kind", "dit", "--out", "y.safetensors"],
    ["task", "new", "x", "--images", ".", "--image-size", "8"],
    ["data", "prompts", "p.txt", "--encoder", "e", "--out", "z.safetensors"],
    ["student", "export", "x", "--format", "lora"],
]
SEARCH = {
    "trials": 3,
    "objectives": {"fid": "minimize"},
    "space": {"options.lr": {"low": 0.001, "high": 0.01, "log": True}, "batch_size": [8, 16]},
    "sampler": "tpe",
    "confirm": {"top": 1, "seeds": [1001]},
}
TOLD = [
    {"tag": "counting", "prompt": "two dogs", "correct": True, "filename": "a.png"},
    {"tag": "colors", "prompt": "a red dog", "correct": False, "filename": "b.png"},
]
BASELINE = {
    "schema_version": 1,
    "command": "harness check",
    "environment": RECORD["environment"],
    "runs": {},
}
STUDENT = {
    "run_id": "ard-2-x",
    "method": "ard",
    "options": {"history_layers": 2},
    "num_steps": 2,
    "task": "tiny",
    "task_version": 1,
}


def lines_of(value: Any) -> bytes:
    return b"\n".join(map(json_of, value)) if isinstance(value, list) else json_of(value)


def resolved(value: Any, folder: Path, task: Task) -> Any:
    """A config as the command line takes it: read from YAML, parsed, and settled."""
    content = written("c.yaml", yaml_of, read_yaml)(value, folder, task)
    content = {**content, "budget": "steps=1"} if "=" in str(content.get("budget")) else content
    return resolve(parse_config(content), results=folder)


def task_of(value: Any, folder: Path, task: Task) -> Any:
    found = written("mine.yaml", yaml_of, lambda path: load_task(str(path)))(value, folder, task)
    return found.digest, found.recipe, found.path(found.trained("teacher"))


def sweep_of(value: Any, folder: Path, task: Task) -> Any:
    return expand(written("s.yaml", yaml_of, read_yaml)(value, folder, task), "sweep file")


def search(value: Any, folder: Path, task: Task) -> Any:
    content = written("s.yaml", yaml_of, read_yaml)({"search": value}, folder, task)
    return search_of(content["search"], {}, "ard", "sweep file").sampler_of(1)


def reported(value: Any, folder: Path, task: Task) -> Any:
    """A record that can be read can be reported."""
    results = folder / "results"
    written("results/runs/a/record.json", json_of, read_record)(value, folder, task)
    found = reports_of(load_records(results))
    return [(report.sections, report.notes) for report in found]


def published(value: Any, folder: Path, task: Task) -> Any:
    identities = {"x": {"a": 1}}  # those of PUBLISHED
    (folder / "shared.json").write_text(json.dumps({"identities": identities, "floors": {}}))
    return written("records.jsonl", json_of, lambda path: published_records(path.parent))(
        value, folder, task
    )


def student(value: Any, folder: Path, task: Task) -> Any:
    path = folder / "student.safetensors"
    said = json.dumps(value).encode("utf-8", "replace").decode()
    save_file({"a": torch.zeros(1)}, path, {"student": said})
    return student_config(path, {})


def teacher_said(value: Any, folder: Path, task: Task) -> Any:
    path = folder / "teacher.safetensors"
    network = json.dumps(value)
    said = {"network": network, "schedule": "vp", "prediction_type": "eps"}
    save_file(OFFICIAL, path, said)
    return read_teacher(str(path))


def prompt_header(value: Any, folder: Path, task: Task) -> Any:
    path = folder / "prompts.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"prompts": json.dumps(value)})
    return prompts_of(path)


def outcome(value: Any, folder: Path, task: Task) -> Any:
    found = written("searches/a.json", json_of, lambda path: read_outcomes(path.parents[1]))(
        value, folder, task
    )
    return [searches_page(one.task, [one]) for one in found]


def command(words: Any, folder: Path, task: Task) -> Any:
    """The command line ends with a code of its own, never with a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(word).encode("utf-8", "replace").decode().replace("\0", "") for word in words])
    assert ended.value.code in (0, 1, 2)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    if ended.value.code:
        assert all(printable(line) == line for line in err.getvalue().split("\n"))
        raise UsageError(err.getvalue())


# key lists of checkpoints


OFFICIAL = official()
SHAPES = {name: list(tensor.shape) for name, tensor in OFFICIAL.items()}
ARGS = {"num_heads": 4, "model": "DiT-S/2", "num_classes": 10}
NETWORK = {**sizes_of(OFFICIAL, {}, "it", 4), "num_heads": 4}
KEYS = ["blocks.a.x", "blocks.", "blocks.999999999.x", "module.a", "n_averaged", "lora_A.x"]
states = st.tuples(
    st.one_of(st.just(SHAPES), mutated(SHAPES)),
    st.one_of(st.just(ARGS), mutated(ARGS), st.just({})),
    st.dictionaries(st.sampled_from(KEYS), st.just([2]), max_size=2),
)


def tensors_of(shapes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of shapes; those of the official file where the shape is its own."""
    found = {}
    for name, shape in shapes.items():
        sides = [side for side in shape if type(side) is int] if isinstance(shape, list) else [1]
        sides = [min(abs(side), 400) for side in sides][:5]
        own = OFFICIAL.get(name)
        found[name] = own if own is not None and sides == list(own.shape) else torch.zeros(sides)
    return found


def key_list(value: Any, folder: Path, task: Task) -> Any:
    shapes, args, more = value
    return sizes_of(tensors_of({**shapes, **more}), args, "it")


def checkpoint(value: Any, folder: Path, task: Task) -> Any:
    shapes, args, more = value
    path = folder / "dit.pt"
    torch.save({"ema": tensors_of({**shapes, **more}), "args": args}, path)
    return read_teacher(str(path))


# bytes


def bytes_of(write: Callable[[Path], Any]) -> bytes:
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    write(folder / "a")
    found = next(folder.iterdir())
    content = found.read_bytes()
    found.unlink()
    folder.rmdir()
    return content


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in ("a.png", "a.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"1"))


PT = bytes_of(lambda path: torch.save({"model": {"a": torch.zeros(4)}, "args": {"b": 1}}, path))
LEGACY = bytes_of(
    lambda path: torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
)
SAFE = bytes_of(lambda path: save_file({"a": torch.zeros(4)}, path, {"b": "c"}))
PICTURES = np.zeros((3, 2, 2, 1), np.uint8)
NPZ = bytes_of(lambda path: np.savez(path, PICTURES, np.arange(3)))
PACKED = bytes_of(lambda path: np.savez_compressed(path, PICTURES, np.arange(3)))
TAR = bytes_of(tar)


def npz(path: Path) -> Any:
    for name in ("arr_0", "arr_1"):
        mapped(path, name)
    return [*NpzPictures(path).batches(2)]


def spec_of(task: Task) -> dict[str, Any]:
    return task.spec.model_dump(mode="json")


TARGETS: dict[str, Target] = {
    "yaml text": (st.text(max_size=60), lambda text, *_: allowed(parse_yaml, text)),
    "json text": (st.text(max_size=60), lambda text, *_: allowed(parse_json, text)),
    "yaml bytes": (st.binary(max_size=60), written("a.yaml", bytes, read_yaml)),
    "config": (mutated(CONFIG), resolved),
    "any config": (plain, resolved),
    "options": (mutated(CONFIG["options"]), lambda value, *_: parse_options("ard", as_map(value))),
    "sweep": (mutated(SWEEP), sweep_of),
    "any sweep": (plain, sweep_of),
    "search": (mutated(SEARCH), search),
    "record": (mutated(RECORD), reported),
    "any record": (plain, written("record.json", json_of, read_record)),
    "published record": (mutated(PUBLISHED), published),
    "record bytes": (damaged(json_of(RECORD)), written("record.json", bytes, read_record)),
    "baseline": (mutated(BASELINE), written("b.json", json_of, read_baseline)),
    "outcome": (mutated(OUTCOME), outcome),
    "prompts": (st.binary(max_size=60), written("a.txt", bytes, read_prompts)),
    "prompt lines": (mutated(TOLD), written("a.jsonl", lines_of, read_prompts)),
    "verdicts": (mutated(TOLD), written("a.jsonl", lines_of, read_results)),
    "verdict bytes": (damaged(lines_of(TOLD)), written("a.jsonl", bytes, read_results)),
    "prompt header": (plain, prompt_header),
    "student": (mutated(STUDENT), student),
    "teacher's metadata": (st.one_of(st.just(NETWORK), mutated(NETWORK)), teacher_said),
    "keys": (states, key_list),
    "checkpoint": (states, checkpoint),
    "pt bytes": (damaged(PT), written("a.pt", bytes, load_pickled)),
    "legacy bytes": (damaged(LEGACY), written("a.pt", bytes, load_pickled)),
    "safetensors bytes": (damaged(SAFE), written("a.safetensors", bytes, read_state_dict)),
    "npz bytes": (damaged(NPZ), written("a.npz", bytes, npz)),
    "packed npz bytes": (damaged(PACKED), written("a.npz", bytes, npz)),
    "tar bytes": (damaged(TAR), written("a.tar", bytes, lambda path: index_of(path, (), True))),
    "command line": (st.sampled_from(COMMANDS).flatmap(mutated), command),
}


def as_map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def allowed(parse: Callable[[str], Any], text: str) -> Any:
    """Callers turn ValueError into a sentence."""
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(str(error)) from error


def attack(name: str, count: int, derandomise: bool, folder: Path, task: Task) -> tuple[int, int]:
    """Tries a target so often. Returns how many inputs it took and how many it refused."""
    strategy, target = TARGETS[name]
    if name == "task":
        strategy = mutated(spec_of(task))
    found = [0, 0]

    @settings(
        max_examples=count,
        derandomize=derandomise,
        database=None,
        deadline=None,
        suppress_health_check=CHECKS,
    )
    @given(strategy)
    def once(value: Any) -> None:
        try:
            target(value, folder, task)
            found[0] += 1
        except HarnessError:
            found[1] += 1

    once()
    return found[0], found[1]


TARGETS["task"] = (st.nothing(), task_of)


@pytest.fixture
def place(tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, where nothing that a command line names exists."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_a_value_or_a_sentence(name: str, tiny: Task, place: Path) -> None:
    took, refused = attack(name, SHORT, True, place, tiny)
    assert refused, "nothing was refused: the inputs attack nothing"
    assert took + refused >= SHORT / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs_are_values_or_sentences(name: str, tiny: Task, place: Path) -> None:
    """With new inputs each time; all targets together have over 10,000."""
    count = LONG if name not in ("command line", "config", "record") else LONG // 3
    took, refused = attack(name, count, False, place, tiny)
    print(f"{name}: {took} taken, {refused} refused")


def test_the_long_version_is_long_enough() -> None:
    assert LONG * (len(TARGETS) - 3) > 10_000
    with zipfile.ZipFile(io.BytesIO(NPZ)) as archive:
        assert len(archive.namelist()) == 2


def test_the_search_finds_other_errors(tiny: Task, place: Path) -> None:
    """So that the tests above can fail."""

    def broken(value: Any, folder: Path, task: Task) -> Any:
        return 1 / (len(value) % 3)

    TARGETS["broken"] = (st.text(), broken)
    try:
        with pytest.raises(ZeroDivisionError):
            attack("broken", SHORT, True, place, tiny)
    finally:
        del TARGETS["broken"]
