"""Tables from records that are written by hand: rows, refusals, failures, differences."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats
from written import ENVIRONMENT, metric, record

from harness.errors import UsageError
from harness.provenance import code_digest
from harness.records import Exposure, Record, publish_records, write_record
from harness.report.apart import apart_table
from harness.report.best import best_rows, best_table
from harness.report.console import print_results
from harness.report.markdown import page
from harness.report.notes import notes
from harness.report.pairs import compared_neighbours
from harness.report.publish import publish
from harness.report.rows import latest_versions, load_records, rows_and_apart, rows_of
from harness.report.tables import differences_table, exposure_table, floor_table, results_table
from harness.report.task_report import TaskReport, reports_of

FIRST = "FID first − second"
BETTER = "better (Holm, 95 %)"


def failed(method: str = "ard", seed: int = 0, reason: str = "loss nan at step 3") -> Record:
    return record(
        method, seed, run_id=f"failed-{seed}", status="failed", reason=reason, metrics={}, cost=None
    )


def teacher(**changes: Any) -> Record:
    return record("teacher", steps=0, num_steps=24, **changes)


def line_of(records: list[Record], place: int = 0) -> dict[str, str]:
    return dict(results_table(rows_of(records)).iloc[place])


def differences_of(records: list[Record]) -> pd.DataFrame:
    report = TaskReport.of(records)
    return differences_table(report.pairs[0], report.headline, report.largest_p, report.reference)


# the best


def test_the_best_of_each_kind_by_number_of_steps() -> None:
    """Lowest FID first; the teacher's own output stands last, and is no sampler of few steps."""
    own = record("teacher", steps=0, num_steps=24, fid=1.0)
    own.metrics["distance_to_teacher"] = metric("distance_to_teacher", {0: 0.0, 1: 0.0})
    records = [
        own,
        record("teacher", steps=0, num_steps=4, fid=7.0),
        record("step-distillation", fid=3.0),
        record("step-distillation", num_steps=1, fid=6.0),
        record("ard", fid=2.0),
        record("ect", fid=4.0, target="data"),
        record("imm", fid=2.5, target="data"),
    ]
    report = TaskReport.of(records)
    table = best_table(best_rows(report.rows, "fid", own), "fid")
    assert list(table["steps"]) == ["1", "4", "4", "4", "24"]
    assert [name.split(",")[0] for name in table["best"]] == [
        "step-distillation", "teacher", "ard", "imm", "the teacher itself",
    ]  # fmt: skip
    assert list(table["learns"])[1:4] == ["no training", "from the teacher", "from data alone"]
    assert [name.split(",")[0] for name in table["next"]] == [
        "", "", "step-distillation", "ect", "",
    ]  # fmt: skip
    first = report.sections[0]
    assert first.heading == "Best at 1, 2 and 4 steps"
    assert "one seed" in first.text


# rows


def test_seeds_of_one_setting_share_a_row() -> None:
    rows = rows_of(
        [
            record(seed=2),
            record("step-distillation"),
            record(seed=0),
            record(seed=1),
            record(num_steps=2),
        ]
    )
    assert [(row.label, row.num_steps, len(row.records)) for row in rows] == [
        ("ard, history_layers 6", 2, 1),
        ("ard, history_layers 6", 4, 3),
        ("step-distillation", 4, 1),
    ]
    assert [r.config["seed"] for r in rows[1].records] == [0, 1, 2]


def test_settings_are_kept_apart() -> None:
    settings = {"precision": "bf16", "compile": True, "batch_size": 8, "noise_sets": 1}
    apart = [
        record(),
        record(steps=200),
        record(options={"history_layers": 2}),
        record(num_steps=2),
    ]
    apart += [record(config={**record().config, key: value}) for key, value in settings.items()]
    assert len(rows_of(apart)) == len(apart)


def test_training_free_rows_come_first() -> None:
    rows = rows_of(
        [record(steps=200), record(), teacher(), record("teacher", steps=0, num_steps=4)]
    )
    assert [(row.num_steps, row.training) for row in rows] == [
        (24, (0, 0)),
        (4, (0, 0)),
        (4, (100, 64)),
        (4, (200, 64)),
    ]


# refusals


def test_another_identity_stands_in_a_section_of_its_own() -> None:
    other = record("reflow", identity={"version": 2, "features": "f" * 64})
    records = [record(), record(seed=1), other]
    (row,) = rows_of(records)
    assert [found.run_id for found in row.records] == [record().run_id, record(seed=1).run_id]
    (found,) = rows_and_apart(records)[1]
    assert found.record == other
    assert found.reason == "another features; version 2 instead of 1"
    text = page(reports_of(records))
    section = text[text.index("Not comparable with these tables") :]
    assert "reflow" in section
    assert "another features; version 2 instead of 1" in section
    assert "reflow" not in text[: text.index("Not comparable with these tables")]


def test_every_metric_counts_for_comparability() -> None:
    other = record(seed=1)
    other.metrics["kid"] = metric("kid", {0: 1.0}, subset_size=10)
    (found,) = rows_and_apart([record(), other, record(seed=2)])[1]
    assert (found.record, found.reason) == (other, "subset_size 10 instead of None")


def test_runs_of_ours_outweigh_work_from_elsewhere() -> None:
    """However many files of 30 samples there are, the table is that of our runs."""
    outside = ["not trained here; bill as stated: 2 GPU days"]
    theirs = [
        record(f"theirs {k}", steps=0, identity={"n": 30}, flags=outside, cost=None)
        for k in range(3)
    ]
    ours = record(identity={"n": 40})
    assert [row.label for row in rows_of([*theirs, ours])] == [rows_of([ours])[0].label]
    table = apart_table(rows_and_apart([*theirs, ours])[1])
    assert list(table["differs in"]) == ["n 30 instead of 40"] * 3
    assert list(table["training"]) == ["as stated: 2 GPU days"] * 3
    assert list(table["N"]) == ["40"] * 3


def test_a_bill_as_stated_stands_in_the_row() -> None:
    outside = ["not trained here; bill as stated: 2 GPU days"]
    theirs = record("theirs", steps=0, flags=outside, cost=None)
    (line,) = [dict(line) for _, line in results_table(rows_of([theirs])).iterrows()]
    assert (line["method"], line["training"]) == ("theirs", "as stated: 2 GPU days")


def test_of_equally_many_the_present_code_counts() -> None:
    here = record(identity={"version": 2})
    here.environment = here.environment.model_copy(update={"code": code_digest()})
    (found,) = rows_and_apart([here, record(seed=1)])[1]
    assert found.reason == "version 1 instead of 2"


def test_tasks_have_sections_of_their_own() -> None:
    text = page(reports_of([record(), record(task="other", identity={"version": 2})]))
    assert text.index("## other") < text.index("## tiny")


# cells


def test_the_cells_of_a_row() -> None:
    line = line_of([record(seed=0, fid=4.0), record(seed=1, fid=6.0)])
    assert line["method"] == "ard, history_layers 6"
    assert (line["steps"], line["training"], line["seeds × noise sets"]) == (
        "4",
        "100 × 64",
        "2 × 2",
    )
    # Mean squares 4 of seeds and 1 of noise sets over 4 numbers; 25 / 17 degrees of freedom.
    half_width = stats.t.ppf(0.975, 25 / 17) * (5 / 4) ** 0.5
    assert line["FID ↓"] == f"5.50 ± {half_width:.2f}"
    assert (line["NFE"], line["MMACs / sample"], line["parameters"]) == ("4", "3.0", "2.500 M")
    assert line["latency / teacher"] == "0.250"
    assert line["training TFLOPs + trajectories"] == "2.0 + 3.0"


def test_a_row_without_training_has_an_interval_over_noise_sets() -> None:
    line = line_of([teacher(fid=1.0)])
    assert (line["training"], line["seeds × noise sets"]) == ("none", "- × 2")
    assert line["FID ↓"] == "1.50 ± 6.35"  # values 1 and 2
    assert line.get("training seconds", "") == ""


def test_an_untrained_student_and_a_method_without_training_differ() -> None:
    rows = rows_of([teacher(), record("step-distillation", steps=0)])
    assert {row.label: line_of(list(row.records))["training"] for row in rows} == {
        "teacher": "none",
        "step-distillation": "untrained",
    }


def test_the_floor_is_a_table_apart_with_its_own_number_of_samples() -> None:
    rows = rows_of([record(), teacher()])
    assert len(results_table(rows)) == 2
    (line,) = floor_table(rows).to_dict("records")
    assert line["held-out real samples"] == f"N = {record().metrics['fid_floor'].n}"
    assert line["FID ↓"] == "0.25"


# failures


def test_a_failed_row_shows_its_reason() -> None:
    line = line_of([failed(), teacher()], 1)
    assert line["method"] == "ard, history_layers 6"
    assert line["status"] == "failed: loss nan at step 3"
    assert line["FID ↓"] == line["KID ↓"] == ""


def test_a_row_of_which_a_seed_failed_has_a_rate_and_no_interval() -> None:
    line = line_of([record(seed=0, fid=4.0), record(seed=1, fid=6.0), failed(seed=2)])
    assert line["method"] == "ard, history_layers 6"
    assert line["seeds × noise sets"] == "2 × 2"
    assert line["FID ↓"] == "1 of 3 seeds diverged: failed (others 4.50, 6.50)"
    assert "±" not in "".join(line.values())


def test_a_seed_far_from_its_row_has_diverged() -> None:
    line = line_of(seeds("ard", [4.0, 786.9, 6.0]))
    assert line["FID ↓"] == "1 of 3 seeds diverged: 787 (others 4.50, 6.50)"
    assert line_of(seeds("ard", [4.0, float("nan")]))["FID ↓"].endswith(
        "diverged: not finite (others 4.50)"
    )


def test_a_bad_method_has_not_diverged_and_neither_has_a_seed_near_the_teacher() -> None:
    def diverged(*fids: float, beside: float | None = None) -> int:
        own = {"distance_to_teacher": metric("distance_to_teacher", {0: 0.0, 1: 0.0})}
        free = teacher(fid=beside or 0.0)
        free = free.model_copy(update={"metrics": {**free.metrics, **own}})
        row = rows_of([*seeds("ard", list(fids)), *([free] if beside else [])])[-1]
        return len(row.diverged)

    assert diverged(700.0, 800.0, 900.0) == 0
    assert diverged(0.5, 9.0) == 0  # means 1.0 and 9.5
    assert diverged(0.5, 10.0) == 1
    assert diverged(0.5, 10.0, beside=0.6) == 0  # 10 times the teacher is 11
    assert diverged(0.5, 11.0, beside=0.6) == 1


def test_diverged_seeds_are_named_below_and_in_no_comparison() -> None:
    report = TaskReport.of([*seeds("ard", [4.0, 4.1, 787.0]), *seeds("denoising", [5.0, 5.1, 5.3])])
    assert "no comparison and no plot: ard, history_layers 6, 4 steps." in "\n".join(report.notes)
    assert not report.pairs[0]
    assert [row.records[0].method for row in report.grids] == ["denoising", "ard"]


def test_a_page_of_failures_alone() -> None:
    text = page(reports_of([failed()]))
    assert "failed: loss nan at step 3" in text
    assert not TaskReport.of([failed()]).notes


def test_a_row_that_failed_whole_is_named_below_the_tables() -> None:
    text = TaskReport.of([failed(), record("step-distillation")]).notes
    assert (
        "Failed, and in no comparison: ard, history_layers 6, 4 steps (loss nan at step 3)." in text
    )


def test_failures_have_no_differences() -> None:
    rows = rows_of(
        [
            failed("ard", 0),
            failed("ard", 1),
            record("step-distillation", 0),
            record("step-distillation", 1),
        ]
    )
    assert compared_neighbours(rows, "fid") == ([], 0)


def test_one_seed_measured_twice_is_one_record() -> None:
    more = record(run_id="more", config={**record().config, "extra_features": "dinov2 0123"})
    more.metrics["fd_dinov2"] = metric("fd_dinov2", {0: 3.0, 1: 3.0})
    more.metrics["fd_dinov2_floor"] = metric("fd_dinov2_floor", {0: 1.5})
    rows = rows_of([more, record(), record(seed=1)])
    assert [[r.run_id for r in row.records] for row in rows] == [["more", record(seed=1).run_id]]
    assert floor_table(rows).iloc[0]["FD-DINOv2 ↓"] == "1.5"


@pytest.mark.parametrize("order", [1, -1])
def test_of_one_seed_measured_twice_the_present_codes_record_counts(order: int) -> None:
    """Even if it failed, or has fewer metrics."""
    old = record(run_id="old", fid=3.0)
    old.metrics["fd_dinov2"] = metric("fd_dinov2", {0: 3.0, 1: 3.0})
    here = ENVIRONMENT.model_copy(update={"code": code_digest()})
    for new in (
        record(run_id="new", environment=here),
        failed().model_copy(update={"run_id": "new", "environment": here}),
    ):
        (row,) = rows_of([old, new][::order])
        assert [made.run_id for made in row.records] == ["new"]


# differences


def seeds(method: str, fids: list[float], **changes: Any) -> list[Record]:
    return [record(method, seed, fid, **changes) for seed, fid in enumerate(fids)]


def difference(first: list[Record], second: list[Record]) -> dict[str, str]:
    (line,) = differences_of([*first, *second]).to_dict("records")
    return line


@pytest.mark.parametrize("sign", [1, -1])
def test_the_lower_fid_is_better_whichever_row_comes_first(sign: int) -> None:
    line = difference(
        seeds("ard", [10.0, 20.0, 30.0]),
        seeds("step-distillation", [10 + sign * 2.0, 20 + sign * 2.1, 30 + sign * 1.9]),
    )
    assert (line["first"], line["second"], line["seeds × noise sets"]) == (
        "ard, history_layers 6",
        "step-distillation",
        "3 × 2",
    )
    assert float(line[FIRST].split(" ± ")[0]) == pytest.approx(-sign * 2)
    assert line[BETTER] == ("ard, history_layers 6" if sign == 1 else "step-distillation")


def test_an_uncertain_difference_is_not_named() -> None:
    line = difference(
        seeds("ard", [10.0, 20.0, 30.0]), seeds("step-distillation", [12.0, 19.0, 31.0])
    )
    assert line[BETTER] == "not shown"


def test_a_difference_that_holm_does_not_reject_is_not_named() -> None:
    """Alone its p names a better row; beside two more comparisons it does not."""
    first, second = seeds("ard", [10.0, 10.0, 10.0]), seeds("step-distillation", [11.0, 11.5, 12.2])
    alone = difference(first, second)
    assert 0.02 < float(alone["p"]) < 0.05
    assert alone[BETTER] == "ard, history_layers 6"
    third = seeds("denoising", [14.0, 8.0, 12.0])
    lines = differences_of([*first, *second, *third]).to_dict("records")
    assert len(lines) == 3
    assert {line[BETTER] for line in lines} == {"not shown"}
    assert alone["p"] in [line["p"] for line in lines]


def test_holms_family_is_the_whole_page() -> None:
    """Comparisons at another number of steps, and those with the best, count too."""
    first, second = seeds("ard", [10.0, 10.0, 10.0]), seeds("step-distillation", [11.0, 11.5, 12.2])
    elsewhere = [
        made
        for method, fids in (("ard", [5.0, 9.0, 7.0]), ("denoising", [7.0, 7.0, 8.0]))
        for made in seeds(method, fids, num_steps=2)
    ]
    (alone,) = differences_of([*first, *second]).to_dict("records")
    both = {
        line["steps"]: line
        for line in differences_of([*first, *second, *elsewhere]).to_dict("records")
    }
    assert both["4"]["p"] == alone["p"]
    assert 0.025 < float(alone["p"]) < 0.05
    assert (alone[BETTER], both["4"][BETTER]) == ("ard, history_layers 6", "not shown")
    text = page(reports_of([*first, *second, *elsewhere]))
    assert "Holm's correction covers all 2 p values of this page." in text


def crowd(count: int) -> list[Record]:
    """So many settings of two seeds; with more blocks of history FID falls, and varies more."""
    return [
        made
        for n in range(1, count + 1)
        for made in seeds(
            "ard", [90.0 - n, 90.0 - n + 0.001 * (count - n)], options={"history_layers": n}
        )
    ]


def test_in_a_crowd_each_is_beside_the_best_and_all_pairs_are_in_holms_family() -> None:
    lines = differences_of(crowd(31)).to_dict("records")
    assert len(lines) == 30
    assert {line["second"] for line in lines} | {line["first"] for line in lines} >= {
        f"ard, history_layers {n}" for n in range(1, 32)
    }
    assert all("ard, history_layers 31" in (line["first"], line["second"]) for line in lines)
    p = sorted(float(line["p"]) for line in lines)
    # A correction for these 30 pairs alone would make this p significant.
    assert 0.05 / (31 * 30 / 2) < p[0] < 0.05 / 30
    assert {line[BETTER] for line in lines} == {"not shown"}


def test_one_lucky_seed_hides_no_differences() -> None:
    lucky = record("ard", fid=1.0, options={"history_layers": 99})
    assert len(differences_of([*crowd(30), lucky])) == 30 * 29 / 2


def test_a_ratio_is_over_the_reference_with_most_noise_sets() -> None:
    def reference(sets: dict[int, float], **changes: Any) -> Record:
        made = teacher(config={**teacher().config, "noise_sets": len(sets)}, **changes)
        own = {
            "fid": metric("fid", sets),
            "distance_to_teacher": metric("distance_to_teacher", dict.fromkeys(sets, 0.0)),
        }
        return made.model_copy(update={"metrics": {**made.metrics, **own}})

    one, two = reference({0: 4.0}, run_id="one"), reference({0: 4.0, 1: 6.0}, run_id="two")
    pair = [*seeds("ard", [10.0, 12.0]), *seeds("step-distillation", [20.0, 24.0])]
    ratios = {tuple(differences_of([*pair, *free])["over the teacher's, first / second"])
              for free in ([one, two], [two, one], [two])}  # fmt: skip
    assert len(ratios) == 1
    assert float(next(iter(ratios))[0].split(" ± ")[0]) == pytest.approx(
        (5.5 + 7.5) / (15.5 + 19.5), abs=1e-3
    )
    (on_one,) = differences_of([*pair, one])["over the teacher's, first / second"]
    assert float(on_one.split(" ± ")[0]) == pytest.approx((6 + 8) / (16 + 20), abs=1e-3)


def test_what_a_task_gives_a_method_says_nothing_to_another() -> None:
    """3 history layers are ARD's default on this task; step distillation has no such option."""
    on = {"task": "fashion-mnist"}
    ours = seeds("ard", [10.0, 10.0, 10.0], options={"history_layers": 3}, **on)
    line = difference(ours, seeds("step-distillation", [11.0, 11.5, 12.2], **on))
    assert (line["first"], line["second"]) == ("ard, history_layers 3", "step-distillation")
    other = seeds("ard", [10.0, 10.0, 10.0], options={"history_layers": 2}, **on)
    assert differences_of([*other, *seeds("step-distillation", [11.0, 11.5, 12.2], **on)]).empty


def test_only_rows_of_equal_steps_and_training_are_compared() -> None:
    pair = [1.0, 2.0]
    records = [
        *seeds("ard", pair),
        *seeds("ard", pair, num_steps=2),
        *seeds("step-distillation", pair, steps=200),
        teacher(),
    ]
    assert differences_of(records).empty


def test_one_seed_shows_no_difference() -> None:
    assert differences_of([record(), record("step-distillation", fid=9.0)]).empty


def test_equal_rows_show_no_difference() -> None:
    line = difference(seeds("ard", [1.0, 2.0]), seeds("step-distillation", [1.0, 2.0]))
    assert (float(line["p"]), line[BETTER]) == (1, "not shown")


# exposure, notes


def test_the_exposure_table_shows_the_gap_of_trained_rows() -> None:
    exposures = [
        Exposure(on_teachers_history=[0.1, 0.2], on_own_history=[0.1, own], n=16)
        for own in (0.3, 0.5)
    ]
    records = [record(seed=seed, exposure=exposure) for seed, exposure in enumerate(exposures)]
    (line,) = exposure_table(rows_of([*records, teacher(exposure=exposures[0])])).to_dict("records")
    assert line["method"] == "ard, history_layers 6"
    assert line["gap after each step"] == "0.0000, 0.2000"
    assert line["last step, own history"].startswith("0.4000 ± ")
    assert line["last step, teacher's history"].startswith("0.2000")


def test_notes_say_what_a_reader_must_know() -> None:
    dirty = ENVIRONMENT.model_copy(update={"dirty": True, "device": "H200"})
    rows = rows_of(
        [
            record(flags=["short average"]),
            record("denoising", target="data", environment=dirty),
            teacher(),
        ]
    )
    text = "\n".join(notes(rows, "fid"))
    for part in (
        "N = 40",
        "held-out real images have",
        "they share noise sets",
        "95 % t interval over training seeds crossed with evaluation noise sets",
        "A trained row of one seed has no ±",
        "whether it was idle is not recorded",
        "Latency: batch 16, float32, cpu with 2 threads, 2 warm-ups, median of 9",
        "2 rows share one store of trajectories, made once for 3 TFLOPs",
        "The target is not the guided teacher in denoising: data",
        "ard-4-100-0: short average.",
        "Made on cpu (a cpu), Python 3.11, torch 2.15.0, commit 0123456789, code c.",
        "Made on H200 (a cpu)",
        "with uncommitted changes",
    ):
        assert part in text


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_of_any_width_shows_every_number(width: int) -> None:
    console = Console(width=width, record=True, file=StringIO())
    print_results([teacher(fid=1.0), record(fid=7.25)], console)
    text = console.export_text()
    for part in ("teacher", "7.75", "1.50", "N = 40"):
        assert part in text


# files


def test_records_of_a_folder(tmp_path: Path) -> None:
    write_record(tmp_path / "runs" / "a" / "record.json", record(fid=1.0))
    publish_records(tmp_path / "tiny", [record(fid=2.0), record(seed=1)])
    found = {one.run_id: one for one in load_records(tmp_path)}
    assert found.keys() == {record().run_id, record(seed=1).run_id}
    assert found[record().run_id].metrics["fid"].values[0] == 1.0
    assert len(load_records(tmp_path / "tiny")) == 2


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no record below .*; `harness run` makes one"):
        load_records(tmp_path)


def test_publishing_copies_records_and_grids_and_writes_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / record().run_id
    write_record(folder / "record.json", record())
    (folder / "samples.png").write_bytes(b"a picture")
    write_record(tmp_path / "runs" / "failed-1" / "record.json", failed(seed=1))
    written, _ = publish(load_records(tmp_path), tmp_path)
    assert written == tmp_path / "tiny" / "README.md"
    text = written.read_text()
    assert f"![samples](samples/{record().run_id}.png)" in text
    assert (tmp_path / "tiny" / "samples" / f"{record().run_id}.png").read_bytes() == b"a picture"
    assert {one.run_id for one in load_records(tmp_path / "tiny")} == {record().run_id, "failed-1"}


def test_a_page_shows_the_grid_of_each_methods_best_row(tmp_path: Path) -> None:
    """The best first, then the best of other methods; overtaken grids are deleted."""
    for one in (
        record(fid=5.0),
        record(fid=3.0, options={"history_layers": 2}, run_id="best"),
        record("lcm", fid=1.0),
    ):
        write_record(tmp_path / "runs" / one.run_id / "record.json", one)
        (tmp_path / "runs" / one.run_id / "samples.png").write_bytes(b"a picture")
    (tmp_path / "tiny" / "samples").mkdir(parents=True)
    (tmp_path / "tiny" / "samples" / "overtaken.png").write_bytes(b"a picture")
    page, _ = publish(load_records(tmp_path), tmp_path)
    shown = [f"{record('lcm').run_id}.png", "best.png"]
    assert sorted(path.name for path in (tmp_path / "tiny" / "samples").iterdir()) == sorted(shown)
    assert [line for line in page.read_text().splitlines() if "samples/" in line] == [
        f"![samples](samples/{name})" for name in shown
    ]


@pytest.mark.slow
def test_publishing_published_records_alone_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / record().run_id
    write_record(folder / "record.json", record())
    (folder / "samples.png").write_bytes(b"a picture")
    first, _ = publish(load_records(tmp_path), tmp_path)
    text = first.read_text()
    for path in folder.iterdir():
        path.unlink()
    publish(load_records(tmp_path), tmp_path)
    assert first.read_text() == text


def test_pages_begin_with_the_best_rows_then_what_was_found(tmp_path: Path) -> None:
    for layers in (1, 3, 6):
        one = record(run_id=f"ard-{layers}").model_copy(
            update={"options": {"history_layers": layers}}
        )
        write_record(tmp_path / "runs" / one.run_id / "record.json", one)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "findings.md").write_text("Three layers are best.\n")
    (tmp_path / "findings.md").write_text("Tables are being made anew.\n")
    first, index = publish(load_records(tmp_path), tmp_path)
    text = first.read_text()
    places = [
        index.read_text().index(part)
        for part in ("| tiny   | from the teacher", "[tiny]", "Tables are being made anew.")
    ]
    assert places == sorted(places)
    parts = ("## Best at", "![ablations](ablations.png)", "Three layers are best.", "## Notes")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "[All rows, cost, diversity and curves](details.md)" in text
    assert "## All rows" in first.with_name("details.md").read_text()
    picture = Image.open(tmp_path / "tiny" / "ablations.png")
    assert picture.size[0] > 400
    publish([one for one in load_records(tmp_path) if one.run_id != "ard-3"], tmp_path)
    assert "ablations.png" not in first.read_text()


def test_a_long_number_is_shortened_in_a_label() -> None:
    def shown(lr: float) -> str:
        return rows_of([record().model_copy(update={"options": {"lr": lr, "history_layers": 6}})])[
            0
        ].label

    assert shown(0.00027796258518939394).endswith("lr 0.000278")
    assert shown(0.00054).endswith("lr 0.00054")
    assert shown(1e-06).endswith("lr 1e-06")


def test_a_report_holds_the_latest_version_of_each_task() -> None:
    old, new, other = record(seed=0), record(seed=1, task_version=2), record(task="other")
    assert latest_versions([old, new, other]) == [new, other]
