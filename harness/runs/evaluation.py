"""Measurements of a trained student: cost, latency and exposure bias; and its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from harness import ranks
from harness.asides import write_aside
from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.files import write_sealed
from harness.machine import peak_flops
from harness.methods import Method
from harness.metrics.compute import parameters
from harness.metrics.exposure import exposure_bias
from harness.metrics.latency import captured, interleaved_latency
from harness.metrics.pixels import drawable
from harness.metrics.sampling import Sampler, sample_grid, sampling_cost
from harness.networks.adapters import merged
from harness.records import Cost, Exposure, LatencyEntry, Milestone, TrainingBill
from harness.runs.resolve import Resolved
from harness.solvers import SOLVERS, Noise, sample, trace
from harness.tasks import Task
from harness.training.estimate import store_bill
from harness.training.settings import Bill
from harness.training.trainer import STEERING, Trainer

EMA_WEIGHT_FLAG = 0.01
"""Share of the initial weights in the evaluated average above which a record is flagged."""


def training_bill(
    resolved: Resolved,
    trainer: Trainer | None,
    method: Method,
    teacher: Guided,
    device: torch.device,
) -> TrainingBill:
    """The bill of a run's student, including the inherited bill of the run it started from."""
    bill, parent = trainer.bill if trainer else Bill(), resolved.parent
    before = parent.bill if parent else None
    evaluations, trajectory_flops = 0, 0.0
    if trainer and "trajectory" in method.sources:
        evaluations, trajectory_flops = store_bill(teacher, resolved.recipe, resolved.task)
    inherited = before.trajectory_flops if before else 0.0
    one_store = parent is None or parent.recipe == resolved.recipe
    shares = (p.ema.initial_weight for p in method.players.values() if p.ema)
    return TrainingBill(
        steps=trainer.step if trainer else 0,
        images=bill.images,
        flops=bill.flops,
        # A run of the same seed and grid reads the store of the run it started from.
        trajectory_flops=max(trajectory_flops, inherited)
        if one_store
        else trajectory_flops + inherited,
        teacher_evaluations=evaluations + bill.teacher_evaluations,
        seconds=bill.seconds,
        peak_memory_bytes=bill.peak_memory_bytes,
        mfu=mfu_of(bill, device),
        inherited_flops=before.flops + before.inherited_flops if before else 0.0,
        inherited_images=before.images + before.inherited_images if before else 0,
        inherited_seconds=before.seconds + before.inherited_seconds if before else 0.0,
        ema_initial_weight=max(shares, default=0.0) if trainer else 1.0,
    )


def mfu_of(bill: Bill, device: torch.device) -> float | None:
    """Model FLOPs utilisation of training; None on a CPU and for an unknown card."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_flops(card)
    return bill.flops / bill.seconds / (peak * ranks.count()) if peak and bill.seconds else None


def measure_exposure(
    resolved: Resolved, method: Method, teacher: Guided, device: torch.device
) -> Exposure | None:
    """Exposure bias on the first batch of evaluation noise, on fresh teacher trajectories.

    The noise is the same for every seed. None for one step, for a sampler that draws noise, and for
    levels that trajectories do not have.
    """
    task, recipe = resolved.task, resolved.recipe
    on_path = bool(torch.isin(method.levels, recipe.levels).all())
    if resolved.num_steps == 1 or method.solver.stochastic or not on_path:
        return None
    x_T, cond = task.evaluation_inputs(0, slice(task.spec.evaluation.batch_size))
    x_T, cond = x_T.to(device), cond.to(device)
    solver = SOLVERS[recipe.solver]()
    with torch.no_grad():
        path = trace(solver, teacher, x_T, recipe.levels, cond)
        errors = exposure_bias(
            method.solver, method.student, method.teacher_points(path), method.levels, cond
        )
    return Exposure(
        on_teachers_history=errors[0], on_own_history=errors[1], drift=errors[2], n=len(x_T)
    )


def measure_latency(
    task: Task, sampler: Sampler, reference: Sampler, device: torch.device
) -> LatencyEntry:
    """Seconds of a batch, measured in turn with the reference's on the same inputs.

    On a GPU both are measured as CUDA graphs too, where they can be.
    """
    warmup, repeats = 2, 9
    batch = task.spec.evaluation.latency_batch
    x_T, cond = task.evaluation_inputs(0, slice(batch))
    x_T, cond = x_T.to(device), cond.to(device)
    mine, theirs = (lambda s=s: s(x_T, cond, lambda name: x_T) for s in (sampler, reference))
    found = interleaved_latency(mine, theirs, device, warmup=warmup, repeats=repeats)
    my_graph, their_graph = (captured(call, device) for call in (mine, theirs))
    graphs = None
    if my_graph and their_graph:
        graphs = interleaved_latency(my_graph, their_graph, device, warmup=warmup, repeats=repeats)
    return LatencyEntry(
        seconds=found.seconds,
        reference_seconds=found.reference_seconds,
        ratio=found.ratio,
        reference=f"{task.spec.reference.method}, {task.spec.reference.num_steps} steps",
        batch=batch,
        dtype="float32",
        device=device.type,
        threads=torch.get_num_threads(),
        warmup=warmup,
        repeats=repeats,
        graph_seconds=graphs.seconds if graphs else None,
        graph_ratio=graphs.ratio if graphs else None,
    )


def cost_of(
    method: Method,
    task: Task,
    sampler: Sampler,
    latency: LatencyEntry,
    bill: TrainingBill | None,
    device: torch.device,
) -> Cost:
    """What sampling and training cost."""
    nfe, macs = sampling_cost(sampler, method.sampled_network, task, device)
    trained = sum(p.numel() for p in method.student_player.trained) if method.players else None
    return Cost(
        parameters=parameters(method.sampled_network),
        trained_parameters=trained,
        nfe=nfe,
        macs_per_sample=macs,
        merged_macs_per_sample=merged_macs(method, task, device),
        latency=latency,
        training=bill,
    )


def merged_macs(method: Method, task: Task, device: torch.device) -> int | None:
    """Multiply-adds of a sample by the student with merged adapters; None if it has none."""
    student = merged(method.student)
    if student is method.student:
        return None

    def sampler(x_T: Tensor, cond: Condition, noise: Noise) -> Tensor:
        return sample(method.solver, student, x_T, method.levels, cond, noise)

    return sampling_cost(sampler, student, task, device)[1]


def training_curve(trainer: Trainer | None, count: int | None) -> dict[str, Any]:
    """The fields of a record for the first losses and the milestones.

    Args:
        count: the number of samples that the quality at a milestone rests on.
    """
    first = trainer.curve[0] if trainer else {}
    milestones = trainer.milestones if trainer else []
    return {
        "first_losses": {
            name: value
            for name, value in first.items()
            if name.rpartition("/")[2] not in ("step", *STEERING)
        },
        "milestones": [Milestone(**point, n=count) for point in milestones],
    }


def flags_of(resolved: Resolved, method: Method, bill: TrainingBill | None) -> list[str]:
    """The caveats of a record, one sentence each."""
    flags = []
    if bill and bill.steps and bill.ema_initial_weight > EMA_WEIGHT_FLAG:
        flags.append(
            "the evaluated average still holds "
            f"{bill.ema_initial_weight:.1%} of the initial weights"
        )
    if (
        resolved.settings.precision == "bf16"
        and resolved.task.prediction_type == "eps"
        and resolved.settings.total_steps
    ):
        flags.append(
            "bf16 losses on a network that predicts eps: "
            "at the noisiest level x_0 carries 157 times its rounding"
        )
    if method.players and not bill:
        flags.append("untrained: the student as it starts")
    return flags


def write_grid(
    folder: Path, task: Task, device: torch.device, samples: Tensor, reference: Tensor
) -> None:
    """Writes `samples.png`: the student's samples above the teacher's, from the same noise."""
    picture = grid_of(task, device, samples, reference)
    write_aside(folder / "samples.png", lambda aside: picture.save(aside, "png"))


def grid_of(task: Task, device: torch.device, *rows: Tensor) -> Image.Image:
    """A picture of the first samples of each row [n, C, H, W]."""
    height = (task.picture_shape or task.shape)[1]
    columns, scale = (20, 5) if height < 64 else (8, 1)
    draw = drawable(task, device)
    return Image.fromarray(sample_grid(rows, columns, scale, draw=draw).numpy())


def write_student(folder: Path, method: Method, metadata: dict[str, str]) -> None:
    """Writes the student and its optimizer, if the method trains.

    Args:
        metadata: how the student is built and sampled (`StudentFacts.metadata`).
    """
    if method.players:
        average = method.student_player.ema
        assert average is not None
        write_sealed(folder / "student.safetensors", average.module.state_dict(), metadata)
        if state := method.student_player.optimizer_state():
            write_sealed(folder / "optimizer.safetensors", state, metadata)
