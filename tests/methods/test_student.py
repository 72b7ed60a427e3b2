"""The coordinates that students of flow matching share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import of_pair, predict
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import SCHEDULES
from harness.errors import UsageError
from harness.methods import METHODS
from harness.methods.base import Batch
from harness.methods.parts.student import flow_time, largest_sigma, time_of_flow, velocity
from harness.networks.passes import count_passes
from harness.solvers import DDIM, sample
from harness.solvers.ddim import ddim_step
from harness.tasks import Task
from harness.training.tiny_task import as_teacher


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flow_times_and_back(schedule: str) -> None:
    t = torch.tensor([0.001, 0.3, 0.7, 0.99], dtype=torch.float64)
    torch.testing.assert_close(
        time_of_flow(SCHEDULES[schedule](), flow_time(SCHEDULES[schedule](), t)),
        t,
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_share_is_bootstrapped_late_in_a_long_run(tiny: Task) -> None:
    cls, step_sizes = METHODS["shortcut"], []
    method = cls(cls.Config(finest=16), tiny.teacher(torch.device("cpu")), tiny, 2, 10)
    method.s = lambda model, y, tau, step, cond: (step_sizes.append(step), y)[1]  # type: ignore[method-assign]
    items = torch.arange(16)
    for first in (0, 2**28):
        step_sizes.clear()
        method.loss(Batch(items + first, tiny.split.train.batch(items), None, Keyed("train", 0, 0)))
        assert int((step_sizes[-1] > 0).sum()) == 2


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        ("ect", {"q": 256.0}, r"q is 256 and stages 8, but q \*\* stages must not exceed 1e\+06"),
        ("ect", {"stages": 64}, "q is 2 and stages 64"),
        (
            "ict",
            {"levels_from": 20, "levels_to": 10},
            "levels_from is 20, but must not exceed levels_to, which is 10",
        ),
    ],
)
def test_levels_that_come_too_close(method: str, options: dict, complaint: str, tiny: Task) -> None:
    cls = METHODS[method]
    cls.check(cls.Config(), tiny, 4)
    with pytest.raises(UsageError, match=complaint):
        cls.check(cls.Config(**options), tiny, 4)


def test_a_flows_pure_noise_is_its_own_time() -> None:
    flow, vp = SCHEDULES["flow"](), SCHEDULES["vp"]()
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert time_of_flow(flow, ends).tolist() == [1, 0]
    assert time_of_flow(vp, ends).tolist() == [1, 0]
    assert largest_sigma(flow) == 160
    assert 157 < largest_sigma(vp) < 158


def test_an_eps_network_is_weighed_as_a_v_network(tiny: Task) -> None:
    """One error of the output moves the conditioned x_0, velocity and DDIM step equally far."""
    s = torch.full((5,), 0.005, dtype=torch.float64)
    grid = torch.tensor([0.999, 0.8, 0.5, 0.2, 0.01], dtype=torch.float64)
    moved = {}
    for kind in ("eps", "v"):
        task = as_teacher(tiny, "vp", kind)
        cls = METHODS["consistency-distillation"]
        method = cls(cls.Config(), task.teacher(torch.device("cpu")), task, 2, 10)
        x = torch.zeros(5, 1, 2, 2, dtype=torch.float64)
        one, none = (
            predict(out, x, grid, task.schedule, kind)
            for out in (torch.ones_like(x), torch.zeros_like(x))
        )
        found = [one.x_0 - none.x_0, velocity(one) - velocity(none)]
        found.append(ddim_step(one, s, task.schedule) - ddim_step(none, s, task.schedule))
        moved[kind] = [method.conditioned(off, grid) for off in found]
    for eps, v in zip(moved["eps"], moved["v"], strict=True):
        torch.testing.assert_close(eps, v, rtol=1e-9, atol=1e-12)


def test_a_known_pair_has_no_output_error(tiny: Task) -> None:
    for kind in (("vp", "eps"), ("vp", "v"), ("flow", "v")):
        task = as_teacher(tiny, *kind)
        cls = METHODS["ctm"]
        method = cls(cls.Config(), task.teacher(torch.device("cpu")), task, 2, 10)
        x_0, eps = (
            Keyed("pair", 0).normal(name, torch.arange(3), (1, 2, 2)) for name in ("x_0", "eps")
        )
        t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
        exact = of_pair(x_0, eps, t, task.schedule)
        assert not method.output_error(exact, x_0, eps, t).any()
        other = of_pair(x_0, eps + 1, t, task.schedule)
        assert bool((method.output_error(other, x_0, eps, t).abs() > 1e-3).all())


def test_an_unguided_lcm_asks_the_teacher_once(tiny: Task) -> None:
    cls = METHODS["lcm"]
    for scale, passes in ((1.0, 1), (1.5, 2)):
        task = Task(
            tiny.spec.model_copy(
                update={"guidance": tiny.spec.guidance.model_copy(update={"scale": scale})}
            ),
            tiny.folder,
        )
        teacher = task.teacher(torch.device("cpu"))
        method = cls(cls.Config(), teacher, task, 2, 10)
        index = torch.arange(8)
        with count_passes(teacher.denoiser.network) as counted:
            method.loss(Batch(index, task.split.train.batch(index), None, Keyed("train", 0, 0)))
        assert counted.total == passes * 8


def test_ctm_solves_what_each_sample_needs(tiny: Task) -> None:
    cls = METHODS["ctm"]
    teacher = tiny.teacher(torch.device("cpu"))
    method = cls(cls.Config(), teacher, tiny, 2, 10)
    x = tiny.split.train.batch(torch.arange(3))
    at, ahead = torch.tensor([0, 1, 0]), torch.tensor([1, 2, 3])
    with count_passes(teacher.denoiser.network) as counted, torch.no_grad():
        together = method.solved(x[0], at, ahead, method.grid, x[1])
    assert counted.total == 2 * 6  # guided
    for i in range(3):
        with torch.no_grad():
            row = slice(i, i + 1)
            grid = method.grid[at[i] : at[i] + ahead[i] + 1]
            alone = sample(DDIM(), teacher, x[0][row], grid, x[1][row])
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_meanflows_guided_velocity_has_its_scale(tiny: Task) -> None:
    """With an instantaneous velocity that is guided already, the target is guided at the scale."""
    cls, cpu = METHODS["meanflow"], torch.device("cpu")
    method = cls(cls.Config(kappa=0.5), tiny.teacher(cpu), tiny, 2, 10)
    scale, null, conditional = tiny.guidance_scale, 0.3, 0.8
    guided = null + scale * (conditional - null)
    labels = tiny.split.train.batch(torch.arange(4))[1]
    tiny_null = int(tiny.null.classes)

    def u(y: Tensor, rho: Tensor, tau: Tensor, cond: Condition) -> Tensor:
        where = (cond.classes == tiny_null).reshape(-1, 1, 1, 1)
        return torch.where(where, null, guided).expand_as(y)

    method.u = u  # type: ignore[method-assign]
    v = torch.full((4, 1, 8, 8), conditional)
    dropped = torch.tensor([False, False, False, True])
    found = method.guided_velocity(v, v, torch.full((4,), 0.5), labels, dropped)
    torch.testing.assert_close(found[:3], torch.full_like(v[:3], guided))
    torch.testing.assert_close(found[3], v[3])


def test_meanflow_weighs_errors_alike_where_the_velocity_has_no_noise() -> None:
    config = METHODS["meanflow"].Config
    assert (config().power, config(source="teacher").power) == (1, 0)
    assert config(source="teacher", power=0.5).power == 0.5


def test_shortcuts_smallest_steps_alone_are_guided(tiny: Task) -> None:
    cls, cpu = METHODS["shortcut"], torch.device("cpu")
    method = cls(cls.Config(finest=8), tiny.teacher(cpu), tiny, 2, 10)
    assert method.target == "guided data"
    tiny_null = int(tiny.null.classes)

    def s(model: object, y: Tensor, tau: Tensor, step: Tensor, cond: Condition) -> Tensor:
        return torch.where((cond.classes == tiny_null).reshape(-1, 1, 1, 1), 0.0, 1.0).expand_as(y)

    method.s = s  # type: ignore[method-assign]
    labels = tiny.split.train.batch(torch.arange(2))[1]
    d = torch.tensor([1 / 8, 1 / 4], dtype=torch.float64)
    found = method.guided(torch.zeros(2, 1, 8, 8), torch.full((2,), 0.5), d, labels)
    assert found[:, 0, 0, 0].tolist() == pytest.approx([tiny.guidance_scale, 1.0])


@pytest.mark.parametrize("name", ["consistency-training", "ict", "ect", "scm"])
def test_curricula_count_steps(name: str, tiny: Task) -> None:
    """A longer run does not change what the first steps learn."""
    cls, losses = METHODS[name], []
    index = torch.arange(16)
    for total in (20, 2000):
        with keyed_initialisation(0, name):
            method = cls(cls.Config(), tiny.teacher(torch.device("cpu")), tiny, 1, total)
        batch = Batch(index, tiny.split.train.batch(index), None, Keyed("train", 0, 0))
        losses.append(float(next(iter(method.updates(19))).loss(batch)[0].detach()))
    assert losses[0] == losses[1]
