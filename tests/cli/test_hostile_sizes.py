"""Absurd sizes, NaN and infinity: refused before anything of that size is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ARD, Harness, sentence

from harness.methods import METHODS
from harness.networks import backbones
from harness.runs.budgets import LARGEST, parse_budget
from harness.runs.config import RunConfig
from harness.tasks import Task

DIT = {"image_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "num_heads": 2}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--budget", "steps=1000000000"], "budget is 'steps=1000000000'"),
        (["--budget", "steps=1e99"], "budget is 'steps=1e99'"),
        (["--budget", "images=1e13"], "budget is 'images=1e13'"),
        (["--budget", "images=1e12"], "training steps of 8 images"),
        (["--budget", "flops=nan"], "budget is 'flops=nan'"),
        (["--budget", "flops=inf"], "budget is 'flops=inf'"),
        (["--budget", "steps=" + "9" * 10**5], "budget is 'steps=999"),
        (["--num-steps", "1000000000"], "num_steps is '1000000000'"),
        (["--num-steps", "9" * 5000], "num_steps is '999"),
        (["--seed", "1e400"], "seed is '1e400'"),
        (["--batch-size", "1000000000000"], "batch_size is '1000000000000'"),
        (["--noise-sets", "99999999999999999999"], "noise_sets is "),
        (["--lr", "nan"], "lr is 'nan'"),
        (["--lr", "inf"], "lr is 'inf'"),
        (["--lr", "-inf"], "lr is '-inf'"),
        (["--history-layers", "1000000"], "history_layers is 1000000, but the teacher has 3"),
        (["--device", "cuda:99999999999999999999"], "device 'cuda:99999999999999999999' is not"),
        (["--device", "cpu:-7"], "device 'cpu:-7' is not"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_the_command_line_has_limits(
    words: list[str], error: str, tiny: Task, harness: Harness
) -> None:
    base = [*ARD] if "--num-steps" not in words else ["run", "--task", "tiny", "--method", "ard"]
    given = [] if "--history-layers" in words else ["--history-layers", "2"]
    assert error in sentence(harness(*base, *given, *words), 2)


@pytest.mark.parametrize(
    "words",
    [
        ("teacher", "levels", "--task", "tiny", "--num-steps", 10**9),
        ("teacher", "levels", "--task", "tiny", "--count", 10**12),
        ("task", "new", "mine", "--images", ".", "--image-size", 10**6),
        ("data", "encode", "--images", ".", "--size", 10**6),
        ("data", "encode", "--images", ".", "--shard-size", 10**18),
        ("sweep", "x.yaml", "--workers", 10**6),
        ("cost", "--method", "ard", "--image-size", 10**6),
        ("evaluate", "--samples", "x.npz", "--num-steps", 10**9),
    ],
    ids=lambda words: " ".join(map(str, words))[:40],
)
def test_options_of_other_commands_have_limits(
    words: tuple[Any, ...], tiny: Task, harness: Harness
) -> None:
    done = harness(*words)
    assert (done.code, done.out) == (2, "")
    assert "is not in the range" in done.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS.names())
def test_no_option_of_a_method_is_infinite(method: str, value: float) -> None:
    """Every number of every method's options, whatever its own limits are."""
    model = METHODS[method].Config
    for name, field in model.model_fields.items():
        if "float" in str(field.annotation):
            with pytest.raises(ValueError, match=name):
                model.model_validate({name: value})


def changed(content: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A task's content with another value in a place such as `data.shape`."""
    head, _, rest = place.partition(".")
    return {**content, head: changed(content[head], rest, value) if rest else value}


SIZES = [
    ("network.depth", 10**6),
    ("network.depth", 0),
    ("network.depth", "3"),
    ("network.depth", True),
    ("network.hidden_size", 10**9),
    ("network.hidden_size", 15),
    ("network.num_heads", 0),
    ("network.num_heads", -2),
    ("network.patch_size", 0),
    ("network.patch_size", 3),
    ("network.image_size", 10**6),
    ("network.image_size", [8, 8, 8]),
    ("network.num_classes", 10**12),
    ("network.size", "DiT-XL/0"),
    ("network.backbone", ["dit"]),
    ("network.backbone", "prompted"),
    ("network", {"backbone": "diffusers", "class": "DiTTransformer2DModel", "config": [1]}),
    (
        "network",
        {
            "backbone": "diffusers",
            "class": "DiTTransformer2DModel",
            "config": {"num_layers": 10**6},
        },
    ),
    ("data.shape", [1, 10**6, 10**6]),
    ("data.shape", [1, 0, 8]),
    ("data.num_classes", 10**12),
    ("data.num_classes", -1),
    ("data.split_seed", -1),
    ("guidance.scale", float("nan")),
    ("guidance_scan", [float("inf")]),
    ("schedule", "flow-inf"),
    ("schedule", "flow-nan"),
    ("trajectories.count", 10**15),
    ("trajectories.steps", 10**9),
    ("trajectories.steps", 0),
    ("evaluation.samples", 10**12),
    ("evaluation.noise_sets", 10**9),
    ("evaluation.batch_size", 0),
    ("evaluation.kid_subset_size", 10**9),
    ("batch_size", 10**9),
    ("batch_size", 0),
    ("budgets", {"quick": {"steps": 10**9, "noise_sets": 1}}),
    ("budgets", {"quick": {"steps": -1, "noise_sets": 1}}),
    ("version", -1),
]


@pytest.mark.parametrize(("place", "value"), SIZES, ids=lambda value: str(value)[:40])
def test_a_task_has_limits(
    place: str, value: Any, tiny_folder: Path, harness: Harness, tmp_path: Path
) -> None:
    content = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    file = tiny_folder / "mine.yaml"
    file.write_text(yaml.safe_dump(changed({**content, "name": "mine"}, place, value)))
    done = harness("run", "--method", "teacher", "--task", file, "--results", tmp_path / "r")
    assert str(file) in sentence(done, 2)


def test_a_network_that_no_memory_holds_is_not_begun() -> None:
    from harness.errors import UsageError

    huge = {**DIT, "depth": 10_000, "hidden_size": 2**16}
    with pytest.raises(UsageError, match="of memory"):
        backbones.build(huge)
    with pytest.raises(UsageError, match="tokens"):
        backbones.build({**DIT, "depth": 1, "image_size": 2**14, "patch_size": 1})


def test_large_networks_are_fine() -> None:
    """1,000 layers, and DiT-XL."""
    import torch

    assert len(backbones.build({**DIT, "depth": 1000}).blocks) == 1000
    with torch.device("meta"):
        whole = {"size": "DiT-XL/2", "image_size": 32, "in_channels": 4, "num_classes": 1000}
        assert len(backbones.build(whole).blocks) == 28
        assert len(backbones.build({**DIT, "depth": 10, "hidden_size": 2**16}).blocks) == 10


def test_large_runs_are_fine(tiny: Task) -> None:
    """10^8 steps, and 50,000 samples."""
    assert parse_budget("steps=1e8", tiny) == ("steps", 1e8)
    assert LARGEST["steps"] >= 1e8
    content = tiny.spec.model_dump(mode="json")
    for place, value in (
        ("evaluation.samples", 50_000),
        ("trajectories.count", 10**7),
        ("budgets", {"table": {"steps": 10**8, "noise_sets": 10}}),
    ):
        type(tiny.spec).model_validate(changed(content, place, value))


# sweeps


def sweep(text: str, harness: Harness, folder: Path) -> str:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return sentence(harness("sweep", path, "--results", folder / "r", "--dry-run"), 2)


def test_a_grid_has_an_end(tiny: Task, harness: Harness, tmp_path: Path) -> None:
    values = list(range(1, 101))
    axes = {f"options.a{n}": values for n in range(8)}
    text = yaml.safe_dump({"base": {"task": "tiny", "method": "ard"}, "axes": axes})
    assert "make 1e+16 runs, but a file has at most 100000" in sweep(text, harness, tmp_path)


SEARCH = "base: {task: tiny, method: step-distillation, num_steps: 2, budget: steps=1}\nsearch: "


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("{trials: 1000000000000, objectives: {fid: minimize}, space: tunes}", "trials is"),
        ("{trials: 1, objectives: {fid: minimize}, space: {options.lr: {low: .nan, high: 1}}}",
         "should be a finite number"),
        ("{trials: 1, objectives: {fid: minimize}, space: [1]}", "search: space"),
        ("{trials: 1, objectives: {fid: minimize}, space: {batch_size: {low: 1, high: "
         "9000000000000000000}}}", "batch_size"),
        ("{trials: 1, objectives: {fid: minimize}, space: {seed: {low: 1, high: 5, step: 0}}}",
         "space.seed"),
        ("{trials: 1, objectives: {fid: minimize}, space: {options.lr: []}}", "search: space"),
        ("{trials: 1, seed: -1, objectives: {fid: minimize}, space: tunes}", "seed is -1"),
        ("7", "search"),
        ("{trials: 1, objectives: {fid: minimize}, space: tunes, confirm: {top: 1, seeds: [-1]}}",
         "seeds"),
    ],
    ids=lambda value: value[:50],
)  # fmt: skip
def test_a_search_has_limits(
    search: str, words: str, tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    assert words in sweep(SEARCH + search, harness, tmp_path)


@pytest.mark.parametrize("value", ["{", "!!timestamp x", ".nan", "&a [*a]"])
def test_parameters_of_engines_are_plain(
    value: str, tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("base: {task: tiny, method: teacher}\n")
    words = ("--engine", "slurm", "--engine-set", f"timeout_min={value}")
    assert "--engine-set timeout_min is no value" in sentence(harness("sweep", path, *words), 2)


def test_numbers_of_a_run_have_limits_in_every_place() -> None:
    """A whole number without an end would be passed on to torch."""
    for name, field in RunConfig.model_fields.items():
        if "int" in str(field.annotation):
            for value in (-1, 10**19):
                with pytest.raises(ValueError, match=name):
                    RunConfig.model_validate({"method": "ard", name: value})
