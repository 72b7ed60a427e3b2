"""Checks of a method's description, its sampling and its student before training.

Each check takes a case and raises AssertionError. The first line of its docstring is what
`harness test-method` prints.
"""

from __future__ import annotations

import torch
from pydantic import ValidationError

from harness.methods import METHODS
from harness.methods.parts.options import Span
from harness.training.case import Case, all_close


def names(case: Case) -> None:
    """It names its paper, target and sources, and documents every option."""
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
        assert isinstance(once, METHODS[name].Config), (
            f"canonical gives a config that is not {name}'s"
        )
        assert METHODS[name].canonical(once, num_steps) == (name, once), (
            "canonical is not its own canonical form"
        )


def sampling(case: Case) -> None:
    """Sampling goes from t = 1 to t = 0, gives finite images, and the same ones again."""
    method = case.build()
    assert method.levels.dtype == torch.float64, f"levels are {method.levels.dtype}, not float64"
    assert method.levels[0] == 1, "levels do not start at 1"
    assert method.levels[-1] == 0, "levels do not end at 0"
    images = case.sample(method)
    assert images.shape == (3, *case.task.shape), f"samples are {tuple(images.shape)}"
    assert bool(images.isfinite().all()), "samples are not finite"
    assert torch.equal(images, case.sample(method)), (
        "the same noise gives other samples the second time"
    )


def points(case: Case) -> None:
    """The teacher's points that its steps should meet start at the trajectory's noise."""
    path = case.sources["trajectory"].batch(torch.arange(3))
    found = case.build().teacher_points(path)
    assert found.shape == (3, case.num_steps + 1, *case.task.shape), (
        f"teacher_points are {tuple(found.shape)}"
    )
    assert torch.equal(found[:, 0], path.states[:, 0]), "the first point is not the noise"


def neighbours(case: Case) -> None:
    """A sample does not depend on its neighbours in the batch."""
    method = case.build()
    all_close(
        case.sample(method)[2:], case.sample(method, slice(2, 3)), 1e-4, "alone and in a batch"
    )


def untrained(case: Case) -> None:
    """The untrained student equals the stated untrained sampler, for 1 step and for several.

    A method that states no such sampler passes.
    """
    x_T, cond = case.task.evaluation_inputs(0)
    for num_steps in (1, case.num_steps):
        method = case.build(num_steps=num_steps)
        if (expected := method.untrained_sampler()) is not None:
            with torch.no_grad():
                all_close(
                    case.sample(method),
                    expected(x_T[:3], cond[:3]),
                    1e-4,
                    f"untrained, {num_steps} steps",
                )


def generator(case: Case) -> None:
    """torch's own generator does not move: all randomness is keyed."""
    before = torch.get_rng_state()
    method = case.build()
    if method.players:
        case.trainer(method).train(until=2)
    case.sample(method)
    assert torch.equal(torch.get_rng_state(), before), (
        "torch's generator moved: draw from batch.normal and batch.uniform"
    )


def tunes(case: Case) -> None:
    """It declares 3 to 5 options for searches, with valid values around the default."""
    cls, own = case.cls, case.cls.Config().model_dump()
    assert 3 <= len(cls.tunes) <= 5, f"tunes has {len(cls.tunes)} names, but should have 3 to 5"
    for name, of in cls.tunes.items():
        assert name in own, f"tunes names {name}, which is no option"
        for value in of.ends if isinstance(of, Span) else of:
            try:
                cls.Config(**{name: value})
            except ValidationError as error:
                raise AssertionError(f"tunes has {name} {value!r}: {error}") from error
        assert own[name] in of, f"the default of {name} is {own[name]!r}, which its tunes leave out"


def training_free(case: Case) -> None:
    """Without sources nothing is trained."""
    method = case.build()
    assert not method.players, "there are players but no sources"
    assert not list(method.updates(0)), "there are updates but no sources"
    assert not any(parameter.requires_grad for parameter in method.student.parameters()), (
        "the student asks for gradients"
    )
