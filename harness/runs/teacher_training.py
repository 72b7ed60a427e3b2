"""Trains and verifies the networks that ship with a task, and searches levels for its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor, nn

from harness.data.scene_prompts import CATEGORIES
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import few_step_levels
from harness.documents import parse_yaml, read_text
from harness.errors import CheckFailed, UsageError
from harness.files import file_hash, write_tensors, write_text
from harness.methods import METHODS, Method
from harness.methods.parts.classification import Classification
from harness.methods.parts.detection import Detection
from harness.metrics.evaluator import Evaluator
from harness.metrics.features import classify
from harness.metrics.fidelity import fid, label_agreement
from harness.metrics.following import Reading
from harness.metrics.pixels import rounding_of
from harness.metrics.sampling import sample_set
from harness.metrics.spaces import JudgeSpace
from harness.provenance import capture_environment
from harness.runs.build import Reference
from harness.runs.identity import shipped_network_key
from harness.runs.log import Report, silent
from harness.solvers import SOLVERS, trace
from harness.solvers.search import LevelSearch, search_levels
from harness.tasks import Task, borrows
from harness.tasks.prompts import written
from harness.tasks.spec import (
    DetectorFeatures,
    EncoderSpec,
    Part,
    Weights,
    WrittenPrompts,
)
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

W = TypeVar("W", bound=Weights)


@dataclass(frozen=True)
class Made:
    """A file of weights and its card; a teacher's text encoder, trained with it, lies beside."""

    part: Part
    path: Path
    sha256: str
    card: dict[str, Any]
    encoder: EncoderSpec | None = None


def train_networks(
    task: Task, folder: Path, device: torch.device, report: Report = silent
) -> list[Made]:
    """Trains the feature network, then the teacher; scans guidance; writes weights and cards.

    An interrupted call resumes. Networks that the task borrows or has from others are not trained,
    nor those that it has while another one is missing.

    Returns:
        The written files.
    """
    made, own = [], _own(task)
    for part in [part for part in own if task.trained(part).sha256 is None] or own:
        weights, (name, method) = task.trained(part), _method(part, task)
        network = _train(name, method, weights, task.untrained(), folder / part, device, report)
        state, encoder = network.state_dict(), None
        if part == "teacher" and isinstance(prompts := task.spec.prompts, WrittenPrompts):
            encoder = _write(folder, prompts.encoder, _behind("encoder.", state))
            task = _with(task, prompts=prompts.model_copy(update={"encoder": encoder}))
            state = _behind("network.", state)
        file = _write(folder, weights, state)
        task = _with(task, **{part: file})
        quality = _quality(part, task, device, report)
        card = _write_card(Path(file.file), weights, task, quality, device)
        made.append(Made(part, Path(file.file), str(file.sha256), card, encoder))
    return made


def _write(folder: Path, weights: W, state: dict[str, Tensor]) -> W:
    """Writes weights in float16; the task's entry for the file."""
    path = folder / Path(weights.file).name
    write_tensors(path, {key: tensor.half() for key, tensor in state.items()})
    return weights.model_copy(update={"file": str(path.resolve()), "sha256": file_hash(path)})


def _behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors behind a prefix, without it."""
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


PARTS: tuple[Part, ...] = ("features", "teacher")
"""The networks that are trained, in this order."""


def _method(part: Part, task: Task) -> tuple[str, type[Method]]:
    """The method that trains a network, and the name of its training."""
    if part == "teacher":
        return "denoising", METHODS["denoising"]
    if isinstance(task.spec.features, DetectorFeatures):
        return "detection", Detection
    return "classification", Classification


def _own(task: Task) -> list[Part]:
    """The networks that are trained for a task: neither borrowed nor from others.

    Raises UsageError if there is none.
    """
    own: list[Part] = [part for part in PARTS if not borrows(task, part)]
    if not own:
        raise UsageError(
            f"task {task.spec.name} has the networks of {task.spec.like}: name that one"
        )
    if not task.own_classifier and "features" in own:
        own.remove("features")  # a published network is not trained
    if trained := [part for part in own if task.trained(part).training is not None]:
        return trained
    raise UsageError(f"the {' and '.join(own)} of task {task.spec.name} are not trained here")


def _quality(part: Part, task: Task, device: torch.device, report: Report) -> dict[str, Any]:
    return (
        features_quality(task, device)
        if part == "features"
        else teacher_quality(task, device, report)
    )


def _train(
    name: str,
    cls: type[Method],
    weights: Weights,
    task: Task,
    folder: Path,
    device: torch.device,
    report: Report,
) -> nn.Module:
    """The averaged network of a method that learns from real images."""
    training = weights.training
    assert training is not None
    with keyed_initialisation(training.seed, name):
        method = cls(
            cls.Config(**training.options), None, task, task.trajectory_steps, training.steps
        )
    method.to(device)
    settings = TrainSettings(
        training.steps,
        training.batch_size,
        training.seed,
        precision=training.precision,
        compile=training.compile,
    )
    identity = shipped_network_key(task, name, training.model_dump(mode="json"))
    Trainer(method, {"data": task.split.train}, settings, folder, device, identity=identity).train(
        progress=report(name)
    )
    (player,) = method.players.values()
    assert player.ema is not None
    return player.ema.module


def _with(task: Task, **changes: Any) -> Task:
    """The task with parts of its spec replaced."""
    return Task(task.spec.model_copy(update=changes), task.folder)


def _write_card(
    path: Path, weights: Weights, task: Task, quality: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Writes the card beside the weights."""
    split = task.untrained().split
    card: dict[str, Any] = {
        "command": f"harness teacher train --task {task.spec.name}",
        "sha256": file_hash(path),
        "device": capture_environment(device).device,
        "format": "fp16 safetensors of the averaged weights",
        "training": weights.model_dump(mode="json")["training"],
        "data": {
            **task.spec.data.model_dump(mode="json"),
            "images": len(split.train),
            "held_out": len(split.held_out),
        },
        "quality": quality,
    }
    write_text(path.with_suffix(".yaml"), yaml.safe_dump(card, sort_keys=False))
    return card


def features_quality(task: Task, device: torch.device) -> dict[str, float]:
    """Accuracy on both splits, and FID of real images.

    The FIDs compare held-out with training images, and the two halves of the training set.
    """
    if isinstance(task.spec.features, DetectorFeatures):
        return _judge_quality(task, device)
    classifier = task.classifier(device)
    train, held_out = task.split.train, task.split.held_out
    rounded = rounding_of(task)
    features, logits = classify(classifier, train.images, rounded=rounded)
    features_out, logits_out = classify(classifier, held_out.images, rounded=rounded)
    half = len(features) // 2
    return {
        "train_accuracy": round(label_agreement(logits, train.labels), 4),
        "held_out_accuracy": round(label_agreement(logits_out, held_out.labels), 4),
        "fid_held_out": round(fid(features_out, features), 3),
        "fid_halves": round(fid(features[:half], features[half:]), 3),
    }


def _judge_quality(task: Task, device: torch.device) -> dict[str, float]:
    """Shares of real scenes that the detector reads as their prompts, and FIDs of real scenes."""
    task = task.untrained()
    space = JudgeSpace(task, device)
    held_out, real = task.split.held_out, task.split.reference
    seen = space.read(held_out.images[:])
    reading = Reading(held_out.labels, written(judged=True), seen)
    features, half = space.classify(real.images)[0], len(real) // 2
    return {
        "followed_held_out_scenes": round(reading.share(), 4),
        **{f"followed_{name}": round(reading.share(name), 4) for name in CATEGORIES},
        "scenes": len(held_out),
        "fid_held_out": round(fid(space.classify(held_out.images)[0], features), 3),
        "fid_halves": round(fid(features[:half], features[half : 2 * half]), 3),
        "reference": len(real),
    }


def teacher_quality(task: Task, device: torch.device, report: Report = silent) -> dict[str, Any]:
    """FID, KID and label agreement by guidance scale, on noise set 0; the best scale.

    Nothing where no feature network judges samples.
    """
    if task.spec.features is None:
        return {}
    scan, n = {}, task.spec.guidance_scan_samples or task.spec.evaluation.samples
    for scale in task.spec.guidance_scan:
        at_scale = _with(task, guidance=task.spec.guidance.model_copy(update={"scale": scale}))
        sampler = Reference(at_scale, device).sampler
        samples = sample_set(sampler, at_scale, 0, device, report(f"guidance {scale}"), n)
        evaluator = Evaluator(at_scale, {0: samples}.__getitem__, device)
        metrics = evaluator.of_samples(samples, task.evaluation_numbers(0)[:n])
        names = ("fid", "kid", "label_agreement", "prompts_followed")
        shown = [name for name in (*names, "followed_seen", "followed_held_out") if name in metrics]
        scan[scale] = {name: round(metrics[name], 4) for name in shown}
    best = min(scan, key=lambda scale: scan[scale]["fid"])
    return {"n": n, "noise_set": 0, "guidance_scan": scan, "best_guidance_scale": best}


def verify(task: Task, device: torch.device, report: Report = silent) -> list[str]:
    """Measures the shipped networks again and compares the numbers with their cards.

    Returns:
        A line for each number compared.

    Raises:
        CheckFailed: if a number is off by more than 2 %, or if the task does not use the guidance
            scale with the best FID.
    """
    lines = []
    for part in _own(task):
        weights, measured = task.trained(part), _quality(part, task, device, report)
        path, found = task.path(weights).with_suffix(".yaml"), _numbers(measured)
        try:
            stated_numbers = _numbers(parse_yaml(read_text(path), float | str)["quality"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"card {path} is missing or states no quality: {error}") from error
        if missing := stated_numbers.keys() - found.keys():
            raise CheckFailed(
                f"card {path} states {', '.join(sorted(missing))}, which is not measured"
            )
        for name, stated in stated_numbers.items():
            close = math.isclose(found[name], stated, rel_tol=0.02, abs_tol=2e-3)
            lines.append(
                f"{Path(weights.file).stem}: {name} is {found[name]}, its card says {stated}"
                f"{'' if close else ': not the same'}"
            )
            if not close:
                raise CheckFailed(lines[-1])
        used = task.spec.guidance.scale
        if (best := measured.get("best_guidance_scale", used)) != used:
            raise CheckFailed(f"the best guidance scale is {best}, the task uses {used}")
    return lines


def search(
    task: Task, solver: str, num_steps: int, count: int, device: torch.device
) -> LevelSearch:
    """Searches the best levels for few steps of a solver.

    The search uses `count` trajectories from noise that nothing else uses.

    Raises UsageError for an unknown solver, for one that draws noise, or for more steps than the
    task's trajectories have.
    """
    chosen = SOLVERS[solver]()
    if chosen.stochastic:
        raise UsageError(
            f"solver {solver} draws noise, so that no path has an end to meet: give another"
        )
    if not 1 <= num_steps <= task.trajectory_steps:
        raise UsageError(
            f"num_steps is {num_steps}, but levels are chosen among {task.trajectory_steps}: "
            f"give 1 to {task.trajectory_steps}"
        )
    index, teacher = torch.arange(count), task.teacher(device)
    x_T = Keyed("levels", 0).normal("x_T", index, task.shape).to(device)
    cond = task.conditions.balanced(index).to(device)
    with torch.no_grad():
        path = trace(chosen, teacher, x_T, few_step_levels(task.trajectory_steps), cond)
    return search_levels(chosen, teacher, path, num_steps)


def _numbers(tree: dict[Any, Any], prefix: str = "") -> dict[str, float]:
    """A nested dictionary's numbers by dotted name."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        flat |= (
            _numbers(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": float(value)}
        )
    return flat
