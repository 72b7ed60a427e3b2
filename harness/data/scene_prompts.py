"""Prompts about scenes of digits and shapes, in the six categories of GenEval.

GenEval (Ghosh et al. 2023, arXiv 2310.11513) asks for one object, two objects, a count, a colour, a
position, or two colours. The grammar here says the same of ten digits and four shapes:

    a seven;  a seven and a circle;  three sevens;  three blue sevens;  a red seven
    a circle left of a four;  a red circle left of a green four;  a red circle and a green four

Some colours never go with some objects in training, and some relations never with some pairs.
Prompts with such a combination are held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from harness.diffusion.randomness import Keyed
from harness.errors import UsageError, unknown

OBJECTS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("circle", "square", "triangle", "cross"),
)
PLURALS = tuple(name + ("es" if name in ("six", "cross") else "s") for name in OBJECTS)
COLOURS = ("red", "green", "blue", "yellow", "purple")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's names of its categories."""
WORDS = tuple(
    dict.fromkeys(
        (
            *("a", "an", "and", "of", "left", "right", "above", "below"),
            *COUNTS.values(),
            *COLOURS,
            *OBJECTS,
            *PLURALS,
        )
    )
)
"""Every word that a prompt may have."""
LONGEST = 1000
"""Characters that a prompt may have."""
MOST_WORDS = 8
"""Words of the longest prompts, such as "a red seven left of a blue four"."""


@dataclass(frozen=True)
class Things:
    """Some equal objects.

    Attributes:
        count: their number, 1 to 4.
        object: the place in `OBJECTS`.
        colour: the place in `COLOURS`; None is any colour.
    """

    count: int
    object: int
    colour: int | None = None

    @property
    def text(self) -> str:
        name = (OBJECTS if self.count == 1 else PLURALS)[self.object]
        described = name if self.colour is None else f"{COLOURS[self.colour]} {name}"
        article = "an" if described == "eight" else "a"
        return f"{article if self.count == 1 else COUNTS[self.count]} {described}"


@dataclass(frozen=True)
class Prompt:
    """What a scene shows, and nothing else.

    Attributes:
        things: one or two kinds of objects.
        relation: the place in `RELATIONS` of the first to the second, or None.
    """

    things: tuple[Things, ...]
    relation: int | None = None

    @property
    def text(self) -> str:
        if len(self.things) == 1:
            return self.things[0].text
        between = "and" if self.relation is None else RELATIONS[self.relation]
        return f"{self.things[0].text} {between} {self.things[1].text}"

    @property
    def category(self) -> str:
        coloured = self.things[0].colour is not None
        if self.relation is not None:
            return "position"
        if len(self.things) == 2:
            return "color_attr" if coloured else "two_object"
        if self.things[0].count > 1:
            return "counting"
        return "colors" if coloured else "single_object"

    @property
    def held_out(self) -> bool:
        """Whether it has a combination that training never shows."""
        if any(x.colour is not None and unseen_colour(x.object, x.colour) for x in self.things):
            return True
        return self.relation is not None and unseen_relation(
            self.relation, *(x.object for x in self.things)
        )


def unseen_colour(thing: int, colour: int) -> bool:
    """Whether training never shows this object in this colour: 10 of 70 combinations."""
    return (thing + 3 * colour) % 7 == 3


def unseen_relation(relation: int, first: int, second: int) -> bool:
    """Whether training never says this of this pair, in either order: about one in eight."""
    if relation % 2:  # "b right of a" is "a left of b"
        first, second = second, first
    return (3 * first + 5 * second + relation // 2) % 8 == 0


def _kinds(category: str) -> list[Iterator[Prompt]]:
    """All prompts of a category, by kind: kinds are equally frequent."""
    objects, colours = range(len(OBJECTS)), range(len(COLOURS))
    pairs = [(a, b) for a, b in product(objects, objects) if a != b]
    one = (Prompt((Things(1, thing),)) for thing in objects)
    coloured = list(product(objects, colours))
    both = [(a, b) for a, b in product(coloured, coloured) if a[0] != b[0] and a[1] != b[1]]
    relations = range(len(RELATIONS))
    found = {
        "single_object": [one],
        "two_object": [(Prompt((Things(1, a), Things(1, b))) for a, b in pairs)],
        "counting": [
            (Prompt((Things(n, thing),)) for n in COUNTS for thing in objects),
            (Prompt((Things(n, *thing),)) for n in COUNTS for thing in coloured),
        ],
        "colors": [(Prompt((Things(1, *thing),)) for thing in coloured)],
        "position": [
            (Prompt((Things(1, a), Things(1, b)), r) for r in relations for a, b in pairs),
            (Prompt((Things(1, *a), Things(1, *b)), r) for r in relations for a, b in both),
        ],
        "color_attr": [(Prompt((Things(1, *a), Things(1, *b))) for a, b in both)],
    }
    return list(found[category])


@cache
def prompts_of(category: str, held_out: bool, count: int) -> tuple[Prompt, ...]:
    """Prompts of a category, seen in training or held out, in a fixed random order.

    The kinds of a category take turns. Where there are too few prompts, they come again.

    Raises ValueError if there is none.
    """
    kinds = []
    for number, kind in enumerate(_kinds(category)):
        chosen = [prompt for prompt in kind if prompt.held_out == held_out]
        if chosen:
            order = Keyed("prompts", 0).permutation(f"{category} {number} {held_out}", len(chosen))
            kinds.append([chosen[place] for place in order.tolist()])
    if not kinds:
        raise ValueError(f"no prompt of {category} is {'held out' if held_out else 'seen'}")
    turns = ((kinds[i % len(kinds)], i // len(kinds)) for i in range(count))
    return tuple(kind[turn % len(kind)] for kind, turn in turns)


HELD_OUT = ("counting", "colors", "position", "color_attr")
"""The categories that have prompts with combinations that training never shows."""


def training_prompts(count: int) -> tuple[Prompt, ...]:
    """Prompts that training may see; the categories take turns. `count` is a multiple of six."""
    each = [prompts_of(category, False, count // len(CATEGORIES)) for category in CATEGORIES]
    return tuple(prompt for turn in zip(*each, strict=True) for prompt in turn)


def judged_prompts(count: int) -> tuple[Prompt, ...]:
    """Prompts for evaluation: six categories of seen ones and four of held-out ones take turns.

    `count` is a multiple of ten.
    """
    parts = [(category, False) for category in CATEGORIES]
    parts += [(category, True) for category in HELD_OUT]
    each = [prompts_of(*part, count // len(parts)) for part in parts]
    return tuple(prompt for turn in zip(*each, strict=True) for prompt in turn)


def parse(text: str) -> Prompt:
    """The prompt that a text means.

    Raises UsageError for a text that is empty, too long, has unknown words, or says something that
    the grammar does not have.
    """
    words = words_of(text)
    for place, relation in enumerate((*(r.split() for r in RELATIONS), ["and"])):
        for start in range(1, len(words) - len(relation)):
            if words[start : start + len(relation)] == relation:
                first, second = words[:start], words[start + len(relation) :]
                things = (_things(first, text), _things(second, text))
                return Prompt(things, place if place < len(RELATIONS) else None)
    return Prompt((_things(words, text),))


def words_of(text: str) -> list[str]:
    """The words of a prompt. Raises UsageError for a text that holds anything else."""
    if len(text) > LONGEST:
        raise UsageError(f"a prompt has {len(text):,} characters, but at most {LONGEST} are read")
    if not text.isprintable():
        raise UsageError(f"prompt {text!r} has control characters: leave them out")
    words = text.lower().split()
    for word in words:
        if word not in WORDS:
            raise unknown("word", word, WORDS, f"prompt {text[:60]!r}")
    return words


def _things(words: list[str], text: str) -> Things:
    """What words such as "three blue sevens" mean."""
    counts = {"a": 1, "an": 1, **{word: count for count, word in COUNTS.items()}}
    if words and words[0] in counts:
        count, rest = counts[words[0]], words[1:]
        names = OBJECTS if count == 1 else PLURALS
        colour = COLOURS.index(rest[0]) if len(rest) == 2 and rest[0] in COLOURS else None
        if rest and rest[-1] in names and len(rest) == (1 if colour is None else 2):
            return Things(count, names.index(rest[-1]), colour)
    raise UsageError(
        f"prompt {text[:60]!r} is not understood: say it as in 'three blue sevens' or "
        "'a red circle left of a green four'"
    )


def encoded(prompts: tuple[Prompt, ...]) -> dict[str, torch.Tensor]:
    """What a scene of each prompt holds.

    Returns:
        objects, colours [n, 4]: places in `OBJECTS` and `COLOURS`; -1 is no object, or any colour.
        relation [n]: the place in `RELATIONS`, or -1.
    """
    objects, colours = (torch.full((len(prompts), 4), -1) for _ in range(2))
    relation = torch.full((len(prompts),), -1)
    for row, prompt in enumerate(prompts):
        single = [thing for thing in prompt.things for _ in range(thing.count)]
        for slot, thing in enumerate(single):
            objects[row, slot] = thing.object
            colours[row, slot] = -1 if thing.colour is None else thing.colour
        if prompt.relation is not None:
            relation[row] = prompt.relation
    return {"objects": objects, "colours": colours, "relation": relation}
