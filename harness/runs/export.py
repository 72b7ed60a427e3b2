"""Students out: a file or a folder that others can sample, with a model card."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UsageError
from harness.files import file_hash, inside, read_tensors, write_sealed, write_text
from harness.methods import Method
from harness.methods.parts.adapters import LoRAOptions
from harness.networks.adapters import merged
from harness.records import Cost, Record, read_record
from harness.runs.build import build
from harness.runs.config import RunConfig, parse_config
from harness.runs.identity import refuse_other_run
from harness.runs.resolve import CPU, Parent, Resolved, options_on, resolve
from harness.runs.student_file import StudentFacts, facts_of
from harness.tasks import Task, load_task, task_names

FORMATS = ("safetensors", "diffusers", "lora")
LOADING = {
    "safetensors": """```
harness evaluate --student student.safetensors
```

The file's metadata say how the student is built and sampled.""",
    "diffusers": """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
samples = pipeline(torch.tensor([0, 1]))  # class labels -> [2, C, H, W]
```

`pipeline.py` takes the student's own steps, and sets the time frequencies of the official DiT,
which `config.json` cannot say. So load the transformer through it. It is code that
`trust_remote_code=True` lets run: read it first.""",
    "lora": """`pipeline.load_lora_weights(FOLDER)` loads the file where the class has it.
peft loads it into any transformer of diffusers:

```python
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

found = load_file("pytorch_lora_weights.safetensors")  # B holds alpha / rank
adapters = {name.removeprefix("transformer."): weight for name, weight in found.items()}
layers = sorted({name.partition(".lora_")[0] for name in adapters})
rank = next(len(weight) for name, weight in adapters.items() if ".lora_A." in name)
config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
inject_adapter_in_model(config, transformer)  # the teacher's
set_peft_model_state_dict(transformer, adapters)
```

Sample it without guidance, in the student's own steps (network times, above).""",
}


def export(run: str, kind: str, results: Path, folder: Path | None, task: str | None) -> Path:
    """Writes the student of a finished run in a format of `FORMATS`, with its model card.

    Args:
        run: a run id in the results folder, or the folder of a run.
        folder: where to write; by default `<results>/students/<run id>-<format>`.
        task: file of the run's task, if it does not ship.

    Returns:
        The folder that was written.

    Raises UsageError for a run without a student, and for a format that cannot hold it exactly.
    """
    record, weights = finished_run(run, results)
    if kind == "lora" and record.options.get("lora_rank") is None:
        raise UsageError(
            f"{record.run_id} was trained in all its weights, and a LoRA file holds low-rank "
            "changes alone: give --format safetensors or diffusers"
        )
    resolved = resolved_again(record, task, results)
    folder = folder or results / "students" / f"{record.run_id}-{kind}"
    facts = facts_of(resolved).model_copy(update={"run_id": record.run_id})
    if kind == "diffusers":
        from harness.runs.diffusers_folder import write_folder

        write_folder(student_of(resolved, record, weights), resolved, folder)
    elif kind == "lora":
        from harness.runs.lora_file import write_lora

        write_lora(student_of(resolved, record, weights), resolved, record.run_id, folder)
    else:
        tensors = read_tensors(weights)
        if isinstance(resolved.config, LoRAOptions) and resolved.config.lora_rank is not None:
            tensors = merged(student_of(resolved, record, weights).sampled_network).state_dict()
            options = resolved.config.merged().model_dump(mode="json")
            facts = facts.model_copy(update={"options": options})
        write_sealed(folder / "student.safetensors", tensors, facts.metadata())
    write_text(folder / "README.md", model_card(record, resolved, facts, kind, task))
    return folder


def finished_run(run: str, results: Path) -> tuple[Record, Path]:
    """The record of a finished run and the file of its student. Raises UsageError without one."""
    folder, named = Path(run), results / "runs" / run
    if len(folder.parts) == 1 and (named.is_dir() or not folder.is_dir()):
        folder = inside(named, results)
    if not (folder / "record.json").is_file():
        raise UsageError(f"there is no run {run} in {results / 'runs'}: give the id of a run there")
    record, weights = read_record(folder / "record.json"), folder / "student.safetensors"
    inside(weights, folder)
    if record.status != "finished":
        raise UsageError(f"run {record.run_id} is {record.status}: give a finished one")
    if not weights.is_file():
        raise UsageError(
            f"run {record.run_id} has no student: {record.method} trains none, or {weights} is gone"
        )
    refuse_other_run(weights, record.run_id)
    return record, weights


def resolved_again(record: Record, task: str | None, results: Path) -> Resolved:
    """The run of a record, without training. Raises UsageError if its task has changed."""
    if task is None and record.task not in task_names():
        raise UsageError(
            f"run {record.run_id} is of task {record.task}, which does not ship: "
            "give its file by --task"
        )
    found = load_task(task or record.task)
    spec = found.spec
    if (spec.name, spec.version) != (record.task, record.task_version):
        raise UsageError(
            f"run {record.run_id} is of {record.task}, version {record.task_version}, but the task "
            f"here is {spec.name}, version {spec.version}: give the right file by --task"
        )
    config = parse_config(
        {
            "method": record.method,
            "task": task or record.task,
            "num_steps": record.config["num_steps"],
            "options": record.options,
            "budget": "steps=0",
        }
    )
    return resolve(config, found, results)


def student_of(resolved: Resolved, record: Record, weights: Path) -> Method:
    """The method with a run's student."""
    parent = Parent(record.run_id, weights, file_hash(weights), setting="", bill=None)
    return build(replace(resolved, parent=parent), resolved.task.teacher(CPU), CPU)


def command_of(record: Record, task: Task | None, file: str | None = None) -> str:
    """The command that makes a record's run again.

    Args:
        task: the record's task; without it the command states every option.
        file: file of the task, if it does not ship.
    """
    config = record.config
    plain = RunConfig(method=record.method)
    fields: dict[str, Any] = {
        "task": file or record.task,
        "method": record.method,
        "num_steps": config["num_steps"],
        "seed": config["seed"],
        "budget": f"steps={config['total_steps']}" if config["total_steps"] else None,
        "noise_sets": config["noise_sets"],
        "purpose": config.get("purpose", plain.purpose),
        "batch_size": config["batch_size"] or None,
        "micro_batch_size": config["micro_batch_size"],
        "precision": config["precision"],
        "compile": config["compile"],
        "init_from": (config["init_from"] or {}).get("run_id"),
    }
    usual = {**plain.model_dump(), "task": "", "method": "", "num_steps": None, "seed": None}
    usual["batch_size"] = task.spec.batch_size if task else None
    asked = {name: value for name, value in fields.items() if value not in (None, usual[name])}
    own = RunConfig(method=record.method, task=record.task)
    defaults = options_on(task, own).model_dump(mode="json") if task else {}
    asked |= {name: v for name, v in record.options.items() if v != defaults.get(name)}
    words = [f"--{name.replace('_', '-')} {_word(value)}" for name, value in asked.items()]
    return " ".join(["harness run", *words])


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return shlex.quote(text)


def model_card(
    record: Record, resolved: Resolved, facts: StudentFacts, kind: str, task: str | None = None
) -> str:
    """The README.md of an exported student.

    Args:
        task: file of the task, if it does not ship.
    """
    library = "safetensors" if kind == "safetensors" else "diffusers"
    tags = ["diffusion", "distillation", record.method, *(["lora"] if kind == "lora" else [])]
    head = {"library_name": library, "tags": tags}
    summary = resolved.task.spec.summary
    rows = [
        f"| {name} | {metric.mean:.4g} | {metric.direction} | {metric.n} x {len(metric.values)} |"
        for name, metric in sorted(record.metrics.items())
        if not name.endswith("_floor")
    ]
    table = ["| metric | mean | better | samples x noise sets |", "|---|---|---|---|", *rows]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {record.method}, {facts.num_steps} steps, on {record.task}",
        f"A few-step student. Its task: {summary}.",
        "\n".join(facts_lines(record, resolved, facts)),
        f"## Use\n\n{LOADING[kind]}",
        "## Metrics\n\n" + "\n".join(table),
        *([f"Caveats: {'; '.join(record.flags)}."] if record.flags else []),
        f"## Made by\n\n```\n{command_of(record, resolved.task, task)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def facts_lines(record: Record, resolved: Resolved, facts: StudentFacts) -> list[str]:
    """Task, teacher, network and training of a student, a line each."""
    spec, cost = resolved.task.spec, record.cost
    lines = [
        f"- **Task**: {record.task}, version {record.task_version}; guidance "
        f"{spec.guidance.scale:g}; schedule {spec.schedule}",
        f"- **Teacher**: identity `{record.hashes.get('teacher', 'exact')}`",
        f"- **Network**: `{facts.network}`",
        f"- **Network times**: {', '.join(f'{level:g}' for level in record.levels)}",
    ]
    if cost:
        lines.append(
            f"- **Sampling**: {cost.nfe:g} passes and {cost.macs_per_sample / 1e6:.1f} MMACs a "
            f"sample, {cost.parameters} parameters"
        )
        lines += adapter_lines(cost)
    if cost and cost.training:
        bill = cost.training
        lines.append(
            f"- **Training**: {bill.steps} steps, {bill.images} images, {bill.whole_flops:.3g} "
            f"FLOPs with trajectories; seed {record.config['seed']}, run `{record.run_id}`"
        )
    return lines


def adapter_lines(cost: Cost) -> list[str]:
    """What a student costs beside and without its adapters, if it was trained with any."""
    if cost.merged_macs_per_sample is None:
        return []
    return [
        f"- **Adapters**: {cost.trained_parameters} parameters were trained; with merged adapters "
        f"a sample takes {cost.merged_macs_per_sample / 1e6:.1f} MMACs"
    ]
