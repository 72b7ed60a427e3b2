"""A network seen through its schedule: conversions and back, guidance, counted passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Denoiser, Guided, Prediction, predict
from harness.diffusion.schedules import FlowSchedule, Schedule, VPSchedule
from harness.networks.passes import count_passes

LABELS = Condition(torch.tensor([0, 1, 2]))
NULL = Conditions(5).null


class Network(nn.Module):
    """A network with C + 1 channels that depend on image, time and label; stores its times."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.time = t
        out = torch.sin(x) * (1 + cond.classes.reshape(-1, 1, 1, 1)) + t.reshape(-1, 1, 1, 1) / 1000
        return torch.cat([out, torch.full_like(x[:, :1], 1e9)], 1)


def noisy(t: Tensor, schedule: Schedule) -> tuple[Tensor, Prediction]:
    """Random x_t [3, 2, 4, 4] at t, and the true x_0, eps and v, in float64."""
    random = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=random) for _ in range(2))
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in schedule.alpha_sigma(t))
    v = eps - x_0 if isinstance(schedule, FlowSchedule) else alpha * eps - sigma * x_0
    return alpha * x_0 + sigma * eps, Prediction(x_0, eps, v)


@pytest.mark.parametrize(
    "t", [torch.tensor(0.5), torch.tensor([0.05, 0.4, 0.8])], ids=["one t", "t a sample"]
)
@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()], ids=["vp", "flow"])
@pytest.mark.parametrize("kind", ["eps", "x_0", "v"])
def test_each_output_gives_back_all_three(kind: str, schedule: Schedule, t: Tensor) -> None:
    x_t, truth = noisy(t, schedule)
    output = getattr(truth, kind)
    found = predict(output, x_t, t, schedule, kind)
    assert torch.equal(getattr(found, kind), output)  # straight from the network, no round trip
    for name in ("x_0", "eps", "v"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["eps", "x_0", "v"])
def test_predictions_of_halves_are_float32(kind: str) -> None:
    x_t, truth = noisy(torch.tensor(0.3), VPSchedule())
    found = predict(truth.eps.bfloat16(), x_t.bfloat16(), torch.tensor(0.3), VPSchedule(), kind)
    assert {found.x_0.dtype, found.eps.dtype, found.v.dtype} == {torch.float32}


@pytest.mark.parametrize("kind", ["eps", "x_0", "v"])
def test_nothing_blows_up_on_clean_data(kind: str) -> None:
    x_0 = torch.ones(3, 2, 4, 4)
    output = {"eps": torch.zeros_like(x_0), "x_0": x_0, "v": torch.zeros_like(x_0)}[kind]
    found = predict(output, x_0, torch.tensor(0.0), VPSchedule(), kind)
    assert torch.equal(found.x_0, x_0)
    assert not found.eps.any()


@pytest.mark.parametrize(
    "t", [torch.tensor(0.25), torch.tensor([0.25, 0.5, 1.0])], ids=["one t", "t a sample"]
)
def test_a_denoiser_tells_the_level_and_drops_extra_channels(t: Tensor) -> None:
    network, (x_t, _) = Network(), noisy(t, VPSchedule())
    found = Denoiser(network, VPSchedule(), "eps")(x_t, t, LABELS)
    assert torch.equal(network.time, (1000 * t - 1).expand(3))
    assert torch.equal(found.eps, network(x_t, network.time, LABELS)[:, :2])


@pytest.fixture
def denoiser() -> Denoiser:
    """A denoiser of the network above."""
    return Denoiser(Network(), VPSchedule(), "eps")


T = torch.tensor([0.2, 0.5, 0.7])


def evaluate(model: nn.Module, denoiser: Denoiser, t: Tensor = T) -> tuple[Prediction, float]:
    """What the model says at t, and how many passes a sample took."""
    x_t, _ = noisy(t, VPSchedule())
    with count_passes(denoiser.network) as passes:
        found = model(x_t, t, LABELS)
    return found, passes.total / 3


def test_guidance_at_scale_one_is_the_condition_in_one_pass(denoiser: Denoiser) -> None:
    expected, _ = evaluate(denoiser, denoiser)
    found, passes = evaluate(Guided(denoiser, 1.0, NULL), denoiser)
    assert passes == 1
    assert torch.equal(found.eps, expected.eps)
    assert torch.equal(found.x_0, expected.x_0)


@pytest.mark.parametrize("t", [torch.tensor(0.5), T], ids=["one t", "t a sample"])
@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guidance_is_the_formula_in_two_passes(denoiser: Denoiser, scale: float, t: Tensor) -> None:
    found, passes = evaluate(Guided(denoiser, scale, NULL), denoiser, t)
    x_t, _ = noisy(t, VPSchedule())
    with_label, without = (
        denoiser(x_t, t, LABELS).eps,
        denoiser(x_t, t, Condition(torch.full((3,), 5))).eps,
    )
    assert passes == 2
    torch.testing.assert_close(
        found.eps, without + scale * (with_label - without), rtol=1e-10, atol=1e-10
    )
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in VPSchedule().alpha_sigma(t))
    torch.testing.assert_close(alpha * found.x_0 + sigma * found.eps, x_t, rtol=1e-10, atol=1e-10)


def test_guidance_of_leading_channels_leaves_the_others_conditional(denoiser: Denoiser) -> None:
    found, _ = evaluate(Guided(denoiser, 2.0, NULL, channels=1), denoiser)
    everywhere, _ = evaluate(Guided(denoiser, 2.0, NULL), denoiser)
    conditional, _ = evaluate(denoiser, denoiser)
    assert torch.equal(found.eps[:, :1], everywhere.eps[:, :1])
    assert torch.equal(found.eps[:, 1:], conditional.eps[:, 1:])


def test_guidance_may_turn_patches_without_stretching_them(denoiser: Denoiser) -> None:
    """The guided patch, scaled to the conditional one's norm."""
    found, _ = evaluate(Guided(denoiser, 4.0, NULL, norm_patch=2), denoiser)
    free, _ = evaluate(Guided(denoiser, 4.0, NULL), denoiser)
    conditional, _ = evaluate(denoiser, denoiser)

    def patches(x: Tensor) -> Tensor:
        return F.unfold(x, 2, stride=2)  # [B, C 4, patches]

    expected = patches(free.eps) * (
        patches(conditional.eps).norm(dim=1, keepdim=True)
        / patches(free.eps).norm(dim=1, keepdim=True)
    )
    torch.testing.assert_close(patches(found.eps), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found.eps, free.eps, rtol=0.01)
    again = Guided(denoiser, 1.0, NULL, norm_patch=2).with_network(denoiser.network).at(4.0)
    assert torch.equal(evaluate(again, denoiser)[0].eps, found.eps)


def test_passes_count_samples_and_states_inside_the_block_only() -> None:
    network = nn.Identity()
    with count_passes(network) as passes:
        network(torch.zeros(3, 1, 8, 8))
        network(torch.zeros(2, 4, 1, 8, 8))
    network(torch.zeros(3, 1, 8, 8))
    assert passes.total == 3 + 8


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_guidance_is_the_same_in_the_terms_of_any_network(kind: str) -> None:
    class Saying(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            eps = torch.sin(x) * (1 + cond.classes.reshape(-1, 1, 1, 1))
            return eps if kind == "eps" else predict(eps, x, t, FlowSchedule(), "eps").v

    x_t, _ = noisy(torch.tensor(0.6), FlowSchedule())
    found = Guided(Denoiser(Saying(), FlowSchedule(), kind), 1.5, NULL)(
        x_t, torch.tensor(0.6), LABELS
    )  # type: ignore[arg-type]
    torch.testing.assert_close(
        found.eps,
        torch.sin(x_t) * (6 + 1.5 * (LABELS.classes.reshape(-1, 1, 1, 1) - 5)),
        rtol=1e-10,
        atol=1e-10,
    )


def test_a_velocity_network_is_asked_at_pure_noise() -> None:
    x_t, v = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    found = predict(v, x_t, torch.tensor(1.0), FlowSchedule(), "v")
    assert torch.equal(found.eps, x_t)
    torch.testing.assert_close(found.x_0, x_t - v)
