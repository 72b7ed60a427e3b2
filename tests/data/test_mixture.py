"""The Gaussian mixture: its formulas against sampling, quadrature and known special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness.data.mixture import ExactNetwork, GaussianMixture
from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import FlowSchedule, Schedule, VPSchedule
from harness.metrics.exact import kl_of_map
from harness.metrics.fidelity import frechet_distance, sample_moments

KEYS = Keyed("test", 0)
MIXTURE = GaussianMixture.drawn(0, 3, 2, 2, 0.8, (0.2, 0.4))
NULL = 3


def labels(count: int) -> Tensor:
    return torch.arange(count) % 3


def one_gaussian(mean: list[float], std: float) -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[std]], dtype=torch.float64)
    )


@pytest.mark.parametrize("label", [0, 1, 2, NULL])
def test_the_density_integrates_to_one(label: int) -> None:
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    total = (
        MIXTURE.log_density(points, torch.full((len(points),), label)).exp().sum()
        * (axis[1] - axis[0]) ** 2
    )
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_samples_have_the_moments() -> None:
    index = torch.arange(60_000)
    samples = MIXTURE.sample(KEYS, index, labels(len(index)))
    assert frechet_distance(sample_moments(samples), MIXTURE.moments()) < 1e-3
    mean, covariance = sample_moments(samples)
    torch.testing.assert_close(mean, MIXTURE.moments()[0], rtol=0, atol=0.02)
    torch.testing.assert_close(covariance, MIXTURE.moments()[1], rtol=0, atol=0.02)


@pytest.mark.parametrize("label", [0, NULL])
@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()])
def test_the_posterior_mean_follows_from_the_density(schedule: Schedule, label: int) -> None:
    """Tweedie: `E[x_0 | x_t] = (x_t + sigma^2 grad log p(x_t)) / alpha`.

    The gradient is autograd's, of the noised density.
    """
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = KEYS.normal("x", torch.arange(3), (2,)).double().requires_grad_(True)
    asked = torch.full((3,), label)
    log_p = MIXTURE._log_components(x_t, alpha, sigma, asked).logsumexp(1)
    score = torch.autograd.grad(log_p.sum(), x_t)[0]
    expected = (x_t.detach() + sigma[:, None] ** 2 * score) / alpha[:, None]
    torch.testing.assert_close(
        MIXTURE.posterior_mean(x_t.detach(), alpha, sigma, asked), expected, rtol=1e-8, atol=1e-8
    )


def test_the_null_class_is_the_mixture_of_all() -> None:
    x = KEYS.normal("x", torch.arange(5), (2,)).double()
    each = torch.stack([MIXTURE.log_density(x, torch.full((5,), c)).exp() for c in range(3)]).mean(
        0
    )
    torch.testing.assert_close(MIXTURE.log_density(x, torch.full((5,), NULL)).exp(), each)


def test_the_ode_map_of_one_gaussian_is_known() -> None:
    """The ODE keeps x's place in units of the standard deviation.

    So `x_0 = m + s (x_T - alpha m) / sqrt(alpha^2 s^2 + sigma^2)`.
    """
    mixture, x_T = one_gaussian([0.3, -0.5], 0.2), KEYS.normal("x", torch.arange(50), (2,)).double()
    alpha, sigma = VPSchedule().alpha_sigma(torch.ones((), dtype=torch.float64))
    mean = mixture.means[0, 0]
    expected = mean + 0.2 * (x_T - alpha * mean) / (alpha**2 * 0.04 + sigma**2).sqrt()
    found = mixture.ode_map(x_T, torch.zeros(50, dtype=torch.long), VPSchedule())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_ode_map_has_converged() -> None:
    x_T = KEYS.normal("x", torch.arange(200), (2,)).double()
    once, twice = (MIXTURE.ode_map(x_T, labels(200), VPSchedule(), steps) for steps in (400, 800))
    assert float((once - twice).abs().max()) < 1e-5


def test_kl_of_the_exact_map_is_zero_and_of_a_wrong_one_is_known() -> None:
    mixture, schedule = one_gaussian([0.3, -0.5], 0.2), VPSchedule()
    alpha, sigma = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
    mean, scale = (
        mixture.means[0, 0].view(2, 1, 1),
        float(0.2 / (alpha**2 * 0.04 + sigma**2).sqrt()),
    )
    x_T = KEYS.normal("x", torch.arange(4000), (2, 1, 1)).double()
    asked = torch.zeros(4000, dtype=torch.long)

    def log_density(x: Tensor) -> Tensor:
        return mixture.log_density(x, asked)

    assert kl_of_map(lambda x: mean + scale * x, x_T, log_density) == pytest.approx(0, abs=2e-3)
    narrower, off = 0.5, 0.1  # KL(N(m + off, (s k)^2) || N(m, s^2)) in each of two dimensions
    expected = 2 * (math.log(1 / narrower) + (narrower**2 + (off / 0.2) ** 2) / 2 - 0.5)
    found = kl_of_map(lambda x: mean + off + scale * narrower * x, x_T, log_density)
    assert found == pytest.approx(expected, rel=0.03)


def test_kl_of_the_mixtures_ode_map_is_zero() -> None:
    count = 400
    x_T = KEYS.normal("x", torch.arange(count), (2, 1, 1)).double()
    found = kl_of_map(
        lambda x: MIXTURE.ode_map(x.flatten(1), labels(count), VPSchedule(), 100),
        x_T,
        lambda x: MIXTURE.log_density(x, labels(count)),
    )
    assert abs(found) < 0.02


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()])
def test_the_exact_network_predicts_the_posterior(schedule: Schedule) -> None:
    denoiser = Denoiser(ExactNetwork(MIXTURE, schedule), schedule)
    x, t = (
        KEYS.normal("x", torch.arange(6), (2, 1, 1)),
        torch.linspace(0.05, 0.95, 6, dtype=torch.float64),
    )
    alpha, sigma = schedule.alpha_sigma(t)
    expected = MIXTURE.posterior_mean(x.flatten(1), alpha, sigma, labels(6))
    torch.testing.assert_close(
        denoiser(x, t, Condition(labels(6))).x_0.flatten(1).double(), expected, rtol=1e-4, atol=1e-4
    )
