"""Searches by Optuna: what is tried, what is found again, and what a failure leaves."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from threading import Thread, Timer
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
import yaml
from click.testing import CliRunner

from harness.cli.main import main
from harness.errors import Busy, RunFailed, UsageError
from harness.records import read_record
from harness.runs.database import storage_of
from harness.runs.leases import leases_of
from harness.runs.run import Run
from harness.sweeps.search import Searcher, known_study, lines_of, objective, open_study, searches
from harness.tasks import Task
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
SPACE = {"options.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "options.heads": ["shared", "per_step"]}


def content(**changes: Any) -> dict[str, Any]:
    search = {"trials": 4, "objectives": {"fid": "minimize"}, "space": SPACE, **changes}
    return {"base": {"task": "tiny", "num_steps": 2, "budget": "steps=2", "method": "step-distillation"}, "search": search}


def searcher(folder: Path, **more: Any) -> Searcher:
    return Searcher(folder, CPU, storage_of(folder), **more)


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs are not made but answered: FID is how far log10 of the learning rate is from -2."""
    runs: list[Any] = []

    def execute(self: Run, reuse: bool = False, wait: bool = False) -> Any:
        runs.append(self.resolved)
        value = abs(float(torch.tensor(self.resolved.config.lr).log10()) + 2)  # type: ignore[attr-defined]
        metric = SimpleNamespace(mean=value)
        cost = SimpleNamespace(macs_per_sample=float(self.resolved.num_steps))
        return SimpleNamespace(run_id=self.resolved.run_id, metrics={"fid": metric}, cost=cost, method="step-distillation")

    monkeypatch.setattr(Run, "execute", execute)
    return runs


def test_a_search_makes_runs_and_marks_the_best(tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (search,) = searches(content(trials=3), "here", tmp_path, CPU)
    study = searcher(tmp_path).make(search)
    assert states(study) == ["COMPLETE"] * 3
    for trial in study.trials:
        (run_id,) = trial.user_attrs["run_ids"]
        record = read_record(tmp_path / "runs" / run_id / "record.json")
        assert record.metrics["fid"].mean == trial.value
        assert record.options["lr"] == trial.params["options.lr"]
    values = [trial.value for trial in study.trials]
    assert [line["best"] for line in lines_of(search, study)] == [value == min(values) for value in values]

    monkeypatch.setattr(Trainer, "train", lambda *args, **more: pytest.fail("trained again"))
    again = searcher(tmp_path).make(search)
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]


def test_trial_0_is_the_methods_defaults(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (search,) = searches(content(), "here", tmp_path, CPU)
    first = searcher(tmp_path).make(search).trials[0]
    assert first.params == {"options.lr": 3e-3, "options.heads": "per_step"}
    narrow = {"options.lr": {"low": 1e-2, "high": 1e-1, "log": True}, "options.heads": ["shared", "per_step"]}
    (search,) = searches(content(space=narrow), "here", tmp_path, CPU)
    first = searcher(tmp_path).make(search).trials[0]
    assert first.params["options.heads"] == "per_step"
    assert first.params["options.lr"] >= 1e-2


def test_a_cell_widens_the_space_of_its_own_study(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    given = content(space={"options.lr": SPACE["options.lr"]})
    del given["base"]["method"]
    own: dict[str, Any] = {"options.heads": ["shared", "per_step"]}
    given["cells"] = [{"method": "step-distillation", "space": own}, {"method": "ard", "options": {"history_layers": 2}}]
    wide, narrow = searches(given, "here", tmp_path, CPU)
    assert set(wide.spec.space) == {"options.lr", "options.heads"}
    assert set(narrow.spec.space) == {"options.lr"}
    assert set(searcher(tmp_path).make(wide).trials[0].params) == set(wide.spec.space)
    given["cells"][0]["space"] = {"options.heds": ["shared"]}
    with pytest.raises(UsageError, match="did you mean heads"):
        searches(given, "here", tmp_path, CPU)
    given["cells"][0]["space"] = ["shared"]
    with pytest.raises(UsageError, match="search: space"):
        searches(given, "here", tmp_path, CPU)


def test_the_seed_decides_what_is_tried(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    def tried(folder: str, **changes: Any) -> list[Any]:
        (search,) = searches(content(trials=8, **changes), "here", tmp_path / folder, CPU)
        return [trial.params for trial in searcher(tmp_path / folder).make(search).trials]

    first = tried("a")
    assert tried("b") == first
    assert tried("c", seed=1)[1:] != first[1:]
    assert len({str(params) for params in first}) == 8


def test_more_trials_later_go_on_where_it_stopped(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (whole,) = searches(content(trials=7), "here", tmp_path / "whole", CPU)
    expected = [trial.params for trial in searcher(tmp_path / "whole").make(whole).trials]
    for trials in (3, 7):
        (search,) = searches(content(trials=trials), "here", tmp_path / "parts", CPU)
        study = searcher(tmp_path / "parts").make(search)
        assert [trial.params for trial in study.trials] == expected[:trials]


def test_a_trial_that_was_interrupted_is_taken_up_again(tiny: Task, tmp_path: Path, executed: list[Any],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (search,) = searches(content(), "here", tmp_path, CPU)
    answered = Run.execute

    def interrupted(self: Run, *args: Any) -> Any:
        if len(executed) == 2:
            raise KeyboardInterrupt
        return answered(self, *args)

    monkeypatch.setattr(Run, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        searcher(tmp_path).make(search)
    asked = open_study(search, storage_of(tmp_path)).trials[2].params
    monkeypatch.setattr(Run, "execute", answered)
    study = searcher(tmp_path).make(search)
    assert states(study) == ["COMPLETE"] * 4
    assert study.trials[2].params == asked
    assert len({resolved.run_id for resolved in executed}) == 4


def test_a_trial_without_all_its_values_is_given_up(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (search,) = searches(content(trials=2), "here", tmp_path, CPU)
    open_study(search, storage_of(tmp_path)).ask()
    assert states(searcher(tmp_path).make(search)) == ["FAIL", "COMPLETE"]


def test_values_that_fit_alone_but_not_together_are_a_failed_trial(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    space = {"options.trajectory": ["states", "predictions"], "options.parametrization": ["direct", "teacher"]}
    given = content(trials=6, space=space, sampler="random")
    given["base"]["options"] = {"heads": "shared"}
    with pytest.raises(UsageError, match="give trajectory 'states'"):  # all highest, which is tried out
        searches(given, "here", tmp_path, CPU)
    given["search"]["space"]["options.trajectory"] = ["states", "predictions", "states"]
    (search,) = searches(given, "here", tmp_path, CPU)
    study = searcher(tmp_path).make(search)
    assert set(states(study)) == {"COMPLETE", "FAIL"}
    assert len(study.trials) == 6
    assert states(searcher(tmp_path).make(search)) == states(study)


def test_a_trial_that_another_process_finishes_meanwhile_is_left_as_it_is(tiny: Task, tmp_path: Path, executed: list[Any],
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (search,) = searches(content(trials=3), "here", tmp_path, CPU)
    answered = Run.execute

    def finished_elsewhere(self: Run, *args: Any) -> Any:
        found, study = answered(self, *args), open_study(search, storage_of(tmp_path))
        if len(executed) == 2:
            study.tell(study.trials[-1].number, 0.125)
        return found

    monkeypatch.setattr(Run, "execute", finished_elsewhere)
    study = searcher(tmp_path).make(search)
    assert states(study) == ["COMPLETE"] * 3
    assert study.trials[1].value == 0.125


def test_a_failure_is_a_trial_and_the_search_goes_on(tiny: Task, tmp_path: Path, executed: list[Any],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (search,) = searches(content(), "here", tmp_path, CPU)
    answered = Run.execute

    def fails(self: Run, *args: Any) -> Any:
        found = answered(self, *args)
        if len(executed) == 2:
            raise RunFailed("the loss is not finite")
        return found

    monkeypatch.setattr(Run, "execute", fails)
    study = searcher(tmp_path).make(search)
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert not lines_of(search, study)[1]["best"]


def test_two_workers_share_a_study(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (search,) = searches(content(trials=10), "here", tmp_path, CPU)
    workers = [Thread(target=searcher(tmp_path).make, args=(search,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    study = open_study(search, storage_of(tmp_path))
    assert states(study) == ["COMPLETE"] * 10
    assert len({str(trial.params) for trial in study.trials}) == 10


def test_seeds_are_averaged(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (search,) = searches({**content(trials=1), "seeds": [0, 5]}, "here", tmp_path, CPU)
    study = searcher(tmp_path).make(search)
    assert [resolved.settings.seed for resolved in executed] == [0, 5]
    assert len(study.trials[0].user_attrs["run_ids"]) == 2


def test_several_objectives_have_a_front(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    changes = {"objectives": {"fid": "minimize", "macs": "minimize"}, "space": {"num_steps": [1, 2], "options.lr": SPACE["options.lr"]}}
    (search,) = searches(content(**changes, trials=8), "here", tmp_path, CPU)
    study = searcher(tmp_path).make(search)
    points = [tuple(trial.values) for trial in study.trials]
    dominated = [any(a <= c and b <= d and (a, b) != (c, d) for a, b in points) for c, d in points]
    assert [line["best"] for line in lines_of(search, study)] == [not worse for worse in dominated]


def test_a_run_below_the_median_is_pruned(tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials 0 to 3 fill the median; the fourth is worse at its first milestone, and its record says so."""
    (search,) = searches({**content(trials=5, prune=True), "base": {**content()["base"], "budget": "steps=8"}}, "here", tmp_path, CPU)
    calls = itertools.count()
    judged = Run._judged

    def quality(self: Run, trainer: Any, found: dict[str, float]) -> dict[str, float]:
        return judged(self, trainer, {**found, "fid": float(next(calls))})

    monkeypatch.setattr(Run, "_judged", quality)
    study = searcher(tmp_path).make(search)
    assert states(study) == ["COMPLETE"] * 4 + ["PRUNED"]
    reasons = [read_record(path).reason for path in (tmp_path / "runs").glob("*/record.json")]
    assert sum("pruned: after 0.125 of the budget its fid was worse" in reason for reason in reasons) == 1


def test_other_codes_trials_are_not_mixed_in(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (search,) = searches(content(trials=1), "here", tmp_path, CPU)
    study = searcher(tmp_path).make(search)
    study._storage.set_trial_user_attr(open_study(search, storage_of(tmp_path)).ask()._trial_id, "code", "older")
    with pytest.raises(UsageError, match="was begun by other code"):
        searcher(tmp_path).make(search)
    searcher(tmp_path, reuse=True).make(search)


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"trial": 3}, "unknown option 'trial' in here: search; did you mean trials"),
    ({"objectives": {"fidd": "minimize"}}, "unknown objective 'fidd'; did you mean fid"),
    ({"objectives": {"fid": "minimise"}}, "here: search"),
    ({"space": {"options.lrr": [1]}}, "unknown option 'lrr'"),
    ({"space": {"num_steps": [1, 3, 2]}}, "num_steps is 3, but must divide"),
    ({"space": {"num_steps": {"low": 1, "high": 4}}}, "num_steps is 3, but must divide"),
    ({"space": {"options.lr": {"low": 1.0, "high": 2.0}}}, "lr is 2.0"),
    ({"space": {"options.lr": {"low": 1e-1, "high": 1e-4}}}, "here: search: space"),
    ({"prune": True, "objectives": {"fid": "minimize", "macs": "minimize"}}, "prune looks at the curve of one objective"),
    ({"prune": True, "objectives": {"macs": "minimize"}}, "must be one of: fid"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(changes: dict[str, Any], complaint: str, tiny: Task, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=complaint):
        searches(content(**changes), "here", tmp_path, CPU)


def test_several_seeds_are_not_pruned(tiny: Task, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a trial has 2 seeds"):
        searches({**content(prune=True), "seeds": [0, 1]}, "here", tmp_path, CPU)


def test_an_objective_that_a_record_lacks(executed: list[Any]) -> None:
    with pytest.raises(UsageError, match="unknown objective 'kidd'; did you mean kid"):
        objective(SimpleNamespace(cost=None, metrics={"kid": 1}), "kidd")  # type: ignore[arg-type]


def test_the_command(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content()))
    words = ["sweep", str(tmp_path / "s.yaml"), "--results", str(tmp_path / "results")]
    dry = CliRunner().invoke(main, [*words, "--dry-run"])
    assert dry.output.splitlines()[-1].startswith("0 of 4 trials made in 1 studies")
    assert not executed
    assert not (tmp_path / "results").exists()
    made = CliRunner().invoke(main, words)
    assert "4 of 4 trials made in 1 studies" in made.output
    assert sum(line.startswith("* step-distillation-2-") for line in made.output.splitlines()) == 1


def test_a_database_that_cannot_be_opened(tiny: Task, tmp_path: Path) -> None:
    (search,) = searches(content(), "here", tmp_path, CPU)
    with pytest.raises(UsageError, match="cannot open the study's database"):
        open_study(search, f"sqlite:///{tmp_path / 'nowhere' / 's.db'}")


def test_a_search_outlives_its_server(
    tiny: Task, tmp_path: Path, executed: list[Any], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL is killed while a run is made, and comes back when its values are to be told."""
    storage, answered, timers = server.database(), Run.execute, []

    def killing(self: Run, *args: Any) -> Any:
        if len(executed) == 1:
            server.kill()
            timers.append(Timer(1.0, server.start))
            timers[0].start()
        return answered(self, *args)

    monkeypatch.setattr(Run, "execute", killing)
    (search,) = searches(content(), "here", tmp_path, CPU)
    study = Searcher(tmp_path, CPU, storage).make(search)
    timers[0].join()
    assert states(study) == ["COMPLETE"] * 4
    assert len(executed) == 4


def test_a_trial_whose_run_was_taken_over_is_tried_again(tiny: Task, tmp_path: Path, executed: list[Any],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    answered, refused = Run.execute, []

    def busy_once(self: Run, *args: Any) -> Any:
        if len(executed) == 1 and not refused:
            refused.append(self.resolved.run_id)
            raise Busy("taken over")
        return answered(self, *args)

    monkeypatch.setattr(Run, "execute", busy_once)
    (search,) = searches(content(), "here", tmp_path, CPU)
    assert states(searcher(tmp_path).make(search)) == ["COMPLETE"] * 4
    assert refused[0] == executed[1].run_id


def test_looking_makes_nothing(tiny: Task, tmp_path: Path, executed: list[Any]) -> None:
    (search,) = searches(content(), "here", tmp_path, CPU)
    storage = storage_of(tmp_path)
    assert known_study(search, storage) is None
    assert not (tmp_path / "harness.db").exists()
    with leases_of(tmp_path).holding("run"):
        assert known_study(search, storage) is None
    made = searcher(tmp_path).make(search)
    found = known_study(search, storage)
    assert found is not None
    assert found.trials == made.trials
    assert known_study(replace(search, name="another"), storage) is None
