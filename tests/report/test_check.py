"""The regression check: what fails, what is only reported, and how often it errs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from written import record as plain

from harness.cli.main import main
from harness.errors import CheckFailed, UsageError
from harness.provenance import code_digest
from harness.records import Metric, Record, published_records, read_record, write_record
from harness.report.baseline import (
    Baseline,
    Entry,
    baseline_of,
    configs_of,
    read_baseline,
    write_baseline,
)
from harness.report.check import compare, compare_quality, refuse_nothing
from harness.runs.config import parse_config
from harness.runs.identity import key_of_record, row_key
from harness.runs.resolve import resolve
from harness.sweeps.sweep import expand
from harness.tasks import load_task

ROOT = Path(__file__).parents[2]


def record(seed: int = 0, fid: float = 5.0, **changes: Any) -> Record:
    made = plain(seed=seed, **changes).model_copy(
        update={"task": "digits", "run_id": f"ard-{seed}", "first_losses": {"loss": 1.5}}
    )
    metric = Metric(values={0: fid}, n=40, direction="lower", identity={"metric": "fid"})
    return made.model_copy(update={"metrics": {"fid": metric}})


def states(baseline: Baseline, *records: Record) -> set[tuple[str, str]]:
    return {
        (finding.what, finding.state)
        for finding in compare(baseline, records)
        if finding.state != "same"
    }


BASE = baseline_of([record(seed, fid) for seed, fid in enumerate((4.8, 5.0, 5.2))], "made here")
HERE = [record(seed, fid) for seed, fid in enumerate((4.8, 5.0, 5.2))]


def test_equal_records_are_the_same() -> None:
    findings = compare(BASE, HERE)
    assert {finding.state for finding in findings} == {"same"}
    assert {finding.what for finding in findings} >= {
        "parameters",
        "MACs",
        "NFE",
        "identity of fid",
        "first loss",
        "fid, 3 seeds",
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_quality_or_loss_that_is_not_finite_is_a_regression(bad: float) -> None:
    here = [record(0, bad), *HERE[1:]]
    assert ("fid, 3 seeds", "regressed") in states(BASE, *here)
    here = [HERE[0].model_copy(update={"first_losses": {"loss": bad}}), *HERE[1:]]
    assert states(BASE, *here) == {("first loss", "regressed")}


def changed(part: str, **changes: Any) -> Record:
    """The first record with a part of its cost changed."""
    cost = HERE[0].cost
    assert cost is not None
    assert cost.latency is not None
    inner = {"cost": cost, "latency": cost.latency}[part].model_copy(update=changes)
    return HERE[0].model_copy(
        update={"cost": inner if part == "cost" else cost.model_copy(update={"latency": inner})}
    )


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (changed("cost", parameters=2_500_001), ("parameters", "regressed")),
        (changed("cost", macs_per_sample=2_999_999), ("MACs", "regressed")),
        (changed("cost", nfe=5.0), ("NFE", "regressed")),
        (changed("latency", ratio=0.4), ("latency / reference", "slower")),
        (changed("latency", ratio=0.1), ("latency / reference", "faster")),
        (
            HERE[0].model_copy(update={"hashes": {"teacher": "other"}}),
            ("hash of teacher", "not comparable"),
        ),
        (HERE[0].model_copy(update={"first_losses": {"loss": 1.503}}), ("first loss", "regressed")),
        (
            HERE[0].model_copy(update={"first_losses": {"student/loss": 1.5}}),
            ("first loss", "missing"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_difference_is_found(other: Record, found: tuple[str, str]) -> None:
    assert states(BASE, other, *HERE[1:]) == {found}


def test_a_loss_may_differ_by_rounding_and_on_another_device() -> None:
    near = HERE[0].model_copy(update={"first_losses": {"loss": 1.5001}})
    assert states(BASE, near, *HERE[1:]) == set()
    elsewhere = HERE[0].environment.model_copy(update={"device": "a GPU"})
    far = HERE[0].model_copy(update={"first_losses": {"loss": 2.0}, "environment": elsewhere})
    assert states(BASE, far, *HERE[1:]) == set()


def test_what_cannot_be_made_again_is_no_part_of_a_baseline(tmp_path: Path) -> None:
    """Work from outside, and tasks in files of one's own, beside what can."""
    samples = HERE[0].model_copy(update={"run_id": "theirs", "method": "theirs", "cost": None})
    samples = samples.model_copy(update={"flags": ["not trained here; bill as stated: nothing"]})
    student = HERE[0].model_copy(
        update={
            "run_id": "student",
            "flags": samples.flags,
            "config": {**HERE[0].config, "init_from": {"setting": "theirs"}},
        }
    )
    own = HERE[0].model_copy(update={"run_id": "own", "task": "my-own"})
    absent = HERE[0].model_copy(update={"run_id": "absent", "method": "a plug-in's"})
    assert states(BASE, *HERE, samples, student, own, absent) == set()
    assert baseline_of([*HERE, samples, student, own, absent], "made here") == BASE
    with pytest.raises(UsageError, match="no finished record"):
        baseline_of([samples, student, own, absent], "made here")
    for made in (*HERE, samples):
        write_record(tmp_path / "runs" / made.run_id / "record.json", made)
    words = ["check", "--baseline", str(tmp_path / "base.json"), "--records", str(tmp_path)]
    done = CliRunner().invoke(main, [*words, "--update"])
    assert (done.exit_code, f"wrote {tmp_path / 'base.json'} without theirs" in done.output) == (
        0,
        True,
    ), done.output


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_records_of_a_run_the_present_codes_is_checked(order: int) -> None:
    here = HERE[0].environment.model_copy(update={"code": code_digest()})
    worse = record(0, 9.0).model_copy(update={"run_id": "worse"})
    present = HERE[0].model_copy(update={"run_id": "present", "environment": here})
    assert states(BASE, *HERE[1:], *[worse, present][::order]) == set()
    failed = present.model_copy(update={"status": "failed"})
    assert states(BASE, *HERE[1:], *[HERE[0], failed][::order]) == {("record", "missing")}


def test_runs_without_first_losses_are_counted(tmp_path: Path) -> None:
    bare = [made.model_copy(update={"first_losses": {}}) for made in HERE[:2]]
    write_baseline(tmp_path / "base.json", baseline_of([*bare, HERE[2]], "made here"))
    for made in HERE:
        write_record(tmp_path / "runs" / made.run_id / "record.json", made)
    done = CliRunner().invoke(
        main, ["check", "--baseline", str(tmp_path / "base.json"), "--records", str(tmp_path)]
    )
    assert (done.exit_code, "2 of 3 runs of the baseline hold no first losses" in done.output) == (
        0,
        True,
    ), done.output


def test_a_baseline_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"it is not JSON in UTF-8: .*; --update makes it anew"):
        read_baseline(tmp_path / "base.json")


def test_another_metric_is_not_compared() -> None:
    other = Metric(
        values={0: 50.0}, n=40, direction="lower", identity={"metric": "fid", "library": "another"}
    )
    assert states(BASE, HERE[0].model_copy(update={"metrics": {"fid": other}}), *HERE[1:]) == {
        ("identity of fid", "not comparable")
    }


def test_runs_that_are_not_there_and_runs_that_are_new() -> None:
    assert states(BASE, *HERE[1:]) == {("record", "missing")}
    assert states(BASE, *HERE, record(3)) == {("record", "new")}
    assert states(BASE, *HERE, record(3).model_copy(update={"task": "mixture"})) == set()
    failed = HERE[0].model_copy(update={"status": "failed"})
    assert states(BASE, failed, *HERE[1:]) == {("record", "missing")}
    for nothing in ([record(7)], []):
        with pytest.raises(CheckFailed, match="nothing was compared"):
            refuse_nothing(compare(BASE, nothing))
    refuse_nothing(compare(BASE, HERE[1:]))


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.02, "same"), (1.3, "regressed"), (0.98, "same"), (0.7, "improved")]
)
def test_quality_is_one_sided(factor: float, expected: str) -> None:
    here = [record(seed, fid * factor) for seed, fid in enumerate((4.8, 5.0, 5.2))]
    (finding,) = [finding for finding in compare(BASE, here) if finding.what == "fid, 3 seeds"]
    assert finding.state == expected


def test_where_more_is_better_less_is_a_regression() -> None:
    def better_high(value: float) -> Record:
        metric = Metric(values={0: value}, n=40, direction="higher", identity={"metric": "fid"})
        return record().model_copy(update={"metrics": {"fid": metric}})

    baseline = baseline_of([better_high(0.9)], "made here")
    assert states(baseline, better_high(0.5)) == {("fid, 1 seed", "regressed")}
    assert states(baseline, better_high(1.5)) == {("fid, 1 seed", "improved")}


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_rate_of_false_alarms_and_what_is_found(seeds: int) -> None:
    """Other seeds of an equal method rarely fail; a mean four deviations worse mostly does."""
    drawn, alarms, found, trials = random.Random(seeds), 0, 0, 120
    others = baseline_of(
        [record(seed, num_steps=n) for n in range(2, 7) for seed in range(max(seeds, 2))],
        "made here",
    )
    mine = baseline_of([record(seed, num_steps=1) for seed in range(seeds)], "made here")

    def with_new_numbers(runs: dict[str, Entry], mean: float) -> dict[str, Entry]:
        values = {key: math.exp(drawn.gauss(mean, 0.1)) for key in runs}
        return {
            key: run.model_copy(
                update={"quality": run.quality.model_copy(update={"value": values[key]})}
            )
            for key, run in runs.items()
        }

    for _ in range(trials):  # six rows of the same spread, which is pooled
        runs = with_new_numbers({**others.runs, **mine.runs}, 1)
        baseline = mine.model_copy(update={"runs": runs})
        for shift, worse in ((0.0, False), (0.4, True)):
            (finding,) = compare_quality(baseline, with_new_numbers(mine.runs, 1 + shift))
            alarms += not worse and finding.state == "regressed"
            found += worse and finding.state == "regressed"
    assert alarms / trials < 0.05
    assert found / trials > {1: 0.15, 2: 0.7, 3: 0.9, 5: 0.95}[seeds]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_baseline(tmp_path / "b.json", BASE)
    assert read_baseline(tmp_path / "b.json") == BASE
    with pytest.raises(UsageError, match=r"cannot read baseline .*--update makes one"):
        read_baseline(tmp_path / "none.json")
    (tmp_path / "b.json").write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(UsageError, match=r"cannot be read \(schema_version"):
        read_baseline(tmp_path / "b.json")
    with pytest.raises(UsageError, match="no finished record"):
        baseline_of([], "nothing")


@pytest.mark.parametrize(
    "folder",
    [path.parent for path in sorted((ROOT / "results").glob("*/records.jsonl"))],
    ids=lambda path: path.name,
)
def test_a_baselines_configs_make_the_same_runs(folder: Path) -> None:
    """One record of each row, with untrained students and samplers without training.

    Records of an older version of the task cannot be made again.
    """
    task = load_task(folder.name)
    present = [
        found for found in published_records(folder) if found.task_version == task.spec.version
    ]
    rows = {row_key(found): found for found in present}
    for found in rows.values():
        baseline = baseline_of([found], "made here")
        assert next(iter(baseline.runs.values())).config
        (config,) = configs_of(baseline)
        assert resolve(config, task).key == key_of_record(found), found.run_id


def test_what_nothing_trains_must_be_equal() -> None:
    def teacher(fid: float) -> Record:
        return record(fid=fid, method="teacher", steps=0)

    baseline = baseline_of([teacher(5.0), *HERE], "made here")
    assert states(baseline, teacher(5.01), *HERE) == set()
    assert states(baseline, teacher(5.1), *HERE) == {("fid, 1 seed", "regressed")}


def test_losses_that_a_record_lacks_are_reported() -> None:
    without = HERE[0].model_copy(update={"first_losses": {}})
    assert states(BASE, without, *HERE[1:]) == {("first losses", "missing")}
    older = baseline_of([without, *HERE[1:]], "made here")
    assert states(older, *HERE) == set()


def test_the_command(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(*words: object) -> tuple[Any, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in ("check", "--baseline", tmp_path / "b.json", *words)])
        output = capsys.readouterr()
        return ended.value.code, output.out + output.err

    config = {"task": "tiny", "method": "step-distillation", "num_steps": 2, "budget": "steps=2"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    results = ("--results", tmp_path / "results")
    assert check("--run", "--update", *results)[0] == 2
    with pytest.raises(SystemExit):
        main(["run", "--config", str(tmp_path / "c.yaml"), *map(str, results)])
    assert check("--records", tmp_path / "results", "--update")[0] == 0
    assert check(*results)[0] == 0
    code, output = check("--run", "--results", tmp_path / "anew")
    assert code == 0, output
    assert (
        tmp_path / "anew" / "runs" / resolve(parse_config(config)).run_id / "record.json"
    ).is_file()

    path = tmp_path / "results" / "runs" / resolve(parse_config(config)).run_id / "record.json"
    good = read_record(path)
    assert good.cost is not None
    write_record(path, good.model_copy(update={"cost": good.cost.model_copy(update={"nfe": 3.0})}))
    code, output = check(*results)
    assert code == 1
    assert "NFE regressed (baseline 2.0, here 3.0)" in " ".join(output.split())
    code, output = check("--update", *results)
    assert code == 0
    assert "regressed" in output
    empty = baseline_of([good.model_copy(update={"task_version": 9})], "another version")
    write_baseline(tmp_path / "b.json", empty)
    assert check(*results)[0] == 1
    assert check("--update", *results)[0] == 0
    assert check(*results)[0] == 0
    (tmp_path / "b.json").write_text("{}")
    code, output = check(*results)
    assert code == 2
    assert "--update makes it anew" in " ".join(output.split())
    assert check("--update", *results)[0] == 0
    assert check(*results)[0] == 0


def test_the_small_sweep_and_its_baseline_are_the_same_runs() -> None:
    baseline = read_baseline(ROOT / "baselines" / "smoke.json")
    asked = expand(yaml.safe_load((ROOT / "ablations" / "smoke.yaml").read_text()), "smoke.yaml")
    assert (
        {resolve(config).key for config in asked}
        == set(baseline.runs)
        == {resolve(config).key for config in configs_of(baseline)}
    )
    assert all(entry.losses or not entry.trains for entry in baseline.runs.values())
