"""Intervals, paired differences and Holm's procedure against known numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from harness.records import Environment, Metric, Record
from harness.report.statistics import Interval, degradation_ratio, holm, metric_interval, paired_difference, t_interval

ENVIRONMENT = Environment(commit=None, dirty=None, code="c", python="3", packages={}, device="cpu", cpu="cpu", threads=1)


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
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))


def test_one_value_allows_no_interval() -> None:
    found = t_interval([5.0])
    assert found.mean == 5.0
    assert math.isnan(found.half_width)
    assert found.text(2) == "5.00"
    assert Interval(1.234, 0.567).text(1) == "1.2 ± 0.6"


def test_one_record_gives_an_interval_over_noise_sets() -> None:
    assert metric_interval([record(0, {0: 1.0, 1: 2.0, 2: 3.0}, total_steps=0)], "fid") == t_interval([1.0, 2.0, 3.0])


def test_one_training_seed_gives_no_interval() -> None:
    """Noise sets say nothing of how another seed would have trained."""
    found = metric_interval([record(0, {0: 1.0, 1: 2.0, 2: 3.0})], "fid")
    assert found.mean == 2.0
    assert math.isnan(found.half_width)


def test_several_records_give_an_interval_over_seeds() -> None:
    records = [record(0, {0: 1.0, 1: 3.0}), record(1, {0: 5.0, 1: 7.0})]
    assert metric_interval(records, "fid") == t_interval([2.0, 6.0])


def test_a_difference_is_paired_within_seed_and_noise_set() -> None:
    """Seeds and noise sets far apart, and a constant difference of about 1 in each pair."""
    first = [record(0, {0: 11.0, 1: 101.0}), record(1, {0: 1001.2, 1: 5001.2}), record(2, {0: 0.9, 1: 70.9})]
    second = [record(2, {0: 0.0, 1: 70.0}), record(0, {0: 10.0, 1: 100.0}), record(1, {0: 1000.0, 1: 5000.0})]
    found = paired_difference(first, second, "fid")
    assert found is not None
    assert found.seeds == 3
    assert found.interval.mean == pytest.approx((1 + 1.2 + 0.9) / 3)
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
    assert paired_difference([record(0, {0: 1.0}), record(1, {0: 1.0})], [record(0, {0: 2.0}), record(2, {0: 2.0})], "fid") is None


def test_equal_rows_do_not_differ() -> None:
    row = [record(seed, {0: float(seed)}) for seed in range(3)]
    found = paired_difference(row, row, "fid")
    assert found is not None
    assert (found.interval.mean, found.interval.half_width, found.p_value) == (0, 0, 1)


def test_how_much_worse_than_the_reference() -> None:
    """Seed 0: 8 over 2, seed 1: 6 over 3, after subtracting the reference within each noise set."""
    reference = record(0, {0: 2.0, 1: 4.0}, total_steps=0)
    first = [record(0, {0: 10.0, 1: 12.0}), record(1, {0: 8.0, 1: 10.0}), record(2, {0: 99.0})]
    second = [record(0, {0: 4.0, 1: 6.0}), record(1, {0: 5.0, 1: 7.0})]
    found = degradation_ratio(first, second, reference, "fid")
    assert found is not None
    assert found.mean == pytest.approx((8 / 2 + 6 / 3) / 2)
    assert found.half_width == pytest.approx(t_interval([4.0, 2.0]).half_width)


def test_no_ratio_for_what_is_better_than_the_reference() -> None:
    reference = record(0, {0: 2.0}, total_steps=0)
    assert degradation_ratio([record(0, {0: 10.0})], [record(0, {0: 1.5})], reference, "fid") is None
    assert degradation_ratio([record(0, {0: 10.0})], [record(1, {0: 3.0})], reference, "fid") is None


def test_holm_on_a_textbook_example() -> None:
    """0.01 <= 0.05/4; 0.005 first; 0.03 > 0.05/2, so it and all larger ones stand."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]


def test_no_ratio_on_other_noise_sets_than_the_references() -> None:
    rows = [record(0, {0: 10.0, 1: 10.0})], [record(0, {0: 5.0, 1: 8.0})]
    both = degradation_ratio(*rows, record(0, {0: 2.0, 1: 2.0}, total_steps=0), "fid")
    assert both is not None
    assert both.mean == pytest.approx(8 / 4.5)
    assert degradation_ratio(*rows, record(0, {0: 2.0}, total_steps=0), "fid") is None


def test_those_that_are_not_looked_at_belong_to_holms_family() -> None:
    assert holm([0.016, 0.024]) == [True, True]
    assert holm([0.016, 0.024], unseen=1) == [True, True]
    assert holm([0.016, 0.026], unseen=1) == [True, False]
    assert holm([0.016, 0.024], unseen=2) == [False, False]


def test_holm_stops_at_the_first_that_is_not_rejected() -> None:
    assert holm([0.02, 0.021, 0.022]) == [False, False, False]
    assert holm([0.016, 0.024, 0.049]) == [True, True, True]
    assert holm([0.04]) == [True]
    assert holm([0.04, 0.04]) == [False, False]
    assert holm([]) == []
    assert holm([0.09], level=0.1) == [True]
