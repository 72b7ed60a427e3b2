"""Records and rows in Python: the best method for each number of steps.

python examples/read_results.py results
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness.report.rows import load_records
from harness.report.tables import QUALITY
from harness.report.task_report import reports_of


def best(results: Path) -> list[str]:
    """A line for each task and number of steps: the trained row with the lowest headline metric."""
    lines = []
    for report in reports_of(load_records(results)):
        name, digits = report.headline, QUALITY[report.headline][1]
        trained = [row for row in report.finished if row.training[0] and not row.diverged]
        for steps in sorted({row.num_steps for row in trained}):
            rows = [row for row in trained if row.num_steps == steps]
            row = min(rows, key=lambda row: row.interval(name).mean)
            quality = f"{name} {row.text(name, digits)}"
            lines.append(f"{report.task}, {steps} steps: {row.label}, {quality}")
    return lines


if __name__ == "__main__":
    print("\n".join(best(Path(sys.argv[1]))))
