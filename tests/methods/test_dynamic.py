"""DMDR's dynamic parts: the real score returns to the teacher, and renoising becomes uniform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import MEAN, SHAPE, STD, GaussianTask, Model, built, posterior
from scipy import stats
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import schedule_of
from harness.errors import UsageError
from harness.methods import METHODS, Batch
from harness.methods.parts.dynamic import Moved, eased, renoised
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.tasks import Task
from harness.training.case import CPU, Case, weights

UPDATES = 4
GUIDANCE, RENOISING = ({f"dynamic_{part}_updates": UPDATES} for part in ("guidance", "renoising"))


def test_a_falls_by_half_a_cosine() -> None:
    found = [eased(update, 4) for update in range(7)]
    assert found == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0, 0])
    assert [eased(4, 4), eased(0, None), eased(10**6, None)] == [0, 0, 0]


# guidance, where the answer is known


class Whole(Model):
    """The exact denoiser as a network with weights: its two distortions, in which it is linear."""

    @property
    def network(self) -> nn.Module:
        return self

    def with_network(self, network: nn.Module) -> nn.Module:
        return network


def gaussian(distortion: tuple[float, float], **options: int) -> Any:
    """A method of exact scores on data; the fake score's are distorted."""
    method = built("dmd2", student_gan=0.0, fake_gan=0.0, num_steps=1)
    teacher, fake = (Whole(posterior, schedule_of("vp")) for _ in range(2))
    with torch.no_grad():
        fake.distortion.copy_(torch.tensor(distortion))
    matching = method.matching
    matching.teacher, matching.model, moved = teacher, fake, Moved(teacher, fake)
    matching.config, matching.moved = matching.config.model_copy(update=options), moved
    return method


def direction(method: Any, update: int) -> Tensor:
    """`x_fake - x_real` of the student's loss at samples of the data: its gradient, not divided."""
    index, keys = torch.arange(64), Keyed("train", 0)
    x = (MEAN + STD * keys.normal("x", index, SHAPE)).double().requires_grad_()
    cond, matching = Condition(torch.zeros(64, dtype=torch.long)), method.matching
    batch = Batch(index, (x.detach(), cond), None, keys)
    matching.student_loss(x, cond, batch, update=update)[0].backward()
    x_t, t = matching.noised(x.detach(), batch, "student", a=matching.renoising(update))
    real = matching.real_score(update)(x_t, t, cond).x_0
    assert x.grad is not None
    off = (x.detach() - real.detach()).abs().flatten(1).mean(1).clamp(min=1e-4)
    return x.grad * x.numel() * off.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("update", "a"), [(0, 1.0), (2, 0.5), (4, 0.0), (9, 0.0)])
def test_the_difference_of_scores_shrinks_by_the_share_of_the_way(update: int, a: float) -> None:
    plain, dynamic = (gaussian((0.3, 0.2), **options) for options in ({}, GUIDANCE))
    expected = direction(plain, update)
    assert float(expected.abs().mean()) > 0.01
    torch.testing.assert_close(direction(dynamic, update), (1 - 0.375 * a) * expected)


@pytest.mark.parametrize("update", [0, 2, 4])
def test_no_gradient_is_left_where_the_students_distribution_is_right(update: int) -> None:
    """Its score is then the teacher's, which is the fake score of an exact student."""
    assert float(direction(gaussian((0, 0), **GUIDANCE, **RENOISING), update).abs().max()) < 1e-12
    off = gaussian((0.3, 0.2), **GUIDANCE, **RENOISING)
    assert float(direction(off, update).abs().mean()) > 0.01


# guidance on networks


def moving(task: Task, **options: Any) -> Any:
    """The method with a fake score that is 10 % larger in all weights than the teacher."""
    method: Any = Case(
        "dmd2", task, Path(), {"fake_gan": 0.0, "student_gan": 0.0, **options}
    ).build()
    with torch.no_grad():
        for weight in method.matching.fake.network.parameters():
            weight.mul_(1.1)
    return method


def gradients(method: Any, task: Task, update: int) -> list[Tensor]:
    """The student's loss and its gradients, and the fake score's loss."""
    index = torch.arange(4)
    batch = Batch(index, task.split.train.batch(index), None, Keyed("train", 0))
    loss = method.loss_at(batch, 1, update)[0]
    found = torch.autograd.grad(loss, method.student_player.trained, allow_unused=True)
    fake = method.fake_loss(batch, 1, update)[0]
    return [loss, fake, *(gradient for gradient in found if gradient is not None)]


@pytest.mark.parametrize("renoising", ["shared", "decoupled"])
def test_it_is_dmd2_bit_for_bit_after_k_updates_and_where_the_fake_is_the_teacher(
    renoising: str, tiny: Task
) -> None:
    plain, dynamic = (moving(tiny, renoising=renoising, **more) for more in ({}, GUIDANCE))

    def equal(update: int) -> bool:
        both = [gradients(method, tiny, update) for method in (plain, dynamic)]
        assert len(both[0]) == len(both[1]) > 10
        return all(torch.equal(*pair) for pair in zip(*both, strict=True))

    assert equal(UPDATES)
    assert not equal(1)
    teacher, plain.matching.teacher = plain.matching.teacher, dynamic.matching.real_score(1)
    assert equal(1)  # the moved score stands for the teacher in all that asks it
    plain.matching.teacher = teacher
    for method in (plain, dynamic):
        method.matching.fake.network.load_state_dict(teacher.denoiser.network.state_dict())
    assert equal(1)


def test_the_real_scores_weights_are_on_the_way_from_the_teachers_to_the_fakes(tiny: Task) -> None:
    method = moving(tiny, **GUIDANCE)
    teacher, fake = method.teacher.denoiser.network, method.matching.fake.network
    before = [{k: v.clone() for k, v in each.state_dict().items()} for each in (teacher, fake)]
    for update, a in ((2, 0.5), (0, 1.0), (2, 0.5)):  # no trace of an earlier update is left
        real = method.matching.real_score(update)
        assert real.denoiser.network is method.moved in method.networks
        assert real.scale == method.teacher.scale != 1
        for name, weight in real.denoiser.network.state_dict().items():
            start, end = (each[name] for each in before)
            torch.testing.assert_close(weight, (1 - 0.375 * a) * start + 0.375 * a * end)
    assert not any(weight.requires_grad for weight in method.moved.parameters())
    assert method.matching.real_score(UPDATES) is method.teacher
    after = [each.state_dict() for each in (teacher, fake)]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


# renoising


def law(update: int) -> Any:
    """The law of t in an update of the student."""
    a = eased(update, UPDATES)
    return stats.beta(1 + 3 * a, 1 + 0.5 * a, loc=0.02, scale=0.96)


@pytest.mark.parametrize("update", range(UPDATES + 1))
def test_timesteps_have_the_law_of_the_update(update: int) -> None:
    index = torch.arange(4096)
    batch = Batch(index, None, None, Keyed("train", 0))
    matching, x = built("dmd2", **RENOISING).matching, torch.zeros(4096, *SHAPE)
    _, t = matching.noised(x, batch, "student", a=matching.renoising(update))
    u = batch.uniform("student t")
    torch.testing.assert_close(t, torch.from_numpy(law(update).ppf(u.numpy())))
    assert stats.kstest(t.numpy(), law(update).cdf).pvalue > 0.01
    assert stats.kstest(t.numpy(), law((update + 2) % 5).cdf).pvalue < 1e-6


def test_renoising_ends_uniform_bit_for_bit() -> None:
    u = Keyed("train", 0).uniform("t", torch.arange(64))
    assert renoised(u, 0.0) is u
    torch.testing.assert_close(renoised(u, 1e-9), u)


def test_how_much_of_it_is_near_pure_noise() -> None:
    """The shares that the docstring of `parts/dynamic.py` gives."""
    near = [law(update).sf(0.95) for update in (0, UPDATES)] + [stats.beta(4, 1.5).sf(0.95)]
    assert near == pytest.approx([0.034, 0.031, 0.067], abs=5e-4)


def test_scores_fake_score_and_head_have_one_law_and_guidance_has_its_own() -> None:
    """`x` of zeros noised on a flow schedule: t is what remains of the noise."""
    method: Any = built("dmd2", schedule="flow", num_steps=2, **RENOISING)
    seen: dict[str, float] = {}
    noised = method.matching.noised

    def watched(x: Tensor, batch: Batch, name: str, *bound: float, a: float = 0.0) -> Any:
        seen[name] = a
        return noised(x, batch, name, *bound, a=a)

    method.matching.noised = watched
    index = torch.arange(4)
    data = torch.zeros(4, *SHAPE), Condition(torch.zeros(4, dtype=torch.long))
    batch = Batch(index, data, None, Keyed("train", 0))
    for step, a in ((0, 1.0), (4, 1.0), (10, 0.5), (14, 0.5), (20, 0.0)):
        seen.clear()
        for update in method.updates(step):
            update.loss(batch)
        names = {"fake", "real"} | ({"student"} if step % 5 == 0 else set())
        assert seen == pytest.approx(dict.fromkeys(names, a))
    _, t = method.matching.noised(data[0], batch, "guidance", 0.75)
    assert torch.equal(t, 0.02 + batch.uniform("guidance t") * 0.73)


# a run


def often(task: Task, folder: Path, **options: Any) -> Case:
    """A case without a GAN whose student trains in each step."""
    whole = {"student_every": 1, "student_gan": 0.0, "fake_gan": 0.0, **options}
    return Case("dmd2", task, folder, whole, num_steps=1)


def test_flops_are_those_that_run_and_the_moved_scores_passes_are_not_the_teachers(
    tiny: Task, tmp_path: Path
) -> None:
    """Guidance makes 2 passes a sample. FLOPs are DMD2's; the teacher's passes begin after K."""
    plain, dynamic = (often(tiny, tmp_path, **k) for k in ({}, {"dynamic_guidance_updates": 1}))
    teacher, passes = tiny.teacher(CPU), []
    trainer = dynamic.trainer(dynamic.build(teacher), teacher=teacher.denoiser.network)
    for step in (1, 2):
        trainer.train(until=step)
        passes.append(trainer.bill.teacher_evaluations)
    assert passes == [0, 16]
    method = plain.build()
    assert trainer.bill.flops == 2 * plain.trainer(method).flops_of(list(method.updates(0)))


def test_a_resumed_run_goes_on_bit_for_bit(tiny: Task, tmp_path: Path) -> None:
    """It resumes in the third of 4 updates."""
    case = often(tiny, tmp_path, **GUIDANCE, **RENOISING)
    straight, first, resumed = (case.build() for _ in range(3))
    case.trainer(straight).train(until=3)
    case.trainer(first, tmp_path / "run").train(until=2)
    case.trainer(resumed, tmp_path / "run").train(until=3)
    expected, found = weights(straight), weights(resumed)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


# options


def test_without_them_a_run_has_its_old_name(tiny_folder: Path) -> None:
    def name(**options: Any) -> str:
        return resolve(RunConfig(method="dmd2", task="tiny", options=options)).run_id

    off = {f"dynamic_{part}_updates": None for part in ("guidance", "renoising")}
    assert name() == name(**off)
    assert len({name(), name(**GUIDANCE), name(**RENOISING)}) == 3
    config = METHODS["dmd2"].Config()
    assert not config.model_dump().keys() & off.keys()


@pytest.mark.parametrize("part", ["guidance", "renoising"])
def test_a_part_has_at_least_one_update(part: str, tiny_folder: Path) -> None:
    options = {f"dynamic_{part}_updates": 0}
    with pytest.raises(UsageError, match=f"dynamic_{part}_updates"):
        resolve(RunConfig(method="dmd2", task="tiny", options=options))


def test_guidance_needs_a_fake_score_from_the_teachers_weights(tiny: Task) -> None:
    cls: Any = METHODS["dmd2"]
    for task, init in ((tiny, "random"), (GaussianTask("vp"), "teacher")):
        with pytest.raises(UsageError, match="this fake score starts from random ones"):
            cls.check(cls.Config(init=init, **GUIDANCE), task, 4)
        cls.check(cls.Config(init=init, **RENOISING), task, 4)
    cls.check(cls.Config(**GUIDANCE), tiny, 4)
