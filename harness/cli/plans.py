"""What `--dry-run` prints where files are missing, or where a run is too large to be timed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.runs.needed import Needed
    from harness.runs.plan import Plan
    from harness.runs.resolve import Resolved
    from harness.training.settings import Execution

H100_FLOPS, UTILISATION = 989e12, 0.4
"""bf16 FLOPs a second of an H100 (dense), and the share of them that hours are counted at."""
RANKS = (2, 4, 8)
"""Numbers of ranks that a plan speaks of."""
LARGE = 5e9
"""MACs of a network's pass from which a run is planned instead of timed."""


def show_plan_if_needed(resolved: Resolved, as_json: bool, execution: Execution) -> bool:
    """Prints the files and the cost of a run, and returns True, unless it can be timed here.

    Raises UsageError after printing if files are missing or wrong, or the disk is too small.
    """
    from harness.data.trajectories import check_store_disk
    from harness.runs.needed import needed_files
    from harness.runs.plan import macs_a_pass, plan, problem_of

    files = needed_files(resolved.task)
    bad = [file for file in files if file.state in ("missing", "wrong")]
    if not bad and macs_a_pass(problem_of(resolved.task)) < LARGE:
        return False
    found = plan(resolved, execution)
    if as_json:
        content = {"files": [{**asdict(f), "place": str(f.place)} for f in files]}
        click.echo(json.dumps({**content, "plan": asdict(found)}, indent=1))
    else:
        show_files(files)
        show_plan(resolved, found)
    if bad:
        raise UsageError(
            f"{len(bad)} of the {len(files)} files of task {resolved.task.spec.name} are missing "
            "or wrong: the list above says where each belongs and comes from"
        )
    if found.trajectories:
        check_store_disk(resolved.recipe)
    return True


def show_files(files: list[Needed]) -> None:
    """Prints each file with its state."""
    for file in files:
        state = "a run downloads it" if file.state == "download" else file.state
        click.echo(f"{file.what}: {file.place}: {state}")
        if file.note:
            click.echo(f"  {file.note}")
    click.echo("")


def show_plan(resolved: Resolved, found: Plan) -> None:
    """Prints what a run costs."""
    import yaml

    from harness.data.shards import amount, free_bytes
    from harness.files import cache_folder

    options = resolved.config.model_dump(mode="json")
    click.echo(f"method: {resolved.method}, {resolved.num_steps} steps")
    click.echo(yaml.safe_dump({"options": options}, sort_keys=False))
    cost = found.sampling
    click.echo(
        f"a sample: {cost.nfe:g} network passes, {cost.macs / 1e9:.2f} GMACs "
        f"({100 * cost.extra:+.2f} % beside plain passes), {cost.parameters / 1e6:.1f} M parameters"
    )
    if found.steps:
        click.echo(f"training: {found.steps} steps, {found.images} images")
    if found.trajectories:
        folder = cache_folder()
        click.echo(
            f"trajectories: {found.trajectories}, which need {amount(found.disk)}; "
            f"{amount(free_bytes(folder))} are free in {folder}"
        )
    if found.prompts_disk:
        click.echo(f"prompts: {amount(found.prompts_disk)} in float16")
    if memory := found.memory:
        click.echo(
            f"memory of a GPU: {amount(memory.networks)} for networks, gradients and AdamW, and "
            f"{amount(memory.sample)} for each sample of a micro-batch in "
            f"{resolved.settings.precision}; with a micro-batch of {found.micro_batch} "
            f"{amount(memory.of(found.micro_batch))}, which --micro-batch-size changes"
        )
    parts = ", ".join(f"{part} {flops:.3g}" for part, flops in found.flops.items())
    click.echo(f"FLOPs: {parts}")
    hours = found.gpu_hours(UTILISATION * H100_FLOPS)
    click.echo(
        f"together {hours:.3g} GPU-hours at {UTILISATION:.0%} of an H100's {H100_FLOPS:.3g} bf16 "
        "FLOPs a second; decoding and feature networks come on top"
    )
    if found.memory:
        for line in lines_of_ranks(resolved, found, hours):
            click.echo(line)


def lines_of_ranks(resolved: Resolved, found: Plan, hours: float) -> list[str]:
    """What several ranks change, for each number of them that can share the batch.

    In a step a rank sends and receives the gradients of nearly two copies of the student, as a
    ring's all-reduce does.
    """
    from harness.data.shards import amount

    size, group = resolved.settings.batch_size, resolved.settings.sample_group
    assert found.memory is not None
    lines = []
    for count in RANKS:
        if size % (count * group) == 0:
            micro = min(found.micro_batch, size // count)
            gradients = 4 * found.sampling.trained_parameters  # once more, as one flat message
            sent, memory = gradients * 2 * (count - 1) / count, found.memory.of(micro) + gradients
            lines.append(
                f"{count} ranks: {hours / count:.3g} hours, {amount(memory)} a GPU "
                f"with a micro-batch of {micro}, {amount(sent)} of gradients sent in a step"
            )
    return lines
