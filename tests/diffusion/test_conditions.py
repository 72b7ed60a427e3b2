"""Conditions: labels, text, nothing, and numbers beside."""

from __future__ import annotations

import math

import pytest
import torch

from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.networks.backbones.dit import DiT
from harness.networks.history import with_history
from harness.training.tiny_task import NETWORK

OPTIONS = {**NETWORK, "depth": 2, "num_classes": 3}
WHOLE = Condition(
    torch.tensor([0, 1, 2]), torch.arange(24.0).view(3, 4, 2), {"s": torch.tensor([0.1, 0.2, 0.3])}
)


def test_every_part_is_indexed_and_repeated() -> None:
    part = WHOLE[1:]
    assert part.classes.tolist() == [1, 2]
    assert part.text is not None
    assert part.text[0, 0].tolist() == [8, 9]
    assert part.scalars["s"].tolist() == pytest.approx([0.2, 0.3])
    twice = WHOLE.repeat(2)
    assert twice.classes.tolist() == [0, 1, 2, 0, 1, 2]
    assert twice.text is not None
    assert twice.text.shape == (6, 4, 2)
    assert len(twice.scalars["s"]) == 6


def test_dropout_replaces_labels_and_text_but_not_the_numbers() -> None:
    null = Condition(torch.tensor([9]), torch.full((1, 4, 2), -1.0))
    dropped = WHOLE.replaced(torch.tensor([False, True, False]), null)
    assert dropped.classes.tolist() == [0, 9, 2]
    assert dropped.text is not None
    assert WHOLE.text is not None
    assert torch.equal(dropped.text[1], torch.full((4, 2), -1.0))
    assert torch.equal(dropped.text[[0, 2]], WHOLE.text[[0, 2]])
    assert torch.equal(dropped.scalars["s"], WHOLE.scalars["s"])


def test_nothing_stays_nothing() -> None:
    nothing = Condition().repeat(2)[:1].replaced(torch.tensor([True]), Condition())
    assert (nothing.labels, nothing.text) == (None, None)
    with pytest.raises(ValueError, match="labels are needed"):
        _ = nothing.classes


@pytest.mark.parametrize("cond", [Condition(), Condition(text=torch.zeros(1, 4, 2)), WHOLE[:1]])
def test_a_null_of_another_kind_is_refused(cond: Condition) -> None:
    with pytest.raises(ValueError, match="other parts"):
        cond.replaced(torch.tensor([True]), Conditions(3).null)


@pytest.mark.parametrize("count", [10, 1000])
def test_drawn_conditions_are_uniform(count: int) -> None:
    """Pearson's statistic of 50,000 labels has mean count - 1 and variance 2 (count - 1)."""
    labels = Conditions(count).drawn(Keyed("evaluate", 0), torch.arange(50_000)).classes
    found = labels.bincount(minlength=count)
    assert len(found) == count
    expected = len(labels) / count
    statistic = float((found - expected).square().sum() / expected)
    assert abs(statistic - (count - 1)) < 4 * math.sqrt(2 * (count - 1))
    neighbours = labels.float() - labels.float().mean()
    correlation = (neighbours[1:] * neighbours[:-1]).mean() / neighbours.square().mean()
    assert abs(float(correlation)) < 4 / math.sqrt(len(labels))


def test_a_number_told_again_counts() -> None:
    extended = WHOLE.with_scalars(s=torch.zeros(3, dtype=torch.float64), w=torch.ones(3))
    assert extended.scalars["s"].tolist() == [0, 0, 0]
    assert extended.scalars["s"].dtype == torch.float32
    assert set(extended.scalars) == {"s", "w"}
    assert set(WHOLE.scalars) == {"s"}


def built(cls: type, *args: object, **more: object) -> torch.nn.Module:
    with keyed_initialisation(0, "conditions"):
        network = cls(*args, **OPTIONS, **more)
        for name, parameter in network.named_parameters():
            if not name.startswith("scalar_embedders"):
                torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_numbers_change_nothing_until_they_are_trained() -> None:
    plain, student = built(DiT), built(DiT, scalars=("s",))
    student.load_teacher(plain.state_dict())
    x, t, cond = (
        torch.randn(3, 1, 8, 8),
        torch.full((3,), 500.0),
        Conditions(3).balanced(torch.arange(3)),
    )
    with torch.no_grad():
        at = [student(x, t, cond.with_scalars(s=torch.full((3,), value))) for value in (0.0, 700.0)]
        assert torch.equal(at[0], plain(x, t, cond))
        assert torch.equal(at[1], at[0])
        torch.nn.init.normal_(student.scalar_embedders["s"].mlp[2].weight)
        assert (
            student(x, t, cond.with_scalars(s=torch.full((3,), 700.0))) - at[0]
        ).abs().max() > 1e-3
    with pytest.raises(KeyError, match="s"):
        student(x, t, cond)


def test_numbers_learn_from_the_first_step() -> None:
    student = built(DiT, scalars=("s",))
    cond = Conditions(3).balanced(torch.arange(3)).with_scalars(s=torch.tensor([1.0, 2.0, 3.0]))
    student(torch.randn(3, 1, 8, 8), torch.full((3,), 500.0), cond).square().mean().backward()
    assert student.scalar_embedders["s"].mlp[2].weight.grad.abs().max() > 0


def test_a_history_student_is_told_too() -> None:
    student = with_history(built(DiT, scalars=("s",)), 2, 1)
    torch.nn.init.normal_(student.scalar_embedders["s"].mlp[2].weight)
    x, t, cond = (
        torch.randn(2, 2, 1, 8, 8),
        torch.tensor([[999.0, 499.0]]).expand(2, -1),
        Conditions(3).balanced(torch.arange(2)),
    )
    with torch.no_grad():
        a, b = (
            student(x, t, cond.with_scalars(s=torch.tensor(values)))[0]
            for values in ([1.0, 1.0], [1.0, 90.0])
        )
    assert torch.equal(a[0], b[0])
    assert (a[1] - b[1]).abs().amax((1, 2, 3)).min() > 1e-4
