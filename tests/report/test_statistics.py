"""Intervals, paired differences and Holm's procedure against known numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from harness.records import Environment, Metric, Record
from harness.report.statistics import (
    Interval,
    crossed_interval,
    degradation_ratio,
    holm,
    metric_interval,
    p_value,
    paired_difference,
    standard_error,
    t_interval,
)

ENVIRONMENT = Environment(
    commit=None, dirty=None, code="c", python="3", packages={}, device="cpu", cpu="cpu", threads=1
)


def record(seed: int, values: dict[int, float], total_steps: int = 100) -> Record:
    metric = Metric(values=values, n=10, direction="lower", identity={})
    return Record(
        run_id=f"r{seed}", task="tiny", task_version=1, method="ard", options={},
        config={"seed": seed, "total_steps": total_steps}, target="data", hashes={},
        status="finished", metrics={"fid": metric}, environment=ENVIRONMENT,
    )  # fmt: skip


def test_an_interval_of_known_values() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees


def test_an_interval_is_scipys() -> None:
    values = [3.1, 2.7, 4.4, 3.9, 2.2]
    found = t_interval(values)
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high)
    )


def test_one_value_allows_no_interval() -> None:
    found = t_interval([5.0])
    assert found.mean == 5.0
    assert math.isnan(found.half_width)
    assert found.text(2) == "5.00"
    assert Interval(1.234, 0.567).text(1) == "1.2 ± 0.6"


def test_one_record_gives_an_interval_over_noise_sets() -> None:
    assert metric_interval(
        [record(0, {0: 1.0, 1: 2.0, 2: 3.0}, total_steps=0)], "fid"
    ) == t_interval([1.0, 2.0, 3.0])


def test_one_training_seed_gives_no_interval() -> None:
    """Noise sets say nothing of how another seed would have trained."""
    found = metric_interval([record(0, {0: 1.0, 1: 2.0, 2: 3.0})], "fid")
    assert found.mean == 2.0
    assert math.isnan(found.half_width)


def test_several_records_give_an_interval_over_seeds_crossed_with_noise_sets() -> None:
    records = [record(0, {0: 1.0, 1: 2.0, 2: 6.0}), record(1, {2: 7.0, 1: 8.0, 0: 3.0})]
    assert metric_interval(records, "fid") == crossed_interval(BY_HAND)


def test_one_noise_set_gives_an_interval_over_seeds() -> None:
    records = [record(0, {0: 2.0}), record(1, {0: 6.0}), record(2, {0: 7.0})]
    assert metric_interval(records, "fid") == t_interval([2.0, 6.0, 7.0])


BY_HAND = np.array([[1.0, 2.0, 6.0], [3.0, 8.0, 7.0]])
"""Two seeds on three noise sets: mean squares 13.5 of seeds, 10.5 of sets, 3.5 of the rest."""


def test_two_crossed_factors_by_hand() -> None:
    error, freedom = standard_error(BY_HAND)
    assert error == pytest.approx(math.sqrt((13.5 + 10.5 - 3.5) / 6))
    assert freedom == pytest.approx(20.5**2 / (13.5**2 / 1 + 10.5**2 / 2 + 3.5**2 / 2))
    found = crossed_interval(BY_HAND)
    assert found.mean == 4.5
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    assert p_value(BY_HAND) == pytest.approx(2 * stats.t.sf(4.5 / error, freedom))
    assert crossed_interval(BY_HAND.T) == found  # seeds and noise sets are treated alike


def test_a_mean_is_no_surer_than_the_rest_allows() -> None:
    """Seeds have equal means and so have noise sets: the rest alone is left."""
    values = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    error, freedom = standard_error(values)
    assert (error, freedom) == (pytest.approx(math.sqrt(4 / 2 / 6)), 2)


def test_three_equal_mean_squares_leave_the_poorest_factors_freedom() -> None:
    """Satterthwaite's 1 / (1/2 + 1/2 + 1/4) = 0.8 would make an interval ten times as wide."""
    draw = np.random.default_rng(0)
    parts = draw.standard_normal((3, 1)), draw.standard_normal((1, 3)), draw.standard_normal((3, 3))
    seeds, sets, rest = parts[0] - parts[0].mean(), parts[1] - parts[1].mean(), parts[2]
    rest = rest - rest.mean(0) - rest.mean(1, keepdims=True) + rest.mean()
    seeds, sets = (
        seeds / math.sqrt(3 * (seeds**2).sum() / 2),
        sets / math.sqrt(3 * (sets**2).sum() / 2),
    )
    error, freedom = standard_error(
        1.01 * seeds + 1.01 * sets + rest / math.sqrt((rest**2).sum() / 4)
    )
    assert error == pytest.approx(math.sqrt((2 * 1.01**2 - 1) / 9))
    assert freedom == 2


def test_factors_that_do_not_vary_leave_the_others_interval() -> None:
    """All noise sets alike within a seed: K columns say no more than one, and the reverse."""
    seeds = np.array([[1.0], [4.0], [5.5]])
    alone, repeated = crossed_interval(seeds), crossed_interval(seeds.repeat(5, axis=1))
    assert repeated.mean == pytest.approx(alone.mean)
    assert repeated.half_width == pytest.approx(alone.half_width)
    assert crossed_interval(seeds.repeat(5, axis=1).T).half_width == pytest.approx(alone.half_width)


@pytest.mark.parametrize(
    ("of_seed", "of_noise", "of_rest"),
    [(1.0, 0.05, 0.1), (0.02, 0.137, 0.02), (1.0, 1.0, 0.1), (1.0, 1.0, 1.0)],
    ids=["seeds dominate", "noise sets dominate", "both", "all three"],
)
@pytest.mark.parametrize("shape", [(3, 5), (3, 3)])
def test_intervals_cover_what_they_claim(
    shape: tuple[int, int], of_seed: float, of_noise: float, of_rest: float
) -> None:
    """95 % of the intervals of many experiments hold the true mean; a few more where parts mix."""
    draw, count = np.random.default_rng(0), 3000
    seeds, sets = shape
    values = (
        7.0
        + of_seed * draw.standard_normal((count, seeds, 1))
        + of_noise * draw.standard_normal((count, 1, sets))
        + of_rest * draw.standard_normal((count, seeds, sets))
    )
    found = [crossed_interval(matrix) for matrix in values]
    covered = np.mean([abs(one.mean - 7.0) <= one.half_width for one in found])
    assert 0.94 <= covered <= 0.985


def test_an_interval_over_seeds_alone_would_not_cover_new_noise() -> None:
    """Where noise sets vary most: the reason for crossing them."""
    draw, count = np.random.default_rng(1), 1000
    noise = 0.137 * draw.standard_normal((count, 1, 5))
    values = noise + 0.019 * draw.standard_normal((count, 3, 5))
    found = [t_interval(list(matrix.mean(1))) for matrix in values]
    assert np.mean([abs(one.mean) <= one.half_width for one in found]) < 0.5


def test_a_difference_is_paired_within_seed_and_noise_set() -> None:
    """Seeds and noise sets far apart, and a constant difference of about 1 in each pair."""
    first = [
        record(0, {0: 11.0, 1: 101.0}),
        record(1, {0: 1001.2, 1: 5001.2}),
        record(2, {0: 0.9, 1: 70.9}),
    ]
    second = [
        record(2, {0: 0.0, 1: 70.0}),
        record(0, {0: 10.0, 1: 100.0}),
        record(1, {0: 1000.0, 1: 5000.0}),
    ]
    found = paired_difference(first, second, "fid")
    assert found is not None
    assert found.seeds == 3
    assert (found.noise_sets, found.interval.mean) == (2, pytest.approx((1 + 1.2 + 0.9) / 3))
    # Both noise sets of a seed have one difference, so seeds alone vary.
    expected = stats.ttest_rel([1.0, 1.2, 0.9], [0.0, 0.0, 0.0])
    assert found.p_value == pytest.approx(expected.pvalue)
    other_way = paired_difference(second, first, "fid")
    assert other_way is not None
    assert other_way.interval.mean == pytest.approx(-found.interval.mean)
    assert other_way.p_value == pytest.approx(found.p_value)


def test_only_seeds_and_noise_sets_that_both_have_count() -> None:
    first = [record(0, {0: 2.0, 1: 50.0}), record(1, {0: 3.0}), record(5, {0: 99.0})]
    second = [record(0, {0: 1.0, 7: 9.0}), record(1, {0: 1.0}), record(6, {0: -99.0})]
    found = paired_difference(first, second, "fid")
    assert found is not None
    assert (found.seeds, found.interval.mean) == (2, 1.5)


def test_one_pair_is_no_difference() -> None:
    assert paired_difference([record(0, {0: 1.0})], [record(0, {0: 2.0})], "fid") is None
    assert (
        paired_difference(
            [record(0, {0: 1.0}), record(1, {0: 1.0})],
            [record(0, {0: 2.0}), record(2, {0: 2.0})],
            "fid",
        )
        is None
    )


def test_equal_rows_do_not_differ() -> None:
    row = [record(seed, {0: float(seed)}) for seed in range(3)]
    found = paired_difference(row, row, "fid")
    assert found is not None
    assert (found.interval.mean, found.interval.half_width, found.p_value) == (0, 0, 1)


def test_a_difference_has_the_interval_of_the_matrix_of_differences() -> None:
    first = [record(0, {0: 2.0, 1: 4.0, 2: 9.0}), record(1, {0: 5.0, 1: 11.0, 2: 11.0})]
    second = [record(0, {0: 1.0, 1: 2.0, 2: 3.0}), record(1, {0: 2.0, 1: 3.0, 2: 4.0})]
    found = paired_difference(first, second, "fid")
    assert found is not None
    assert found.interval == crossed_interval(BY_HAND)
    assert found.p_value == p_value(BY_HAND)


def test_how_much_worse_than_the_reference() -> None:
    """Seed 0: 8 over 2, seed 1: 6 over 3, after subtracting the reference within each noise set.

    By the delta method the errors are a - 2.8 b over the mean 2.5 of b, for each seed.
    """
    reference = record(0, {0: 2.0, 1: 4.0}, total_steps=0)
    first = [record(0, {0: 10.0, 1: 12.0}), record(1, {0: 8.0, 1: 10.0}), record(2, {0: 99.0})]
    second = [record(0, {0: 4.0, 1: 6.0}), record(1, {0: 5.0, 1: 7.0})]
    found = degradation_ratio(first, second, reference, "fid")
    assert found is not None
    assert found.mean == pytest.approx((8 + 6) / (2 + 3))
    errors = [(8 - 2.8 * 2) / 2.5, (6 - 2.8 * 3) / 2.5]
    assert found.half_width == pytest.approx(t_interval(errors).half_width)


def test_a_ratio_covers_the_true_one() -> None:
    """Excesses 8 and 2 over a reference of 1, with noise sets in common: the ratio is 4."""
    draw, hits = np.random.default_rng(2), 0
    for _ in range(400):
        noise = 0.1 * draw.standard_normal(4)
        rows = [
            [
                record(
                    seed, dict(enumerate(excess + 1 + noise + 0.1 * draw.standard_normal(4) + of))
                )
                for seed, of in enumerate(0.05 * excess * draw.standard_normal(4))
            ]
            for excess in (8.0, 2.0)
        ]
        reference = record(0, dict(enumerate(1 + noise)), total_steps=0)
        found = degradation_ratio(*rows, reference, "fid")
        assert found is not None
        hits += abs(found.mean - 4.0) <= found.half_width
    assert 0.92 <= hits / 400 <= 0.99


def test_no_ratio_for_what_is_better_than_the_reference() -> None:
    reference = record(0, {0: 2.0}, total_steps=0)
    assert (
        degradation_ratio([record(0, {0: 10.0})], [record(0, {0: 1.5})], reference, "fid") is None
    )
    assert (
        degradation_ratio([record(0, {0: 10.0})], [record(1, {0: 3.0})], reference, "fid") is None
    )


def test_a_ratio_is_on_the_noise_sets_that_the_reference_has_too() -> None:
    rows = [record(0, {0: 10.0, 1: 10.0})], [record(0, {0: 5.0, 1: 8.0})]
    both = degradation_ratio(*rows, record(0, {0: 2.0, 1: 2.0}, total_steps=0), "fid")
    assert both is not None
    assert both.mean == pytest.approx(8 / 4.5)
    one = degradation_ratio(*rows, record(0, {0: 2.0}, total_steps=0), "fid")
    assert one is not None
    assert one.mean == pytest.approx(8 / 3)
    assert degradation_ratio(*rows, record(0, {7: 2.0}, total_steps=0), "fid") is None


def test_holm_on_a_textbook_example() -> None:
    """0.01 <= 0.05/3, 0.005 <= 0.05/4 first; 0.03 > 0.05/2, so it and all larger ones stand."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == 0.01


def test_those_that_are_not_looked_at_belong_to_holms_family() -> None:
    assert holm([0.016, 0.024]) == 0.024
    assert holm([0.016, 0.024], unseen=1) == 0.024
    assert holm([0.016, 0.026], unseen=1) == 0.016
    assert holm([0.016, 0.024], unseen=2) == 0


def test_holm_stops_at_the_first_that_is_not_rejected() -> None:
    assert holm([0.02, 0.021, 0.022]) == 0
    assert holm([0.016, 0.024, 0.049]) == 0.049
    assert holm([0.04]) == 0.04
    assert holm([0.04, 0.04]) == 0
    assert holm([]) == 0
    assert holm([0.09], level=0.1) == 0.09
