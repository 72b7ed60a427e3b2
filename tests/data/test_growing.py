"""Stores that grow, that are rounded to float16, that need disk, and that follow code."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import provenance
from harness.data import shards
from harness.data.recipe import Recipe, compute
from harness.data.trajectories import (
    CODE,
    ROOMS,
    TrajectoryStore,
    check_store_disk,
    missing_count,
    open_store,
    store_folder,
    trajectory_code,
)
from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Prediction, predict
from harness.diffusion.schedules import VPSchedule
from harness.errors import UsageError
from harness.files import tensors_digest
from harness.plugins import load_plugin
from harness.provenance import imported_with, room_of
from harness.solvers import SOLVERS

CPU = torch.device("cpu")
RECIPE = Recipe("t", "vp", "eps", 1.5, None, "ddim", 4, 11, 3, (2, 4, 4), 3)


class Teacher:
    """A denoiser whose answer depends on the size of the batch, as a GPU's last bits do."""

    schedule = VPSchedule()

    def __init__(self, fails_after: float = float("inf"), scale: float = 1.0):
        self.asked, self.fails_after, self.scale = 0, fails_after, scale

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        self.asked += len(x_t)
        if self.asked > self.fails_after:
            raise KeyboardInterrupt
        out = self.scale * x_t.sin() * t + cond.classes.reshape(-1, 1, 1, 1) + 1e-4 * len(x_t)
        return predict(out, x_t, t, self.schedule, "eps")


def opened(count: int, teacher: Teacher | None = None, **changes: object) -> TrajectoryStore:
    """The store in shards of 4, integrated 3 at once."""
    recipe = replace(RECIPE, count=count, **changes)
    return open_store(recipe, teacher or Teacher(), CPU, shard_size=4, batch_size=3)


def content(store: TrajectoryStore) -> str:
    path = store.batch(torch.arange(len(store)))
    return tensors_digest({"states": path.states, "predictions": path.predictions})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# more trajectories


@pytest.mark.parametrize(
    ("counts", "asked"),
    [((4, 8), 4), ((5, 11), 7), ((6, 7, 11), 4), ((10, 11), 3), ((3, 4), 1), ((1, 20), 20)],
)
def test_an_extended_store_equals_a_fresh_one(
    counts: tuple[int, ...], asked: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; `asked` are the trajectories of the last extension.

    A batch that was cut short is computed again: of 5, item 4 is alone.
    """
    for count in counts[:-1]:
        folder = opened(count).folder
    teacher = Teacher()
    extended = opened(counts[-1], teacher)
    assert extended.folder == folder
    assert teacher.asked == 4 * asked
    found = content(extended)
    monkeypatch.setenv("HARNESS_CACHE", str(cache / "fresh"))
    assert content(opened(counts[-1])) == found


def test_full_shards_stay_as_they_are() -> None:
    folder = opened(9).folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    opened(20)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert (len(before), len(after)) == (3, 5)
    changed = [name for name in before if after[name] != before[name]]
    assert changed == ["00002-of-4.safetensors"]


def test_fewer_are_read_from_a_larger_store() -> None:
    larger, teacher = opened(11), Teacher()
    smaller = opened(6, teacher)
    assert (teacher.asked, len(smaller), missing_count(replace(RECIPE, count=6))) == (0, 6, 0)
    items = torch.arange(6)
    assert torch.equal(smaller.batch(items).states, larger.batch(items).states)
    assert missing_count(replace(RECIPE, count=13)) == 2


def test_a_reader_of_the_smaller_store_goes_on_while_it_grows() -> None:
    smaller = opened(6)
    before = content(smaller)
    opened(11)
    assert content(smaller) == before


def test_an_interrupted_extension_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(5)
    with pytest.raises(KeyboardInterrupt):
        opened(20, Teacher(fails_after=4 * 9))  # 4 to 7 and 8 to 11 are done
    assert missing_count(replace(RECIPE, count=20)) == 15
    teacher = Teacher()
    found = content(opened(20, teacher))
    assert teacher.asked == 4 * 8
    monkeypatch.setenv("HARNESS_CACHE", str(cache / "fresh"))
    assert content(opened(20)) == found


def test_a_store_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of many gigabytes is not read as a whole by each run."""
    first, teacher = opened(11), Teacher()
    with monkeypatch.context() as patch:
        patch.setattr("harness.files.tensors_digest", lambda tensors: "another")
        assert content(opened(11, teacher)) == content(first)
        assert teacher.asked == 0
        (first.folder / "verified.json").unlink()
        opened(11, teacher)
        assert teacher.asked == 4 * 11


# float16


def test_float16_states_its_error() -> None:
    store, items = opened(11, dtype="float16"), torch.arange(11)
    exact = opened(11).batch(items)
    found = store.batch(items)
    stated = json.loads((store.folder / "manifest.json").read_text())["error"]
    for name in ("states", "predictions"):
        value, right = getattr(found, name), getattr(exact, name)
        assert value.dtype == torch.float32
        assert torch.equal(value, right.half().float())
        off = (value.double() - right.double()).flatten()
        assert stated[name]["largest"] == float(off.abs().max())
        relative = float(off.norm() / right.double().norm())
        assert stated[name]["relative_rms"] == pytest.approx(relative, rel=1e-12)
        assert 1e-5 < relative < 2**-11
    assert store.folder != opened(11).folder
    assert store.recipe.size * 2 == RECIPE.size == 4 * 32 * (5 + 4)


def test_float16_extends_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(5, dtype="float16")
    store = opened(11, dtype="float16")
    found, manifest = content(store), (store.folder / "manifest.json").read_text()
    monkeypatch.setenv("HARNESS_CACHE", str(cache / "fresh"))
    fresh = opened(11, dtype="float16")
    assert (content(fresh), (fresh.folder / "manifest.json").read_text()) == (found, manifest)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match=r"states reach 1.5e\+06, but float16 ends at 65504"):
        opened(11, Teacher(scale=1e4), dtype="float16")


# disk


def test_too_little_disk_is_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened(5)
    usage, teacher = namedtuple("usage", "free"), Teacher()
    need = 6 * (2 * 4 + 1) * 2 * 4 * 4 * 4
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage(need - 1))
    with pytest.raises(UsageError, match=r"6 trajectories need 0.00691 MB, and .*: set HARNESS_C"):
        opened(11, teacher)
    assert teacher.asked == 0
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage(need))
    assert check_store_disk(RECIPE).startswith("6 trajectories need 0.00691 MB, and 0.00691")
    opened(11, teacher)
    assert check_store_disk(RECIPE) == ""


# digests follow what decides content


def test_the_code_of_trajectories_covers_what_computes_them(tiny) -> None:
    """Every class of a teacher and every solver, and neither sets of images nor errors."""
    solvers = {SOLVERS[name].__module__ for name in SOLVERS.names()}
    files = {
        path.as_posix()
        for path in imported_with({*CODE, *solvers}, provenance.PACKAGE)
        if room_of(path) in ROOMS
    }
    teacher = tiny.teacher(CPU)
    modules = {type(part).__module__ for part in (*teacher.modules(), tiny.schedule)}
    ours = {name for name in modules | {compute.__module__} if name.startswith("harness.")}
    assert {f"{name.replace('.', '/')}.py".removeprefix("harness/") for name in ours} <= files
    assert {"diffusion/randomness.py", "diffusion/conditions.py", "data/mixture.py"} <= files
    assert not {"data/images.py", "data/trajectories.py", "networks/classifier.py"} & files


PLUGIN = '''
from harness.solvers import SOLVERS, DDIM

@SOLVERS.register("{name}")
class Twin(DDIM):
    """DDIM by another name."""

    def init(self, model, x_T, cond):
        return {state}
'''


@pytest.fixture
def code_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function from a plug-in's text and a solver's name to the store's folder."""
    monkeypatch.setattr(provenance, "PLUGIN_SOURCES", {})
    monkeypatch.setattr("harness.plugins.PLUGIN_SOURCES", provenance.PLUGIN_SOURCES)
    before = dict(SOLVERS._entries)

    def code(text: str, solver: str) -> Path:
        provenance.PLUGIN_SOURCES.clear()
        SOLVERS._entries = dict(before)
        trajectory_code.cache_clear()
        (tmp_path / "plugin.py").write_text(text)
        load_plugin(tmp_path / "plugin.py")
        return store_folder(replace(RECIPE, solver=solver))

    yield code
    SOLVERS._entries = before
    trajectory_code.cache_clear()


def test_a_comment_in_a_plugin_keeps_the_trajectories(code_of) -> None:
    text = PLUGIN.format(name="twin", state=None)
    commented = text.replace("DDIM by another name", "A twin").replace(
        "        return None", "        # a remark\n\n        return (\n            None\n        )"
    )
    assert commented.count("\n") > text.count("\n")
    first = code_of(text, "twin")
    assert code_of(commented, "twin") == first
    assert code_of(PLUGIN.format(name="twin", state=1), "twin") != first


def test_a_plugin_that_registers_another_solver_does_not_count(code_of) -> None:
    plain = store_folder(RECIPE)
    assert code_of(PLUGIN.format(name="twin", state=None), "ddim") == plain
    assert code_of(PLUGIN.format(name="twin", state=1), "ddim") == plain


def test_prompts_and_labels_are_computed_alike() -> None:
    """`compute` alone decides a row: the store adds nothing."""
    found = compute(RECIPE, Conditions(3), Teacher(), torch.arange(3), CPU)
    assert torch.equal(opened(3).batch(torch.arange(3)).states, found["states"])
