"""Searches by Optuna: what is tried, what is found again, and what a failure leaves."""

from __future__ import annotations

import itertools
import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from click.testing import CliRunner
from inprocess import Here
from searched import CPU, SPACE, content, fail_at, made, states

from harness.cli.main import main
from harness.errors import Busy, RunFailed, UsageError
from harness.metrics.evaluator import Evaluator
from harness.records import read_record, write_record
from harness.runs.locks import held
from harness.runs.run import Run
from harness.sweeps.child import MILESTONES_FILE, Pruning, milestones
from harness.sweeps.database import known_study, lines_of, open_study
from harness.sweeps.driver import TRIES, Driver
from harness.sweeps.search import PRUNED_AFTER, UNSEEN, Searcher, bad_value
from harness.sweeps.study import objective, study_plans
from harness.tasks import Task
from harness.training.trainer import Trainer


def test_a_search_makes_runs_and_marks_the_best(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = study_plans(content(trials=3), "here", tmp_path, CPU)
    study = made(plan, tmp_path)
    assert states(study) == ["COMPLETE"] * 3
    for trial in study.trials:
        (run_id,) = trial.user_attrs["run_ids"]
        record = read_record(tmp_path / "runs" / run_id / "record.json")
        assert record.metrics["fid"].mean == trial.value
        assert record.options["lr"] == float(f"{trial.params['options.lr']:.4g}")
    values = [trial.value for trial in study.trials]
    assert [line["best"] for line in lines_of(plan, study)] == [
        value == min(values) for value in values
    ]

    monkeypatch.setattr(Trainer, "train", lambda *args, **more: pytest.fail("trained again"))
    again = made(plan, tmp_path)
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]


def test_trial_0_is_the_methods_defaults(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (plan,) = study_plans(content(), "here", tmp_path, CPU)
    first = made(plan, tmp_path).trials[0]
    assert first.params == {"options.lr": 3e-3, "options.heads": "shared"}
    narrow = {
        "options.lr": {"low": 1e-2, "high": 1e-1, "log": True},
        "options.heads": ["per_step", "shared"],
    }
    (plan,) = study_plans(content(space=narrow), "here", tmp_path, CPU)
    first = made(plan, tmp_path).trials[0]
    assert first.params["options.heads"] == "shared"
    assert first.params["options.lr"] >= 1e-2


def test_a_cell_widens_the_space_of_its_own_study(
    tiny: Task, tmp_path: Path, executed: list[Any]
) -> None:
    given = content(space={"options.lr": SPACE["options.lr"]})
    del given["base"]["method"]
    own: dict[str, Any] = {"options.heads": ["shared", "per_step"]}
    given["cells"] = [
        {"method": "step-distillation", "space": own},
        {"method": "ard", "options": {"history_layers": 2}},
    ]
    wide, narrow = study_plans(given, "here", tmp_path, CPU)
    assert set(wide.spec.space) == {"options.lr", "options.heads"}
    assert set(narrow.spec.space) == {"options.lr"}
    assert set(made(wide, tmp_path).trials[0].params) == set(wide.spec.space)
    given["cells"][0]["space"] = {"options.heds": ["shared"]}
    with pytest.raises(UsageError, match="did you mean heads"):
        study_plans(given, "here", tmp_path, CPU)
    given["cells"][0]["space"] = ["shared"]
    with pytest.raises(UsageError, match="search: space"):
        study_plans(given, "here", tmp_path, CPU)


def test_the_seed_decides_what_is_tried(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    def tried(folder: str, **changes: Any) -> list[Any]:
        (plan,) = study_plans(content(trials=8, **changes), "here", tmp_path / folder, CPU)
        return [trial.params for trial in made(plan, tmp_path / folder).trials]

    first = tried("a")
    assert tried("b") == first
    assert tried("c", seed=1)[1:] != first[1:]
    assert len({str(params) for params in first}) == 8


def test_more_trials_later_go_on_where_it_stopped(
    tiny: Task, tmp_path: Path, executed: list[Any]
) -> None:
    (whole,) = study_plans(content(trials=7), "here", tmp_path / "whole", CPU)
    expected = [trial.params for trial in made(whole, tmp_path / "whole").trials]
    for trials in (3, 7):
        (plan,) = study_plans(content(trials=trials), "here", tmp_path / "parts", CPU)
        study = made(plan, tmp_path / "parts")
        assert [trial.params for trial in study.trials] == expected[:trials]


def test_a_milestone_after_a_line_that_was_cut_off_counts(tmp_path: Path) -> None:
    file = tmp_path / MILESTONES_FILE
    judge = Pruning(objective="fid", sign=1, medians={}).judge(file)
    judge(0.125, {"fid": 3.0})
    file.write_bytes(file.read_bytes()[:-20])
    judge(0.25, {"fid": 2.0})
    assert milestones(file) == {250: 2.0}


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_driver_that_dies_while_it_writes_values_loses_none(
    at: int, tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials, trial 0 with the defaults among them, are those of an undisturbed search."""
    plans = [study_plans(content(trials=2), "here", tmp_path / name, CPU)[0] for name in "ab"]
    expected = made(plans[0], tmp_path / "a")
    suggest, calls = optuna.trial.Trial._suggest, iter(range(100))

    def dying(self: optuna.trial.Trial, *args: Any) -> Any:
        if self.study.study_name == plans[1].name and self._is_fixed_param(*args):
            assert next(calls) != at, "dies"
        return suggest(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.trial.Trial, "_suggest", dying)
        with pytest.raises(AssertionError, match="dies"):
            made(plans[1], tmp_path / "b")
    found = made(plans[1], tmp_path / "b")
    assert [trial.params for trial in found.trials] == [trial.params for trial in expected.trials]
    assert states(found) == ["COMPLETE", "COMPLETE"]


def test_values_that_fit_alone_but_not_together_are_a_bad_value(
    tiny: Task, tmp_path: Path, executed: list[Any]
) -> None:
    space = {
        "options.trajectory": ["states", "predictions"],
        "options.parametrization": ["direct", "teacher"],
    }
    given = content(trials=6, space=space, sampler="random")
    given["base"]["options"] = {"heads": "shared"}
    (plan,) = study_plans(given, "here", tmp_path, CPU)
    study = made(plan, tmp_path)
    assert states(study) == ["COMPLETE"] * 6
    assert {
        "give trajectory 'states'" in trial.user_attrs.get("reason", "") for trial in study.trials
    } == {True, False}
    assert states(made(plan, tmp_path)) == states(study)


def test_seeds_are_averaged(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (plan,) = study_plans({**content(trials=1), "seeds": [1000, 1005]}, "here", tmp_path, CPU)
    study = made(plan, tmp_path)
    assert [resolved.settings.seed for resolved in executed] == [1000, 1005]
    assert len(study.trials[0].user_attrs["run_ids"]) == 2


def test_several_objectives_have_a_front(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    changes = {
        "objectives": {"fid": "minimize", "macs": "minimize"},
        "space": {"num_steps": [1, 2], "options.lr": SPACE["options.lr"]},
    }
    (plan,) = study_plans(content(**changes, trials=8), "here", tmp_path, CPU)
    study = made(plan, tmp_path)
    points = [tuple(trial.values) for trial in study.trials]
    dominated = [any(a <= c and b <= d and (a, b) != (c, d) for a, b in points) for c, d in points]
    assert [line["best"] for line in lines_of(plan, study)] == [not worse for worse in dominated]


def test_a_run_below_the_median_is_pruned(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials 0 to 3 make the median; the next is worse at its first milestone."""
    (plan,) = study_plans(
        {**content(trials=5, prune=True), "base": {**content()["base"], "budget": "steps=8"}},
        "here",
        tmp_path,
        CPU,
    )
    calls = itertools.count()
    quality = Evaluator.quality
    monkeypatch.setattr(
        Evaluator,
        "quality",
        lambda self, images: {**quality(self, images), "fid": float(next(calls))},
    )
    study = made(plan, tmp_path)
    assert states(study) == ["COMPLETE"] * 4 + ["PRUNED"]
    assert [list(trial.intermediate_values) for trial in study.trials] == [
        [125, 250, 500, 1000]
    ] * 4 + [[125]]
    reasons = [read_record(path).reason for path in (tmp_path / "runs").glob("*/record.json")]
    assert (
        sum("pruned: after 0.125 of the budget its fid was worse" in reason for reason in reasons)
        == 1
    )


def test_other_codes_trials_are_not_mixed_in(
    tiny: Task, tmp_path: Path, executed: list[Any]
) -> None:
    (plan,) = study_plans(content(trials=1), "here", tmp_path, CPU)
    study = made(plan, tmp_path)
    study._storage.set_trial_user_attr(open_study(plan, tmp_path).ask()._trial_id, "code", "older")
    with pytest.raises(UsageError, match="was begun by other code"):
        made(plan, tmp_path)
    made(plan, tmp_path, reuse=True)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"trial": 3}, "unknown option 'trial' in here: search; did you mean trials"),
        ({"objectives": {"fidd": "minimize"}}, "unknown objective 'fidd'; did you mean fid"),
        ({"objectives": {"fid": "minimise"}}, "here: search"),
        ({"space": {"options.lrr": [1]}}, "unknown option 'lrr'"),
        ({"space": {"num_steps": [1, 3, 2]}}, "num_steps is 3, but must divide"),
        ({"space": {"num_steps": {"low": 1, "high": 4}}}, "num_steps is 3, but must divide"),
        ({"space": {"options.lr": {"low": 1.0, "high": 2.0}}}, "lr is 2.0"),
        ({"space": {"options.lr": {"low": 1e-1, "high": 1e-4}}}, "here: search: space"),
        (
            {"prune": True, "objectives": {"fid": "minimize", "macs": "minimize"}},
            "prune needs a single objective",
        ),
        ({"prune": True, "objectives": {"macs": "minimize"}}, "must be one of: .*fid"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    changes: dict[str, Any], complaint: str, tiny: Task, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=complaint):
        study_plans(content(**changes), "here", tmp_path, CPU)


def test_early_points_of_a_run_may_be_spared(tiny: Task, tmp_path: Path) -> None:
    """Under `prune_from` a run is compared only at milestones from that part on."""
    for start, expected in ((0.0, {125, 250, 500}), (0.3, {500})):
        given = {**content(prune=True, prune_from=start), "seeds": [1000]}
        (plan,) = study_plans(given, "here", tmp_path, CPU)
        searcher = Searcher(plan, tmp_path, CPU, Driver(Here(), 1))
        searcher.study = optuna.create_study()
        for value in range(PRUNED_AFTER):
            trial = searcher.study.ask(plan.spec.distributions())
            for place in (125, 250, 500):
                trial.report(float(value), place)
            searcher.study.tell(trial, float(value))
        pruning = searcher._pruning()
        assert pruning is not None
        assert set(pruning.medians) == expected


def test_several_seeds_are_not_pruned(tiny: Task, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a trial has 2 seeds"):
        study_plans({**content(prune=True), "seeds": [1000, 1001]}, "here", tmp_path, CPU)


def test_an_objective_that_a_record_lacks(executed: list[Any]) -> None:
    with pytest.raises(UsageError, match="unknown objective 'kidd'; did you mean kid"):
        objective(SimpleNamespace(cost=None, metrics={"kid": 1}), "kidd")  # type: ignore[arg-type]


def sweep_command(folder: Path) -> list[str]:
    """The words that make the sweep `s.yaml` of a folder, with results beside it."""
    results = str(folder / "results")
    return ["sweep", str(folder / "s.yaml"), "--results", results, "--device", "cpu"]


def test_the_command(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cli.cmd_sweep.Local", lambda shares: Here())
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content()))
    words = sweep_command(tmp_path)
    dry = CliRunner().invoke(main, [*words, "--dry-run"])
    assert dry.output.splitlines()[-1].startswith("0 of 4 trials made in 1 studies")
    assert not executed
    assert not (tmp_path / "results").exists()
    made = CliRunner().invoke(main, words)
    assert "4 of 4 trials made in 1 studies" in made.output
    assert sum(line.startswith("* step-distillation-2-") for line in made.output.splitlines()) == 1


def test_a_trial_that_was_interrupted_is_taken_up_again(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = study_plans(content(), "here", tmp_path, CPU)
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt, executed)
        with pytest.raises(KeyboardInterrupt):
            made(plan, tmp_path)
    left = open_study(plan, tmp_path)
    assert states(left) == ["COMPLETE", "COMPLETE", "RUNNING"]
    study = made(plan, tmp_path)
    assert states(study) == ["COMPLETE"] * 4
    assert study.trials[2].params == left.trials[2].params
    assert len({resolved.run_id for resolved in executed}) == 4


def test_a_run_that_fails_is_a_bad_value_and_the_search_goes_on(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = study_plans(content(), "here", tmp_path, CPU)
    fail_at(monkeypatch, 2, lambda: RunFailed("the loss is not finite"), executed)
    study = made(plan, tmp_path)
    assert states(study) == ["COMPLETE"] * 4
    assert study.trials[1].value == 10 * study.trials[0].value
    assert study.trials[1].user_attrs["reason"] == "the loss is not finite"
    line = lines_of(plan, study)[1]
    assert (line["state"], line["best"], line["reason"]) == (
        "failed",
        False,
        "the loss is not finite",
    )


@pytest.mark.parametrize(
    ("direction", "seen", "expected"),
    [
        ("minimize", [2.0, 3.0], 30.0),
        ("maximize", [0.5, 0.25], -2.0),
        ("minimize", [-1.0, -2.0], 8.0),
        ("maximize", [-1.0], -10.0),
        ("minimize", [], UNSEEN),
        ("maximize", [], -UNSEEN),
        ("minimize", [0.0], UNSEEN),
    ],
)
def test_a_bad_value_is_worse_than_all_seen(
    direction: str, seen: list[float], expected: float
) -> None:
    assert bad_value(direction, seen) == expected


def test_bad_values_do_not_grow_by_each_other(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = study_plans(content(trials=5), "here", tmp_path, CPU)
    for number in (2, 3, 4):
        fail_at(monkeypatch, number, lambda: RunFailed("the loss is not finite"), executed)
    values = [trial.value for trial in made(plan, tmp_path).trials]
    assert values[1:4] == [10 * values[0]] * 3


def test_a_value_that_is_not_finite_is_a_failure(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.sweeps.search.objective", lambda record, name: math.nan)
    (plan,) = study_plans(content(trials=1), "here", tmp_path, CPU)
    (trial,) = made(plan, tmp_path).trials
    assert (trial.value, trial.user_attrs["reason"]) == (UNSEEN, "fid: [nan]: not finite")


def test_a_trial_whose_process_dies_is_made_anew_by_the_same_command(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts for nothing: the command that saw it ends with exit code 3."""
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content(trials=3)))
    words = sweep_command(tmp_path)
    monkeypatch.setattr("harness.cli.cmd_sweep.Local", lambda shares: Here())
    with monkeypatch.context() as patch:
        jobs, run = itertools.count(), Here.run
        patch.setattr(
            Here, "run", lambda self, job: run(self, job) if not 1 <= next(jobs) <= TRIES else -9
        )
        first = CliRunner().invoke(main, words)
    assert first.exit_code == 3, first.output
    assert "2 of 3 trials were made; the same command makes the others" in first.output
    assert "its process died 3 times, at last by SIGKILL" in first.output
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    assert "3 of 3 trials made" in again.output


def test_two_trials_at_once(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (plan,) = study_plans(content(trials=10), "here", tmp_path, CPU)
    study = made(plan, tmp_path, workers=2)
    assert states(study) == ["COMPLETE"] * 10
    assert len({str(trial.params) for trial in study.trials}) == 10


def test_a_study_has_one_driver(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (plan,) = study_plans(content(), "here", tmp_path, CPU)
    with (
        held(tmp_path, f"study-{plan.name}"),
        pytest.raises(Busy, match=f"another process works on study-{plan.name}"),
    ):
        made(plan, tmp_path)


def test_a_database_that_cannot_be_read(tiny: Task, tmp_path: Path) -> None:
    (plan,) = study_plans(content(), "here", tmp_path, CPU)
    (tmp_path / "harness.db").write_text("no database")
    for ask in (open_study, known_study):
        with pytest.raises(
            UsageError, match=r"cannot read the studies in .*harness.db .*move the file away"
        ):
            ask(plan, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE trial_values SET value = value / 2",
        "UPDATE trial_params SET param_value = param_value / 2 WHERE param_name = 'options.lr'",
        "DELETE FROM trial_user_attributes WHERE key = 'run_ids'",
        "UPDATE trials SET state = 'PRUNED'",
    ],
)
def test_a_changed_database_is_told(
    change: str, tiny: Task, tmp_path: Path, executed: list[Any]
) -> None:
    """SQLite finds nothing wrong with it."""
    (plan,) = study_plans(content(trials=2), "here", tmp_path, CPU)
    before = lines_of(plan, made(plan, tmp_path))
    study = known_study(plan, tmp_path)
    assert study is not None
    assert lines_of(plan, study) == before
    with closing(sqlite3.connect(tmp_path / "harness.db")) as database:
        assert database.execute(change).rowcount > 0
        database.commit()
    for ask in (known_study, open_study):
        with pytest.raises(
            UsageError, match=r"harness\.db \(trial 0 of study .* was changed since"
        ):
            ask(plan, tmp_path)


def test_looking_makes_nothing(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (plan,) = study_plans(content(), "here", tmp_path, CPU)
    assert known_study(plan, tmp_path) is None
    assert not (tmp_path / "harness.db").exists()
    study = made(plan, tmp_path)
    found = known_study(plan, tmp_path)
    assert found is not None
    assert found.trials == study.trials
    assert known_study(replace(plan, name="another"), tmp_path) is None


def test_a_trial_without_its_objective_fails_and_the_search_goes_on(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As KL does not exist for a sampler that draws noise."""
    (plan,) = study_plans(content(), "here", tmp_path, CPU)
    answered = Run.execute

    def execute(self: Run, *args: Any, **more: Any) -> Any:
        answered(self, *args, **more)
        if len(executed) == 2:
            path = self.folder / "record.json"
            write_record(path, read_record(path).model_copy(update={"metrics": {}}))

    monkeypatch.setattr(Run, "execute", execute)
    study = made(plan, tmp_path)
    assert states(study) == ["COMPLETE"] * 4
    assert [("reason" in trial.user_attrs) for trial in study.trials] == [False, True, False, False]
    assert study.trials[1].value == pytest.approx(10 * study.trials[0].value)
