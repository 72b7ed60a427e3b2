"""What a run will cost, counted without its files: a network's shape is enough.

FLOPs of sampling are counted on the network itself, without memory for its weights. Those of
training are in proportion: they are counted on a network of the same depth at width 64, on images
so small that attention has about the same share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt

import torch

from harness.data.images import ImageSet, Split
from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Guided
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.files import header_of
from harness.methods import METHODS, MethodConfig
from harness.methods.parts.adapters import LoRAOptions
from harness.networks.backbones import build, depth_of
from harness.networks.backbones.dit import sized
from harness.networks.backbones.text import text_widths
from harness.networks.recomputing import checkpoint_activations
from harness.runs.cost import (
    PaperProblem,
    SamplingCost,
    pass_bytes,
    sampling_cost_on_meta,
    training_memory,
)
from harness.runs.resolve import Resolved
from harness.tasks import Task
from harness.tasks.spec import PromptSpec
from harness.training.estimate import rehearsal, total_flops
from harness.training.memory import Memory, loss_bytes
from harness.training.settings import PLAIN, Execution

WIDTH, HEADS = 64, 4
"""Of the network on which training is counted."""
IMAGES = 64
"""Images of noise in the place of the task's."""
CPU = torch.device("cpu")


class Narrow(Task):
    """A task with a narrow network of random weights and small images of noise."""

    def __init__(self, task: Task):
        super().__init__(task.spec, task.folder)
        whole = task.network_options
        options = sized(whole) if whole.get("backbone", "dit") == "dit" else {}
        patch, width = options.get("patch_size", 2), options.get("hidden_size", 1024)
        tokens = task.shape[1] * task.shape[2] / patch**2
        side = patch * max(2, round(sqrt(tokens * WIDTH / width)))
        self.shape = task.shape[0], side, side
        self.scale = WIDTH / width
        self.text_length = round(text_length(task) * self.scale)
        read = {"text_width": WIDTH} if self.text_length else {"num_classes": task.num_classes}
        self.network_options = {
            "image_size": side,
            "patch_size": patch,
            "in_channels": task.shape[0],
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "depth": depth_of(whole),
            **read,
        }

    @cached_property
    def conditions(self) -> Conditions:
        """Class labels, or two prompts of noise."""
        if not self.text_length:
            return Conditions(self.num_classes)
        shape = self.text_length, WIDTH
        text = Condition(text=Keyed("narrow", 0).normal("text", torch.arange(3), shape))
        return Conditions(2, text[:2], text[2:])

    @property
    def conditions_hash(self) -> str:
        return ""

    def teacher(self, device: torch.device) -> Guided:
        with keyed_initialisation(0, "narrow"):
            network = build(self.network_options)
        return self.guided(network.requires_grad_(False).eval().to(device))

    @property
    def teacher_hash(self) -> str:
        return ""

    @cached_property
    def split(self) -> Split:
        index = torch.arange(IMAGES)
        noise = Keyed("narrow", 0).normal("x", index, self.shape)
        images = ImageSet(noise, index % 2, self.conditions if self.text_length else None)
        return Split(images, images)


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes:
        sampling: of one sample in the run's number of steps.
        steps, images: of training.
        flops: of training, of its trajectories (`trajectories`) and of evaluation samples, by name.
        trajectories, disk: number of trajectories, and their bytes.
        prompts_disk: bytes of the file of prompts in float16; 0 without prompts.
        memory: of training; None for a method that trains nothing.
        micro_batch: samples whose passes are in memory at once.
    """

    sampling: SamplingCost
    steps: int
    images: int
    flops: dict[str, float]
    trajectories: int
    disk: float
    prompts_disk: float = 0.0
    memory: Memory | None = None
    micro_batch: int = 0

    def gpu_hours(self, flops_a_second: float) -> float:
        """Hours of all FLOPs at a speed."""
        return sum(self.flops.values()) / flops_a_second / 3600


def plan(resolved: Resolved, execution: Execution = PLAIN) -> Plan:
    """The cost of a run that finds nothing in the cache."""
    task, settings = resolved.task, resolved.settings
    problem = problem_of(task)
    sampling = sampling_cost_on_meta(resolved.method, resolved.config, problem, resolved.num_steps)
    one = 2 * sampling.plain_macs / sampling.nfe  # FLOPs of a pass
    samples = task.spec.evaluation.samples * resolved.noise_sets
    flops = {"evaluation samples": 2.0 * sampling.macs * samples}
    cls, count, disk, memory = METHODS[resolved.method], 0, 0.0, None
    if settings.total_steps:
        narrow = Narrow(task)
        config = narrowed(resolved.config, narrow.scale)
        trainer = rehearsal(resolved.method, config, narrow, resolved.num_steps, settings, CPU)
        small = problem_of(narrow, narrow.text_length)
        flops["training"] = total_flops(trainer) / (2 * macs_a_pass(small)) * one
        kept = loss_bytes(trainer)
        if execution.checkpoint_activations:  # beside the inputs of all blocks, all of one block
            checkpoint_activations(player.module for player in trainer.method.players.values())
            kept = min(kept, loss_bytes(trainer) + kept / depth_of(task.network_options))
        passes = kept / pass_bytes(small)
        memory = training_memory(
            resolved.method, resolved.config, problem, resolved.num_steps, passes
        )
        if "trajectory" in cls.sources:
            recipe = narrow.recipe.of_run(settings.seed, cls.trajectory_grid(resolved.config))
            recipe = replace(recipe, shape=task.shape)
            guided = 1 if task.guidance_scale == 1 else 2
            flops["trajectories"] = one * recipe.count * recipe.steps * guided
            count, disk = recipe.count, float(recipe.count * recipe.size)
    images = settings.total_steps * settings.batch_size
    return Plan(
        sampling,
        settings.total_steps,
        images,
        flops,
        count,
        disk,
        prompts_bytes(problem, task.num_classes),
        memory,
        settings.micro_batch_size or settings.batch_size,
    )


def narrowed(config: MethodConfig, scale: float) -> MethodConfig:
    """Options for a narrow network: adapters keep their part of its width, on all layers."""
    if not isinstance(config, LoRAOptions) or config.lora_rank is None:
        return config
    rank = max(1, round(config.lora_rank * scale))
    return config.model_copy(update={"lora_rank": rank, "lora_targets": ()})


def prompts_bytes(problem: PaperProblem, count: int) -> float:
    """Bytes of as many prompts in float16; 0 without text."""
    if not problem.text_length:
        return 0.0
    width, pooled = text_widths(problem.network_options)
    return 2.0 * count * (problem.text_length * width + pooled)


def macs_a_pass(problem: PaperProblem) -> float:
    """Multiply-adds of one pass of a network for one sample; 0 for an exact teacher."""
    if not problem.network_teacher:
        return 0.0
    return sampling_cost_on_meta("teacher", METHODS["teacher"].Config(), problem, 1).plain_macs


def text_length(task: Task) -> int:
    """Tokens of a task's prompts; 0 for class labels.

    Raises UsageError for prompts whose number of tokens is neither in the task nor in a file.
    """
    prompts = task.spec.prompts
    if prompts is None:
        return 0
    if not isinstance(prompts, PromptSpec):
        return task.conditions.null.text.shape[1]  # type: ignore[union-attr]
    return prompts.length or header_of(task.path(prompts))[1]["table"][1]


def problem_of(task: Task, length: int | None = None) -> PaperProblem:
    """A task as a problem without data or weights; data of standard deviation 1 stand for its.

    Args:
        length: tokens of a prompt; None takes the task's.
    """
    return PaperProblem(
        task.shape,
        task.num_classes,
        task.network_options,
        task.schedule,
        task.trajectory_steps,
        task.prediction_type,
        data_std=1.0,
        guidance_scale=task.guidance_scale,
        network_teacher=task.network_teacher,
        own_classifier=task.own_classifier,
        grid=task.spec.trajectories.grid,
        text_length=text_length(task) if length is None else length,
    )
