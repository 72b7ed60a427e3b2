"""The report of one task, computed once from its records; the formats only render it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pandas as pd

from harness.records import Record
from harness.report.agreement import agreement_table
from harness.report.apart import Apart, apart_table
from harness.report.best import Best, best_rows, best_table, leaders, ranked_by_kind
from harness.report.claims import claims_table, read_claims
from harness.report.compare import (
    against_best_table,
    compared_with_best,
    equal_compute,
    equal_compute_table,
    equal_images_table,
)
from harness.report.labels import guidance_of
from harness.report.notes import notes
from harness.report.pairs import CROWD, Compared, compared_neighbours
from harness.report.plots import Plot, task_plots
from harness.report.rows import (
    Row,
    headline,
    is_trial,
    reference_record,
    rows_and_apart,
)
from harness.report.statistics import holm
from harness.report.tables import (
    KEYS,
    QUALITY,
    differences_table,
    diversity,
    error_split_table,
    exposure_table,
    floor_table,
    plain_heading,
    results_table,
)

CLAIMS = Path(__file__).parents[2] / "baselines" / "claims.yaml"
"""The published claims; an installed package has no such file."""
MOST_GRIDS = 6
"""Sample grids of a task that a page shows."""
MOST_RANKED = 20
"""Lines of the ranking that a page shows."""
GRIDS = (
    "Samples of noise set 0. "
    "The upper row is the method's, the lower one the task's reference from the same noise."
)


@dataclass(frozen=True)
class Section:
    """A table with its heading, the sentences that explain it, and one to stand below it.

    Attributes:
        detail: whether it stands among the details, which a reader opens.
        of_results: whether its columns are some of `TaskReport.results`.
    """

    heading: str
    text: str
    table: pd.DataFrame
    below: str = ""
    detail: bool = False
    of_results: bool = False


@dataclass(frozen=True)
class TaskReport:
    """What the records of one task show."""

    task: str
    rows: tuple[Row, ...]
    apart: tuple[Apart, ...] = ()

    @classmethod
    def of(cls, records: Sequence[Record]) -> TaskReport:
        """The report of one task's records."""
        rows, apart = rows_and_apart(records)
        return cls(records[0].task, tuple(rows), tuple(apart))

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
    def unguided(self) -> list[Row]:
        """Trained rows that aim at the data where the teacher is guided: they have another aim."""
        if guidance_of(self.task) == 1:
            return []
        return [row for row in self.rows if row.training[0] and row.records[0].target == "data"]

    @cached_property
    def ranked(self) -> list[Row]:
        """The rows that are compared with each other."""
        apart = set(map(id, self.unguided))
        return [row for row in self.rows if id(row) not in apart]

    @cached_property
    def equal(self) -> list[Row]:
        """The largest group of ranked rows with equal total training FLOPs."""
        return equal_compute(self.ranked)

    @cached_property
    def with_best(self) -> list[Compared]:
        """Rows of equal compute against the best of their number of steps."""
        return compared_with_best(self.equal, self.headline)

    @cached_property
    def pairs(self) -> tuple[list[Compared], int]:
        """Ranked rows that differ in one thing, and how many such pairs are left out."""
        return compared_neighbours(self.ranked, self.headline)

    @cached_property
    def p_values(self) -> list[float]:
        """All p values of the page."""
        return [
            pair.difference.p_value for pair in (*self.with_best, *self.pairs[0]) if pair.difference
        ]

    @cached_property
    def largest_p(self) -> float:
        """The largest p that Holm's procedure over the whole page rejects."""
        return holm(self.p_values, unseen=self.pairs[1])

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
    def best(self) -> list[Best]:
        """The rows that a page speaks of first; none of trials, which rank nothing."""
        if all(is_trial(row.records[0]) for row in self.finished):
            return []
        return best_rows(self.ranked, self.headline, self.reference)

    @cached_property
    def grids(self) -> list[Row]:
        """The rows whose samples are shown: the best of each number of steps and kind.

        Then come the best of other methods, the best methods first.
        """
        ranked = ranked_by_kind(self.ranked, self.headline, self.reference)
        best = {id(of[0]): of[0] for of in ranked.values() if of[0].training[0]}
        methods = {row.records[0].method for row in best.values()}
        for row in sorted(self.finished, key=lambda row: row.interval(self.headline).mean):
            if row.records[0].method not in methods:
                methods.add(row.records[0].method)
                best[id(row)] = row
        return list(best.values())[:MOST_GRIDS]

    @cached_property
    def sections(self) -> list[Section]:
        """The tables in the order of a page, without empty ones."""
        first = self._best() if self.best else ()
        compared = (*first, *self._of_equal_compute(), *self._of_all_rows()) if self.rows else ()
        apart = Section(
            "Not comparable with these tables",
            "Each of these has another N, size or identity of a metric than most records, "
            "and stands in no other table. The last column says what differs.",
            apart_table(self.apart),
        )
        return [section for section in (*compared, apart) if len(section.table)]

    def _best(self) -> Iterator[Section]:
        seeds = {len(row.records) for row in self.finished if row.training[0]}
        yield Section(
            "Best at 1, 2 and 4 steps",
            f"The lowest {plain_heading(self.headline)} of its kind, and the next one. "
            + (
                "Trained rows have one seed here, so their order may change with another."
                if seeds == {1}
                else "How sure the order is, the distance to the best says below."
            ),
            best_table(self.best, self.headline),
        )

    def _of_equal_compute(self) -> Iterator[Section]:
        ranking = equal_compute_table(self.equal, self.headline)
        left = len(ranking) - MOST_RANKED
        more = f"{left} more stand in the details, under All rows." if left > 0 else ""
        yield Section(
            "Methods at equal training FLOPs",
            "Total training FLOPs agree within 2 %, with those of the trajectories. "
            "The best of its columns ranks a method. "
            "Seconds are those of the machine in the notes; whether it was idle is not recorded.",
            ranking[:MOST_RANKED],
            " ".join(filter(None, (self._unguided_named(), more))),
        )
        yield Section(
            "Distance to the best",
            "Rows with two seeds or more, none of them diverged, "
            "against the best of their number of steps: "
            "difference with 95 % interval, paired within training seed and noise set. "
            f"{self._family()} "
            "A row whose distance is not shown may still be far from the best if seeds differ "
            "much.",
            against_best_table(self.with_best, self.headline, self.largest_p),
        )
        yield Section(
            "After equally many images",
            "From the curves of noise set 0. "
            "A run that is measured before its end has not lowered its learning rate yet, "
            "so long runs look worse here than short ones would.",
            equal_images_table(self.equal, self.headline),
            detail=True,
        )

    def _of_all_rows(self) -> Iterator[Section]:
        table, keys = self.results, KEYS[:3]
        quality = [heading for heading, _ in QUALITY.values() if heading in table] + [
            name for name in ("status",) if name in table
        ]
        spread = [heading for heading, _ in diversity().values() if heading in table]
        cost = [name for name in table.columns if name not in (*KEYS, *quality, *spread)]
        named = self._unguided_named()
        parts = partial(Section, text="", detail=True, of_results=True)
        yield parts("All rows", table=table[[*KEYS, *quality]], below=named)
        yield Section(
            "Floor",
            "Held-out real samples against the same reference. "
            "These numbers depend on N, so do not compare them with other tables.",
            floor_table(self.finished),
            detail=True,
        )
        if spread:
            yield parts("Fidelity and diversity", table=table[[*keys, *spread]])
        if cost:
            yield parts("Cost", table=table[[*keys, *cost]])
        yield Section(
            "Exposure bias",
            "Root mean squared error of a pixel against the teacher's points.",
            exposure_table(self.finished),
            detail=True,
        )
        yield Section(
            "Error of the ODE map",
            "Its parts, as root mean squares; they do not add up.",
            error_split_table(self.finished),
            detail=True,
        )
        yield Section(
            "Differences",
            "Rows that differ in one thing (a method or an option), "
            "paired within training seed and noise set. "
            f"{self._family()} "
            f"Of more than {CROWD} such rows, each is shown against the best alone, "
            "but the correction counts all pairs. "
            "The last column is the ratio of mean excesses; its interval is by the delta method.",
            differences_table(self.pairs[0], self.headline, self.largest_p, self.reference),
            detail=True,
        )

    def _family(self) -> str:
        """What the correction of p values covers."""
        printed, unseen = len(self.p_values), self.pairs[1]
        more = f" and {unseen} pairs that it leaves out" if unseen else ""
        return f"Holm's correction covers all {printed} p values of this page{more}."

    def _unguided_named(self) -> str:
        """The rows that no ranked table holds, since the teacher is guided and they are not."""
        labels = sorted({row.label for row in self.unguided})
        if not labels:
            return ""
        return (
            "In no ranked table, since the teacher is guided "
            f"and these learn the data without guidance: {'; '.join(labels)}."
        )


def reports_of(records: Sequence[Record]) -> list[TaskReport]:
    """A report for each task, by name."""
    tasks = sorted({record.task for record in records})
    return [TaskReport.of([record for record in records if record.task == task]) for task in tasks]


def leaders_table(reports: Sequence[TaskReport]) -> pd.DataFrame:
    """The best of each task by what a row learns from, and the tasks' teachers."""
    lines = []
    for report in reports:
        if report.best:
            for line in leaders(report.ranked, report.headline, report.reference):
                lines.append({"task": report.task, **line})
    return pd.DataFrame(lines).fillna("")


def agreement_section(reports: Sequence[TaskReport]) -> list[Section]:
    """Whether tasks order methods alike; empty where they have too few methods in common."""
    table = agreement_table({report.task: report.equal for report in reports})
    text = (
        "Spearman's rank correlation between tasks, "
        "over the methods at equal training FLOPs that both have. "
        "It describes these rows alone: they were chosen by hand, so it has no p value."
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
