"""What every method must keep, as checks that run on any registered method in seconds.

`harness test-method FILE` runs them on a stranger's file, and the tests run them on ours. Each check
takes a case and raises AssertionError; its docstring is what a person reads.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.methods import METHODS
from harness.training.case import BATCH, CPU, STEPS, Case, all_close, losses, weights
from harness.training.tiny_task import tiny_task


def names(case: Case) -> None:
    """It names its paper, its target and what it learns from, and every option has a line of documentation."""
    cls = case.cls
    assert cls.sources <= {"data", "trajectory"}, f"sources are {sorted(cls.sources)}"
    assert cls.target in ("guided teacher", "data"), f"target is {cls.target!r}"
    assert cls.reference, "reference is empty"
    assert (cls.__doc__ or "").strip(), "the class has no docstring"
    bare = [name for name, option in cls.Config.model_fields.items() if not option.description]
    assert not bare, f"options without documentation: {', '.join(bare)}"


def canonical(case: Case) -> None:
    """Its canonical form is a registered method, and its own canonical form."""
    config = case.config
    case.cls.check(config, case.task, case.num_steps)
    for num_steps in (1, case.num_steps):
        name, once = case.cls.canonical(config, num_steps)
        assert isinstance(once, METHODS[name].Config), f"canonical gives a config that is not {name}'s"
        assert METHODS[name].canonical(once, num_steps) == (name, once), "canonical is not its own canonical form"


def sampling(case: Case) -> None:
    """Sampling goes from t = 1 to t = 0, gives finite images, and the same ones again."""
    method = case.build()
    assert method.levels.dtype == torch.float64, f"levels are {method.levels.dtype}, not float64"
    assert method.levels[0] == 1, "levels do not start at 1"
    assert method.levels[-1] == 0, "levels do not end at 0"
    images = case.sample(method)
    assert images.shape == (3, *case.task.shape), f"samples are {tuple(images.shape)}"
    assert bool(images.isfinite().all()), "samples are not finite"
    assert torch.equal(images, case.sample(method)), "the same noise gives other samples the second time"


def points(case: Case) -> None:
    """The teacher's points that its steps should meet start at the trajectory's noise."""
    path = case.sources["trajectory"].batch(torch.arange(3))
    found = case.build().teacher_points(path)
    assert found.shape == (3, case.num_steps + 1, *case.task.shape), f"teacher_points are {tuple(found.shape)}"
    assert torch.equal(found[:, 0], path.states[:, 0]), "the first point is not the noise"


def neighbours(case: Case) -> None:
    """A sample does not depend on its neighbours in the batch."""
    method = case.build()
    all_close(case.sample(method)[2:], case.sample(method, slice(2, 3)), 1e-4, "alone and in a batch")


def untrained(case: Case) -> None:
    """The untrained student is what the method states, if it states something, for 1 step and for several."""
    x_T, cond = case.task.evaluation_inputs(0)
    for num_steps in (1, case.num_steps):
        method = case.build(num_steps=num_steps)
        if (expected := method.untrained_sampler()) is not None:
            with torch.no_grad():
                all_close(case.sample(method), expected(x_T[:3], cond[:3]), 1e-4, f"untrained, {num_steps} steps")


def generator(case: Case) -> None:
    """torch's own generator does not move: all randomness is keyed."""
    before = torch.get_rng_state()
    method = case.build()
    if method.players:
        case.trainer(method).train(until=2)
    case.sample(method)
    assert torch.equal(torch.get_rng_state(), before), "torch's generator moved: draw from batch.normal and batch.uniform"


def training_free(case: Case) -> None:
    """Without sources nothing is trained."""
    method = case.build()
    assert not method.players, "there are players but no sources"
    assert not list(method.updates(0)), "there are updates but no sources"
    assert not any(parameter.requires_grad for parameter in method.student.parameters()), "the student asks for gradients"


def finite(case: Case) -> None:
    """Losses are finite scalars in float32, in fp32 and under bf16 autocast, in the first step and in the last."""
    for precision in (torch.float32, torch.bfloat16):
        method = case.build()
        for step in (0, STEPS - 1):
            batch = case.batch(method)
            for update in method.updates(step):
                assert update.player in method.players, f"an update names player {update.player!r}; players are {', '.join(method.players)}"
                with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
                    loss, metrics = update.loss(batch)
                assert (loss.shape, loss.dtype) == ((), torch.float32), f"a loss is {tuple(loss.shape)}, {loss.dtype}"
                assert bool(loss.isfinite()), f"the loss of {update.player} is {float(loss.detach())} in {precision}"
                for name, value in metrics.items():
                    assert value.shape == () and not value.requires_grad, f"metric {name} is not a detached scalar"  # noqa: PT018


def isolation(case: Case) -> None:
    """Gradients reach the player of an update alone: no other player, no average, not the teacher."""
    teacher = case.task.teacher(CPU)
    method = case.build(teacher=teacher)
    batch = case.batch(method)
    for update in method.updates(STEPS - 1):
        for other, player in method.players.items():
            player.module.requires_grad_(other == update.player)
        update.loss(batch)[0].backward()
        mine = list(method.players[update.player].module.parameters())
        assert any(p.grad is not None and bool(p.grad.any()) for p in mine), f"no gradient reaches {update.player}"
        ours, players = set(map(id, mine)), method.players.values()
        bystanders = [teacher, method.student, *(p.module for p in players), *(p.ema.module for p in players if p.ema)]
        hit = [p for module in bystanders for p in module.parameters() if id(p) not in ours and p.grad is not None]
        assert not hit, f"the loss of {update.player} leaves gradients elsewhere"
        method.players[update.player].optimizer.zero_grad(set_to_none=True)


def averaged(case: Case) -> None:
    """What is evaluated is the moving average of the player "student", which training moves and `start_from` sets."""
    method = case.build()
    average = method.student_player.ema
    assert average is not None, 'the player "student" has no average'
    updates = sum(update.player == "student" for step in range(STEPS) for update in method.updates(step))
    left = average.decay**updates
    assert left <= 1.01 * average.initial_weight, f"after {updates} updates the average holds {left:.2g} of its start, not what it says"
    ours = set(map(id, average.module.parameters()))
    assert ours == set(map(id, method.student.parameters())), "the student's parameters are not those of the average"
    before = weights(method)
    case.trainer(method).train(until=2)
    after = weights(method)
    assert any(not torch.equal(before[key], after[key]) for key in before if ".ema." in key), "training does not move the average"
    other = case.build()
    other.start_from({key: value + 1 for key, value in average.module.state_dict().items()})
    started = other.student_player
    assert started.ema is not None
    for module in (started.module, started.ema.module):
        for key, value in module.state_dict().items():
            assert torch.equal(value, average.module.state_dict()[key] + 1), "start_from does not set player and average"


def accumulation(case: Case) -> None:
    """Micro-batches equal one large batch: losses and weights after 6 steps, under plain gradient descent."""
    found, group = [], case.config.sample_group
    for size in dict.fromkeys((BATCH, group if group > 1 else BATCH // 2)):
        method = case.build()
        for player in method.players.values():  # Adam divides rounding noise by rounding noise where a gradient is 0
            player.optimizer = torch.optim.SGD(player.module.parameters(), lr=0.1)
        trainer = case.trainer(method, micro_batch_size=size)
        trainer.train(until=6)
        found.append((weights(method), losses(trainer)))
    start, (whole, curve) = weights(case.build()), found[0]
    assert any(not torch.equal(start[key], whole[key]) for key in start), "training moves no weight"
    for split, other in found[1:]:
        all_close(torch.tensor(other), torch.tensor(curve), 1e-4, "losses")
        for key, value in split.items():
            all_close(value, whole[key], 1e-4, key)


def resume(case: Case) -> None:
    """10 steps equal 5, a resume from the checkpoint, and 5 more, bit for bit: weights, losses, bill, samples."""
    whole, second = case.build(), case.build()
    straight = case.trainer(whole, case.folder / "whole")
    straight.train()
    case.trainer(case.build(), case.folder / "halves").train(until=STEPS // 2)
    resumed = case.trainer(second, case.folder / "halves")
    resumed.train()
    assert resumed.step == straight.step == STEPS
    expected, found = weights(whole), weights(second)
    unequal = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not unequal, f"a resumed run has other weights: {', '.join(unequal[:3])}"
    assert resumed.curve == straight.curve, "a resumed run has another curve"
    for name in ("images", "flops", "updates", "teacher_evaluations"):
        assert vars(resumed.bill)[name] == vars(straight.bill)[name], f"a resumed run has another bill: {name}"
    assert torch.equal(case.sample(whole), case.sample(second)), "a resumed run has other samples"


def own_state(case: Case) -> None:
    """Its own state survives a round trip through `state_dict` and `load_state_dict`."""
    method, other = case.build(), case.build()
    case.trainer(method).train(until=STEPS // 2)
    state = copy.deepcopy(method.state_dict())
    other.load_state_dict(copy.deepcopy(state))
    back = other.state_dict()
    assert back.keys() == state.keys(), "state_dict has other keys after load_state_dict"
    unequal = [key for key in state if not torch.equal(torch.as_tensor(back[key]), torch.as_tensor(state[key]))]
    assert not unequal, f"state_dict changes in a round trip: {', '.join(unequal)}"


def any_step(case: Case) -> None:
    """If it says that training does not depend on the number of steps, it does not."""
    if not case.cls.trained_once(case.config):
        return
    found = []
    for num_steps in (1, case.num_steps):
        method = case.build(num_steps=num_steps)
        case.trainer(method).train(until=3)
        found.append(weights(method))
    unequal = [key for key in found[0] if not torch.equal(found[0][key], found[1][key])]
    assert not unequal, f"trained for 1 step and for {case.num_steps} the weights differ: {', '.join(unequal[:3])}"


def seeded(case: Case) -> None:
    """The seed decides the run: equal losses for equal seeds, other ones for another."""

    def run(seed: int) -> list[float]:
        trainer = case.trainer(case.build(), seed=seed)
        trainer.train(until=3)
        return losses(trainer)

    first = run(0)
    assert first == run(0), "two runs of one seed have other losses"
    assert first != run(1), "the seed changes nothing"


Check = Callable[[Case], None]
EVERY: tuple[Check, ...] = (names, canonical, sampling, points, neighbours, untrained, generator)
TRAINED: tuple[Check, ...] = (finite, isolation, averaged, accumulation, resume, own_state, seeded, any_step)
UNTRAINED: tuple[Check, ...] = (training_free,)


def checks_of(name: str) -> tuple[Check, ...]:
    """The checks that a method must pass."""
    return (*EVERY, *(TRAINED if METHODS[name].sources else UNTRAINED))


@dataclass(frozen=True)
class Outcome:
    """One check of one method; `problem` is empty where it passed."""

    check: str
    what: str
    problem: str = ""


def run_checks(name: str, folder: Path, options: dict[str, Any] | None = None) -> Iterator[Outcome]:
    """Runs all checks of a method, one after the other."""
    task = tiny_task(folder / "task")
    for check in checks_of(name):
        what = (check.__doc__ or "").strip()
        try:
            check(Case(name, task, folder / check.__name__, dict(options or {})))
        except Exception as error:  # whatever a stranger's file does
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if isinstance(error, AssertionError) else f" ({Path(where.filename).name}:{where.lineno})"
            yield Outcome(check.__name__, what, f"{type(error).__name__}: {str(error).strip()}{place}")
        else:
            yield Outcome(check.__name__, what)
