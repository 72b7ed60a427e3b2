"""A task's records as a Markdown page, and as files that can be committed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness.files import write_aside, write_text
from harness.records import Record, publish_records
from harness.report.claims import claims_table, read_claims
from harness.report.compare import against_best_table, agreement_table, equal_compute_table, equal_images_table
from harness.report.plots import write_plots
from harness.report.rows import CROWD, counted, rows_of
from harness.report.tables import (
    KEYS,
    QUALITY,
    differences_table,
    diversity,
    error_split_table,
    exposure_table,
    floor_table,
    notes,
    results_table,
)

CLAIMS = Path(__file__).parent.parent.parent / "baselines" / "claims.yaml"
"""The file of claims of a checkout."""

AGAINST_BEST = (
    "Those with two seeds or more beside the best of their number of steps: difference and 95 % interval, paired within training seed and "
    "noise set, and p of a t test times the number of the others. What is not shown may be far from the best, if seeds differ much:"
)
"""What is said above `against_best_table`."""


def markdown_table(table: pd.DataFrame) -> str:
    """A table of text cells in Markdown."""
    return table.to_markdown(index=False, disable_numparse=True)


def by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by task name, sorted."""
    tasks = sorted({record.task for record in records})
    return {task: [record for record in records if record.task == task] for task in tasks}


def task_section(records: Sequence[Record]) -> str:
    """Results, differences and notes of one task. Raises NotComparable for mixed identities."""
    rows = rows_of(records)
    table = results_table(rows)
    quality, spread = ([heading for heading, _ in columns.values() if heading in table] for columns in (QUALITY, diversity()))
    quality += [column for column in ("status",) if column in table]
    cost = [column for column in table.columns if column not in (*KEYS, *quality, *spread)]
    parts = []
    equal = equal_compute_table(rows)
    if len(equal):
        parts += [
            "Methods at equal training FLOPs (within 2 %; trajectories are beside them), by the best of their columns:",
            markdown_table(equal),
        ]
        against = against_best_table(rows)
        if len(against):
            parts += [AGAINST_BEST, markdown_table(against)]
        said = ("The same after equally many images, from the curves of noise set 0. A run that is looked at before its end had not "
                "lowered its learning rate yet, so that long runs look worse than short ones would:")  # fmt: skip
        parts += [said, markdown_table(equal_images_table(rows)), "All rows:"]
    parts.append(markdown_table(table[[*KEYS, *quality]]))
    if any(row.finished for row in rows):
        parts += ["The floor, which compares with nothing above: these numbers depend on N.", markdown_table(floor_table(rows))]
    if spread:
        parts += ["Fidelity and diversity apart:", markdown_table(table[[*KEYS[:3], *spread]])]
    parts += ["What it costs:", markdown_table(table[[*KEYS[:3], *cost]])]
    exposure = exposure_table(rows)
    if len(exposure):
        parts += ["Exposure bias, as root mean squared error of a pixel against the teacher's points:", markdown_table(exposure)]
    split = error_split_table(rows)
    if len(split):
        parts += ["What the error of the ODE map is made of (root mean squares, which do not add up):", markdown_table(split)]
    differences = differences_table(rows)
    if len(differences):
        said = ("Rows that differ in one thing (a method or an option), paired within training seed and noise set. Holm's correction is "
                f"over those of one number of steps and one training; of more than {CROWD} such rows each stands beside the best alone, "
                "but all pairs count:")  # fmt: skip
        parts += [said, markdown_table(differences)]
    parts.append("\n".join(f"- {note}" for note in notes(rows)))
    return "\n\n".join(parts)


def page(records: Sequence[Record]) -> str:
    """The whole report: one section for each task."""
    sections = [f"## {task}\n\n{task_section(found)}" for task, found in by_task(records).items()]
    return "# Results\n\n" + "\n\n".join([*sections, *agreement(records)]) + "\n"


def agreement(records: Sequence[Record]) -> list[str]:
    """Whether tasks agree on the order of methods, as a section; none where they have too few in common."""
    table = agreement_table({task: rows_of(found) for task, found in by_task(records).items()})
    said = "Spearman's rank correlation between tasks, over methods at equal training FLOPs that both have:"
    return [f"## Agreement between tasks\n\n{said}\n\n{markdown_table(table)}"] if len(table) else []


def claims_section(records: Sequence[Record], file: Path = CLAIMS) -> list[str]:
    """Published claims beside the numbers here; none where the package has been installed without its file of claims."""
    if not file.is_file():
        return []
    said = "What papers say, and what was measured here. On another task only the direction of a claim can be checked:"
    return [f"## Claims\n\n{said}\n\n{markdown_table(claims_table(read_claims(file), records))}"]


def publish(records: Sequence[Record], results: Path) -> list[Path]:
    """Copies records and grids to `<results>/<task>/` and writes its README.md: what is meant to be committed.

    The page begins with what `<results>/<task>/findings.md` says, if somebody has written that.

    Returns:
        The pages written.
    """
    pages, parts = [], results.resolve().parts
    place = "/".join(parts[parts.index("results") :]) if "results" in parts else results.name
    for task, found in by_task(records).items():
        folder = results / task
        publish_records(folder, found)
        plots = "".join(f"\n{caption}\n\n![{name}]({name})\n" for name, caption in write_plots(rows_of(found), folder))
        pictures = plots + _copy_grids(found, results, folder)
        head = f"# Results on {task}\n\nMade by `harness report {place} --publish` from `{task}/records.jsonl`.\n\n"
        findings = folder / "findings.md"
        said = findings.read_text(encoding="utf-8").strip() + "\n\n" if findings.is_file() else ""
        write_text(folder / "README.md", head + said + task_section(found) + "\n" + pictures)
        pages.append(folder / "README.md")
    tasks = "\n".join(f"- [{task}]({task}/README.md): {len(found)} runs" for task, found in by_task(records).items())
    whole = [f"# Results\n\nMade by `harness report {place} --publish`.\n\n{tasks}", *agreement(records), *claims_section(records)]
    write_text(results / "README.md", "\n\n".join(whole) + "\n")
    return [*pages, results / "README.md"]


def _copy_grids(records: Sequence[Record], results: Path, folder: Path) -> str:
    """The sample grid of each row's first seed, as Markdown."""
    lines = []
    for row in rows_of(records):
        for record in row.finished[:1]:
            source, picture = results / "runs" / record.run_id / "samples.png", folder / "samples" / f"{record.run_id}.png"
            if source.exists():
                write_aside(picture, lambda aside, source=source: shutil.copyfile(source, aside))  # type: ignore[misc]
            if picture.exists():
                steps, batch = row.training
                trained = f", trained {steps} × {batch}" if steps else ""
                lines.append(f"{row.label}, {counted(row.num_steps)}{trained}:\n\n![samples](samples/{picture.name})")
    if not lines:
        return ""
    return "\nSamples of noise set 0; the lower row is the task's reference from the same noise.\n\n" + "\n\n".join(lines) + "\n"
