"""Step distillation and ARD: their inputs and targets, and the untrained student."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.data.trajectories import TrajectoryStore, open_store
from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import VPSchedule, few_step_levels, respaced_levels
from harness.errors import UsageError
from harness.methods import METHODS, Batch
from harness.methods.ard import ARD, ARDConfig
from harness.methods.parts.options import Span
from harness.methods.parts.points import PROTOCOLS, DistillationConfig
from harness.methods.step_distillation import TrajectoryDistillation
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.solvers import DDIM, Trajectory, sample, trace
from harness.tasks import Task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@pytest.fixture
def store(tiny: Task) -> TrajectoryStore:
    return open_store(tiny.recipe, tiny.teacher(CPU), CPU)


def build(
    task: Task, num_steps: int = 2, teacher: Guided | None = None, **options: Any
) -> TrajectoryDistillation:
    """ARD with that many history layers, 0 by default."""
    with keyed_initialisation(0, "ard"):
        return ARD(
            ARDConfig(**{"history_layers": 0, **options}),
            teacher or task.teacher(CPU),
            task,
            num_steps,
            100,
        )


def loud_teacher(task: Task) -> Guided:
    """A float64 guided teacher with random weights so large that labels and attention matter."""
    teacher = task.teacher(CPU)
    with keyed_initialisation(2, "loud"):
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher.double()


def in_float64(method: TrajectoryDistillation) -> TrajectoryDistillation:
    """The same method, trained and evaluated in float64.

    Equal then means equal to rounding on every machine.
    """
    for network in (method.players["student"].module, method.student):
        network.double()
    return method


def inputs(task: Task) -> tuple[Tensor, Condition]:
    """The first noise set, in float64."""
    x_T, cond = task.evaluation_inputs(0)
    return x_T.double(), cond


def scrambled(method: TrajectoryDistillation) -> TrajectoryDistillation:
    """The same method in float64 with random changes of all weights.

    No two heads and no two states are then alike.
    """
    with keyed_initialisation(1, "scramble"):
        for parameter in method.student.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    method.players["student"].module.load_state_dict(method.student.state_dict())
    return in_float64(method)


def paths(store: TrajectoryStore, count: int) -> Trajectory:
    """The first trajectories, in float64."""
    path = store.batch(torch.arange(count))
    return replace(path, states=path.states.double(), predictions=path.predictions.double())


def whole_batch(store: TrajectoryStore) -> Batch:
    """All trajectories, in float64."""
    return Batch(torch.arange(len(store)), None, paths(store, len(store)), Keyed("train", 0))


class Deep:
    """A problem whose teacher has as many layers as digits'."""

    trajectory_steps, network_teacher, network_options = 24, True, {"depth": 12}


def run_id(method: str, num_steps: int = 2, **options: Any) -> str:
    return resolve(
        RunConfig(method=method, task="tiny", num_steps=num_steps, options=options)
    ).run_id


def test_without_history_ard_is_step_distillation(tiny: Task) -> None:
    assert run_id("ard", history_layers=0) == run_id("step-distillation")
    assert run_id("ard", history_layers=0, heads="per_step", lr=0.01) == run_id(
        "step-distillation", heads="per_step", lr=0.01
    )
    assert run_id("ard", history_layers=1) != run_id("step-distillation")
    assert run_id("ard", history_layers=1) != run_id("ard", history_layers=2)
    assert run_id("step-distillation", heads="per_step") != run_id("step-distillation")
    assert run_id("step-distillation", protocol="released") != run_id("step-distillation")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_a_name_for_options(name: str, tiny: Task) -> None:
    """A run has one id under the name and under what the name stands for."""
    plain = PROTOCOLS[name]
    assert run_id("ard", history_layers=1, protocol=name) == run_id(
        "ard", history_layers=1, **plain
    )
    config = ARDConfig(protocol=name)
    assert config == ARDConfig(**plain)
    assert config == ARDConfig(**config.model_dump())  # as a record gives it back
    assert ARDConfig(**plain, protocol=name) == config


def test_a_protocol_and_another_value_contradict_each_other(tiny: Task) -> None:
    with pytest.raises(UsageError, match="protocol 'released' means heads 'per_step', but heads"):
        ARDConfig(protocol="released", heads="shared")
    own = {"trajectory": "renoised", "parametrization": "direct"}
    assert ARDConfig(protocol="tuned", **own).trajectory == "renoised"
    with pytest.raises(UsageError, match="protocol is 'paper', but it should be 'tuned'"):
        run_id("ard", protocol="paper")


@pytest.mark.parametrize("method", ["ard", "step-distillation", "ladd"])
def test_whatever_a_search_draws_is_valid(method: str, tiny: Task) -> None:
    cls = METHODS[method]
    assert 3 <= len(cls.tunes) <= 5
    choices = [(r.low, r.high) if isinstance(r, Span) else tuple(r) for r in cls.tunes.values()]
    for drawn in itertools.product(*choices):
        cls.check(cls.Config(**dict(zip(cls.tunes, drawn, strict=True))), Deep(), 4)


def test_equal_masks_are_one_model(tiny: Task) -> None:
    full = run_id("ard", 4, history_layers=2)
    assert run_id("ard", 4, history_layers=2, history_depth=0) == run_id("step-distillation", 4)
    assert run_id("ard", 4, history_layers=2, history_depth=3) == full
    assert run_id("ard", 4, history_layers=2, history_depth=7) == full
    assert run_id("ard", 4, history_layers=2, history_depth=2) != full
    assert run_id("ard", 4, history_layers=2, mask="keep_first") != full
    assert run_id("ard", 2, history_layers=2, mask="keep_first") == run_id(
        "ard", 2, history_layers=2
    )


def test_in_one_step_all_variants_are_one_model(tiny: Task) -> None:
    ids = {
        run_id(
            "ard",
            1,
            history_layers=layers,
            heads=heads,
            trajectory=trajectory,
            parametrization="direct",
        )
        for layers in (0, 1, 3)
        for heads in ("shared", "per_step")
        for trajectory in ("states", "predictions", "renoised")
    }
    assert ids == {run_id("step-distillation", 1, protocol="released")}
    assert {run_id("ard", 1, history_layers=2, mask=mask) for mask in ("causal", "keep_first")} == {
        run_id("step-distillation", 1)
    }
    assert run_id("step-distillation", 1) not in ids


def test_models_that_share_an_id_in_one_step_train_alike(
    tiny: Task, store: TrajectoryStore
) -> None:
    def train(**options: Any) -> Tensor:
        method = build(tiny, 1, **options)
        Trainer(method, {"trajectory": store}, TrainSettings(5, 8, 0), None, CPU).train()
        x_T, cond = tiny.evaluation_inputs(0)
        return sample(method.solver, method.student, x_T, method.levels, cond)

    first = train(history_layers=0, trajectory="states", parametrization="direct")
    torch.testing.assert_close(
        train(history_layers=2, protocol="released"),
        first,
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("num_steps", "options", "message"),
    [
        (
            2,
            {"history_layers": 4},
            "history_layers is 4, but the teacher has 3 layers: give 0 to 3",
        ),
        (
            3,
            {"history_layers": 1},
            "num_steps is 3, but must divide the 4 evaluations .* one of 1, 2, 4",
        ),
        (
            2,
            {"history_layers": 1, "trajectory": "predictions"},
            "parametrization 'teacher' .* give trajectory 'states'",
        ),
        (2, {"history_layers": 1, "grid": "released"}, "grid 'released' has the points of 4 steps"),
        (
            4,
            {"history_layers": 1, "grid": "released", "step_counts": [2, 4]},
            "give num_steps 4 without step_counts",
        ),
        (
            2,
            {"history_layers": 1, "mask": "keep_first", "history_depth": 1},
            "history_depth is an option of mask 'causal'",
        ),
        (2, {"history_layers": -1}, "history_layers is -1"),
        (2, {"history_layers": 1, "history_depth": -1}, "history_depth is -1"),
        (
            2,
            {"history_layers": 1, "heads": "both"},
            "heads is 'both', but it should be 'shared' or 'per_step'",
        ),
    ],
)
def test_options_that_do_not_suit_the_task(
    num_steps: int, options: dict[str, Any], message: str, tiny: Task
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run_id("ard", num_steps, **options)
    assert "\n" not in str(caught.value)


def test_history_layers_may_be_all_layers(tiny: Task) -> None:
    assert run_id("ard", history_layers=3)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_points_are_what_the_evaluations_have_produced(
    num_steps: int, tiny: Task, store: TrajectoryStore
) -> None:
    path = store.batch(torch.arange(3))
    states = build(tiny, num_steps, trajectory="states").teacher_points(path)
    predictions = build(tiny, num_steps, protocol="released").teacher_points(path)
    assert states.shape == predictions.shape == (3, num_steps + 1, *tiny.shape)
    for i in range(num_steps + 1):
        j = 4 * i // num_steps
        assert torch.equal(states[:, i], path.states[:, j])
        assert torch.equal(
            predictions[:, i], path.states[:, 0] if i == 0 else path.predictions[:, j - 1]
        )


def test_renoised_points_have_the_noise_mixed_in_again(tiny: Task, store: TrajectoryStore) -> None:
    path = store.batch(torch.arange(3))
    method = build(tiny, 4, trajectory="renoised", parametrization="direct")
    points = method.teacher_points(path)
    assert torch.equal(points[:, 0], path.states[:, 0])
    assert torch.equal(points[:, 4], path.predictions[:, 3])
    for i in (1, 2, 3):
        alpha, sigma = tiny.schedule.alpha_sigma(method.levels[i])
        expected = alpha * path.predictions[:, i - 1] + sigma * path.states[:, 0]
        torch.testing.assert_close(points[:, i], expected.float(), rtol=1e-5, atol=1e-5)


def test_times_are_true_levels_or_labels_of_the_step(tiny: Task) -> None:
    assert build(tiny, 4, trajectory="states").points.times.tolist() == pytest.approx(
        [999, 749, 499, 249], abs=1e-3
    )
    renoised = build(tiny, 4, trajectory="renoised", parametrization="direct")
    assert renoised.points.times.tolist() == pytest.approx([999, 749, 499, 249], abs=1e-3)
    for grid in ("task", "released"):
        released = build(tiny, 4, protocol="released", grid=grid)
        assert released.points.times.tolist() == pytest.approx(
            [999, 749.25, 499.5, 249.75], abs=1e-3
        )
    assert build(tiny, 2, protocol="released").points.times.tolist() == pytest.approx(
        [999, 499.5], abs=1e-3
    )
    assert build(tiny, 4, time_embedding="constant").points.times.tolist() == pytest.approx(
        [999] * 4, abs=1e-3
    )


def test_states_stand_at_the_levels_of_the_sampler(tiny: Task, store: TrajectoryStore) -> None:
    assert torch.equal(store.levels[::2], build(tiny, 2, trajectory="states").levels)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_released_grids_points(protocol: str, tiny: Task) -> None:
    """After 10, 15, 20 and 25 evaluations on DiT's respacing to 25 steps."""
    method = build(tiny, 4, protocol=protocol, grid="released")
    assert ARD.trajectory_grid(method.config) == ("respaced", 25)
    recipe = tiny.recipe.of_run(0, ARD.trajectory_grid(method.config))
    path = open_store(recipe, tiny.teacher(CPU), CPU).batch(torch.arange(3))
    assert path.steps == 25
    levels = VPSchedule().network_time(method.levels).tolist()
    assert levels == pytest.approx([999, 583, 375, 166, -1], abs=1e-3)
    x, target = method.points.inputs_and_targets(path)
    kind = path.predictions if protocol == "released" else path.states[:, 1:]
    assert torch.equal(x[:, 0], path.states[:, 0])
    for i, evaluation in enumerate((10, 15, 20)):
        assert torch.equal(x[:, i + 1], kind[:, evaluation - 1])
        assert torch.equal(target[:, i], kind[:, evaluation - 1])
    assert torch.equal(target[:, 3], path.states[:, 25])


def test_a_tasks_own_respaced_grid(tiny: Task) -> None:
    """Points are as many evaluations apart, at the levels of the states there."""
    trajectories = tiny.spec.trajectories.model_copy(update={"grid": "respaced", "steps": 10})
    task = Task(tiny.spec.model_copy(update={"trajectories": trajectories}), tiny.folder)
    method = build(task, 5)
    assert torch.equal(method.levels, respaced_levels(10)[::2])
    assert torch.equal(method.levels, task.recipe.levels[list(method.points.places)])


UNTRAINED = {"trajectory": "states", "heads": "shared", "parametrization": "teacher"}


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_untrained_it_is_the_unguided_teachers_ddim(num_steps: int, tiny: Task) -> None:
    teacher = loud_teacher(tiny)
    method = in_float64(build(tiny, num_steps, teacher, **UNTRAINED))
    x_T, cond = inputs(tiny)
    with torch.no_grad():
        mine = trace(method.solver, method.student, x_T, method.levels, cond)
        theirs = trace(DDIM(), teacher.denoiser, x_T, few_step_levels(num_steps), cond)
        guided = sample(DDIM(), teacher, x_T, few_step_levels(num_steps), cond)
    scale = float(theirs.states.abs().max())
    close(mine.states, theirs.states)
    close(mine.predictions, theirs.predictions)
    assert not torch.allclose(guided, theirs.states[:, -1], rtol=1e-2, atol=1e-3 * scale)


def test_untrained_with_history_only_the_first_step_is(tiny: Task) -> None:
    teacher = loud_teacher(tiny)
    method = in_float64(build(tiny, 2, teacher, **UNTRAINED, history_layers=2))
    x_T, cond = inputs(tiny)
    with torch.no_grad():
        mine = trace(method.solver, method.student, x_T, method.levels, cond).states
        theirs = trace(DDIM(), teacher.denoiser, x_T, few_step_levels(2), cond).states
    scale = float(theirs.abs().max())
    close(mine[:, 1], theirs[:, 1])
    assert float((mine[:, 2] - theirs[:, 2]).abs().max()) > 1e-4 * scale


def test_noise_channels_change_nothing_before_training(tiny: Task) -> None:
    teacher = loud_teacher(tiny)
    x_T, cond = inputs(tiny)
    with torch.no_grad():
        plain, wide = (
            sample(method.solver, method.student, x_T, method.levels, cond)
            for method in (
                in_float64(build(tiny, 2, teacher, noise_channels=channels, protocol="released"))
                for channels in (False, True)
            )
        )
    close(wide, plain)


VARIANTS = [
    {"trajectory": "predictions", "heads": "per_step", "parametrization": "direct"},
    {"trajectory": "predictions", "noise_channels": True, "parametrization": "direct"},
    {"trajectory": "predictions", "mask": "keep_first", "parametrization": "direct"},
    {"trajectory": "renoised", "time_embedding": "constant", "parametrization": "direct"},
    {"trajectory": "states", "heads": "per_step", "history_depth": 1, "parametrization": "direct"},
    {"trajectory": "states", "heads": "shared", "parametrization": "teacher"},
]


@pytest.mark.parametrize("history_layers", [0, 2, 3])
@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda options: "-".join(map(str, options.values()))
)
def test_a_masked_pass_equals_sampling_steps_on_the_teachers_points(
    options: dict[str, Any], history_layers: int, tiny: Task, store: TrajectoryStore
) -> None:
    method = scrambled(build(tiny, 4, history_layers=history_layers, **options))
    batch = whole_batch(store)
    points, cond = method.teacher_points(batch.trajectory), batch.trajectory.cond
    with torch.no_grad():
        _, metrics = method.loss(batch)
        seen = method.points.network_input(points[:, :-1], points[:, 0])
        masked, _ = method.student(seen, method.points.times.expand(len(points), 4), cond)
        state = method.solver.init(method.student, points[:, 0], cond)
        for i, (t, s) in enumerate(zip(method.levels[:-1], method.levels[1:], strict=True)):
            x_s, x_0, state = method.solver.step(
                method.student, points[:, i], t, s, cond, state, None
            )
            answer = method.points.answer(masked[:, i], points[:, i], t, s)
            expected = method.points.next_input(answer, points[:, 0], s)
            close(x_s, expected)
            if options["trajectory"] != "renoised":  # there the error is that of x_0
                error = float((x_s - points[:, i + 1]).square().mean())
                assert error == pytest.approx(float(metrics[f"mse_step{i + 1}"]), rel=1e-9)
            if options["trajectory"] == "predictions":
                assert torch.equal(x_s, x_0)


def test_the_loss_is_the_mean_of_the_steps_errors(tiny: Task, store: TrajectoryStore) -> None:
    """An eps network's DDIM steps count times alpha_t, direct predictions plainly."""
    levels = build(tiny, 4, history_layers=1).levels[:-1]
    alphas = tiny.schedule.alpha_sigma(levels)[0].tolist()
    for protocol, factors in (("states", [1.0] * 4), ("tuned", alphas)):
        method = scrambled(build(tiny, 4, history_layers=1, protocol=protocol))
        loss, metrics = method.loss(whole_batch(store))
        errors = [float(metrics[f"mse_step{i + 1}"]) for i in range(4)]
        expected = sum(a**2 * error for a, error in zip(factors, errors, strict=True)) / 4
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "touched", "changed"),
    [
        ({"history_layers": 2}, 1, [1, 2, 3]),
        ({"history_layers": 0}, 1, [1]),
        ({"history_layers": 1, "history_depth": 1}, 1, [1, 2]),
        ({"history_layers": 2, "history_depth": 0}, 1, [1]),
        ({"history_layers": 2, "mask": "keep_first"}, 1, [1]),
        ({"history_layers": 2, "mask": "keep_first"}, 0, [0, 1, 2, 3]),
    ],
)
def test_what_of_the_history_is_seen(
    options: dict[str, Any], touched: int, changed: list[int], tiny: Task, store: TrajectoryStore
) -> None:
    method = scrambled(build(tiny, 4, **options))
    path = paths(store, 4)
    x, times = method.teacher_points(path)[:, :-1], method.points.times.expand(4, 4)
    with torch.no_grad():
        before = method.student(x, times, path.cond)[0]
        x[:, touched] += 1.0
        after = method.student(x, times, path.cond)[0]
    assert [i for i in range(4) if not torch.equal(before[:, i], after[:, i])] == changed


def test_per_step_heads_start_as_the_teachers_and_each_is_trained_by_its_step(
    tiny: Task, store: TrajectoryStore
) -> None:
    method = build(tiny, 2, heads="per_step")
    network = method.players["student"].module
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            network.head_of(0).parameters(), network.head_of(1).parameters(), strict=True
        )
    )
    assert network.head_of(0) is not network.head_of(1)
    Trainer(method, {"trajectory": store}, TrainSettings(3, 8, 0), None, CPU).train()
    assert not torch.equal(network.head_of(0).linear.weight, network.head_of(1).linear.weight)


def mean_error(method: TrajectoryDistillation, store: TrajectoryStore) -> float:
    index = torch.arange(len(store))
    with torch.no_grad():
        return float(method.loss(Batch(index, None, store.batch(index), Keyed("train", 0)))[0])


@pytest.mark.parametrize("name", ["step-distillation", "ard"])
def test_training_lowers_the_loss(name: str, tiny: Task, store: TrajectoryStore) -> None:
    cls = METHODS[name]
    options = {"lr": 0.01, **({"history_layers": 2} if cls is ARD else {})}
    method = cls(cls.Config(**options), tiny.teacher(CPU), tiny, 2, 60)
    before = mean_error(method, store)
    Trainer(method, {"trajectory": store}, TrainSettings(60, 8, 0), None, CPU).train()
    assert mean_error(method, store) < 0.8 * before


def test_the_released_codes_protocol() -> None:
    config = ARDConfig(protocol="released")
    assert (config.history_layers, config.mask, config.history_depth) == (6, "causal", None)
    assert (config.trajectory, config.heads, config.parametrization) == (
        "predictions",
        "per_step",
        "direct",
    )
    assert ARDConfig.model_fields.keys() >= DistillationConfig.model_fields.keys()


@pytest.mark.parametrize("trajectory", ["predictions", "states", "renoised"])
def test_a_share_of_the_batch_sees_its_own_history(
    trajectory: str, tiny: Task, store: TrajectoryStore
) -> None:
    own = scrambled(
        build(
            tiny,
            history_layers=2,
            own_history=0.5,
            trajectory=trajectory,
            parametrization="direct",
            teacher=loud_teacher(tiny),
        )
    )
    batch = whole_batch(store)
    assert batch.trajectory is not None
    took = batch.uniform("own history") < 0.5
    assert 0 < int(took.sum()) < len(store)
    x, target = own.points.inputs_and_targets(batch.trajectory)
    path = trace(own.solver, own.student, x[:, 0], own.levels, batch.trajectory.cond)
    mixed = torch.where(took.reshape(-1, 1, 1, 1, 1), path.states[:, :-1].detach(), x)
    assert (mixed - x)[took, 1:].abs().max() > 1e-3
    with torch.no_grad():
        answer, _ = own.student(mixed, own.points.times.expand(len(x), 2), batch.trajectory.cond)
        found = float(own.loss(batch)[0])
        assert found == pytest.approx(float((answer - target).square().mean()), rel=1e-9)
        answer, _ = own.student(x, own.points.times.expand(len(x), 2), batch.trajectory.cond)
        assert abs(found - float((answer - target).square().mean())) > 1e-4
