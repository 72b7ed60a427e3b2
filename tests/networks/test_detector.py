"""The detector of scenes: marks of centres, and the objects that follow from logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.networks.detector import MOST, Detector, marks


class Told(Detector):
    """A detector whose logits are given."""

    logits: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def told(centres: list[tuple[float, float]]) -> Told:
    """One image with objects 0, 1, ... of colours 1, 0, 1, ... at pixels (x, y)."""
    network = Told((3, 32, 32), 5, 2)
    x, y = (torch.tensor([[c[k] for c in centres]]) for k in (0, 1))
    each = marks(x, y, torch.ones(1, len(centres), dtype=torch.bool), 8, 8)
    mark, owner = each.max(1)
    objects = torch.nn.functional.one_hot(owner, 5).movedim(3, 1).float()
    colours = torch.nn.functional.one_hot(1 - owner % 2, 2).movedim(3, 1).float()
    clamped = mark.clamp(1e-6, 1 - 1e-6)
    network.logits = torch.cat([(clamped / (1 - clamped)).log()[:, None], objects, colours], 1)
    return network


def test_a_mark_is_one_at_its_centre_and_falls_with_distance() -> None:
    x, y = torch.tensor([[6.0, 20.0]]), torch.tensor([[10.0, 14.0]])
    found = marks(x, y, torch.tensor([[True, False]]), 8, 8)
    assert found[0, 0, 2, 1] == 1
    assert float(found[0, 0, 2, 2]) == pytest.approx(torch.exp(torch.tensor(-1 / 1.28)).item())
    assert not found[0, 1].any()


@pytest.mark.parametrize(
    "centres",
    [
        [(6, 6)],
        [(6, 6), (24, 8), (9, 25), (26, 26)],
        [(8, 8), (20, 8)],  # on corners of cells, where four marks are equal
        [(6, 12), (18, 12), (12, 24)],
    ],
)
def test_objects_are_found_once_where_they_are(centres: list[tuple[float, float]]) -> None:
    found = told(centres).find(torch.zeros(1, 3, 32, 32))
    number = len(centres)
    assert sorted(found.objects[0].tolist()) == [*[-1] * (MOST - number), *range(number)]
    for place, name in enumerate(found.objects[0].tolist()):
        if name >= 0:
            assert found.colours[0, place] == 1 - name % 2
            assert abs(float(found.x[0, place]) - centres[name][0]) < 1
            assert abs(float(found.y[0, place]) - centres[name][1]) < 1


def test_an_empty_canvas_holds_nothing() -> None:
    network = told([(6, 6)])
    network.logits[:, 0] = -5
    assert (network.find(torch.zeros(1, 3, 32, 32)).objects == -1).all()


def test_features_and_logits_come_from_the_same_body() -> None:
    network = Detector((3, 32, 32), 14, 5)
    images = torch.rand(2, 3, 32, 32)
    cells = network.body(images)
    torch.testing.assert_close(network.features(images), cells.flatten(2).mean(2))
    torch.testing.assert_close(network(images), network.head(cells))
