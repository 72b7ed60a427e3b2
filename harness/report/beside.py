"""A run beside the published rows of its task: what its number means."""

from __future__ import annotations

from pathlib import Path

from harness.files import inside
from harness.records import Record, published_records
from harness.report.apart import told_apart
from harness.report.best import ranked_by_kind
from harness.report.labels import counted
from harness.report.rows import headline, rows_of, without_trials
from harness.report.tables import QUALITY, plain_heading

SHIPPED = Path(__file__).parents[1] / "published"
"""The published records in an installed package, which `setup.py` copies there."""
PUBLISHED = SHIPPED if SHIPPED.is_dir() else Path(__file__).parents[2] / "results"
"""The published records; those of the repository where the package runs from there."""


def beside(record: Record, published: Path = PUBLISHED) -> list[str]:
    """Where a finished run stands among the published rows of its number of steps, in sentences.

    There are none if no published row compares with it.
    """
    folder = inside(published / record.task, published)
    found = without_trials(published_records(folder)) if folder.is_dir() else []
    others = [each for each in found if each.run_id != record.run_id]
    if not others or record not in told_apart([*others, record])[0]:
        return []
    rows, steps = rows_of(others), record.config["num_steps"]
    name = headline(rows)
    if name not in record.metrics:
        return []
    here = record.metrics[name].mean
    ranked = {
        kind: of for (count, kind), of in ranked_by_kind(rows, name, None).items() if count == steps
    }
    if not ranked:
        return []
    heading, (_, digits) = plain_heading(name), QUALITY[name]
    best = "; ".join(
        f"{kind} {of[0].label}, {of[0].text(name, digits)}" for kind, of in ranked.items()
    )
    trained = [row for of in ranked.values() for row in of if row.training[0]]
    lower = sum(row.interval(name).mean < here for row in trained)
    bills = [row.finished[0].cost for row in trained]
    flops = [cost.training.whole_flops for cost in bills if cost and cost.training]
    sentences = [f"The best published {heading} in {counted(steps)}: {best}."]
    if trained and flops and record.cost and record.cost.training:
        spent = record.cost.training.whole_flops
        sentences.append(
            f"This run has {here:.{digits}f}; {lower} of {len(trained)} trained rows there have a "
            f"lower one. They trained for up to {max(flops) / 1e12:.3g} TFLOPs, this run for "
            f"{spent / 1e12:.3g}."
        )
    return sentences
