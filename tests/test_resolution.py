"""docs/resolution.md says what its function makes, and the function equals closed formulas."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from formulas import history_extra_macs

from benchmarks.resolution import (
    KINDS,
    STEPS,
    Costs,
    Kind,
    count,
    measure,
    page,
    parabola,
    tokens_of,
)
from harness.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "resolution.md"
DEPTH, WIDTH = 28, 1152


def visible(kind: Kind) -> Callable[[int], tuple[int, ...]]:
    """From a state to those that it sees, as the method has it."""
    ard: Any = METHODS["ard"]
    return ard.history(ard.Config(**kind.options))[1]


def closed() -> Costs:
    """The costs of DiT-XL/2 on four channels with a learned variance, by hand."""
    d = WIDTH
    fixed = DEPTH * 6 * d**2 + 2 * d**2 + 256 * d + d**2  # adaLN, last adaLN, time
    a_token = DEPTH * 12 * d**2 + 16 * d + 32 * d  # blocks, patches in, patches out
    attention = DEPTH * 2 * d
    added = {
        kind: history_extra_macs(1, d, kind.layers, [len(visible(kind)(q)) for q in range(STEPS)])
        for kind in KINDS
    }
    cache = {kind: 2 * kind.layers * (STEPS - 1) * d * 4 for kind in KINDS}
    plain = (STEPS * fixed, STEPS * a_token, STEPS * attention)
    return Costs(plain, STEPS * attention, added, cache)


def test_the_page_is_made_by_its_function() -> None:
    counted, latency = PAGE.read_text().split("\n## Latency\n")
    assert counted == page(closed())
    assert "ratio of times" in latency


@pytest.mark.parametrize("kind", [Kind(6), Kind(28, depth=1)])
def test_the_formulas_are_what_is_counted(kind: Kind) -> None:
    """At a size that the function itself never counts."""
    found, costs, tokens = count("ard", 1024, kind.options), closed(), tokens_of(1024)
    assert found.plain_macs == costs.step_distillation(tokens)
    assert found.macs - found.plain_macs == costs.added[kind] * tokens**2
    assert found.by_kind["attention products"] == Fraction(costs.share(tokens, kind) * found.macs)
    assert found.cache == costs.cache[kind] * tokens


@pytest.mark.slow
def test_the_function_measures_the_formulas() -> None:
    assert measure() == closed()


def test_the_states_that_a_mask_needs() -> None:
    """At the last step: those that it sees, but itself."""
    for kind in KINDS:
        assert kind.kept == len(visible(kind)(STEPS - 1)) - 1


def test_a_parabola_through_three_points() -> None:
    assert parabola({x: 3 - 5 * x + 7 * x**2 for x in (2, 5, 11)}) == (3, -5, 7)


def test_where_history_stops_being_cheap() -> None:
    """At the size that is named history is cheap, one token further it is not."""
    costs, part = closed(), Fraction(1, 10)
    size = costs.most(Kind(6), part)
    assert size is not None
    assert (
        costs.extra(Kind(6), tokens_of(size)) <= part < costs.extra(Kind(6), tokens_of(size + 16))
    )
    assert costs.most(Kind(1), part) is None
    assert costs.extra(Kind(1), tokens_of(2**14)) < part
