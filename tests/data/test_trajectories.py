"""The trajectory store: its content, one build, resumption, sharing by processes, and errors.

Run as a script, it opens a store once another process is ready too: see
`test_two_processes_share_a_build`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.data.cache import cached_samples
from harness.data.recipe import Recipe
from harness.data.trajectories import TrajectoryStore, open_store
from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction, predict
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import GRIDS, VPSchedule, few_step_levels
from harness.errors import UsageError
from harness.files import tensors_digest
from harness.solvers import DDIM, trace

CPU = torch.device("cpu")
RECIPE = Recipe(
    "some teacher",
    "vp",
    "eps",
    1.5,
    None,
    "ddim",
    steps=4,
    count=11,
    seed=3,
    shape=(2, 4, 4),
    num_classes=3,
)
ITEMS = torch.arange(11)


class Teacher:
    """A denoiser whose answer depends on image, time and label.

    It counts its samples, and raises KeyboardInterrupt after `fails_after` of them.
    """

    schedule = VPSchedule()

    def __init__(self, fails_after: float = float("inf")):
        self.asked, self.fails_after = 0, fails_after

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        self.asked += len(x_t)
        if self.asked > self.fails_after:
            raise KeyboardInterrupt
        return predict(
            0.9 * x_t.sin() * t + cond.labels.reshape(-1, 1, 1, 1), x_t, t, self.schedule, "eps"
        )


def opened(teacher: Teacher, recipe: Recipe = RECIPE) -> TrajectoryStore:
    """The store in shards of 4, integrated 3 at once."""
    return open_store(recipe, teacher, CPU, shard_size=4, batch_size=3)


def content(store: TrajectoryStore) -> str:
    """A digest of all that a store holds."""
    path = store.batch(torch.arange(len(store)))
    return tensors_digest(
        {"states": path.states, "predictions": path.predictions, "labels": path.cond.labels}
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_store_holds_what_integrating_gives() -> None:
    found = opened(Teacher()).batch(torch.tensor([10, 0, 4, 4]))
    items = torch.tensor([10, 0, 4, 4])
    x_T = Keyed("trajectory", 3).normal("x_T", items, (2, 4, 4))
    cond = Condition(torch.tensor([1, 0, 1, 1]))
    expected = trace(DDIM(), Teacher(), x_T, few_step_levels(4), cond)
    assert torch.equal(found.states, expected.states)
    assert torch.equal(found.predictions, expected.predictions)
    assert torch.equal(found.levels, expected.levels)
    assert torch.equal(found.cond.labels, cond.labels)


def test_the_last_prediction_is_the_last_state() -> None:
    found = opened(Teacher()).batch(ITEMS)
    assert found.states.shape == (11, 5, 2, 4, 4)
    assert found.predictions.shape == (11, 4, 2, 4, 4)
    assert torch.equal(found.predictions[:, -1], found.states[:, -1])
    assert not torch.equal(found.predictions[:, 0], found.states[:, 1])


def test_a_tasks_trajectories_come_from_its_guided_teacher(tiny) -> None:
    teacher = tiny.teacher(CPU)
    store = open_store(tiny.recipe, teacher, CPU, shard_size=5, batch_size=2)
    found = store.batch(torch.arange(len(store)))
    with torch.no_grad():
        expected = trace(DDIM(), teacher, found.states[:, 0], found.levels, found.cond)
    torch.testing.assert_close(found.states, expected.states, rtol=1e-4, atol=1e-4)
    # At level 999, x_0 amplifies errors 157 times.
    torch.testing.assert_close(found.predictions, expected.predictions, rtol=1e-4, atol=1e-2)
    assert torch.equal(found.predictions[:, -1], found.states[:, -1])


def test_a_store_is_built_once() -> None:
    first, second = Teacher(), Teacher()
    built, again = opened(first), opened(second)
    assert first.asked == 11 * 4
    assert second.asked == 0
    assert content(again) == content(built)
    assert len(again) == 11


def test_shards_and_batches_do_not_change_the_content(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = content(opened(Teacher()))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "other"))
    assert content(open_store(RECIPE, Teacher(), CPU, shard_size=100, batch_size=100)) == first


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "other"},
        {"guidance_scale": 2.0},
        {"guidance_channels": 3},
        {"guidance_norm_patch": 2},
        {"steps": 2},
        {"seed": 4},
        {"dtype": "float16"},
        {"num_classes": 2},
        {"grid": "respaced"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_is_another_store(change: dict) -> None:
    store, other = opened(Teacher()), Teacher()
    changed = opened(other, replace(RECIPE, **change))
    assert changed.folder != store.folder
    assert other.asked == changed.recipe.count * changed.recipe.steps


@pytest.mark.parametrize("grid", GRIDS)
def test_a_store_is_on_its_grid(grid: str) -> None:
    found = opened(Teacher(), replace(RECIPE, grid=grid)).batch(ITEMS)
    assert torch.equal(found.levels, GRIDS[grid](4))
    expected = trace(DDIM(), Teacher(), found.states[:, 0], GRIDS[grid](4), found.cond)
    assert torch.equal(found.states, expected.states)


def test_a_run_draws_trajectories_with_its_seed() -> None:
    """A run of the task's seed reads the task's store; other seeds have noise of their own."""
    assert RECIPE.of_run(0) == RECIPE
    first, second = (opened(Teacher(), RECIPE.of_run(seed)) for seed in (0, 5))
    x_T = Keyed("trajectory", 3 + 5).normal("x_T", ITEMS, (2, 4, 4))
    assert torch.equal(second.batch(ITEMS).states[:, 0], x_T)
    assert not torch.equal(first.batch(ITEMS).states[:, 0], x_T)
    assert RECIPE.of_run(5, ("respaced", 25)) == replace(RECIPE, seed=8, grid="respaced", steps=25)


def test_progress_is_reported() -> None:
    reported = []
    open_store(
        RECIPE,
        Teacher(),
        CPU,
        shard_size=4,
        batch_size=3,
        progress=lambda done, total: reported.append((done, total)),
    )
    assert reported == [(3, 11), (4, 11), (7, 11), (8, 11), (11, 11)]


def test_an_interrupted_build_goes_on_where_it_stopped(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(opened(Teacher()))
    monkeypatch.setenv("HARNESS_CACHE", str(cache / "second"))
    with pytest.raises(KeyboardInterrupt):
        opened(Teacher(fails_after=4 * 4 + 5))  # in the middle of the second shard
    folder = next((cache / "second" / "trajectories").iterdir())
    assert [path.name for path in folder.glob("*.safetensors")] == ["00000-of-4.safetensors"]
    second = Teacher()
    store = opened(second)
    assert second.asked == 7 * 4
    assert content(store) == expected


def test_two_processes_share_a_build(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, __file__, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, name], env=environment, stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    reports = [json.loads(process.communicate(timeout=600)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(each["asked"] for each in reports) == [0, 11 * 4]  # one computes, the other waits
    second = Teacher()
    assert {each["content"] for each in reports} == {content(opened(second))}
    assert second.asked == 0
    assert not list(tmp_path.rglob("*.tmp"))


def shards(store: TrajectoryStore) -> list[Path]:
    """The files of a store."""
    return sorted(store.folder.glob("*.safetensors"))


def flipped(path: Path, place: int = -1) -> None:
    """Flips a bit of a file, which gets another time of change."""
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.unlink()
    path.write_bytes(damaged)


def reopened(passes: int, expected: str, caplog: pytest.LogCaptureFixture) -> str:
    """What opening a damaged store tells, once it has the content of the whole one again.

    Args:
        passes: trajectories that must be computed again.
    """
    caplog.clear()
    teacher = Teacher()
    assert content(opened(teacher)) == expected
    assert teacher.asked == 4 * passes
    told = caplog.text
    assert content(opened(Teacher(fails_after=0))) == expected
    return told


@pytest.mark.parametrize("place", [20, -1], ids=["header", "last byte"])
def test_a_damaged_shard_is_made_again(place: int, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(Teacher())
    expected, path = content(store), shards(store)[1]
    flipped(path, place)
    assert f"{path} is made again: " in reopened(4, expected, caplog)


def test_a_missing_shard_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    store = opened(Teacher())
    expected, path = content(store), shards(store)[2]
    path.unlink()
    assert f"{path.name} is missing or broken" in reopened(3, expected, caplog)


def test_shards_in_each_others_place_are_made_again(caplog: pytest.LogCaptureFixture) -> None:
    store = opened(Teacher())
    expected, (first, second, _) = content(store), shards(store)
    whole = first.read_bytes()
    second.replace(first)
    second.write_bytes(whole)
    assert f"{second.name} holds {store.folder.name}/{first.name}" in reopened(8, expected, caplog)


def test_a_damaged_shard_of_an_unfinished_build_is_made_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = opened(Teacher())
    expected, path = content(store), shards(store)[0]
    (store.folder / "manifest.json").unlink()
    flipped(path)
    assert f"{path.name} was changed" in reopened(4, expected, caplog)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"shards": ["no file"], "shard_size": 4}'])
def test_shards_outlive_their_manifest(text: str, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(Teacher())
    manifest, expected = store.folder / "manifest.json", content(store)
    before = manifest.read_bytes()
    manifest.write_text(text)
    assert f"{manifest} is made again" in reopened(0, expected, caplog)
    assert manifest.read_bytes() == before


def test_damaged_samples_are_made_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached_samples({}, lambda: torch.zeros(3))
    cached_samples({"other": 1}, lambda: torch.ones(3))
    path, other = cache.rglob("samples.safetensors")
    flipped(path)
    assert torch.equal(cached_samples({}, lambda: torch.zeros(3)), torch.zeros(3))
    assert torch.equal(cached_samples({"other": 1}, lambda: torch.ones(3)), torch.ones(3))
    assert f"{path} is made again: " in caplog.text
    path.write_bytes(other.read_bytes())
    assert torch.equal(cached_samples({}, lambda: torch.zeros(3)), torch.zeros(3))
    assert torch.equal(cached_samples({"other": 1}, lambda: torch.ones(3)), torch.ones(3))


def test_a_cache_that_cannot_be_written_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        UsageError, match=r"cannot write the folder .*; set HARNESS_CACHE to another"
    ):
        opened(Teacher())


def test_samples_are_computed_once_for_each_key() -> None:
    asked = []

    def compute(value: float) -> Tensor:
        asked.append(value)
        return torch.full((2, 1, 4, 4), value)

    for value in (1.0, 2.0, 1.0):
        assert torch.equal(
            cached_samples({"value": value, "of": "test"}, lambda value=value: compute(value)),
            torch.full((2, 1, 4, 4), value),
        )
    assert asked == [1.0, 2.0]


def test_samples_that_cannot_be_kept_are_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match="cannot write"):
        cached_samples({}, lambda: torch.zeros(1))


def open_beside_another(meeting: Path, name: str) -> None:
    """Opens the store beside another process, and prints the number of samples and the content.

    Waits until both processes are ready. Building is slow enough for the two to overlap.
    """
    torch.set_num_threads(1)
    (meeting / f"{name}.ready").touch()
    deadline = time.monotonic() + 500
    while len(list(meeting.glob("*.ready"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    teacher = Teacher()
    store = open_store(
        RECIPE,
        teacher,
        CPU,
        shard_size=4,
        batch_size=3,
        progress=lambda done, total: time.sleep(0.02),
    )
    print(json.dumps({"asked": teacher.asked, "content": content(store)}))


if __name__ == "__main__":
    open_beside_another(Path(sys.argv[1]), sys.argv[2])
