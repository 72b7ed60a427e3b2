"""Pages of searches: every trial, the confirmation, and the winners as defaults of a task.

They read the outcomes that `harness sweep` leaves. Tables of methods leave these runs out, since
their noise is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness.files import inside, write_text
from harness.report.markdown import prose, table_text
from harness.sweeps.outcome import Outcome, read_outcomes, snippet, verdict
from harness.sweeps.search import shown


def publish_searches(results: Path) -> list[Path]:
    """Writes `<results>/<task>/searches.md`; the records of trials are published like any others.

    Returns:
        The pages written. Raises UsageError for an outcome that cannot be read.
    """
    outcomes, pages = read_outcomes(results), []
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.task == task]
        page = inside(results / task, results) / "searches.md"
        write_text(page, searches_page(task, here))
        pages.append(page)
    return pages


def searches_page(task: str, outcomes: Sequence[Outcome]) -> str:
    """The page of a task's searches, in Markdown."""
    parts = [
        f"# Searches on {prose(task)}",
        "Made by `harness report --publish` from the outcomes in `searches/`; the records of all "
        "runs are in `records.jsonl`. Runs of searches have noise and seeds that no table uses.",
    ]
    if winners := snippet(outcomes):
        parts.append(
            "## Winners\n\nOptions that differ from their methods' own, for a task file. "
            f"Beside each stand its value and the first trial's.\n\n```yaml\n{winners}\n```"
        )
    return "\n\n".join([*parts, *map(_study, outcomes)]) + "\n"


def _study(outcome: Outcome) -> str:
    """The section of one study."""
    space = "; ".join(
        f"{name.removeprefix('options.')} {_space(of)}" for name, of in outcome.space.items()
    )
    text = (
        f"{len(outcome.trials)} trials of {outcome.asked}, budget {outcome.budget}, "
        f"seeds {', '.join(map(str, outcome.seeds))}. Space: {space}. {verdict(outcome)}."
    )
    parts = [f"## {prose(outcome.study)}", prose(text), _table(trials_table(outcome))]
    if outcome.confirmed:
        parts += [
            f"Confirmation, budget {outcome.confirm_budget}:",
            _table(confirmed_table(outcome)),
        ]
    return "\n\n".join(parts)


def trials_table(outcome: Outcome) -> pd.DataFrame:
    """A row for each trial: number, state, objectives, values of the space, reason."""
    return pd.DataFrame(
        {
            "trial": line.trial,
            "state": line.state + (", best" if line.best else ""),
            **{name: _number(line.values.get(name)) for name in outcome.objectives},
            "options": shown(line.params),
            "reason": line.reason,
            "runs": ", ".join(line.run_ids),
        }
        for line in outcome.trials
    )


def confirmed_table(outcome: Outcome) -> pd.DataFrame:
    """A row for each confirmed trial: its mean, and the value on each seed."""
    seeds = sorted({seed for one in outcome.confirmed for seed in one.values})
    return pd.DataFrame(
        {
            "trial": f"{one.trial}{', winner' if one.trial == outcome.winner else ''}",
            "mean": _number(one.mean),
            **{f"seed {seed}": _number(one.values.get(seed)) for seed in seeds},
            "options": shown(one.params),
            "reason": one.reason,
            "runs": ", ".join(one.run_ids),
        }
        for one in outcome.confirmed
    )


def _space(of: object) -> str:
    if isinstance(of, dict) and {"low", "high"} <= of.keys():
        return f"{of['low']} to {of['high']}{' (log)' if of.get('log') else ''}"
    return " | ".join(map(str, of)) if isinstance(of, list) else str(of)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(frame: pd.DataFrame) -> str:
    """A table without columns that are empty everywhere."""
    empty = [
        name for name in frame.columns if not frame[name].astype(bool).any() and name != "trial"
    ]
    return table_text(frame.drop(columns=empty))
