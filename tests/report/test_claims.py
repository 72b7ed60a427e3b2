"""Claims beside reproductions: what counts as one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from written import metric, record

from harness.errors import UsageError
from harness.records import Record
from harness.report.claims import Claim, claims_table, measured, read_claims, verdict
from harness.report.rows import load_records
from harness.report.statistics import Interval
from harness.runs.config import parse_config
from harness.runs.identity import all_options, run_settings
from harness.runs.resolve import resolve

ROOT = Path(__file__).parent.parent.parent
RATIO = {
    "quantity": "degradation_ratio",
    "first": {"task": "digits", "method": "step-distillation", "budget": "table"},
    "second": {"task": "digits", "method": "ard", "budget": "table"},
}


def claim(**changes: Any) -> Claim:
    return Claim.model_validate(
        {
            "says": "s",
            "source": "p",
            "protocol": "q",
            "published": 5.0,
            "here": RATIO,
            "holds": {"above": 1},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("holds", "mean", "half_width", "expected"),
    [
        ({"above": 1}, 6.0, 0.3, "reproduced in direction"),
        ({"above": 1}, 0.5, 0.3, "not reproduced"),
        ({"above": 1}, 1.2, 0.3, "not shown"),
        ({"above": 1}, 6.0, math.nan, "not shown"),
        ({"below": 0}, -1.0, 0.5, "reproduced in direction"),
        ({"below": 0}, 1.0, 0.5, "not reproduced"),
        ({"below": 0}, -0.3, 0.5, "not shown"),
        ({"within": 0.1}, 5.1, 0.2, "reproduced"),
        ({"within": 0.1}, 6.1, 0.2, "not reproduced"),
        ({"within": 0.1}, 5.4, 0.2, "not shown"),
    ],
)
def test_verdicts(holds: dict[str, float], mean: float, half_width: float, expected: str) -> None:
    assert verdict(claim(holds=holds), Interval(mean, half_width)) == expected


def finished(method: str, fid: float, seed: int, **more: Any) -> Record:
    """A finished record with the settings of a config."""
    resolved = resolve(
        parse_config({"task": "digits", "method": method, "budget": "table", "seed": seed, **more})
    )
    made = record(method, seed=seed, fid=fid).model_copy(
        update={
            "task": "digits",
            "method": resolved.method,
            "config": run_settings(resolved),
            "options": resolved.config.model_dump(mode="json"),
        }
    )
    metrics = {
        "fid": metric("fid", {0: fid, 1: fid + 1}),
        "distance_to_teacher": metric(
            "distance_to_teacher", {0: 0.0 if method == "teacher" else 0.3}
        ),
    }
    assert all_options(made) == made.options
    return made.model_copy(update={"metrics": metrics})


TEACHER = finished("teacher", 2.0, 0, num_steps=24)


def test_a_ratio_is_that_of_the_excesses_over_the_teacher() -> None:
    records = [
        TEACHER,
        *(finished("step-distillation", 12.0 + seed, seed) for seed in (0, 1)),
        *(finished("ard", 4.0, seed) for seed in (0, 1)),
    ]
    found = measured(claim(), records)
    assert found is not None
    assert found[0].mean == pytest.approx((10 / 2 + 11 / 2) / 2)
    assert found[1] == "digits, 4 steps, 2 seeds"
    assert measured(claim(), records[1:]) is None
    assert measured(claim(), records[:3]) is None


def test_one_seed_measured_twice_is_one_seed() -> None:
    here = {
        "quantity": "difference",
        "first": RATIO["second"],
        "second": {"task": "digits", "method": "teacher", "num_steps": 24, "budget": "table"},
    }
    again = finished("ard", 4.0, 0).model_copy(update={"run_id": "again"})
    found = measured(claim(here=here), [TEACHER, finished("ard", 4.0, 0), again])
    assert found is not None
    assert math.isnan(found[0].half_width)
    assert found[1] == "digits, 4 steps, 1 seed"


def test_every_seed_counts() -> None:
    records = [
        TEACHER,
        *(
            finished(method, fid, seed)
            for method, fid in (("step-distillation", 12.0), ("ard", 4.0))
            for seed in (3, 17)
        ),
    ]
    found = measured(claim(), records)
    assert found is not None
    assert found[1] == "digits, 4 steps, 2 seeds"


def test_a_difference_from_a_run_without_training_is_over_its_noise_sets() -> None:
    here = {
        "quantity": "difference",
        "first": RATIO["second"],
        "second": {"task": "digits", "method": "teacher", "num_steps": 24, "budget": "table"},
    }
    found = measured(claim(here=here), [TEACHER, finished("ard", 4.0, 0), finished("ard", 6.0, 1)])
    assert found is not None
    assert found[0].mean == pytest.approx(3.0)
    assert found[0].half_width > 1


def test_the_papers_cost_is_counted() -> None:
    (line,) = claims_table(
        [
            c
            for c in read_claims(ROOT / "baselines" / "claims.yaml")
            if c.here and c.here["quantity"] == "macs_ratio"
        ],
        [],
    ).to_dict("records")
    assert line["verdict"] == "reproduced"
    assert line["here"] == "1.011"


def test_what_is_not_there_is_not_run() -> None:
    lines = claims_table([claim(here=None, needs="a GPU"), claim()], []).to_dict("records")
    assert [line["verdict"] for line in lines] == [
        "not run: a GPU",
        "not run: its runs are not finished",
    ]


def test_our_claims_say_where_they_are_from() -> None:
    claims = read_claims(ROOT / "baselines" / "claims.yaml")
    assert len(claims) > 10
    assert all(c.here is not None or c.needs for c in claims)
    table = claims_table(claims, load_records(ROOT / "results"))
    assert "reproduced" in set(table["verdict"])


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"claims": [{"says": "only"}]}))
    with pytest.raises(UsageError, match="is broken"):
        read_claims(tmp_path / "c.yaml")
    wrong = {**RATIO, "quantity": "ratio"}
    with pytest.raises(UsageError, match="quantity is 'ratio'"):
        measured(
            claim(here=wrong),
            [TEACHER, finished("step-distillation", 12.0, 0), finished("ard", 4.0, 0)],
        )
