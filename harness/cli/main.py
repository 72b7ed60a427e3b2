"""The command line: all commands. Floor 11."""

from __future__ import annotations

import click

from harness import __version__
from harness.cli import cmd_check, cmd_evaluate, cmd_inspect, cmd_report, cmd_run, cmd_status, cmd_sweep, cmd_teacher
from harness.cli.options import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """Benchmark and ablate few-step distillation of diffusion transformers."""


for _command in (
    cmd_run.run_command, cmd_sweep.sweep_command, cmd_status.status_command, cmd_report.report_command, cmd_check.check_command,
    cmd_inspect.list_command, cmd_inspect.describe_command, cmd_evaluate.evaluate_command, cmd_evaluate.test_method_command,
    cmd_inspect.cost_command, cmd_inspect.env_command, cmd_teacher.teacher_group, cmd_sweep.job_command,
):  # fmt: skip
    main.add_command(_command)
