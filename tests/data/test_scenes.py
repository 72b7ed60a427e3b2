"""Scenes and their prompts: what is asked is drawn, and what is held out never is."""

from __future__ import annotations

import pytest
import torch

from harness.data.scene_prompts import (
    CATEGORIES,
    OBJECTS,
    RELATIONS,
    WORDS,
    Prompt,
    Things,
    judged_prompts,
    parse,
    training_prompts,
    unseen_colour,
    unseen_relation,
)
from harness.data.scenes import CELL, GLYPH, RGB, SIDE, Scenes, drawn, glyphs, scenes
from harness.errors import UsageError
from harness.metrics.following import Thing, checked

JUDGED = judged_prompts(250)
ITEMS = torch.arange(500)


def test_a_text_means_its_prompt() -> None:
    prompts = {*JUDGED, *training_prompts(6000)}
    assert [p for p in prompts if parse(p.text) != p] == []
    assert {word for p in prompts for word in p.text.split()} == set(WORDS)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("a seven", "single_object"),
        ("a seven and a circle", "two_object"),
        ("three sevens", "counting"),
        ("three blue sevens", "counting"),
        ("A red seven", "colors"),
        ("a circle left of a four", "position"),
        ("a red circle left of a green four", "position"),
        ("a red circle and a green four", "color_attr"),
    ],
)
def test_categories_are_those_of_geneval(text: str, category: str) -> None:
    assert parse(text).category == category


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not understood"),
        ("a red", "is not understood"),
        ("three seven", "is not understood"),
        ("a seven and", "is not understood"),
        ("a seven left of", "is not understood"),
        ("a red red seven", "is not understood"),
        ("a horse", "unknown word 'horse'"),
        ("a seven\n", "control characters"),
        ("a \x00 seven", "control characters"),
        ("seven " * 2000, "has 12,000 characters, but at most 1000"),
    ],
)
def test_a_bad_prompt_gets_a_sentence(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text)


def test_categories_take_turns_and_held_out_ones_are_apart() -> None:
    training = training_prompts(6000)
    assert [p.category for p in training[:12]] == [*CATEGORIES] * 2
    assert not any(p.held_out for p in training)
    assert sum(p.held_out for p in JUDGED) == 100
    assert sum(p.category == "position" and p.held_out for p in JUDGED) == 25


def test_a_relation_is_held_out_in_either_order() -> None:
    for first in range(len(OBJECTS)):
        for second in range(len(OBJECTS)):
            for there, back in ((0, 1), (2, 3)):
                assert unseen_relation(there, first, second) == unseen_relation(back, second, first)


def test_training_never_shows_a_held_out_colour() -> None:
    layout = scenes(0).train.images.layout(torch.arange(2000))  # type: ignore[union-attr]
    there = layout.objects >= 0
    pairs = zip(layout.objects[there].tolist(), layout.colours[there].tolist(), strict=True)
    shown = set(pairs)
    assert len(shown) == 60
    assert not any(unseen_colour(*pair) for pair in shown)


def things_of(made: Scenes, items: torch.Tensor) -> list[list[Thing]]:
    """What layouts say, as a perfect judge would."""
    layout = made.layout(items)
    rows = zip(
        *(x.tolist() for x in (layout.objects, layout.colours, layout.left, layout.top)),
        strict=True,
    )
    return [
        [
            Thing(thing, colour, x + GLYPH / 2, y + GLYPH / 2)
            for thing, colour, x, y in zip(*row, strict=True)
            if thing >= 0
        ]
        for row in rows
    ]


def test_every_scene_follows_its_prompt_and_no_other() -> None:
    made = Scenes(JUDGED, 5, 1000, True)
    seen = things_of(made, torch.arange(1000))
    asked = [JUDGED[number] for number in made.labels.tolist()]
    assert all(all(checked(*pair).values()) for pair in zip(asked, seen, strict=True))
    others = asked[1:] + asked[:1]  # the next prompt is of another category
    wrong = [all(checked(*pair).values()) for pair in zip(others, seen, strict=True)]
    assert sum(wrong) < 30  # a colour, or a pair, may be right by chance


def test_objects_lie_apart_in_their_quarters() -> None:
    layout = Scenes(JUDGED, 1, 500, False).layout(ITEMS)
    for place in (layout.top, layout.left):
        assert int((place % CELL).max()) == CELL - GLYPH
        assert int(place.max()) == SIDE - GLYPH
    there, cell = layout.objects >= 0, 2 * (layout.top // CELL) + layout.left // CELL
    for row, shown in zip(cell.tolist(), there.tolist(), strict=True):
        used = [c for c, s in zip(row, shown, strict=True) if s]
        assert len(set(used)) == len(used)


def test_a_scene_is_what_pasting_glyphs_by_hand_gives() -> None:
    made = Scenes(JUDGED, 2, 500, False)
    layout, images = made.layout(ITEMS[:20]), made[ITEMS[:20]]
    for i in range(20):
        canvas = torch.zeros(3, SIDE, SIDE)
        for slot in range(4):
            thing = int(layout.objects[i, slot])
            if thing < 0:
                continue
            choices = glyphs(False)[thing]
            ink = choices[int(layout.variant[i, slot] * len(choices))].float() / 255
            y, x = int(layout.top[i, slot]), int(layout.left[i, slot])
            part = canvas[:, y : y + GLYPH, x : x + GLYPH]
            part += ink * (RGB[layout.colours[i, slot]].float()[:, None, None] - part)
        torch.testing.assert_close(images[i], canvas.round() / 127.5 - 1, rtol=0, atol=0)


def test_a_scene_depends_on_its_seed_and_number_alone() -> None:
    made = Scenes(JUDGED, 3, 500, False)
    assert torch.equal(made[ITEMS][100:110], made[ITEMS[100:110]])
    assert not torch.equal(made[ITEMS[:10]], Scenes(JUDGED, 4, 500, False)[ITEMS[:10]])
    assert made.content() != Scenes(JUDGED, 4, 500, False).content()
    assert made.content() != Scenes(JUDGED[:100], 3, 500, False).content()


def test_parts_share_neither_scenes_nor_held_out_digits() -> None:
    split = scenes(0)
    assert (len(split.train), len(split.held_out), len(split.reference)) == (2**20, 5000, 20_000)
    assert split.reference is split.apart
    seven = [set(glyphs(part)[7].flatten(1).numpy().tobytes()) for part in (False, True)]
    assert seven[0] != seven[1]
    assert [len(each) for each in glyphs(False)[10:]] == [4] * 4
    contents = [part.content() for part in (split.train, split.held_out, split.reference)]
    assert len(set(contents)) == 3


def test_mirrored_scenes_are_refused() -> None:
    with pytest.raises(UsageError, match="contradicts its prompt"):
        Scenes(JUDGED, 0, 10, False).views(ITEMS[:2], torch.tensor([True, False]))


def test_an_empty_slot_draws_nothing() -> None:
    layout = Scenes((Prompt((Things(1, 3),)),), 0, 4, False).layout(ITEMS[:4])
    images = drawn(layout, False)
    assert ((images > -1).flatten(1).sum(1) <= 3 * GLYPH**2).all()
    assert ((images > -1).flatten(1).sum(1) > 0).all()


def test_relations_have_their_opposites() -> None:
    pairs = {0: (2, 9), 1: (9, 2)}
    for relation, (x, other) in pairs.items():
        prompt = Prompt((Things(1, 1), Things(1, 2)), relation)
        assert RELATIONS[relation] in prompt.text
        seen = [Thing(1, 0, x, 5), Thing(2, 0, other, 6)]
        assert all(checked(prompt, seen).values())
        assert not checked(prompt, [Thing(1, 0, other, 5), Thing(2, 0, x, 6)])["position"]
