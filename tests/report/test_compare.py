"""Comparisons at equal cost, from records that are written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest
from written import METHODS, field, record, trained

from harness.records import Milestone, Record
from harness.report.agreement import agreement_table, known_as, rank_correlation
from harness.report.compare import (
    ABOVE,
    against_best_table,
    at_images,
    by_setting,
    equal_compute,
    equal_compute_table,
    equal_images_table,
    trained_once,
)
from harness.report.markdown import page
from harness.report.plots import Line, passes_lines
from harness.report.rows import rows_of
from harness.report.task_report import TaskReport, reports_of
from harness.tasks import load_task

SEEDS = "seeds × noise sets"


def report(records: Sequence[Record]) -> TaskReport:
    return TaskReport.of(records)


def equal_compute_of(records: Sequence[Record]) -> pd.DataFrame:
    return equal_compute_table(report(records).equal, report(records).headline)


def equal_images_of(records: Sequence[Record]) -> pd.DataFrame:
    return equal_images_table(report(records).equal, report(records).headline)


def against_best_of(records: Sequence[Record]) -> pd.DataFrame:
    found = report(records)
    return against_best_table(found.with_best, found.headline, found.largest_p)


def by_passes(records: Sequence[Record]) -> list[Line]:
    return passes_lines(report(records).finished, report(records).equal, "fid")


def agreement_of(**records: Sequence[Record]) -> pd.DataFrame:
    """By name of a task, with _ for -."""
    by_task = {task.replace("_", "-"): found for task, found in records.items()}
    return agreement_table(
        {
            task: report([one.model_copy(update={"task": task}) for one in found]).equal
            for task, found in by_task.items()
        }
    )


def test_rows_of_another_budget_are_left_out() -> None:
    others = [
        trained("dmd2", 1.0, flops=3e12),
        trained("ctm", 1.0, flops=6.4e12),
        record("teacher", steps=0),
    ]
    rows = equal_compute(rows_of([*field(flops=6.04e12), *others]))
    assert sorted(row.records[0].method for row in rows) == sorted(METHODS)


def test_a_budget_that_a_few_long_steps_do_not_use_up_is_the_same_budget() -> None:
    """With trajectories of 1e12, 7.10e12 and 7.04e12 would round to two numbers of two digits."""
    records = [
        *field(flops=6.10e12),
        trained("dmd2", 1.0, flops=6.04e12),
        trained("ctm", 1.0, flops=5.9e12),
    ]
    assert sorted(row.records[0].method for row in equal_compute(rows_of(records))) == sorted(
        [*METHODS, "dmd2"]
    )


def test_the_table_has_a_column_for_each_number_of_steps_and_the_bill_for_all() -> None:
    one = [trained(method, 9.2 - number, num_steps=1) for number, method in enumerate(METHODS)]
    table = equal_compute_of([*field(), *one]).set_index("method")
    assert list(table.index) == [
        "ect",
        "imm",
        "ict",
        "shortcut",
        "lcm",
        "reflow",
    ]  # sorted by the best of both columns
    assert table.loc["ect", "FID ↓, 4 steps"] == "2.50"
    assert table.loc["ect", "FID ↓, 1 step"] == "9.70"
    bills = table["training TFLOPs for all its columns"]
    assert bills["ect"] == "7.02"
    assert bills["reflow"] == "13"  # one store of trajectories serves both students
    assert table["training seconds"].to_dict() == {
        method: "14" if method in ("reflow",) else "7" for method in table.index
    }
    assert set(table["target"]) == {"guided teacher"}


def test_failed_seeds_and_methods_are_seen() -> None:
    def failed(method: str, seed: int) -> Record:
        return trained(method, 9.0, seed=seed).model_copy(
            update={"status": "failed", "reason": "nan", "metrics": {}, "cost": None}
        )

    some = [made for made in field() if made.method != "ict"]
    text = page(
        reports_of(
            [
                *some,
                *(failed("ict", seed) for seed in (0, 1)),
                *(failed("ect", seed) for seed in (1, 2)),
            ]
        )
    )
    table = equal_compute_of([*some, failed("ect", 1), failed("ect", 2)]).set_index("method")
    assert table["seeds"].to_dict() == {
        "ect": "1 of 3",
        "imm": "1",
        "lcm": "1",
        "reflow": "1",
        "shortcut": "1",
    }
    assert "Failed, and in no comparison: ict, 4 steps (nan)" in text
    beside = [
        trained(method, 3.0 + number, seed=seed)
        for number, method in enumerate(METHODS)
        for seed in (0, 1)
    ]
    assert "ect" not in set(against_best_of([*beside, failed("ect", 2)])["method"])
    images = equal_images_of([*beside, failed("ect", 2)]).set_index("method")
    assert "not measured: a seed diverged" in set(images.loc["ect"])
    of_all = equal_compute_of([*beside, failed("ect", 2)]).set_index("method")
    assert (
        of_all.loc["ect", "FID ↓, 4 steps"] == "1 of 3 seeds diverged: failed (others 3.50, 3.50)"
    )
    assert of_all.index[-1] == "ect"  # the best of the others, but not ranked among them


def test_settings_with_one_label_have_a_line_each() -> None:
    """Another batch size, or as many FLOPs in other steps."""
    smaller = trained("lcm", 1.0, steps=200)
    smaller = smaller.model_copy(update={"config": {**smaller.config, "batch_size": 32}})
    one_step = trained("lcm", 8.0, num_steps=1)
    rows = rows_of([*field(), one_step, smaller, trained("ect", 1.5, steps=101)])
    table = equal_compute_table(equal_compute(rows), "fid").set_index("method")
    assert len(table) == len(METHODS) + 2
    several = "lcm (100 × 64, 2 noise sets)"
    assert (table.loc[several, "FID ↓, 4 steps"], table.loc[several, "FID ↓, 1 step"]) == (
        "5.50",
        "8.50",
    )
    assert table.loc["lcm (200 × 32, 2 noise sets)", "FID ↓, 4 steps"] == "1.50"
    assert table.loc["ect (101 × 64, 2 noise sets)", "FID ↓, 4 steps"] == "2.00"
    assert [(line.label, line.y) for line in passes_lines(rows, equal_compute(rows), "fid")] == [
        (several, [8.5, 5.5])
    ]


def test_students_for_all_numbers_of_steps_are_apart_by_their_training() -> None:
    """LCM is trained once: 101 steps serve both numbers of steps, and 100 steps serve one."""
    rows = rows_of(
        [*field(), trained("lcm", 8.0, num_steps=1, steps=101), trained("lcm", 4.0, steps=101)]
    )
    long, short = "lcm (101 × 64, 2 noise sets)", "lcm (100 × 64, 2 noise sets)"
    assert {
        label: len(found) for label, found in by_setting(rows).items() if label.startswith("lcm")
    } == {short: 1, long: 2}
    table = equal_compute_table(equal_compute(rows), "fid").set_index("method")
    assert (table.loc[long, "FID ↓, 4 steps"], table.loc[long, "FID ↓, 1 step"]) == ("4.50", "8.50")
    assert (
        table.loc[long, "training TFLOPs for all its columns"]
        == table.loc[short, "training TFLOPs for all its columns"]
        == "7.02"
    )
    assert [(line.label, line.y) for line in passes_lines(rows, equal_compute(rows), "fid")] == [
        (long, [8.5, 4.5])
    ]
    each = rows_of(
        [
            *field(),
            trained("reflow", 8.0, num_steps=1, steps=101),
            trained("reflow", 9.0, steps=101),
        ]
    )
    names = [label for label in by_setting(each) if label.startswith("reflow")]
    assert names == ["reflow (101 × 64, 100 × 64, 2 noise sets)", "reflow (101 × 64, 2 noise sets)"]


def test_the_teachers_line_holds_all_its_steps() -> None:
    """Whatever the noise sets are; the record with most of them counts."""
    free = [record("teacher", steps=0, num_steps=n) for n in (4, 24)]
    more = free[0].model_copy(
        update={"run_id": "more", "config": {**free[0].config, "noise_sets": 3}}
    )
    lines = {line.label: line.x for line in by_passes([*field(), free[1], more])}
    assert lines["teacher"] == [4, 24]
    found = by_setting(rows_of([*free, more]))
    assert {
        name: [(row.num_steps, row.records[0].config["noise_sets"]) for row in rows]
        for name, rows in found.items()
    } == {
        "teacher (3 noise sets, 2 noise sets)": [(4, 3), (24, 2)],
        "teacher (2 noise sets)": [(4, 2)],
    }


def test_options_of_another_version_are_no_error() -> None:
    assert not trained_once(trained("lcm", 1.0).model_copy(update={"options": {"a later one": 1}}))


def test_a_table_needs_a_field() -> None:
    assert len(equal_compute_of(field()[:3])) == 0
    assert len(equal_images_of(field()[:3])) == 0
    assert "equal training FLOPs" not in page(reports_of(field()[:3]))
    assert "equal training FLOPs" in page(reports_of(field()))


def steady(spread: float, methods: Sequence[str] = METHODS, **changes: Any) -> list[Record]:
    """The n-th method has n more than the first, for all seeds but for n times a spread."""
    return [
        trained(method, 3.0 + seed + number * (1 + (seed - 1) * spread), seed=seed, **changes)
        for number, method in enumerate(methods) for seed in range(3)
    ]  # fmt: skip


def test_rows_are_beside_the_best_of_their_number_of_steps() -> None:
    other_budget = steady(0.0, ["ctm"], flops=3e12, num_steps=1)
    alone_in_its_column = steady(0.0, ["ctm"], num_steps=8)
    records = [*steady(0.05), *steady(0.05, num_steps=1), *other_budget, *alone_in_its_column]
    lines = against_best_of(records).to_dict("records")
    assert [(line["steps"], line["method"]) for line in lines] == [
        (steps, method) for steps in "14" for method in METHODS
    ]
    assert [line[ABOVE] for line in lines] == [
        "the best",
        *(f"{n}.00 ± {n * 0.05 * 4.303 / 3**0.5:.2f}" for n in range(1, 6)),
    ] * 2
    assert [line["not the best (Holm, 95 %)"] for line in lines] == ["", *["shown"] * 5] * 2
    assert {(line["training"], line[SEEDS]) for line in lines if line[SEEDS]} == {
        ("100 × 64", "3 × 2")
    }


def test_which_is_best_is_by_all_seeds() -> None:
    wobble = (-2.0, 1.0, 4.0)  # by seed 0 alone the order is turned round
    records = [
        trained(method, 20.0 + n * wobble[seed], seed=seed)
        for n, method in enumerate(METHODS)
        for seed in range(3)
    ]
    lines = against_best_of(records).to_dict("records")
    assert [line["method"] for line in lines] == list(METHODS)
    assert lines[1][ABOVE].startswith("1.00 ± ")
    assert {line["not the best (Holm, 95 %)"] for line in lines} == {"", "not shown"}


@pytest.mark.parametrize(("spread", "p", "shown"), [(0.05, 0.00083, True), (0.16, 0.0084, False)])
def test_all_p_values_of_the_page_are_in_one_family(spread: float, p: float, shown: bool) -> None:
    """Of two methods 2 p values are printed, of six 5 beside the best and 15 of pairs."""
    (_, alone) = against_best_of(steady(spread, METHODS[:2]) + field()[2:]).to_dict("records")
    assert (alone["method"], float(alone["p"])) == (METHODS[1], pytest.approx(p, rel=0.05))
    assert alone["not the best (Holm, 95 %)"] == "shown"
    among = steady(spread)
    assert report(among).largest_p == (pytest.approx(p, rel=0.05) if shown else 0)
    assert len(report(among).p_values) == 20
    assert {
        line["not the best (Holm, 95 %)"] for line in against_best_of(among).to_dict("records")[1:]
    } == {"shown" if shown else "not shown"}


def test_a_row_that_is_better_where_both_have_seeds_is_not_shown_to_be_worse() -> None:
    long = [
        trained("ctm", fid, seed=seed) for seed, fid in enumerate((6.0, 6.1, 6.05, 1.0, 1.0, 1.0))
    ]
    short = [trained("dmd2", fid, seed=seed) for seed, fid in enumerate((5.0, 5.12, 5.04))]
    (_, line) = against_best_of([*field(), *long, *short]).to_dict("records")
    assert (line["method"], line["not the best (Holm, 95 %)"]) == ("dmd2", "not shown")
    assert line[ABOVE].startswith("-1.00")


def test_rows_need_two_finished_seeds_in_common() -> None:
    assert against_best_of(field()).empty
    apart = [trained("ctm", 99.0, seed=seed) for seed in (2, 3)]
    once = trained("dmd2", 99.0)
    failed = trained("dmd2", 99.0, seed=1).model_copy(
        update={"status": "failed", "reason": "loss nan", "metrics": {}, "cost": None}
    )
    table = against_best_of([*steady(0.05), *apart, once, failed]).set_index("method")
    assert table.loc["ctm", ABOVE] == "fewer than two seeds in common"
    assert not any("dmd2" in method for method in table.index)
    assert float(table.loc[METHODS[1], "p"]) == pytest.approx(0.00083, rel=0.02)


def test_the_headline_is_the_task_s() -> None:
    records = [
        made.model_copy(
            update={
                "metrics": {
                    "frechet_distance": made.metrics["fid"].model_copy(update={"identity": {}})
                }
            }
        )
        for made in steady(0.0)
    ]
    assert against_best_of(records).iloc[1][ABOVE] == "1.0000 ± 0.0000"


def test_pages_have_the_table_where_there_are_seeds() -> None:
    assert "not the best" not in page(reports_of(field()))
    assert "not the best" in page(reports_of(steady(0.05)))


def test_between_two_points_a_curve_is_a_power() -> None:
    points = [
        Milestone(step=1, images=n, flops=1.0, quality={"fid": 640 / n}) for n in (100, 200, 800)
    ]
    assert at_images(points, "fid", 200) == pytest.approx(3.2)
    assert at_images(points, "fid", 400) == pytest.approx(1.6)
    assert at_images(points, "fid", 141) == pytest.approx(640 / 141)
    zero = [Milestone(step=1, images=n, flops=1.0, quality={"fid": 0.0}) for n in (100, 200)]
    assert at_images(zero, "fid", 150) == 0
    for outside in (99, 801):
        with pytest.raises(ValueError, match="outside the curve"):
            at_images(points, "fid", outside)


def test_equal_images_are_those_of_the_shortest_run() -> None:
    short = trained("dmd2", 5.0, steps=50)
    table = equal_images_of([*field(), short]).set_index("method")
    column = "FID ↓ after 3,200 images"
    assert table.loc["dmd2", column] == "5.00"
    assert table.loc["ect", column] == "4.00"
    assert table.loc["ect", "part of its run"] == "0.50"
    assert list(table.index)[:2] == ["ect", "dmd2"]


def test_what_has_no_curve_at_its_steps_is_named() -> None:
    shared = [
        trained("dmd2", 1.0, num_steps=steps).model_copy(
            update={"milestones": [], "trained_in": "dmd2-1"}
        )
        for steps in (2, 4)
    ]
    long = trained("ctm", 1.0, steps=2000)
    table = equal_images_of([*field(), *shared, long]).set_index("method")
    column = "FID ↓ after 6,400 images"
    assert (
        table.loc["dmd2", column] == "not measured: its curve was taken at another number of steps"
    )
    assert table.loc["dmd2", "steps"] == "2, 4"
    assert table.loc["ctm", column] == "not measured: its curve begins later"


def test_one_student_for_all_numbers_of_steps_is_billed_once() -> None:
    pair = [trained("imm", 1.0, num_steps=n) for n in (1, 4)]  # both trained, as two processes may
    apart = [trained("reflow", 1.0, num_steps=n) for n in (1, 4)]
    others = [made for made in field() if made.method not in ("imm", "reflow")]
    table = equal_compute_of([*others, trained("dmd2", 3.0), *pair, *apart]).set_index("method")
    assert table.loc["imm", "training TFLOPs for all its columns"] == "7.02"
    assert table.loc["reflow", "training TFLOPs for all its columns"] == "13"


def test_tasks_agree_or_not() -> None:
    fids = {method: 2.0 + number for number, method in enumerate(METHODS)}
    same = {method: math.exp(value) for method, value in fids.items()}
    turned = {method: -value for method, value in fids.items()}
    for other, expected in ((same, "1.00"), (turned, "-1.00")):
        table = agreement_of(one=field(fids), two=field(other, flops=4e11))
        (line,) = table.to_dict("records")
        assert (line["tasks"], line["steps"], line["methods"], line["rank correlation"]) == (
            "one and two",
            "4",
            "6",
            expected,
        )
    assert len(agreement_of(one=field(), two=field()[:4])) == 0


def test_a_rank_correlation_is_spearmans_and_has_no_p() -> None:
    assert rank_correlation([1, 2, 3, 4, 5], [2.0, 3.0, 5.0, 7.0, 9.0]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5]) == pytest.approx(
        1 - 6 * 6 / 210
    )
    assert "p" not in agreement_of(one=field(), two=field())
    (line,) = agreement_of(one=field(), two=field(dict.fromkeys(METHODS, 2.0))).to_dict("records")
    assert line["rank correlation"] == "undefined: all are equal on one"


@pytest.mark.parametrize("layers", [2, 5, 8])
def test_of_rows_that_are_known_by_one_name_the_plainest_counts(layers: int) -> None:
    """ARD's default is the worst on both tasks; other layers on one would be the best."""
    fids = {method: 2.0 + number for number, method in enumerate(METHODS)} | {"ard": 50.0}
    other = trained("ard", 0.1).model_copy(
        update={"run_id": "other", "options": {"history_layers": layers}}
    )
    for found in ([*field(fids), other], [other, *field(fids)]):
        (line,) = agreement_of(one=found, two=field(fids)).to_dict("records")
        assert line["rank correlation"] == "1.00"


def test_the_plainest_is_what_the_task_runs() -> None:
    """The task's own number of layers, not the method's."""
    fids = {method: 2.0 + number for number, method in enumerate(METHODS)} | {"ard": 0.1}
    (layers,) = load_task("fashion-mnist").spec.defaults["ard"].values()
    own = trained("ard", 50.0).model_copy(
        update={"run_id": "own", "options": {"history_layers": layers}}
    )
    for found in ([*field(fids), own], [own, *field(fids)]):
        (line,) = agreement_of(fashion_mnist=found, two=field({**fids, "ard": 50.0})).to_dict(
            "records"
        )
        assert line["rank correlation"] == "1.00"


def test_a_row_is_known_on_another_task_without_what_suits_a_network() -> None:
    def known(**options: Any) -> str:
        (row,) = rows_of([trained("ard", 1.0).model_copy(update={"options": options})])
        return known_as(row)

    assert known(history_layers=6) == known(history_layers=4)
    assert known(history_layers=6, heads="per_step") != known(history_layers=6)


def test_what_was_tuned_on_a_task_does_not_hide_a_method_from_another() -> None:
    def known(task: str, **options: Any) -> str:
        changes = {"task": task, "options": options}
        (row,) = rows_of([trained("ctm", 1.0).model_copy(update=changes)])
        return known_as(row)

    elsewhere, tuned = known("tiny"), load_task("digits").spec.defaults["ctm"]
    assert known("digits", **tuned) == elsewhere
    assert known("digits") != elsewhere  # not what its task runs it with
    assert known("digits", **{**tuned, "lr": 0.02}) != elsewhere
    assert known("digits", **tuned, init="random") != elsewhere


def test_columns_with_other_numbers_of_seeds_say_so() -> None:
    more = [
        trained("imm", 3.0, num_steps=steps, seed=seed) for steps, seed in ((1, 0), (4, 1), (4, 2))
    ]
    others = [made for made in field() if made.method != "imm"]
    table = equal_compute_of([*others, *more]).set_index("method")
    assert table.loc["imm", "seeds"] == "1, 2"
    assert set(table.drop(index="imm")["seeds"]) == {"1"}


def test_rows_of_equal_student_flops_differ_by_their_trajectories() -> None:
    """6.02e12 each; one learns from no trajectories, so it has a smaller total."""
    less = trained("ctm", 1.0)
    assert less.cost is not None
    assert less.cost.training is not None
    bill = less.cost.training.model_copy(update={"trajectory_flops": 0.0})
    cost = less.cost.model_copy(update={"training": bill})
    rows = rows_of([*field(), less.model_copy(update={"cost": cost})])
    assert sorted(row.records[0].method for row in equal_compute(rows)) == sorted(METHODS)


def test_what_learns_unguided_data_is_not_ranked_under_a_guided_teacher() -> None:
    def on(task: str) -> list[Record]:
        made = steady(0.05, [*METHODS, "ctm"], task=task)
        return [
            one.model_copy(update={"target": "data"}) if one.method == "ect" else one
            for one in made
        ]

    guided, plain = report(on("digits-guided")), report(on("digits-flow"))
    assert load_task("digits-guided").spec.guidance.scale != 1
    assert {row.label for row in plain.equal} - {row.label for row in guided.equal} == {"ect"}
    assert not any("ect" in (pair.first.label, pair.second.label) for pair in guided.pairs[0])
    named = "these learn the data without guidance: ect."
    assert page([guided]).count(named) == 2
    assert "ect" in set(guided.results["method"])
    assert named not in page([plain])


def test_trials_stand_in_no_table_but_their_own() -> None:
    def trial(record: Record) -> Record:
        config = {**record.config, "purpose": "tune"}
        return record.model_copy(update={"config": config, "run_id": f"{record.run_id}-tune"})

    evaluated = [
        one.model_copy(update={"config": {**one.config, "purpose": "evaluate"}}) for one in field()
    ]
    trials = [trial(one) for one in field()]
    assert {row.label: len(row.records) for row in rows_of([*evaluated, *trials])} == dict.fromkeys(
        METHODS, 1
    )
    assert not any(
        record.run_id.endswith("tune")
        for row in rows_of([*trials, *field()])
        for record in row.records
    )
    assert len(rows_of(trials)) == len(METHODS)
    assert "These runs are a search's trials" in page([report(trials)])
    assert "a search's trials" not in page([report([*evaluated, *trials])])
