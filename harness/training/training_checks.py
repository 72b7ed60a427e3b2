"""Checks of a method's losses, gradients, averages and resume.

Each check takes a case and raises AssertionError. The first line of its docstring is what
`harness test-method` prints.
"""

from __future__ import annotations

import copy

import torch

from harness.training.case import BATCH, CPU, STEPS, Case, all_close, losses, weights
from harness.training.settings import Precision, autocast


def finite(case: Case) -> None:
    """Losses are finite float32 scalars in fp32 and bf16, in the first step and the last."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        method = case.build()
        for step in (0, STEPS - 1):
            batch = case.batch(method)
            for update in method.updates(step):
                assert update.player in method.players, (
                    f"an update names player {update.player!r}; "
                    f"players are {', '.join(method.players)}"
                )
                with autocast(case.device, precision):
                    loss, metrics = update.loss(batch)
                assert (loss.shape, loss.dtype) == ((), torch.float32), (
                    f"a loss is {tuple(loss.shape)}, {loss.dtype}"
                )
                assert bool(loss.isfinite()), (
                    f"the loss of {update.player} is {float(loss.detach())} in {precision}"
                )
                for name, value in metrics.items():
                    assert value.shape == (), f"metric {name} is not a detached scalar"
                    assert not value.requires_grad, f"metric {name} is not a detached scalar"


def isolation(case: Case) -> None:
    """The gradients of an update reach its player alone: no other one, no average, no teacher."""
    teacher = case.task.teacher(CPU)
    method = case.build(teacher=teacher)
    batch = case.batch(method)
    for update in method.updates(STEPS - 1):
        for other, player in method.players.items():
            for weight in player.trained:
                weight.requires_grad_(other == update.player)
        update.loss(batch)[0].backward()
        mine = method.players[update.player].trained
        assert any(p.grad is not None and bool(p.grad.any()) for p in mine), (
            f"no gradient reaches {update.player}"
        )
        ours, players = set(map(id, mine)), method.players.values()
        bystanders = [
            teacher,
            method.student,
            *(p.module for p in players),
            *(p.ema.module for p in players if p.ema),
        ]
        hit = [
            p
            for module in bystanders
            for p in module.parameters()
            if id(p) not in ours and p.grad is not None
        ]
        assert not hit, f"the loss of {update.player} leaves gradients elsewhere"
        method.players[update.player].optimizer.zero_grad(set_to_none=True)


def averaged(case: Case) -> None:
    """The evaluated student is the moving average of the player "student".

    Training moves the average, and `start_from` sets it together with the player.
    """
    method = case.build()
    average = method.student_player.ema
    assert average is not None, 'the player "student" has no average'
    updates = sum(
        update.player == "student" for step in range(STEPS) for update in method.updates(step)
    )
    left = average.decay**updates
    assert left <= 1.01 * average.initial_weight, (
        f"after {updates} updates the average holds {left:.2g} of its start, not what it says"
    )
    ours = set(map(id, average.module.parameters()))
    assert ours == set(map(id, method.student.parameters())), (
        "the student's parameters are not those of the average"
    )
    before = weights(method)
    case.trainer(method).train(until=2)
    after = weights(method)
    assert any(not torch.equal(before[key], after[key]) for key in before if ".ema." in key), (
        "training does not move the average"
    )
    other = case.build()
    other.start_from({key: value + 1 for key, value in average.module.state_dict().items()})
    started = other.student_player
    assert started.ema is not None
    for module in (started.module, started.ema.module):
        for key, value in module.state_dict().items():
            assert torch.equal(value, average.module.state_dict()[key] + 1), (
                "start_from does not set player and average"
            )


def accumulation(case: Case) -> None:
    """Micro-batches equal one large batch in losses and weights, after 6 steps of SGD."""
    found, group = [], case.config.sample_group
    for size in dict.fromkeys((BATCH, group if group > 1 else BATCH // 2)):
        method = case.build()
        # Adam would divide rounding noise by rounding noise where a gradient is 0.
        for player in method.players.values():
            player.optimizer = torch.optim.SGD(player.trained, lr=0.1)
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
    """10 steps equal 5, a resume from the checkpoint, and 5 more, bit for bit.

    The check compares weights, losses, bill and samples.
    """
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
        assert vars(resumed.bill)[name] == vars(straight.bill)[name], (
            f"a resumed run has another bill: {name}"
        )
    assert torch.equal(case.sample(whole), case.sample(second)), "a resumed run has other samples"


def own_state(case: Case) -> None:
    """Its own state survives a round trip through `state_dict` and `load_state_dict`."""
    method, other = case.build(), case.build()
    case.trainer(method).train(until=STEPS // 2)
    state = copy.deepcopy(method.state_dict())
    other.load_state_dict(copy.deepcopy(state))
    back = other.state_dict()
    assert back.keys() == state.keys(), "state_dict has other keys after load_state_dict"
    unequal = [
        key
        for key in state
        if not torch.equal(torch.as_tensor(back[key]), torch.as_tensor(state[key]))
    ]
    assert not unequal, f"state_dict changes in a round trip: {', '.join(unequal)}"


def any_step(case: Case) -> None:
    """If it is trained once for all numbers of steps, the number does not change its training."""
    if not case.cls.trained_once(case.config):
        return
    found = []
    for num_steps in (1, case.num_steps):
        method = case.build(num_steps=num_steps)
        case.trainer(method).train(until=3)
        found.append(weights(method))
    unequal = [key for key in found[0] if not torch.equal(found[0][key], found[1][key])]
    assert not unequal, (
        f"trained for 1 step and for {case.num_steps} the weights differ: {', '.join(unequal[:3])}"
    )


def seeded(case: Case) -> None:
    """The seed decides the run: equal losses for equal seeds, other ones for another."""

    def run(seed: int) -> list[float]:
        trainer = case.trainer(case.build(), seed=seed)
        trainer.train(until=3)
        return losses(trainer)

    first = run(0)
    assert first == run(0), "two runs of one seed have other losses"
    assert first != run(1), "the seed changes nothing"
