"""The report of one task, computed once from its records; the formats only render it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from harness.records import Record
from harness.report.agreement import agreement_table
from harness.report.claims import claims_table, read_claims
from harness.report.compare import (
    against_best_table,
    equal_compute,
    equal_compute_table,
    equal_images_table,
)
from harness.report.notes import notes
from harness.report.pairs import CROWD
from harness.report.plots import Plot, task_plots
from harness.report.rows import Row, headline, reference_record, rows_of
from harness.report.statistics import metric_interval
from harness.report.tables import (
    KEYS,
    QUALITY,
    differences_table,
    diversity,
    error_split_table,
    exposure_table,
    floor_table,
    results_table,
)

CLAIMS = Path(__file__).parents[2] / "baselines" / "claims.yaml"
"""The published claims; an installed package has no such file."""
MOST_GRIDS = 6
"""Sample grids of a task that a page shows."""
GRIDS = (
    "Samples of noise set 0. "
    "The upper row is the method's, the lower one the task's reference from the same noise."
)


@dataclass(frozen=True)
class Section:
    """A table with its heading and the sentences that explain it."""

    heading: str
    text: str
    table: pd.DataFrame


@dataclass(frozen=True)
class TaskReport:
    """What the records of one task show."""

    task: str
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, records: Sequence[Record]) -> TaskReport:
        """The report of one task's records.

        Raises NotComparable if identities of a metric differ.
        """
        return cls(records[0].task, tuple(rows_of(records)))

    @cached_property
    def finished(self) -> list[Row]:
        """Rows with at least one finished record."""
        return [row for row in self.rows if row.finished]

    @cached_property
    def headline(self) -> str:
        """Name of the metric that rows are compared by; empty if no run finished."""
        return headline(self.finished) if self.finished else ""

    @cached_property
    def reference(self) -> Record | None:
        """The teacher's own output."""
        return reference_record(record for row in self.finished for record in row.finished)

    @cached_property
    def equal(self) -> list[Row]:
        """The largest group of trained rows with equal training FLOPs."""
        return equal_compute(self.rows)

    @cached_property
    def results(self) -> pd.DataFrame:
        """All rows with all columns."""
        return results_table(self.rows)

    @cached_property
    def notes(self) -> list[str]:
        """What a reader must know about the tables, a sentence each."""
        return notes(self.rows, self.headline) if self.finished else []

    @cached_property
    def plots(self) -> list[Plot]:
        """The curves that the records have data for."""
        return task_plots(self.finished, self.equal, self.headline) if self.finished else []

    @cached_property
    def grids(self) -> list[Row]:
        """The rows whose samples are shown: the best of each method, the best methods first."""
        best: dict[str, Row] = {}
        for row in sorted(
            self.finished, key=lambda row: metric_interval(row.finished, self.headline).mean
        ):
            best.setdefault(row.records[0].method, row)
        return list(best.values())[:MOST_GRIDS]

    @cached_property
    def sections(self) -> list[Section]:
        """The tables in the order of a page, without empty ones."""
        return [
            section
            for section in (*self._of_equal_compute(), *self._of_all_rows())
            if len(section.table)
        ]

    def _of_equal_compute(self) -> Iterator[Section]:
        yield Section(
            "Methods at equal training FLOPs",
            "Training FLOPs agree within 2 %; trajectories come on top. "
            "The best of its columns ranks a method.",
            equal_compute_table(self.equal, self.headline),
        )
        yield Section(
            "Distance to the best",
            "Rows with two seeds or more against the best of their number of steps: "
            "difference with 95 % interval, paired within training seed and noise set. "
            "p is that of a t test times the number of other rows. "
            "A row whose distance is not shown may still be far from the best if seeds differ "
            "much.",
            against_best_table(self.equal, self.headline),
        )
        yield Section(
            "After equally many images",
            "From the curves of noise set 0. "
            "A run that is measured before its end has not lowered its learning rate yet, "
            "so long runs look worse here than short ones would.",
            equal_images_table(self.equal, self.headline),
        )

    def _of_all_rows(self) -> Iterator[Section]:
        table, keys = self.results, KEYS[:3]
        quality = [heading for heading, _ in QUALITY.values() if heading in table] + [
            name for name in ("status",) if name in table
        ]
        spread = [heading for heading, _ in diversity().values() if heading in table]
        cost = [name for name in table.columns if name not in (*KEYS, *quality, *spread)]
        yield Section("All rows", "", table[[*KEYS, *quality]])
        yield Section(
            "Floor",
            "Held-out real samples against the same reference. "
            "These numbers depend on N, so do not compare them with other tables.",
            floor_table(self.finished),
        )
        if spread:
            yield Section("Fidelity and diversity", "", table[[*keys, *spread]])
        if cost:
            yield Section("Cost", "", table[[*keys, *cost]])
        yield Section(
            "Exposure bias",
            "Root mean squared error of a pixel against the teacher's points.",
            exposure_table(self.finished),
        )
        yield Section(
            "Error of the ODE map",
            "Its parts, as root mean squares; they do not add up.",
            error_split_table(self.finished),
        )
        yield Section(
            "Differences",
            "Rows that differ in one thing (a method or an option), "
            "paired within training seed and noise set. "
            "Holm's correction covers the rows of one number of steps and one training. "
            f"Of more than {CROWD} such rows, each is shown against the best alone, "
            "but the correction counts all pairs.",
            differences_table(self.rows, self.headline, self.reference),
        )


def reports_of(records: Sequence[Record]) -> list[TaskReport]:
    """A report for each task, by name."""
    tasks = sorted({record.task for record in records})
    return [TaskReport.of([record for record in records if record.task == task]) for task in tasks]


def agreement_section(reports: Sequence[TaskReport]) -> list[Section]:
    """Whether tasks order methods alike; empty where they have too few methods in common."""
    table = agreement_table({report.task: report.equal for report in reports})
    text = (
        "Spearman's rank correlation between tasks, "
        "over the methods at equal training FLOPs that both have."
    )
    return [Section("Agreement between tasks", text, table)] if len(table) else []


def claims_section(records: Sequence[Record], file: Path = CLAIMS) -> list[Section]:
    """Published claims beside the numbers here; empty where there is no file of claims."""
    if not file.is_file():
        return []
    text = (
        "What papers claim, and what was measured here. "
        "Another task can only confirm the direction of a claim."
    )
    return [Section("Claims", text, claims_table(read_claims(file), records))]
