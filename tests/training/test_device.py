"""Whole runs on a second device give the CPU's numbers, and no operation mixes the two devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import elsewhere
from recorder import Recorder
from tiny_runs import ARD, config, new_run
from torch import Tensor

from harness.data.mixture import GaussianMixture
from harness.diffusion.schedules import few_step_levels
from harness.runs.config import parse_config
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.runs.teacher_training import search, train_networks
from harness.solvers import SOLVERS, sample
from harness.tasks import Task, load_task
from harness.training import levels


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second device has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: nullcontext())


class Followed(Recorder):
    """Looks at noise levels whenever it may."""

    def levels(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        self.numbers("levels", step, measure())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"options": {**ARD, "gan_from": 0.3, "gan_warmup_steps": 1}}, marks=pytest.mark.slow
        ),
        {"method": "consistency-distillation", "options": {}},
        pytest.param({"method": "teacher", "options": {"solver": "unipc"}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_on_the_second_device_gives_the_same_numbers(
    changes: dict[str, Any], tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "UPDATES", 1)
    told = {"here": Followed(), "there": Followed()}
    run = new_run(tmp_path / "here", **changes)
    run.follower = told["here"]
    here = run.execute()
    with elsewhere() as device:
        there = Run(
            resolve(config(**changes)), tmp_path / "there", device, follower=told["there"]
        ).execute()
    norms = {name: follower.contents("levels") for name, follower in told.items()}
    assert len(norms["there"]) == len(norms["here"])
    for found, expected in zip(norms["there"], norms["here"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    assert there.metrics.keys() == here.metrics.keys()
    for name in ("fid", "label_agreement", "distance_to_teacher"):
        assert there.metrics[name].mean == pytest.approx(
            here.metrics[name].mean, rel=1e-3, abs=1e-6
        )
    assert (there.cost.nfe, there.cost.macs_per_sample) == (
        here.cost.nfe,
        here.cost.macs_per_sample,
    )
    assert there.first_losses == pytest.approx(here.first_losses, rel=1e-3)


@pytest.mark.parametrize("name", SOLVERS.names())
def test_a_solver_elsewhere_ends_in_the_same_samples(name: str, tiny: Task) -> None:
    x_T, cond = tiny.evaluation_inputs(0)

    def samples(device: torch.device) -> Tensor:
        with torch.no_grad():
            found = sample(
                SOLVERS[name](),
                tiny.teacher(device),
                x_T[:3].to(device),
                few_step_levels(4),
                cond[:3].to(device),
            )
        assert isinstance(found, Tensor)
        assert found.device == device
        return found.cpu()

    expected = samples(torch.device("cpu"))
    with elsewhere() as device:
        torch.testing.assert_close(
            samples(device), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.zeros(2),
        lambda x: torch.zeros(2)[x.long()],
        lambda x: torch.cat([x, torch.zeros(2)]),
        lambda x: torch.stack([x.sum(), torch.zeros(())]),
        lambda x: torch.nn.Linear(2, 2)(x),
        lambda x: x.index_put((torch.tensor([0, 1]),), torch.zeros(2)),
    ],
)
def test_mixing_two_devices_raises(mix: Callable[[Tensor], Tensor]) -> None:
    with elsewhere() as device, pytest.raises(RuntimeError, match="all tensors on one device"):
        mix(torch.zeros(2).to(device))


def test_mixtures_that_cuda_allows() -> None:
    with elsewhere() as device:
        x = torch.arange(3.0).to(device)
        assert x.device == torch.zeros(1, device=device).device == device
        assert (x + torch.ones(())).cpu().tolist() == [1, 2, 3]
        assert x[torch.tensor([2])].cpu().tolist() == [2]
        x.copy_(torch.ones(3))
        x[:1] = 5
        assert x.cpu().tolist() == [5, 1, 1]
        assert x.cpu().device.type == "cpu"


def test_networks_are_trained_and_levels_found_on_the_second_device(
    tiny: Task, tmp_path: Path
) -> None:
    expected = search(tiny, "ddim", 2, 4, torch.device("cpu")).levels
    with elsewhere() as device:
        made = train_networks(tiny, tmp_path / "made", device)
        found = search(tiny, "ddim", 2, 4, device).levels
    assert [one.path.name for one in made] == ["features.safetensors", "teacher.safetensors"]
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_an_exact_teacher_on_the_second_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        GaussianMixture, "ode_map", partialmethod(GaussianMixture.ode_map, steps=40)
    )
    whole = load_task("mixture")
    fewer = {"evaluation": whole.spec.evaluation.model_copy(update={"samples": 50})}
    task = type(whole)(whole.spec.model_copy(update=fewer), whole.folder)
    asked = {
        "task": "mixture",
        "method": "ect",
        "num_steps": 1,
        "budget": "steps=2",
        "noise_sets": 1,
        "batch_size": 8,
    }
    resolved = resolve(parse_config(asked), task)
    here = Run(resolved, tmp_path / "here", torch.device("cpu")).execute()
    with elsewhere() as device:
        there = Run(resolved, tmp_path / "there", device).execute()
    assert there.metrics.keys() == here.metrics.keys() >= {"kl"}
    for name, metric in here.metrics.items():
        assert there.metrics[name].mean == pytest.approx(metric.mean, rel=1e-3), name
