"""Equal tuning: what methods declare, where searches start, and how the best is confirmed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from click.testing import CliRunner
from inprocess import Here, driver
from searched import CPU, SPACE, content, fail_at, made

from harness.cli.main import main
from harness.errors import RunFailed, UsageError
from harness.methods import METHODS
from harness.methods.parts.options import Span
from harness.records import published_records
from harness.sweeps.confirm import Confirmed, chosen, confirm
from harness.sweeps.outcome import outcome_of, read_outcomes, snippet, write_outcome
from harness.sweeps.study import StudyPlan, study_plans
from harness.tasks import Task
from harness.training.case import Case
from harness.training.sampling_checks import tunes

TUNES = {
    "lr": Span(1e-3, 1e-1, log=True),
    "heads": ("per_step", "shared"),
    "weight_decay": Span(0.0, 1.0),
}
CONFIRM = {"top": 2, "seeds": [1001, 1002], "budget": "steps=4"}


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step distillation declares `TUNES`."""
    monkeypatch.setattr(METHODS["step-distillation"], "tunes", TUNES)


def planned(folder: Path, **changes: Any) -> StudyPlan:
    (plan,) = study_plans(content(**changes), "here", folder, CPU)
    return plan


def confirmed(plan: StudyPlan, study: optuna.Study, folder: Path) -> Sequence[Confirmed]:
    (found,) = confirm([(plan, study)], folder, CPU, driver())
    return found


def test_searches_have_seeds_and_noise_of_their_own(
    tiny: Task, tmp_path: Path, executed: list[Any]
) -> None:
    made(planned(tmp_path, trials=2), tmp_path)
    assert {(run.task.purpose, run.settings.seed) for run in executed} == {("tune", 1000)}


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("base", {"purpose": "evaluate"}, "leave purpose out"),
        ("cells", [{"purpose": "evaluate"}], "leave purpose out"),
        ("axes", {"purpose": ["tune", "evaluate"]}, "leave purpose out"),
        ("seeds", [0], "needs seeds from 1000"),
    ],
)
def test_a_search_on_the_noise_or_seeds_of_tables_is_refused(
    place: str, value: Any, complaint: str, tiny: Task, tmp_path: Path
) -> None:
    given = content()
    given[place] = {**given["base"], **value} if place == "base" else value
    with pytest.raises(UsageError, match=complaint):
        study_plans(given, "here", tmp_path, CPU)


def test_the_space_is_what_the_method_declares(tiny: Task, tmp_path: Path, declared: None) -> None:
    given = content(space="tunes")
    given["cells"] = [
        {},
        {
            "space": {
                "options.heads": ["shared", "per_step"],
                "options.clip": {"low": 0.5, "high": 2},
            }
        },
    ]
    plain, own = study_plans(given, "here", tmp_path, CPU)
    assert plain.spec.model_dump(exclude_defaults=True)["space"] == {
        "options.lr": {"low": 1e-3, "high": 1e-1, "log": True},
        "options.heads": ["per_step", "shared"],
        "options.weight_decay": {"low": 0.0, "high": 1.0},
    }
    assert own.spec.space["options.heads"] == ["shared", "per_step"]
    assert set(own.spec.space) == {*plain.spec.space, "options.clip"}
    assert own.defaults() == {
        "options.lr": 3e-3,
        "options.heads": "shared",
        "options.weight_decay": 0.0,
        "options.clip": 1.0,
    }


def test_a_method_without_tunes_has_no_such_space(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["step-distillation"], "tunes", {})
    with pytest.raises(UsageError, match="space is tunes, but step-distillation declares none"):
        planned(tmp_path, space="tunes")


def test_trial_0_has_the_methods_own_options_not_the_tasks(
    tiny: Task, tiny_folder: Path, tmp_path: Path, executed: list[Any]
) -> None:
    """What the space leaves out stays the task's."""
    spec = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    spec["defaults"] = {"step-distillation": {"lr": 0.05, "clip": 2.0}}
    (tiny_folder / "tiny.yaml").write_text(yaml.safe_dump(spec))
    plan = planned(tmp_path, trials=1)
    study = made(plan, tmp_path)
    assert (executed[0].config.lr, executed[0].config.clip) == (3e-3, 2.0)
    assert outcome_of(plan, study, []).defaults == {"clip": 2.0}


def test_confirm_takes_trial_0_and_the_best_each_setting_once(
    tiny: Task, tmp_path: Path, executed: list[Any]
) -> None:
    plan = planned(tmp_path, trials=6, confirm=CONFIRM)
    study = made(plan, tmp_path)
    order = sorted(range(6), key=lambda number: study.trials[number].value)
    assert {trial.number for trial in chosen(plan, study)} == {0, *order[:2]}
    study.add_trial(study.trials[order[0]])  # the same setting once more
    assert {trial.number for trial in chosen(plan, study)} == {0, *order[:2]}
    assert [trial.number for trial in chosen(planned(tmp_path), study)] == []


def test_the_best_mean_of_the_confirmation_wins(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are made at the confirmation's budget and seeds, once; there trial 0 is the best."""
    plan = planned(tmp_path, trials=4, confirm=CONFIRM)
    study = made(plan, tmp_path)
    best = study.best_trial.number
    assert best != 0
    started = len(executed)
    monkeypatch.setattr(
        "searched.distance",
        lambda run: abs(run.resolved.config.lr - 3e-3) + run.resolved.settings.seed,
    )
    found = confirmed(plan, study, tmp_path)
    runs = executed[started:]
    assert {(run.settings.total_steps, run.task.purpose) for run in runs} == {(4, "tune")}
    assert sorted(run.settings.seed for run in runs) == sorted([1001, 1002] * len(found))
    for one in found:
        off = abs(one.params["options.lr"] - 3e-3)
        assert one.values == pytest.approx({1001: 1001.5 + off, 1002: 1002.5 + off})
        assert one.mean == pytest.approx(1002 + off)
    outcome = outcome_of(plan, study, found)
    assert (outcome.winner, outcome.defaults) == (0, {})
    assert f"{best}" in {str(one.trial) for one in found}
    assert confirmed(plan, study, tmp_path) == found
    assert len(executed) == started + len(runs)


def test_a_setting_whose_confirmation_fails_does_not_win(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, trials=4, confirm=CONFIRM)
    study = made(plan, tmp_path)
    best = next(place for place, one in enumerate(chosen(plan, study)) if one.number)
    fail_at(monkeypatch, 4 + 2 * best + 1, lambda: RunFailed("the loss is not finite"), executed)
    found = confirmed(plan, study, tmp_path)
    assert [one.mean is None for one in found] == [place == best for place in range(len(found))]
    assert found[best].reason == "the loss is not finite"
    assert list(found[best].values) == [1002]
    assert outcome_of(plan, study, found).winner != found[best].trial


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"confirm": {**CONFIRM, "seeds": [1000]}}, "seed 1000 has chosen the best trials"),
        ({"confirm": {**CONFIRM, "seeds": [3]}}, "needs seeds from 1000"),
        ({"confirm": {**CONFIRM, "budget": "long"}}, "'long'"),
        ({"confirm": {**CONFIRM, "top": 0}}, "confirm.top is 0"),
        (
            {"confirm": CONFIRM, "objectives": {"fid": "minimize", "macs": "minimize"}},
            "confirm needs a single objective",
        ),
        ({"space": {**SPACE, "purpose": ["tune"]}}, "leave purpose out"),
    ],
)
def test_a_confirmation_that_does_not_fit_is_refused_before_anything_runs(
    changes: dict[str, Any], complaint: str, tiny: Task, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=complaint):
        planned(tmp_path, **changes)


def test_another_confirmation_goes_on_with_the_same_study(tiny: Task, tmp_path: Path) -> None:
    plans = [planned(tmp_path, **more) for more in ({}, {"confirm": CONFIRM}, {"trials": 9})]
    assert len({plan.name for plan in plans}) == 1


def test_the_command_names_the_winners_and_report_publishes_all_trials(
    tiny: Task, tmp_path: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cli.cmd_sweep.Local", lambda shares: Here())
    fail_at(monkeypatch, 2, lambda: RunFailed("the loss is not finite"), executed)
    given = content(trials=4, confirm={"top": 1, "seeds": [1001]})
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(given))
    results = tmp_path / "results"
    words = ["sweep", str(tmp_path / "s.yaml"), "--results", str(results), "--device", "cpu"]
    swept = CliRunner().invoke(main, words)
    assert swept.exit_code == 0, swept.output
    (outcome,) = read_outcomes(results)
    assert outcome.winner
    block = "defaults:" + swept.output.partition("defaults:")[2]
    assert yaml.safe_load(block.partition("\nwrote")[0])["defaults"] == {
        "step-distillation": outcome.defaults
    }
    assert outcome.defaults == {
        name.removeprefix("options."): value
        for name, value in outcome.trials[outcome.winner].params.items()
        if value != "shared"
    }
    CliRunner().invoke(main, ["report", str(results), "--publish"], catch_exceptions=False)
    assert {one.run_id for one in published_records(results)} == {run.run_id for run in executed}
    page = (results / "tiny" / "searches.md").read_text()
    assert snippet([outcome]) in page
    assert "the loss is not finite" in page
    for line in outcome.trials:
        assert f"| {line.trial} " in page
        assert all(f" {run_id} " in page for run_id in line.run_ids)


def test_a_pruned_trial_keeps_its_last_value(tiny: Task, tmp_path: Path) -> None:
    plan = planned(tmp_path, trials=1)
    study = made(plan, tmp_path)
    pruned = study.ask(plan.spec.distributions())
    pruned.report(7.5, 125)
    study.tell(pruned, state=optuna.trial.TrialState.PRUNED)
    outcome = outcome_of(plan, study, [])
    assert [(line.state, line.best) for line in outcome.trials] == [
        ("complete", True),
        ("pruned", False),
    ]
    assert outcome.trials[1].values == {"fid": 7.5}
    assert outcome.winner == 0


def test_a_file_that_is_no_outcome(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    plan = planned(tmp_path, trials=1)
    outcome = outcome_of(plan, made(plan, tmp_path), [])
    path = write_outcome(outcome, tmp_path)
    assert read_outcomes(tmp_path) == [outcome]
    path.write_text("{}")
    with pytest.raises(UsageError, match="is no outcome of a search"):
        read_outcomes(tmp_path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, ""),
        ({"heads": None}, "tunes has 2 names"),
        ({"head": ("shared",)}, "tunes names head, which is no option"),
        ({"heads": ("per_step", "both")}, "tunes has heads 'both'"),
        ({"lr": Span(1e-3, 2.0)}, "tunes has lr 2.0"),
        ({"lr": Span(1e-4, 1e-3)}, "the default of lr is 0.003, which its tunes leave out"),
        ({"heads": ("per_step",)}, "the default of heads is 'shared'"),
        ({name: Span(0, 1) for name in "abc"}, "tunes has 6 names"),
    ],
)
def test_the_check_of_what_a_method_declares(
    changes: dict[str, Any],
    complaint: str,
    tiny: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = {name: of for name, of in {**TUNES, **changes}.items() if of is not None}
    monkeypatch.setattr(METHODS["step-distillation"], "tunes", changed)
    case = Case("step-distillation", tiny, tmp_path)
    if not complaint:
        tunes(case)
        return
    with pytest.raises(AssertionError, match=complaint):
        tunes(case)
