"""Parity with the authors' code: outputs of the official DiT, ARD and SiT on random weights.

`tests/golden` describes the numbers. They are float64, and so are the networks here: float32
outputs differ between CPUs by 1e-5 and more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Denoiser, Guided
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import FlowSchedule, VPSchedule, few_step_levels, respaced_levels
from harness.methods.ard import ARD, ARDConfig
from harness.methods.base import Batch
from harness.networks.backbones import build
from harness.networks.backbones.dit import DiT
from harness.networks.history import EMPTY, History, with_history
from harness.networks.layers import sincos_position_embedding
from harness.solvers import DDIM, Euler, Trajectory, sample, trace

FOLDER = Path(__file__).parents[1] / "golden"
OPTIONS = {
    "image_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
    "learn_sigma": True,
}
LAYERS = [0, 1, 2]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance` of the largest expected value."""
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max() / expected.abs().max()) < tolerance


def part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in golden.items()
        if name.startswith(prefix)
    }


def numbers(name: str) -> dict[str, Tensor]:
    """The tensors of a file of golden numbers, all but the labels in float64."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {
        key: tensor.double() if tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def dit() -> dict[str, Tensor]:
    """Numbers of facebookresearch/DiT."""
    return numbers("dit")


@pytest.fixture(scope="module")
def denoiser(dit: dict[str, Tensor]) -> Denoiser:
    """The official weights in our DiT."""
    network = DiT(**OPTIONS).double()
    network.load_state_dict(part(dit, "dit."))
    return Denoiser(network.requires_grad_(False), VPSchedule(), "eps")


@pytest.fixture(scope="module")
def ard() -> dict[str, Tensor]:
    """Numbers of alsdudrla10/ARD."""
    return numbers("ard")


@pytest.fixture(scope="module")
def sit() -> dict[str, Tensor]:
    """Numbers of willisma/SiT."""
    return numbers("sit")


class ExactFlow(FlowSchedule):
    """The linear path, whose network is told the time in float64."""

    def network_time(self, t: Tensor) -> Tensor:
        return t.double()


@pytest.fixture(scope="module")
def flow(sit: dict[str, Tensor]) -> Denoiser:
    """SiT's weights in our DiT."""
    network = build({**OPTIONS, "convention": "sit"}).double()
    network.load_state_dict(part(sit, "sit."))
    return Denoiser(network.requires_grad_(False), ExactFlow(), "v")


def student(ard: dict[str, Tensor], layers: int) -> History:
    """ARD's weights in our DiT with history."""
    network = with_history(
        DiT(**{**OPTIONS, "image_size": 32}), 4, layers, per_step_heads=True
    ).double()
    network.load_state_dict(part(ard, "ard."))
    return network


@pytest.mark.parametrize(("name", "side"), [("dit", 8), ("ard", 16)])
def test_fixed_positions(request: pytest.FixtureRequest, name: str, side: int) -> None:
    """A fresh network has the official fixed positions, in float32.

    Loading a state dict overwrites them, so the other tests do not see them.
    """
    close(
        sincos_position_embedding(48, (side, side)),
        request.getfixturevalue(name)[f"{name}.pos_embed"],
        1e-6,
    )


def test_dit_forward(dit: dict[str, Tensor], denoiser: Denoiser) -> None:
    close(denoiser.network(dit["io.x"], dit["io.t"], Condition(dit["io.y"])), dit["io.out"])


def test_dit_forward_in_float32(dit: dict[str, Tensor]) -> None:
    """Nothing is lost in the type but rounding."""
    network = DiT(**OPTIONS).requires_grad_(False)
    network.load_state_dict(part(dit, "dit."))
    found = network(dit["io.x"].float(), dit["io.t"], Condition(dit["io.y"]))
    assert found.dtype == torch.float32
    close(found, dit["io.out"], 1e-3)


def test_dit_guided_forward(dit: dict[str, Tensor], denoiser: Denoiser) -> None:
    level_500 = torch.tensor(501 / 1000, dtype=torch.float64)
    found = Guided(denoiser, 1.5, Conditions(10).null, channels=3)(
        dit["io.z"], level_500, Condition(dit["io.labels"])
    )
    close(found.eps, dit["io.cfg_out_t500_w1.5"][:, :4])


def levels(dit: dict[str, Tensor], steps: int) -> Tensor:
    """The timesteps of the golden samples: DiT's levels, noise first, and then clean data."""
    numbers = dit[f"io.ddim{steps}_timesteps"].flip(0).double()
    return torch.cat([(numbers + 1) / 1000, torch.zeros(1, dtype=torch.float64)])


def test_dit_guided_ddim(dit: dict[str, Tensor], denoiser: Denoiser) -> None:
    model = Guided(denoiser, 1.5, Conditions(10).null, channels=3)
    found = sample(DDIM(), model, dit["io.z"], levels(dit, 25), Condition(dit["io.labels"]))
    close(found, dit["io.ddim25_w1.5_first3channels"])


def test_dit_unguided_ddim(dit: dict[str, Tensor], denoiser: Denoiser) -> None:
    found = sample(DDIM(), denoiser, dit["io.z"], levels(dit, 8), Condition(dit["io.labels"]))
    close(found, dit["io.ddim8_unguided"])


def test_sit_forward(sit: dict[str, Tensor], flow: Denoiser) -> None:
    """SiT's time is 0 at the noise, and it predicts data - noise."""
    found = flow.network(sit["io.x"], 1 - sit["io.t"], Condition(sit["io.y"]))
    close(-found[:, :4], sit["io.out"])


def test_sit_guided_forward(sit: dict[str, Tensor], flow: Denoiser) -> None:
    t = torch.tensor(1 - 0.35, dtype=torch.float64)
    found = Guided(flow, 1.5, Conditions(10).null, channels=3)(
        sit["io.z"], t, Condition(sit["io.labels"])
    )
    close(-found.v, sit["io.cfg_out_t0.35_w1.5"])


def test_sit_euler(sit: dict[str, Tensor], flow: Denoiser) -> None:
    model = Guided(flow, 1.5, Conditions(10).null, channels=3)
    levels = torch.linspace(1, 0, 11, dtype=torch.float64)
    found = sample(Euler(), model, sit["io.z"], levels, Condition(sit["io.labels"]))
    close(found, sit["io.euler10_w1.5_first3channels"])


@pytest.mark.parametrize("layers", LAYERS)
def test_ard_predictions_losses_and_gradients(ard: dict[str, Tensor], layers: int) -> None:
    network, states = student(ard, layers), ard["io.states"]
    output, _ = network(states[:, :-1], ard["io.times"].expand(2, 4), Condition(ard["io.labels"]))
    error = output[:, :, :4] - states[:, 1:]
    loss = error.square().mean((1, 2, 3, 4))
    loss.mean().backward()
    close(output[:, :, :4], ard[f"out.N{layers}.pred"])
    close(loss, ard[f"out.N{layers}.loss"])
    norms = part(ard, f"out.N{layers}.gradnorm.")
    assert len(norms) == 6
    for name, norm in norms.items():
        close(network.get_parameter(name).grad.norm(), norm)


@pytest.mark.parametrize("layers", LAYERS)
def test_ard_each_sampling_step_on_a_cache(ard: dict[str, Tensor], layers: int) -> None:
    """From their state to their next one, so that an error shows in the step where it is made."""
    network, sample, cache = (
        student(ard, layers).requires_grad_(False),
        ard[f"out.N{layers}.sample"],
        EMPTY,
    )
    states = torch.cat([ard["io.states"][:, :1], sample], 1)
    for step, time in enumerate(ard["io.times"]):
        output, cache = network(
            states[:, step : step + 1], time.expand(2, 1), Condition(ard["io.labels"]), cache
        )
        close(output[:, 0, :4], sample[:, step])


@pytest.mark.parametrize("layers", LAYERS)
def test_ard_free_running_sampling(ard: dict[str, Tensor], layers: int) -> None:
    network = student(ard, layers).requires_grad_(False)
    x, cache, found = ard["io.states"][:, :1], EMPTY, []
    for time in ard["io.times"]:
        output, cache = network(x, time.expand(2, 1), Condition(ard["io.labels"]), cache)
        x = output[:, :, :4]
        found.append(x)
    close(torch.cat(found, 1), ard[f"out.N{layers}.sample"])


class Problem:
    """The task on which the authors' numbers were made, as far as the method needs it."""

    shape, num_classes, network_options = (4, 32, 32), 10, {**OPTIONS, "image_size": 32}
    schedule, prediction_type, trajectory_steps, network_teacher = VPSchedule(), "eps", 4, True
    trajectory_levels = few_step_levels(4)


@pytest.mark.parametrize("grid", ["task", "released"])
@pytest.mark.parametrize("layers", LAYERS)
def test_the_method_itself_has_their_loss_and_samples(
    ard: dict[str, Tensor], layers: int, grid: str
) -> None:
    """The points are the four predictions of the trajectory, or those after 10, 15, 20, 25 of 25.

    Of all other states and predictions nothing may be read.
    """
    teacher = Guided(
        Denoiser(DiT(**Problem.network_options), VPSchedule()), 1.5, Conditions(10).null
    ).double()
    config = ARDConfig(history_layers=layers, protocol="released", grid=grid)
    method = ARD(config, teacher, Problem(), 4, 1)
    close(method.points.times, ard["io.times"])
    for network in (method.players["student"].module, method.student):
        network.double().load_state_dict(part(ard, "ard."))
    states, cond = ard["io.states"], Condition(ard["io.labels"])
    steps, places = (4, [0, 1, 2, 3]) if grid == "task" else (25, [9, 14, 19, 24])
    unread = torch.full((2, steps + 1, *states.shape[2:]), torch.nan, dtype=states.dtype)
    trajectory = Trajectory(
        unread.index_copy(1, torch.tensor([0]), states[:, :1]),
        unread[:, 1:].index_copy(1, torch.tensor(places), states[:, 1:]),
        few_step_levels(4) if grid == "task" else respaced_levels(25),
        cond,
    )
    loss, _ = method.loss(Batch(torch.arange(2), None, trajectory, Keyed("test", 0)))
    close(loss, ard[f"out.N{layers}.loss"].mean())
    path = trace(method.solver, method.student, states[:, 0], method.levels, cond)
    close(path.states[:, 1:], ard[f"out.N{layers}.sample"])
