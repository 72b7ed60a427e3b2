"""The searches of `harness sweep`: their trials, their confirmation, and what won."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import optuna

from harness.cli.options import say
from harness.errors import RunFailed
from harness.sweeps.confirm import confirm
from harness.sweeps.database import known_study, lines_of
from harness.sweeps.outcome import outcome_of, snippet, write_outcome
from harness.sweeps.search import Searcher
from harness.sweeps.study import StudyPlan, study_plans

if TYPE_CHECKING:
    from harness.cli.cmd_sweep import Place


def run_searches(
    content: dict[str, Any], file: str, place: Place, dry_run: bool, as_json: bool
) -> None:
    """Makes, or only shows, the trials of a search.

    Raises RunFailed if trials are missing or all failed.
    """
    plans = study_plans(content, f"sweep file {file}", place.results, place.device)
    if dry_run:
        show_trials(plans, [known_study(one, place.results) for one in plans], as_json)
        return
    driver = place.driver()
    studies = [
        Searcher(one, place.results, place.device, driver, place.reuse, say, place.tracking).make()
        for one in plans
    ]
    lines = show_trials(plans, studies, as_json)
    done, asked = sum(line["answered"] for line in lines), sum(one.spec.trials for one in plans)
    if done < asked:
        raise RunFailed(f"{done} of {asked} trials were made; the same command makes the others")
    if not any(line["best"] for line in lines):
        raise RunFailed("no trial finished: their records say why")
    pairs = list(zip(plans, studies, strict=True))
    confirmed = confirm(
        pairs, place.results, place.device, driver, place.reuse, say, place.tracking
    )
    outcomes = [
        outcome_of(one, study, runs) for (one, study), runs in zip(pairs, confirmed, strict=True)
    ]
    if driver.lost:
        say(f"processes that died on the way: {len(driver.lost)}")
    paths = [write_outcome(outcome, place.results) for outcome in outcomes]
    say(
        f"wrote {', '.join(map(str, paths))}; `harness report {place.results} --publish` shows them"
    )
    if not as_json:
        click.echo(snippet(outcomes))


def show_trials(
    plans: Sequence[StudyPlan], studies: Sequence[optuna.Study | None], as_json: bool
) -> list[dict[str, Any]]:
    """Prints a line for each trial, and returns the lines."""
    lines = [
        line
        for one, study in zip(plans, studies, strict=True)
        if study is not None
        for line in lines_of(one, study)
    ]
    if as_json:
        click.echo(json.dumps(lines, indent=1))
        return lines
    for line in lines:
        shown = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in line.items()
            if name not in ("study", "trial", "state", "answered", "best")
        )
        click.echo(
            f"{'*' if line['best'] else ' '} {line['study']} "
            f"trial {line['trial']} {line['state']}: {shown}"
        )
    click.echo(
        f"{sum(line['answered'] for line in lines)} of {sum(one.spec.trials for one in plans)} "
        f"trials made in {len(plans)} studies; * is best, or on the front"
    )
    return lines
