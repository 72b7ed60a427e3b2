"""Every registered method keeps the contract of `harness.methods.base`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.data.trajectories import open_store
from harness.methods import METHODS, Batch, Method
from harness.randomness import keyed_initialisation
from harness.solvers import integrate
from harness.tasks import Task
from harness.trainer import Trainer, TrainSettings

CPU = torch.device("cpu")
STEPS = 10
CASES = {name: (name, {}) for name in METHODS.names()} | {  # what is tested: a method and options
    "ard": ("ard", {"history_layers": 2}),  # the default suits a deeper teacher
    "ard with a GAN stage": ("ard", {"history_layers": 2, "gan_from": 0.2, "gan_virtual_batch": 2}),
    "consistency-distillation, karras": ("consistency-distillation", {"grid": "karras", "solver": "heun", "loss": "l2"}),
}
TRAINED = [name for name, (method, _) in CASES.items() if METHODS[method].sources]
every = pytest.mark.parametrize("name", CASES)
trained = pytest.mark.parametrize("name", TRAINED)


def config_of(name: str) -> Any:
    method, options = CASES[name]
    return METHODS[method].Config(**options)


def build(name: str, task: Task, num_steps: int = 2, teacher: Any = None) -> Method:
    with keyed_initialisation(0, name):
        return METHODS[CASES[name][0]](config_of(name), teacher or task.teacher(CPU), task, num_steps, STEPS)


@pytest.fixture
def sources(tiny: Task) -> dict[str, Any]:
    return {"data": tiny.split.train, "trajectory": open_store(tiny.recipe, tiny.teacher(CPU), CPU)}


def trainer(method: Method, sources: dict[str, Any], folder: Path | None = None, **settings: Any) -> Trainer:
    return Trainer(method, sources, TrainSettings(STEPS, 8, 0, log_every=1, **settings), folder, CPU)


def one_batch(method: Method, sources: dict[str, Any]) -> Batch:
    return trainer(method, sources).batches.of_step(0)[0]


def weights(method: Method) -> dict[str, Tensor]:
    """All that is trained and all that is evaluated."""
    found = {}
    for name, player in method.players.items():
        found |= {f"{name}.{key}": value.clone() for key, value in player.module.state_dict().items()}
        if player.ema:
            found |= {f"{name}.ema.{key}": value.clone() for key, value in player.ema.module.state_dict().items()}
    return found


def sample(method: Method, task: Task, rows: slice = slice(0, 3)) -> Tensor:
    x_T, cond = task.evaluation_inputs(0)
    with torch.no_grad():
        noise = task.evaluation_noise(0, rows)
        return integrate(method.solver, method.student, x_T[rows], method.levels, cond[rows], noise)


@every
def test_it_names_what_it_is(name: str) -> None:
    cls = METHODS[CASES[name][0]]
    assert cls.sources <= {"data", "trajectory"}
    assert cls.target in ("guided teacher", "data")
    assert cls.reference
    assert (cls.__doc__ or "").strip()
    assert all(field.description for field in cls.Config.model_fields.values())


@every
def test_canonical_is_a_registered_method_and_stays_itself(name: str, tiny: Task) -> None:
    config, cls = config_of(name), METHODS[CASES[name][0]]
    cls.check(config, tiny, 2)
    for num_steps in (1, 2):
        once = cls.canonical(config, num_steps)
        assert isinstance(once[1], METHODS[once[0]].Config)
        assert METHODS[once[0]].canonical(once[1], num_steps) == once


@every
def test_sampling_gives_finite_images(name: str, tiny: Task) -> None:
    method = build(name, tiny)
    assert method.levels.dtype == torch.float64
    assert method.levels[0] == 1
    assert method.levels[-1] == 0
    images = sample(method, tiny)
    assert images.shape == (3, *tiny.shape)
    assert bool(images.isfinite().all())
    assert torch.equal(images, sample(method, tiny))


@every
def test_the_points_of_a_trajectory_start_at_its_noise(name: str, tiny: Task, sources: dict[str, Any]) -> None:
    path = sources["trajectory"].batch(torch.arange(3))
    points = build(name, tiny).teacher_points(path)
    assert points.shape == (3, 3, *tiny.shape)
    assert torch.equal(points[:, 0], path.states[:, 0])


@every
def test_a_sample_does_not_depend_on_its_neighbours(name: str, tiny: Task) -> None:
    method = build(name, tiny)
    torch.testing.assert_close(sample(method, tiny)[2:], sample(method, tiny, slice(2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name not in TRAINED])
def test_without_sources_nothing_is_trained(name: str, tiny: Task) -> None:
    method = build(name, tiny)
    assert not method.players
    assert not list(method.updates(0))
    assert not any(parameter.requires_grad for parameter in method.student.parameters())


@trained
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_finite(name: str, precision: str, tiny: Task, sources: dict[str, Any]) -> None:
    method = build(name, tiny)
    batch = one_batch(method, sources)
    for update in method.updates(STEPS - 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, metrics = update.loss(batch)
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())
        assert all(value.shape == () and bool(value.isfinite()) and not value.requires_grad for value in metrics.values())


@trained
def test_gradients_reach_the_player_of_the_update_alone(name: str, tiny: Task, sources: dict[str, Any]) -> None:
    teacher = tiny.teacher(CPU)
    method = build(name, tiny, teacher=teacher)
    batch = one_batch(method, sources)
    for update in method.updates(STEPS - 1):
        for other, player in method.players.items():
            player.module.requires_grad_(other == update.player)
        update.loss(batch)[0].backward()
        mine = list(method.players[update.player].module.parameters())
        assert all(parameter.grad is not None for parameter in mine)
        assert any(bool(parameter.grad.any()) for parameter in mine)
        ours = set(map(id, mine))
        players = method.players.values()
        bystanders = [teacher, method.student, *(p.module for p in players), *(p.ema.module for p in players if p.ema)]
        assert all(parameter.grad is None for module in bystanders for parameter in module.parameters() if id(parameter) not in ours)
        method.players[update.player].optimizer.zero_grad(set_to_none=True)


@trained
def test_the_student_is_a_moving_average(name: str, tiny: Task, sources: dict[str, Any]) -> None:
    method = build(name, tiny)
    evaluated = set(map(id, method.student.parameters()))
    averages = [player.ema.module for player in method.players.values() if player.ema]
    assert evaluated <= {id(parameter) for average in averages for parameter in average.parameters()}
    before = weights(method)
    trainer(method, sources).train(until=2)
    after = weights(method)
    assert any(not torch.equal(before[key], after[key]) for key in before if ".ema." in key)


@trained
def test_micro_batches_equal_one_large_batch(name: str, tiny: Task, sources: dict[str, Any]) -> None:
    found = []
    for size in {None, 4, config_of(name).sample_group}:
        method = build(name, tiny)
        for player in method.players.values():  # Adam divides rounding noise by rounding noise where a gradient is 0
            player.optimizer = torch.optim.SGD(player.module.parameters(), lr=0.1)
        training = trainer(method, sources, micro_batch_size=size)
        training.train(until=6)
        losses = [value for point in training.curve for key, value in point.items() if key.endswith("loss")]
        found.append((weights(method), losses))
    start = weights(build(name, tiny))
    assert any(not torch.equal(start[key], found[0][0][key]) for key in start)
    for split, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-5)
        for key, value in split.items():
            torch.testing.assert_close(value, found[0][0][key], rtol=1e-5, atol=1e-6, msg=key)


@trained
def test_a_resumed_run_is_the_same_bit_for_bit(name: str, tiny: Task, sources: dict[str, Any], tmp_path: Path) -> None:
    whole = build(name, tiny)
    straight = trainer(whole, sources, tmp_path / "whole")
    straight.train()
    trainer(build(name, tiny), sources, tmp_path / "halves").train(until=5)
    second = build(name, tiny)
    resumed = trainer(second, sources, tmp_path / "halves")
    resumed.train()
    assert resumed.step == straight.step == STEPS
    expected, found = weights(whole), weights(second)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert resumed.curve == straight.curve
    assert len(resumed.curve) == STEPS
    assert (tmp_path / "whole" / "curves.jsonl").read_bytes() == (tmp_path / "halves" / "curves.jsonl").read_bytes()
    same = ("images", "flops", "updates", "teacher_evaluations")
    assert {key: vars(resumed.bill)[key] for key in same} == {key: vars(straight.bill)[key] for key in same}
    assert torch.equal(sample(whole, tiny), sample(second, tiny))


@trained
def test_its_own_state_survives_a_round_trip(name: str, tiny: Task, sources: dict[str, Any]) -> None:
    method = build(name, tiny)
    trainer(method, sources).train(until=1)
    state = copy.deepcopy(method.state_dict())
    other = build(name, tiny)
    other.load_state_dict(copy.deepcopy(state))
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(torch.as_tensor(other.state_dict()[key]), torch.as_tensor(state[key])) for key in state)


@trained
def test_the_untrained_student_is_evaluated_by_its_player(name: str, tiny: Task) -> None:
    method = build(name, tiny)
    average = method.student_player.ema
    assert average is not None
    assert set(map(id, average.module.parameters())) == set(map(id, method.student.parameters()))
    other = build(name, tiny)
    other.start_from({key: value + 1 for key, value in average.module.state_dict().items()})
    for module in (other.student_player.module, other.student_player.ema.module):  # type: ignore[union-attr]
        assert all(torch.equal(value, average.module.state_dict()[key] + 1) for key, value in module.state_dict().items())


@every
def test_torchs_generator_does_not_move(name: str, tiny: Task, sources: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    method = build(name, tiny)
    if method.players:
        trainer(method, sources).train(until=2)
    sample(method, tiny)
    assert torch.equal(torch.get_rng_state(), before)


@trained
def test_the_seed_decides_the_run(name: str, tiny: Task, sources: dict[str, Any]) -> None:
    def losses(seed: int) -> list[float]:
        training = Trainer(build(name, tiny), sources, TrainSettings(STEPS, 8, seed, log_every=1), None, CPU)
        training.train(until=3)
        return [value for point in training.curve for key, value in point.items() if key.endswith("loss")]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)
