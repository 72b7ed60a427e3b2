"""The command line: all commands. Floor 11."""

from __future__ import annotations

import click

from harness import __version__
from harness.commands import check, inspect, outside, report, run, status, sweep, teacher
from harness.options import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """Benchmark and ablate few-step distillation of diffusion transformers."""


for _command in (
    run.run_command, sweep.sweep_command, status.status_command, report.report_command, check.check_command,
    inspect.list_command, inspect.describe_command, outside.evaluate_command, outside.test_method_command,
    inspect.cost_command, inspect.env_command, teacher.teacher_group,
):  # fmt: skip
    main.add_command(_command)
