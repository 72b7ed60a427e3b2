"""What history costs by resolution: `python -m benchmarks.resolution` prints docs/resolution.md.

Each row is what `harness cost` counts. A pass costs a polynomial of second degree in the number of
tokens, and history a multiple of its square. So a few counts at small sizes give all sizes exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from harness.methods import METHODS
from harness.runs.cost import SamplingCost, paper_problem, sampling_cost_on_meta

NETWORK, STEPS = "DiT-XL/2", 4
SIZES = (256, 512, 1024, 2048, 4096, 8192)
COUNTED = (128, 256, 512)
"""Sizes at which passes are counted; three points give a parabola."""
UNIT = 16
"""Pixels of a token's side: 8 of the autoencoder times 2 of the patch."""
CHEAP = (Fraction(5, 100), Fraction(10, 100), Fraction(20, 100))
"""What history may add, in parts of step distillation."""


@dataclass(frozen=True)
class Kind:
    """A history: `history_layers` of ARD, its mask and its depth.

    Attributes:
        kept: earlier states whose keys the last step needs.
    """

    layers: int
    mask: str = "causal"
    depth: int | None = None

    @property
    def options(self) -> dict[str, int | str]:
        plain: dict[str, int | str] = {"history_layers": self.layers, "mask": self.mask}
        return plain if self.depth is None else {**plain, "history_depth": self.depth}

    @property
    def kept(self) -> int:
        if self.mask == "keep_first":
            return 1
        return STEPS - 1 if self.depth is None else min(self.depth, STEPS - 1)

    @property
    def name(self) -> str:
        return f"N = {self.layers}, {self._seen}"

    @property
    def _seen(self) -> str:
        if self.mask == "keep_first":
            return "keep-first"
        return "all earlier states" if self.depth is None else f"a window of {self.depth}"


BY_LAYERS = tuple(Kind(layers) for layers in (1, 3, 6, 14, 28))
BY_MASK = (
    Kind(6),
    Kind(6, depth=2),
    Kind(6, depth=1),
    Kind(6, mask="keep_first"),
    Kind(28),
    Kind(28, depth=1),
)
KINDS = tuple(dict.fromkeys((*BY_LAYERS, *BY_MASK)))


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one sample in `STEPS` steps, by the number of tokens T.

    Attributes:
        plain: of step distillation, coefficients of 1, T and T^2.
        attention: of its products of attention, the coefficient of T^2.
        added: by history, the coefficient of T^2.
        cache: by history, bytes for each token in float32 that this code carries to the last step.
    """

    plain: tuple[int, int, int]
    attention: int
    added: dict[Kind, int]
    cache: dict[Kind, int]

    def step_distillation(self, tokens: int) -> int:
        return sum(each * tokens**power for power, each in enumerate(self.plain))

    def extra(self, kind: Kind, tokens: int) -> Fraction:
        """What history adds, in parts of step distillation."""
        return Fraction(self.added[kind] * tokens**2, self.step_distillation(tokens))

    def share(self, tokens: int, kind: Kind | None = None) -> Fraction:
        """The share of attention's products in step distillation, or with history."""
        more = self.added[kind] if kind else 0
        whole = self.step_distillation(tokens) + more * tokens**2
        return Fraction((self.attention + more) * tokens**2, whole)

    def most(self, kind: Kind, part: Fraction) -> int | None:
        """The largest size in pixels at which history adds at most a part; None for all sizes."""
        if Fraction(self.added[kind], self.plain[2]) <= part:
            return None
        size = UNIT
        while self.extra(kind, tokens_of(size + UNIT)) <= part:
            size += UNIT
        return size


def tokens_of(size: int) -> int:
    """Tokens of an image whose side has so many pixels."""
    return (size // UNIT) ** 2


def count(method: str, size: int, options: dict[str, int | str]) -> SamplingCost:
    """What `harness cost` counts."""
    problem = paper_problem(NETWORK, size, True, 1000, STEPS)
    return sampling_cost_on_meta(method, METHODS[method].Config(**options), problem, STEPS)


def measure() -> Costs:
    """The costs from counts."""
    found = {tokens_of(s): count("step-distillation", s, {}) for s in COUNTED}
    size = COUNTED[0]
    tokens = tokens_of(size)
    counts = {kind: count("ard", size, kind.options) for kind in KINDS}
    added = {kind: (each.macs - each.plain_macs) // tokens**2 for kind, each in counts.items()}
    return Costs(
        parabola({tokens: each.macs for tokens, each in found.items()}),
        found[tokens].by_kind["attention products"] // tokens**2,
        added,
        {kind: each.cache // tokens for kind, each in counts.items()},
    )


def parabola(points: dict[int, int]) -> tuple[int, int, int]:
    """Coefficients of 1, x and x^2 of the parabola through three points."""
    (a, fa), (b, fb), (c, fc) = points.items()
    slope = Fraction(fb - fa, b - a)
    square = (Fraction(fc - fa, c - a) - slope) / (c - b)
    line = slope - square * (a + b)
    return int(fa - line * a - square * a**2), int(line), int(square)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with numbers on the right."""
    ruler = "|".join([":--", *["--:"] * (len(head) - 1)])
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{ruler}|", *lines[1:]])


def percent(part: Fraction) -> str:
    return f"{float(part):.1%}".replace("%", " %")


def passes(costs: Costs) -> str:
    """Step distillation, and the share of attention."""
    rows = []
    for size in SIZES:
        tokens, six, every = tokens_of(size), Kind(6), Kind(28)
        macs = costs.step_distillation(tokens)
        with_six = macs + costs.added[six] * tokens**2
        shares = [costs.share(tokens), costs.share(tokens, six), costs.share(tokens, every)]
        numbers = [f"{macs / 1e12:,.2f}", f"{with_six / 1e12:,.2f}"]
        rows.append([f"{size} px", f"{tokens:,}", *numbers, *map(percent, shares)])
    head = ["image", "tokens", "step distillation, TMACs", "ARD with N = 6, TMACs"]
    return table(
        [*head, *(f"attention {name}" for name in ("without history", "N = 6", "N = 28"))], rows
    )


def added(costs: Costs, kinds: Sequence[Kind], name: Callable[[Kind], str]) -> str:
    """What history adds to step distillation by size, in the limit, and up to where it is cheap."""
    rows = []
    for kind in kinds:
        extra = [percent(costs.extra(kind, tokens_of(size))) for size in SIZES]
        limit = percent(Fraction(costs.added[kind], costs.plain[2]))
        cheap = [costs.most(kind, part) for part in CHEAP]
        most = ["any" if size is None else f"{size} px" for size in cheap]
        rows.append([name(kind), *extra, limit, *most])
    sizes = [f"{size} px" for size in SIZES]
    parts = [f"at most {int(100 * part)} % up to" for part in CHEAP]
    return table(["history", *sizes, "limit", *parts], rows)


def caches(costs: Costs) -> str:
    """Keys and values of earlier states at the last step, in bf16."""
    rows = []
    for kind in KINDS:
        needed = Fraction(costs.cache[kind] * kind.kept, (STEPS - 1) * 2)
        sizes = [float(needed * tokens_of(size)) / 1e6 for size in SIZES]
        rows.append([kind.name, *(f"{size:,.0f}" for size in sizes)])
    return table(["MB a sample, bf16", *(f"{size} px" for size in SIZES)], rows)


PAGE = """\
# High resolution

What does history cost as images grow, and what would a smaller history save? The network is
{network} on latents (8 pixels a latent, patches of 2): one sample in {steps} steps, without
guidance. This page is made by

```
python -m benchmarks.resolution > docs/resolution.md
```

It counts as `harness cost` does: `harness cost --method ard --history-layers 6 --image-size 1024`
counts one of its numbers. A pass is a parabola in the number of tokens, so counts at small sizes
give all sizes exactly. Tokens decide: an autoencoder of 32 pixels a latent has the same costs at
four times the size.

## A pass

{passes}

TMACs are 10^12 multiply-adds. Step distillation is ARD with N = 0.

## What history adds, by N

N is the number of lowest layers, of 28, that see all earlier states.

{by_layers}

History adds `2 T^2 d N (0 + 1 + ... + {last})` for T tokens of width d. The limit is what it adds
where attention is all of a pass. **With N = 6 it adds more than 10 % past {cheap} px**, and with
all layers past {cheap_all} px. The bound of 10 % is ours.

## What a window or keep-first saves

{by_mask}

A window of 1 and keep-first see one earlier state, so they cost the same: in {steps} steps half of
what all earlier states cost, in S steps 2 / S of it. What that does to quality was not measured at
these sizes; `ablations/masks.yaml` compares masks on 8 x 8 digits.

## Memory of the cache

{caches}

These are the keys and values that the last step needs of the steps before it. This code keeps those
of all states under every mask. So the rows of a window and of keep-first are what it would hold if
it dropped unseen states. At N = 6 the cache of all states is {ratio} tensors of T x d.
"""


def page(costs: Costs) -> str:
    """The page without latencies."""
    return PAGE.format(
        network=NETWORK,
        steps=STEPS,
        last=STEPS - 1,
        passes=passes(costs),
        by_layers=added(costs, BY_LAYERS, lambda kind: f"N = {kind.layers}"),
        by_mask=added(costs, BY_MASK, lambda kind: kind.name),
        cheap=costs.most(Kind(6), CHEAP[1]),
        cheap_all=costs.most(Kind(28), CHEAP[1]),
        caches=caches(costs),
        ratio=2 * 6 * (STEPS - 1),
    )


if __name__ == "__main__":
    from benchmarks.resolution_latency import latencies

    sys.stdout.write(page(measure()) + latencies())
