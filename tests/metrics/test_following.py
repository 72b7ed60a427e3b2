"""Which parts of a prompt a scene follows, and what is reported of it."""

from __future__ import annotations

import math

import pytest
import torch

from harness.data.scene_prompts import COLOURS, OBJECTS, judged_prompts, parse
from harness.metrics import METRICS
from harness.metrics.following import Reading, Thing, checked, things, within_prompts
from harness.networks.detector import Found


def thing(text: str, x: float = 8, y: float = 8) -> Thing:
    """An object such as "red seven" at a place."""
    colour, name = text.split()
    return Thing(OBJECTS.index(name), COLOURS.index(colour), x, y)


@pytest.mark.parametrize(
    ("text", "seen", "wrong"),
    [
        ("a seven", ["red seven"], set()),
        ("a seven", [], {"object", "count"}),
        ("a seven", ["red seven", "red four"], {"object"}),
        ("a seven", ["red seven", "red seven"], {"count"}),
        ("three sevens", ["red seven", "blue seven", "red seven"], set()),
        ("three sevens", ["red seven", "blue seven"], {"count"}),
        ("two blue sevens", ["blue seven", "red seven"], {"color"}),
        ("a red seven", ["blue seven"], {"color"}),
        ("a seven and a four", ["red four", "red seven"], set()),
        ("a red seven and a green four", ["green seven", "red four"], {"color"}),
        ("a red seven and a green four", ["green four", "red seven"], set()),
    ],
)
def test_parts_are_told_apart(text: str, seen: list[str], wrong: set[str]) -> None:
    found = checked(parse(text), [thing(one) for one in seen])
    assert {part for part, right in found.items() if not right} - {"color"} == wrong - {"color"}
    assert (not found["color"]) == ("color" in wrong or "object" in wrong)


@pytest.mark.parametrize(
    ("relation", "first", "second"),
    [
        ("left of", (8, 8), (24, 8)),
        ("right of", (24, 8), (8, 8)),
        ("above", (8, 8), (8, 24)),
        ("below", (8, 24), (8, 8)),
    ],
)
def test_places_count_along_their_axis(
    relation: str, first: tuple[int, int], second: tuple[int, int]
) -> None:
    prompt = parse(f"a seven {relation} a four")
    right = [thing("red seven", *first), thing("red four", *second)]
    assert checked(prompt, right)["position"]
    assert not checked(prompt, [thing("red seven", *second), thing("red four", *first)])["position"]
    diagonal = [thing("red seven", 8, 8), thing("red four", 24, 24)]
    assert not checked(prompt, diagonal)["position"]
    assert not checked(prompt, right[:1])["position"]


def test_shares_are_over_the_samples_of_a_kind() -> None:
    prompts = judged_prompts(20)
    numbers = torch.arange(40) % 20
    right = [
        [Thing(prompt.things[0].object, 0, 8, 8)] if prompt.category == "single_object" else []
        for prompt in prompts
    ]
    reading = Reading(numbers, prompts, [right[number] for number in numbers.tolist()])
    assert reading.share("single_object") == 1
    assert reading.share("position") == 0
    assert reading.share(held_out=True) == 0
    assert reading.share() == pytest.approx(2 / 20)
    assert reading.share(held_out=False) == pytest.approx(2 / 12)
    assert METRICS["followed_single_object"]({"reading": reading}) == 1
    assert METRICS["prompts_followed"]({"reading": reading}) == pytest.approx(0.1)
    assert math.isnan(Reading(numbers[:1] + 1, prompts, [[]]).share("single_object"))


def test_objects_below_the_threshold_are_no_objects() -> None:
    found = Found(
        torch.tensor([[3, -1], [-1, -1]]),
        torch.tensor([[1, -1], [-1, -1]]),
        torch.tensor([[4.0, 0.0], [0.0, 0.0]]),
        torch.tensor([[9.0, 0.0], [0.0, 0.0]]),
    )
    assert things(found) == [[Thing(3, 1, 4.0, 9.0)], []]


def test_a_collapsed_student_has_no_diversity() -> None:
    numbers = torch.arange(12) % 3
    features = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_hand = torch.stack(
        [
            (features[i] - features[j]).norm()
            for k in range(3)
            for i in range(12)
            for j in range(i)
            if int(numbers[i]) == int(numbers[j]) == k
        ]
    ).mean()
    assert within_prompts(features, numbers) == pytest.approx(float(by_hand))
    collapsed = torch.eye(3, 5, dtype=torch.float64)[numbers]
    assert within_prompts(collapsed, numbers) == 0
    assert math.isnan(within_prompts(features[:3], numbers[:3]))
