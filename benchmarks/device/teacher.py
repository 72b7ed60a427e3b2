"""A larger Fashion-MNIST teacher: 8 layers of width 128, trained for as long as time is left.

The length of training follows from the measured seconds of a step, so that the cosine schedule ends
in time. The averaged weights are written as it goes, and FID by guidance scale at the end.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from benchmarks.device.rows import Rows, Setting, Values
from harness.data.images import ImageSet
from harness.diffusion.denoiser import Guided
from harness.diffusion.randomness import keyed_initialisation
from harness.diffusion.schedules import few_step_levels
from harness.files import file_hash, read_tensors, write_tensors, write_text
from harness.methods import METHODS, Method
from harness.metrics.features import classify
from harness.metrics.fidelity import fid, kid, label_agreement
from harness.metrics.sampling import sample_set
from harness.networks.backbones import build
from harness.solvers import SOLVERS, sample
from harness.tasks import Task, load_task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

BATCH, LR = 1024, 2e-3
SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
SAFETY = 0.94
"""The part of the time that is planned for steps."""
MEASURED = 0.4
"""The part of the time that measuring one mode of a step may take, compiling included."""
SNAPSHOT_SECONDS = 20.0


@dataclass(frozen=True)
class Mode:
    """How a step runs."""

    precision: Literal["fp32", "bf16"]
    compile: bool


def teacher_task(setting: Setting) -> Task:
    """Fashion-MNIST with the larger teacher; digits with a small one for a toy."""
    task = load_task("digits" if setting.toy else "fashion-mnist")
    size = {"hidden_size": 32, "depth": 2} if setting.toy else {"hidden_size": 128, "depth": 8}
    few = (
        {"samples": 40, "kid_subset_size": 20}
        if setting.toy
        else {"samples": 10_000, "batch_size": 1000}
    )
    changes = {
        "network": {**task.spec.network, **size},
        "evaluation": task.spec.evaluation.model_copy(update=few),
    }
    return Task(task.spec.model_copy(update=changes), task.folder)


def trainer_of(
    task: Task, mode: Mode, batch: int, steps: int, images: ImageSet, device: torch.device
) -> Trainer:
    """A trainer of the teacher on images that are on the device."""
    with keyed_initialisation(0, "denoising"):
        config = METHODS["denoising"].Config(lr=LR)  # type: ignore[call-arg]
        method = METHODS["denoising"](config, None, task, task.trajectory_steps, steps)
    method.to(device)
    settings = TrainSettings(
        steps, batch, 0, precision=mode.precision, compile=mode.compile, log_every=50
    )
    return Trainer(method, {"data": images}, settings, None, device)


def on_device(task: Task, device: torch.device) -> ImageSet:
    """The training images, moved once."""
    train = task.split.train
    return ImageSet(train.images[:].to(device), train.labels.to(device))


def step_of(task: Task, mode: Mode, batch: int, setting: Setting) -> Callable[[], None]:
    """A training step on random images, to be timed."""
    index = torch.arange(batch)
    images = ImageSet(
        torch.randn(batch, *task.shape).to(setting.device),
        (index % task.num_classes).to(setting.device),
    )
    trainer = trainer_of(task, mode, batch, 100_000, images, setting.device)
    return lambda: trainer.train(until=trainer.step + 1)


class OutOfTime(Exception):
    """Training or compiling took longer than planned."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Inside, OutOfTime is raised in the main thread when the time is over."""

    def end(number: int, frame: Any) -> None:
        raise OutOfTime(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Work:
    """The teacher on its way: what one row leaves for the next."""

    def __init__(self, setting: Setting):
        self.setting, self.task = setting, teacher_task(setting)
        self.batch = 16 if setting.toy else BATCH
        self.weights = setting.out / f"{self.task.spec.name}-teacher.safetensors"
        self.mode, self.seconds = Mode("fp32", False), 0.0
        self.scan_seconds, self.first_seconds = 0.0, 0.0
        self.steps, self.scan, self.snapshot = 0, dict[float, Values](), 0.0

    def measure(self) -> Values:
        """Seconds of a step by mode; the fastest one is chosen. A mode that fails is not."""
        found: Values = {"batch": self.batch}
        modes = [
            Mode("fp32", False),
            *([] if self.setting.toy else [Mode("bf16", False), Mode("bf16", True)]),
        ]
        for mode in modes:
            name = f"{mode.precision}{', compiled' if mode.compile else ''}"
            try:
                with at_most(self.setting.seconds_left * MEASURED):
                    first, found[name] = self.step_seconds(mode)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            if not self.seconds or found[name] < self.seconds:
                self.mode, self.seconds, self.first_seconds = mode, found[name], first
        if not self.seconds:
            raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in found.items()))
        found["scan_seconds"] = self.scan_seconds = self.time_of_scan()
        return found

    def step_seconds(self, mode: Mode) -> tuple[float, float]:
        """Seconds of the first step, compiling included, and of a later one."""
        step = step_of(self.task, mode, self.batch, self.setting)
        first = self.setting.seconds(step)
        self.setting.seconds(step, 2)
        return first, self.setting.seconds(step, 2 if self.setting.toy else 50)

    def time_of_scan(self) -> float:
        """Seconds that FID by guidance scale will take, from one and two batches of a new network.

        Each call draws the noise of all samples, so that a batch costs the difference.
        """
        network = build(self.task.network_options).to(self.setting.device).eval()
        guided, spec = self.task.guided(network).at(SCALES[-1]), self.task.spec.evaluation
        size = min(spec.batch_size, spec.samples // 2)
        self.sample(guided, size)
        one, two = (self.setting.seconds(lambda n=n: self.sample(guided, n * size)) for n in (1, 2))  # type: ignore[misc]
        return len(SCALES) * (one + (spec.samples / size - 1) * max(two - one, 0.0))

    def sample(self, guided: Guided, count: int) -> Tensor:
        """The first samples of noise set 0, [n, C, H, W] on the CPU, by the reference sampler."""
        solver, levels = (
            SOLVERS[self.task.recipe.solver](),
            few_step_levels(self.task.trajectory_steps),
        )

        def sampler(x_T: Tensor, cond: Any, noise: Any) -> Tensor:
            return sample(solver, guided, x_T, levels, cond)

        return sample_set(sampler, self.task, 0, self.setting.device, count=count)

    def train(self) -> Values:
        """Trains until the time left is what the guidance scan and a recompilation take.

        The recompilation finds its kernels in a cache.
        """
        left = self.setting.seconds_left - 1.5 * self.scan_seconds - self.first_seconds / 2 - 20
        self.steps = 5 if self.setting.toy else max(int(SAFETY * left / self.seconds), 100)
        images = on_device(self.task, self.setting.device)
        trainer = trainer_of(
            self.task, self.mode, self.batch, self.steps, images, self.setting.device
        )
        stop, curve = time.time() + max(left, 10), list[tuple[int, float]]()

        def progress(done: int, total: int) -> None:
            curve.append((done, round(trainer.curve[-1]["loss"], 5)))
            if time.time() - self.snapshot > SNAPSHOT_SECONDS:
                self.write(trainer.method)
            if time.time() > stop:
                raise OutOfTime

        stopped = False
        try:
            trainer.train(progress=progress)
        except OutOfTime:
            stopped = True
        self.write(trainer.method)
        few = curve[:: max(len(curve) // 20, 1)] + curve[-1:]
        return {
            "steps": trainer.step,
            "planned": self.steps,
            "stopped": stopped,
            "batch": self.batch,
            "lr": LR,
            "mode": vars(self.mode),
            "training_seconds": round(trainer.bill.seconds, 1),
            "images": trainer.bill.images,
            "flops": trainer.bill.flops,
            "images_a_second": trainer.bill.images / trainer.bill.seconds,
            "tflops": trainer.bill.flops / trainer.bill.seconds / 1e12,
            "loss": few,
        }

    def write(self, method: Method) -> None:
        """Writes the averaged weights in float16."""
        average = method.student_player.ema
        assert average is not None
        write_tensors(
            self.weights,
            {name: tensor.half() for name, tensor in average.module.state_dict().items()},
        )
        self.snapshot = time.time()

    def reference(self) -> tuple[Any, Tensor]:
        """The feature network and the features of the training images, computed once."""
        if not hasattr(self, "_reference"):
            classifier = self.task.classifier(self.setting.device)
            self._reference = classifier, classify(classifier, self.task.split.train.images)[0]
        return self._reference

    def guidance(self, scale: float) -> Values:
        """FID, KID and label agreement of the written weights at a guidance scale."""
        network = build(self.task.network_options)
        network.load_state_dict(
            {name: tensor.float() for name, tensor in read_tensors(self.weights).items()}
        )
        guided = self.task.guided(network.to(self.setting.device).eval()).at(scale)
        spec, (classifier, real) = self.task.spec.evaluation, self.reference()
        features, logits = classify(classifier, self.sample(guided, spec.samples))
        asked = self.task.conditions.balanced(torch.arange(spec.samples)).classes
        found = {
            "fid": fid(features, real),
            "kid": kid(features, real, spec.kid_subset_size),
            "label_agreement": label_agreement(logits, asked),
        }
        self.scan[scale] = {name: round(value, 4) for name, value in found.items()}
        return {**self.scan[scale], "n": spec.samples}

    def card(self) -> Values:
        """Writes the card beside the weights."""
        best = min(self.scan, key=lambda scale: self.scan[scale]["fid"])
        options = {"lr": LR}
        training = {
            "steps": self.steps,
            "batch_size": self.batch,
            "seed": 0,
            **vars(self.mode),
            "options": options,
        }
        quality = {
            "n": self.task.spec.evaluation.samples,
            "noise_set": 0,
            "guidance_scan": self.scan,
            "best_guidance_scale": best,
        }
        content = {
            "command": "python -m benchmarks.device",
            "sha256": file_hash(self.weights),
            "format": "fp16 safetensors of the averaged weights",
            "network": self.task.network_options,
            "training": training,
            "device": torch.cuda.get_device_name(self.setting.device)
            if self.setting.device.type == "cuda"
            else "cpu",
            "data": {
                **self.task.spec.data.model_dump(mode="json"),
                "images": len(self.task.split.train),
            },
            "quality": quality,
        }
        write_text(self.weights.with_suffix(".yaml"), yaml.safe_dump(content, sort_keys=False))
        return {
            "best_guidance_scale": best,
            "fid": self.scan[best]["fid"],
            "bytes": self.weights.stat().st_size,
        }


def rows(setting: Setting) -> Rows:
    """Speed of a step, training, FID by guidance scale, the card."""
    work = Work(setting)
    yield "data", lambda: {"images": len(work.task.split.train)}
    yield "step", work.measure
    yield "training", work.train
    for scale in SCALES[:2] if setting.toy else SCALES:
        yield f"guidance {scale}", lambda scale=scale: work.guidance(scale)  # type: ignore[misc]
    yield "card", work.card
