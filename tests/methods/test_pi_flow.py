"""pi-Flow: exact policies have no loss; the sampler follows them as the teacher by DDIM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussian import COUNT, MEAN, SHAPE, STD, Exact, GaussianTask, Model, posterior, wide, with_v
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import Schedule
from harness.errors import UsageError
from harness.methods import METHODS, Batch
from harness.methods.parts.student import flow_time, time_of_flow
from harness.methods.pi_flow import Grid, Mixture, PiFlow, PiFlowConfig, Policy
from harness.solvers import DDIM, sample

COND = Condition(torch.zeros(COUNT, dtype=torch.long))
PARTS = {"gm": "log_std", "dx": "x_0"}
"""What a policy of each kind is spoilt by."""


def linear(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """A teacher whose x_0 is linear in flow time, whatever x is."""
    alpha, sigma = (wide(c) for c in schedule.alpha_sigma(t))
    x_0 = 0.2 + 0.7 * wide(flow_time(schedule, t)) + torch.zeros_like(x).double()
    return with_v(x_0, (x.double() - alpha * x_0) / sigma, t, schedule)


TEACHERS: dict[str, Exact] = {"gm": posterior, "dx": linear}


def gaussian(kind: str, schedule: str = "flow", num_steps: int = 2, **options: Any) -> PiFlow:
    task = GaussianTask(schedule)
    config = PiFlowConfig(policy=kind, **{"components": 5, "substeps": 8} | options)  # type: ignore[arg-type]
    teacher = Model(TEACHERS[kind], task.schedule)
    with keyed_initialisation(0, "pi-flow"):
        return PiFlow(config, teacher, task, num_steps, 10)  # type: ignore[arg-type]


def exact(method: PiFlow) -> Callable[..., Policy]:
    """The teacher as a policy: a mixture whose components are all the posterior, or a grid."""

    def policy(model: Any, x_t: Tensor, tau: Tensor, end: Tensor, cond: Condition) -> Policy:
        t, count = time_of_flow(method.schedule, tau), method.config.components
        alpha, sigma = (wide(c) for c in method.schedule.alpha_sigma(t))
        y = x_t.double() / (alpha + sigma)
        if method.config.policy == "dx":
            nodes = torch.linspace(0, 1, count, dtype=torch.float64)
            taus = [end.expand(len(y)) + node * (tau - end) for node in nodes]
            return Grid(y, tau, torch.stack([0.2 + 0.7 * wide(s) + 0 * y for s in taus]), end)
        mean = posterior(x_t, t.expand(len(y)), cond, method.schedule).x_0
        variance = STD**2 * tau**2 / ((1 - tau) ** 2 * STD**2 + tau**2)
        logits = torch.randn(count, len(y), 1, 1, 1, generator=torch.Generator().manual_seed(0))
        log_std = (variance.sqrt() / tau).log().expand(len(y))
        return Mixture(y, tau, mean.expand(count, *mean.shape), logits.double(), log_std)

    return policy


def batch_of(step: int) -> Batch:
    index = torch.arange(COUNT)
    data = (MEAN + STD * Keyed("data", 0, step).normal("x", index, SHAPE)).double()
    return Batch(index, (data, COND), None, Keyed("train", 0, step))


@pytest.mark.parametrize("schedule", ["flow", "vp"])
@pytest.mark.parametrize("kind", ["gm", "dx"])
def test_the_loss_is_0_where_the_policy_is_the_teacher(
    kind: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = gaussian(kind, schedule)
    right = exact(method)
    monkeypatch.setattr(method, "policy", right)
    assert float(method.loss(batch_of(0))[0]) < 1e-16

    def wrong(*args: Any) -> Policy:
        policy = right(*args)
        return replace(policy, **{PARTS[kind]: 1.01 * getattr(policy, PARTS[kind])})

    monkeypatch.setattr(method, "policy", wrong)
    assert float(method.loss(batch_of(0))[0]) > 1e-6


@pytest.mark.parametrize("kind", ["gm", "dx"])
def test_the_sampler_follows_an_exact_policy_as_the_teacher_by_ddim(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = gaussian(kind, "vp", num_steps=4, shift=3.0)
    monkeypatch.setattr(method, "policy", exact(method))
    x_T = Keyed("test", 0).normal("x_T", torch.arange(COUNT), SHAPE).double()
    found = sample(method.solver, method.student, x_T, method.levels, COND)
    expected = sample(DDIM(), method.teacher, x_T, method.grid, COND)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_mixture_is_the_posterior_of_its_prior() -> None:
    """Two components of one pixel with two channels, by Bayes' rule on a fine grid."""
    y_s, y = torch.tensor([0.4, -0.2]), torch.tensor([0.3, 0.1])
    start, tau, std = 0.8, 0.5, 0.3
    means, weights = torch.tensor([[0.5, 0.1], [-0.4, 0.3]]), torch.tensor([0.3, 0.7])
    at = lambda s: torch.tensor([s], dtype=torch.float64)  # noqa: E731
    policy = Mixture(
        y_s.double().view(1, 2, 1, 1),
        at(start),
        means.double().view(2, 1, 2, 1, 1),
        weights.double().log().view(2, 1, 1, 1, 1),
        (at(std) / start).log(),
    )
    line = torch.linspace(-3, 3, 601, dtype=torch.float64)
    x = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    # The mixture is what is known of x_0 at the start; its likelihood there is taken out again.
    density = sum(
        w * torch.exp(-(x - m).square().sum(-1) / (2 * std**2))
        for w, m in zip(weights, means, strict=True)
    )
    for sign, point, s in ((1, y_s, start), (-1, y, tau)):
        density = density * torch.exp(sign * (point - (1 - s) * x).square().sum(-1) / (2 * s**2))
    expected = (density.unsqueeze(-1) * x).sum((0, 1)) / density.sum()
    found = policy.mean(y.double().view(1, 2, 1, 1), at(tau)).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_points_lie_in_their_segments() -> None:
    method = gaussian("gm", num_steps=4, substeps=32)
    taus, at = method.points(batch_of(0))
    assert taus.shape == (9, COUNT)
    assert set(taus[0].tolist()) == {1, 0.75, 0.5, 0.25}
    assert bool(((at <= taus[0]) & (at >= taus[-1])).all())
    assert float((at - taus[-1]).min()) < 0.02
    assert float((taus[0] - at).min()) < 0.02


def test_components_are_left_out_on_the_way_but_never_all() -> None:
    logits = torch.zeros(3, 2, 1, 1, 1)
    x_0 = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 2, 1, 1, 1)
    start = torch.ones(2, dtype=torch.float64)
    policy = Mixture(torch.zeros(2, 1, 1, 1), start, x_0, logits, torch.zeros(2))
    dropped = torch.tensor([[True, False, False], [True, True, True]])
    assert policy.without(dropped).mean(policy.y, start).flatten().tolist() == [1.5, 1.0]


def test_the_number_of_steps_divides_the_substeps() -> None:
    with pytest.raises(UsageError, match="num_steps is 3, but must divide substeps, which is 32"):
        METHODS["pi-flow"].check(PiFlowConfig(), GaussianTask("flow"), 3)  # type: ignore[arg-type]
