"""When numbers are said not to compare."""

from __future__ import annotations

import pytest
import torch

from harness.metrics.caveats import floor_of_other_size, singular_covariance
from harness.records import Metric


@pytest.mark.parametrize(
    ("samples", "reference", "few"),
    [
        (5000, 2049, ""),
        (5000, 2048, "2,048 reference images"),
        (360, 5000, "360 samples"),
        (360, 1437, "360 samples and 1,437 reference images"),
    ],
)
def test_fewer_images_than_features_are_said(samples: int, reference: int, few: str) -> None:
    counts = {"samples": samples, "reference images": reference}
    found = singular_covariance("fid_inception", 2048, counts)
    said = f"fid_inception has 2,048 features but {few}: the covariance is singular, "
    assert found == (said + "so the number means little" if few else "")


def test_that_many_images_have_a_singular_covariance() -> None:
    """One more than features gives full rank."""
    for count, full in ((8, False), (9, True)):
        features = torch.randn(count, 8, generator=torch.Generator().manual_seed(0)).double()
        assert (torch.linalg.matrix_rank(torch.cov(features.t())) == 8) == full
        assert (singular_covariance("fid", 8, {"samples": count}) == "") == full


def metrics(**sizes: int) -> dict[str, Metric]:
    return {
        name: Metric(values={0: 1.0}, n=n, direction="lower", identity={})
        for name, n in sizes.items()
    }


def test_a_floor_at_another_n_is_said() -> None:
    assert floor_of_other_size(metrics(fid=360, fid_floor=360), "fid") == ""
    assert floor_of_other_size(metrics(fid=360), "fid") == ""
    said = "FID of the floor is at N = 360, samples are at N = 4,000: not comparable"
    assert floor_of_other_size(metrics(fid=4000, fid_floor=360), "fid") == f"{said}."
    both = metrics(fid=4000, fid_floor=360, fid_at_floor_n=360)
    assert floor_of_other_size(both, "fid") == (
        f"{said}; compare the floor with FID at the floor's N."
    )
