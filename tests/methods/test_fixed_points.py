"""Methods at their fixed points, on a Gaussian with a closed-form denoiser, ODE and jumps.

The student predicts its method's exact answer, distorted by two parameters that are 0. If the
method is exact, its loss is 0. If it is exact in expectation, the parameters' mean gradient over
many batches lies within 4 standard errors of 0. At a wrong map of the same kind it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussian import (
    COUNT,
    MEAN,
    SHAPE,
    STD,
    Exact,
    Model,
    batches,
    built,
    carried,
    end,
    fading,
    jump,
    largest_z,
    posterior,
    step,
    towards,
    wide,
    with_v,
)
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import Schedule, few_step_levels, schedule_of
from harness.methods import Batch
from harness.methods.parts.student import sigma_ve
from harness.solvers import DDIM, sample, trace

# in expectation

IN_EXPECTATION: dict[
    str, tuple[str, dict[str, Any], Exact, Exact]
] = {  # method, options, its map, and a wrong one
    "meanflow": ("meanflow", {"distinct": 0.7}, jump, posterior),
    "meanflow, plain": ("meanflow", {"distinct": 0.7, "power": 0.0}, jump, posterior),
    "shortcut": ("shortcut", {"bootstrap": 0.6}, step, fading),
    "ctm's denoising": ("ctm", {}, jump, end),
    "sct": ("scm", {"source": "data", "ramp_steps": 0}, end, fading),
    "sct, weighted": (
        "scm",
        {"source": "data", "ramp_steps": 0, "normalisation": 1e3},
        end,
        fading,
    ),
}


def expected(case: str, schedule: str, right: bool) -> float:
    """`largest_z` of a case at its map, or at the wrong one."""
    name, options, exact, wrong = IN_EXPECTATION[case]
    method = built(name, exact if right else wrong, schedule, **options)
    if name == "ctm":
        method.jump = lambda model, x_t, *more: x_t.detach()  # leaves denoising alone
    return largest_z(method, next(iter(method.updates(99))).loss)


@pytest.mark.parametrize("schedule", ["vp", "flow", pytest.param("flow-3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", IN_EXPECTATION)
def test_at_the_fixed_point_no_mean_gradient_is_left(case: str, schedule: str) -> None:
    assert expected(case, schedule, right=True) < 4
    assert expected(case, schedule, right=False) > 8


def conditional_gain(
    pairs: Callable[[Tensor], Tensor], schedule: Schedule
) -> Callable[[Tensor], Tensor]:
    """The gain g for which `f(x, t) = mean + g(t) (x - alpha mean)` obeys f(x_t) = E[f(x_s) | x_t].

    The recursion starts at clean data.

    Args:
        pairs: maps each noise level sigma / alpha of t to that of s; 0 is clean.
    """

    def gain(sigma: Tensor) -> Tensor:
        if not bool((sigma > 0).any()):
            return torch.ones_like(sigma)
        lower = torch.where(sigma > 0, pairs(sigma), 0.0)
        t, s = (torch.where(level > 0, schedule.time_of(level), 0.0) for level in (sigma, lower))
        (a, st), (b, ss) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        return torch.where(
            sigma > 0, gain(lower) * (a * b * STD**2 + st * ss) / (a**2 * STD**2 + st**2), 1.0
        )

    return gain


def conditional(gain: Callable[[Tensor], Tensor]) -> Exact:
    def formula(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
        alpha, sigma = (wide(c) for c in schedule.alpha_sigma(t))
        g = wide(gain(sigma_ve(schedule, t)))
        x_0 = MEAN + g * (x.double() - alpha * MEAN)
        return with_v(x_0, (x.double() - alpha * x_0) / sigma, t, schedule)

    return formula


def next_below(grid: Tensor, schedule: Schedule) -> Callable[[Tensor], Tensor]:
    levels = sigma_ve(schedule, grid)

    def pairs(sigma: Tensor) -> Tensor:
        place = (levels.unsqueeze(0) - sigma.unsqueeze(1)).abs().argmin(1)
        return levels[(place + 1).clamp(max=len(levels) - 1)]

    return pairs


@pytest.mark.parametrize("loss", ["l2", pytest.param("huber", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["consistency-training", "ict", "ect"])
def test_consistency_training_finds_conditional_means(name: str, loss: str) -> None:
    options: dict[str, Any] = {"loss": loss, **({"huber_c": 0.05} if loss == "huber" else {})}
    options |= (
        {"stages": 4, "stage_steps": 20} if name == "ect" else {"levels_from": 6, "levels_to": 12}
    )
    method, schedule = built(name, num_steps=1, **options), schedule_of("vp")
    if name == "ect":

        def last_pairs(sigma: Tensor) -> Tensor:
            ratio = 1 - 2.0**-4 * (1 + 8 * torch.sigmoid(-sigma * 0.5 / STD))
            return torch.where(sigma > 0.02, sigma * ratio.clamp(min=0), 0.0)

        gain = conditional_gain(last_pairs, schedule)
        method.pairs = floored(method.pairs, schedule)
    else:
        gain = conditional_gain(next_below(method.grid(99), schedule), schedule)
    method.model = method.target_model = Model(conditional(gain), schedule)
    assert largest_z(method, lambda batch: method.loss_at(batch, step=99)) < 4
    method.model = method.target_model = Model(fading, schedule)
    assert largest_z(method, lambda batch: method.loss_at(batch, step=99)) > 8


def floored(pairs: Any, schedule: Schedule) -> Any:
    """The same pairs, with clean data below a noise level of 0.02, so that the recursion ends."""

    def found(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        t, s = pairs(batch, step)
        return t, torch.where(sigma_ve(schedule, t) > 0.02, s, 0.0)

    return found


# exactly


def test_the_derivative_of_a_consistency_function_is_zero() -> None:
    method = built("scm", end, ramp_steps=0)
    assert method.target == "guided teacher"
    found = [method.loss_at(batch, r=1.0)[1]["tangent"] for batch in batches(2)]
    wrong = built("scm", posterior, ramp_steps=0)
    assert max(map(float, found)) < 1e-6 * min(
        float(wrong.loss_at(batch, r=1.0)[1]["tangent"]) for batch in batches(2)
    )


def test_meanflow_from_the_teacher_is_exact_at_its_jumps() -> None:
    right, wrong = (
        max(float(method.loss(batch)[1]["mse"]) for batch in batches(2))
        for method in (
            built("meanflow", formula, source="teacher", distinct=1.0, power=0.0)
            for formula in (jump, posterior)
        )
    )
    assert right < 1e-4 * wrong


@pytest.mark.parametrize("schedule", ["flow", "vp"])
@pytest.mark.parametrize(
    ("name", "options", "wrong"),
    [
        ("meanflow", {"source": "teacher", "distinct": 1.0, "one_step": 0.2}, posterior),
        ("scm", {"ramp_steps": 0}, fading),
        ("ayf", {"one_step": 0.2}, posterior),
    ],
    ids=["meanflow", "scm", "ayf"],
)
def test_a_difference_is_a_derivative_within_1_percent(
    name: str, options: dict[str, Any], wrong: Exact, schedule: str
) -> None:
    """The gradient of the loss by both, at a map that is not the method's own."""
    found = []
    for how in ("jvp", "difference"):
        method = built(name, wrong, schedule, derivative=how, **options)
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches(2, schedule=schedule):
            method.model.distortion.grad = None
            loss = method.loss(batch) if name == "meanflow" else method.loss_at(batch, r=1.0)
            loss[0].backward()
            total += method.model.distortion.grad
        found.append(total)
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=0)
    assert not torch.equal(found[1], found[0])


@pytest.mark.parametrize("schedule", ["flow", "vp"])
def test_alpha_flows_error_falls_with_the_square_of_alpha(schedule: str) -> None:
    options = {"source": "teacher", "distinct": 1.0, "one_step": 0.0}
    method = built("alpha-flow", jump, schedule, **options)

    def error(alpha: float) -> float:
        """Root mean square of the loss's difference."""
        found = [method.loss_at(batch, alpha)[1]["mse"] for batch in batches(2, schedule=schedule)]
        return float(torch.stack(found).mean().sqrt())

    errors = [error(alpha) for alpha in (0.08, 0.04, 0.02)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)
    assert error(1.0) > 100 * errors[2]


def test_alpha_falls_from_1_to_its_smallest_or_to_0() -> None:
    down, to_zero = built("alpha-flow", fall_steps=100), built("alpha-flow", discrete=False)
    assert [down.alpha(step) for step in (0, 50, 100, 10_000)] == [1, 0.5, 0.005, 0.005]
    assert to_zero.alpha(10_000) == 0
    (update,) = to_zero.updates(10_000)
    assert update.phase == "derivative"
    assert [update.phase for step in (0, 50) for update in down.updates(step)] == ["flow", ""]


def line(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """The pair of noise and sample on whose straight line x lies: x_0 = a + b x_T."""
    one = torch.ones_like(t)
    a = carried(torch.zeros_like(x), one, 0 * one, schedule)
    b = carried(torch.ones_like(x), one, 0 * one, schedule) - a
    alpha, sigma = (wide(c) for c in schedule.alpha_sigma(t))
    x_T = (x.double() - alpha * a) / (alpha * b + sigma)
    return with_v(a + b * torch.where(wide(t) == 1, x.double(), x_T), x_T, t, schedule)


def test_reflow_finds_the_lines_between_the_pairs() -> None:
    for num_steps, step_number in ((4, 0), (1, 99)):
        losses = []
        for formula in (line, posterior):
            method = built("reflow", formula, num_steps=num_steps)
            (update,) = method.updates(step_number)
            losses.append(
                max(float(update.loss(batch)[0].detach()) for batch in batches(2, paths=True))
            )
        assert losses[0] < 1e-4 * losses[1]


def remaining(grid: Tensor) -> Exact:
    """The map that takes the teacher's remaining DDIM steps on a grid."""

    def formula(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
        teacher, there = Model(posterior, schedule), torch.empty_like(x, dtype=torch.float64)
        for level in t.unique():
            rows = t == level
            start = int((grid - level).abs().argmin())
            there[rows] = sample(
                DDIM(), teacher, x[rows].double(), grid[start:], cond[rows]
            ).detach()
        return towards(x, t, there, torch.zeros_like(t), schedule)

    return formula


def test_lcm_is_exact_at_the_rest_of_the_grid() -> None:
    losses = []
    for formula in (remaining(few_step_levels(4)), posterior):
        method = built("lcm", formula, grid_levels=4, loss="l2")
        losses.append(max(float(method.loss(batch)[0].detach()) for batch in batches(2)))
    assert losses[0] < 1e-6 * losses[1]


def solver_jump(grid: Tensor) -> Exact:
    """The jump that takes the teacher's DDIM steps on a grid to the condition's target time."""

    def formula(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
        s = schedule.time_from_network(cond.scalars["target"]).clamp(min=0)
        places = [(grid.unsqueeze(0) - level.unsqueeze(1)).abs().argmin(1) for level in (t, s)]
        teacher, there = Model(posterior, schedule), x.double().clone()
        for pair in torch.stack(places, 1).unique(dim=0).tolist():
            rows = (places[0] == pair[0]) & (places[1] == pair[1])
            if pair[0] < pair[1]:
                there[rows] = sample(
                    DDIM(), teacher, x[rows].double(), grid[pair[0] : pair[1] + 1], cond[rows]
                )
        onwards = torch.where(places[0] < places[1], s, (t - 0.01).clamp(min=0))
        return towards(x, t, there, onwards, schedule)

    return formula


def test_ctm_is_exact_at_the_jumps_of_the_teachers_solver() -> None:
    losses = []
    for formula in (solver_jump(few_step_levels(8)), end):
        method = built("ctm", formula, dsm=0.0, loss="l2")
        losses.append(max(float(method.loss(batch)[0].detach()) for batch in batches(2, size=64)))
    assert losses[0] < 1e-6 * losses[1]


def test_a_progressive_step_is_two_of_the_teachers() -> None:
    losses = []
    fine = few_step_levels(8)

    def two(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
        teacher, there, s = (
            Model(posterior, schedule),
            torch.empty_like(x, dtype=torch.float64),
            torch.empty_like(t),
        )
        for level in t.unique():
            rows, start = t == level, int((fine - level).abs().argmin())
            there[rows] = sample(
                DDIM(), teacher, x[rows].double(), fine[start : start + 3], cond[rows]
            ).detach()
            s[rows] = fine[start + 2]
        return towards(x, t, there, s, schedule)

    for formula in (two, posterior):
        method = built("progressive", formula, rounds=1, num_steps=4)
        losses.append(max(float(method.loss_in(batch, 0)[0].detach()) for batch in batches(2)))
    assert losses[0] < 1e-6 * losses[1]


def test_distribution_matching_stops_where_the_fake_score_is_the_teacher() -> None:
    method = built("dmd2", end, student_gan=0.0, num_steps=2)
    found = []
    for formula in (posterior, end):
        method.matching.model = Model(formula, method.schedule)
        found.append(
            max(float(method.loss_at(batch, place=1)[1]["gradient"]) for batch in batches(2))
        )
    assert found[0] < 1e-9 * found[1]


@pytest.mark.parametrize("divergence", ["kl", "js", "hellinger", "jeffreys"])
def test_divergences_agree_where_the_head_cannot_tell(divergence: str) -> None:
    """Equal densities have the ratio 1, so every sample has the weight 1."""
    plain, other = (
        built("dmd2", end, num_steps=2, divergence=d) for d in ("reverse-kl", divergence)
    )
    for batch in batches(1):
        for method in (plain, other):
            method.matching.model = Model(posterior, method.schedule)
            method.matching.fake.logit = lambda x_t, time, cond: torch.zeros(len(x_t))
        assert torch.equal(plain.loss_at(batch, 1)[0], other.loss_at(batch, 1)[0])


def test_kl_weighs_a_sample_by_its_density_ratio_among_those_of_its_time() -> None:
    """Ratios 1 and 3 in one tenth of the timesteps are 0.5 and 1.5 of its mean; 60 is cut to 20."""
    matching = built("dmd2", end, divergence="kl", min_time=0.1, max_time=0.9).matching
    ratios = torch.tensor([1.0, 3.0, 60.0, 20.0])
    matching.fake.logit = lambda x_t, time, cond: ratios.log()
    x_t, t = torch.zeros(4, *SHAPE), torch.tensor([0.5, 0.51, 0.85, 0.86], dtype=torch.float64)
    found = matching.weights(x_t, t, Condition(torch.zeros(4, dtype=torch.long))).flatten()
    torch.testing.assert_close(found, torch.tensor([0.5, 1.5, 1.0, 1.0]))


def test_the_fake_score_finds_the_denoiser_of_the_students_samples() -> None:
    # The student is exact, so its samples are the data.
    method = built("dmd2", end, fake_gan=0.0, num_steps=1)
    for formula, bound in ((posterior, 4.0), (end, None)):
        method.matching.model = Model(formula, method.schedule)
        found = []
        for batch in batches():
            method.matching.model.distortion.grad = None
            method.fake_loss(batch, place=0)[0].backward()
            found.append(method.matching.model.distortion.grad.clone())
        gradients = torch.stack(found)
        z = float((gradients.mean(0).abs() / (gradients.std(0) / len(found) ** 0.5)).max())
        assert z < bound if bound else z > 8


def test_moments_agree_where_all_jumps_end_in_the_same_points() -> None:
    def same(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
        s = torch.minimum(
            schedule.time_from_network(cond.scalars["target"]).clamp(min=0), t - 1e-6
        ).clamp(min=0)
        return towards(x, t, torch.full_like(x, MEAN, dtype=torch.float64), s, schedule)

    losses = []
    for formula in (same, posterior):
        method = built("imm", formula, gap=2, label_dropout=0.0)
        drawn = method.times
        method.times = lambda batch, drawn=drawn: (*drawn(batch)[:2], drawn(batch)[2] / 4)  # r > s
        losses.append(max(float(method.loss(batch)[0].detach()) for batch in batches(2)))
    assert losses[0] < 1e-5 * losses[1]


def test_moments_see_no_difference_between_equal_distributions() -> None:
    """Apart from a sample's own pair, whose ends differ, exact jumps leave no mean gradient."""
    method = built("imm", jump, gap=2, group=8, label_dropout=0.0)

    def loss(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        batch.data[1].labels.copy_(torch.arange(COUNT) % 8)  # type: ignore[index, union-attr]
        with_own = method.loss(batch)[0]  # of different labels: own pairs alone
        batch.data[1].labels.zero_()  # type: ignore[index, union-attr]
        return method.loss(batch)[0] - with_own, {}

    assert largest_z(method, loss) < 4
    method = built("imm", end, gap=2, group=8, label_dropout=0.0)
    assert largest_z(method, loss) > 8


# in which direction: what is 0 at the fixed point must not be of the wrong sign elsewhere


def shifted(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """The denoiser of the data, moved up by 0.5."""
    alpha, _ = (wide(c) for c in schedule.alpha_sigma(t))
    found = posterior(x - 0.5 * alpha, t, cond, schedule)
    return with_v(found.x_0 + 0.5, found.eps, t, schedule)


def test_distribution_matching_moves_samples_back() -> None:
    method = built("dmd2", end, student_gan=0.0, fake_gan=0.0)
    method.matching.model = Model(shifted, method.schedule)
    for batch in batches(1):
        x = (batch.data[0] + 0.5).requires_grad_()  # type: ignore[index]
        method.generate = lambda *args, x=x: x
        method.loss_at(batch, place=0)[0].backward()
        # Gradient descent moves the samples down.
        assert float(x.grad.mean()) > 5 * float(x.grad.std()) / x.numel() ** 0.5


def test_a_students_gan_loss_asks_for_what_looks_real_and_a_critics_tells_apart() -> None:
    method = built("dmd2", end, num_steps=1)
    slope = torch.ones((), dtype=torch.float64, requires_grad=True)
    method.matching.fake.logit = lambda x_t, time, cond: slope * x_t.mean((1, 2, 3))
    # The fake equals the teacher, so matching has no gradient.
    method.matching.model = Model(posterior, method.schedule)
    (batch,) = batches(1)
    x = (batch.data[0] - 2).detach().requires_grad_()  # type: ignore[index]
    method.generate = lambda *args: x
    method.loss_at(batch, place=0)[0].backward()
    assert bool((x.grad < 0).all())  # up, where the logit is higher
    slope.grad = None
    method.fake_loss(batch, place=0)[0].backward()
    assert float(slope.grad) < 0  # real images are above the samples: a steeper logit tells more


def test_backward_simulation_is_the_samplers_own_path() -> None:
    method, seen = built("dmd2", end, num_steps=4), []
    (batch,) = batches(1, size=8)
    cond = batch.data[1]  # type: ignore[index]

    def recording(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        seen.append((x_t, float(t)))
        return Model(fading, method.schedule)(x_t, t, cond)

    method.generate(recording, cond, batch, 2, "student")
    named = lambda name: batch.normal(f"student {name}", SHAPE)  # noqa: E731
    path = trace(
        method.solver, Model(fading, method.schedule), named("x_T"), method.levels, cond, named
    )
    assert [t for _, t in seen] == method.levels[:3].tolist()
    for i, (x_t, _) in enumerate(seen):
        torch.testing.assert_close(x_t.float(), path.states[:, i].float())


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_scms_tangent_points_to_where_the_path_leads(source: str) -> None:
    """Descending L moves F along g, that is against the change of f along the path (eq. 7)."""
    method = built("scm", fading, ramp_steps=0, source=source, normalisation=1e3)
    drift = []
    for batch in batches(24):
        method.model.distortion.grad = None
        method.loss_at(batch, r=1.0)[0].backward()
        drift.append(float(method.model.distortion.grad[1]))
    right, wrong = built("scm", end, ramp_steps=0), method
    cond, angle = (
        Condition(torch.zeros(64, dtype=torch.long)),
        torch.full((64,), 1.2, dtype=torch.float64),
    )
    x = Keyed("test", 0).normal("x", torch.arange(64), SHAPE).double()
    towards_right = (
        right.F(right.model, x, angle, cond) - wrong.F(wrong.model, x, angle, cond)
    ).mean()
    moved = -sum(drift) * float(towards_right)  # of the distortion, which raises u and with it F
    assert moved > 0
