"""The one trainer. Floor 6: of the methods it knows `methods/base.py` only.

All randomness is keyed by step and sample number, so the state of a run is its step, its weights, its optimizers and
averages, and what the method says; a resumed run continues bit for bit on the CPU.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from harness.diffusion.counting import count_flops
from harness.diffusion.randomness import Keyed
from harness.errors import HarnessError, Interrupted, RunFailed, UsageError
from harness.files import write_aside
from harness.methods.base import Batch, Method, Player, Update
from harness.networks.passes import count_passes
from harness.progress import Progress

MILESTONES = (1 / 8, 1 / 4, 1 / 2)
"""Parts of the budget at which quality is measured; the whole of it is the evaluation itself."""


class Source(Protocol):
    """Samples by item number: real images or trajectories."""

    def __len__(self) -> int: ...

    def batch(self, items: Tensor) -> Any: ...


@dataclass(frozen=True)
class TrainSettings:
    """How a run is trained, whatever the method.

    Attributes:
        total_steps: length of the run.
        batch_size, micro_batch_size: samples a step, and samples a forward pass (None: all at once).
        seed: of all the run's randomness.
        precision: "bf16" runs the losses under autocast.
        compile: whether the players' networks go through torch.compile, each where it is called as a whole. What a loss differentiates
            in forward mode stays as it is.
        checkpoint_seconds: how often a checkpoint is written.
        log_every: steps between two points of the curve.
        sample_group: how many consecutive samples a loss treats together.
        counted_samples: on how many samples FLOPs are counted.
    """

    total_steps: int
    batch_size: int
    seed: int
    micro_batch_size: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    checkpoint_seconds: float = 60.0
    log_every: int = 10
    sample_group: int = 1
    counted_samples: int = 8


@dataclass
class Bill:
    """What training cost.

    Attributes:
        images: samples that the losses were called on.
        flops: training FLOPs (forward and backward, all networks), counted on the first step and multiplied.
        seconds: wall time of the training steps, without the counting of FLOPs and the compiling that come before a loss is first used.
        peak_memory_bytes: the process's (CPU, compiling included) or the device's (CUDA) peak.
        updates: optimizer steps of each player.
        teacher_evaluations: passes through the teacher inside the losses.
    """

    images: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    teacher_evaluations: int = 0


class Items:
    """Which item a sample number takes: the source in a new keyed order each epoch."""

    def __init__(self, name: str, size: int, seed: int):
        self.name, self.size, self.keys = name, size, Keyed("order", seed)
        self._orders: dict[int, Tensor] = {}

    def __call__(self, index: Tensor) -> Tensor:
        epochs, items = index // self.size, torch.empty_like(index)
        for epoch in epochs.unique().tolist():
            if epoch not in self._orders:
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = self.keys.permutation(f"{self.name} epoch {epoch}", self.size)
            here = epochs == epoch
            items[here] = self._orders[epoch][index[here] % self.size]
        return items


class Batches:
    """Makes the micro-batches of a step."""

    def __init__(self, method: Method, sources: Mapping[str, Source], settings: TrainSettings, device: torch.device):
        missing = method.sources - sources.keys()
        if missing:
            raise ValueError(f"the method needs the sources {sorted(method.sources)}, but {sorted(missing)} are not given")
        self.sources = {name: sources[name] for name in method.sources}
        self.items = {name: Items(name, len(source), settings.seed) for name, source in self.sources.items()}
        self.settings, self.device = settings, device

    def of_step(self, step: int) -> list[Batch]:
        """The micro-batches of `step`, which together are samples step B .. step B + B - 1."""
        size = self.settings.batch_size
        index = torch.arange(step * size, (step + 1) * size)
        return [self.of_samples(step, part) for part in index.split(self.settings.micro_batch_size or size)]

    def of_samples(self, step: int, index: Tensor) -> Batch:
        """A batch of these sample numbers."""
        drawn = {name: source.batch(self.items[name](index)) for name, source in self.sources.items()}
        data, trajectory = drawn.get("data"), drawn.get("trajectory")
        if data is not None:
            data = (data[0].to(self.device), data[1].to(self.device))
        if trajectory is not None:
            trajectory = trajectory.to(self.device)
        return Batch(index.to(self.device), data, trajectory, Keyed("train", self.settings.seed, step))


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM only add their number to the list, so that a step can finish (main thread only); a second SIGINT, of
    somebody who does not want to wait, is a KeyboardInterrupt.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains the players of a method.

    Args:
        sources: what the method names in `Method.sources`.
        folder: where `checkpoint/` and `curves.jsonl` go; None keeps nothing.
        device: where everything runs.
        teacher: the network whose passes are billed as teacher evaluations, if there is one.
        identity: what the run is, code included; a checkpoint of another identity is not resumed.
    """

    def __init__(self, method: Method, sources: Mapping[str, Source], settings: TrainSettings, folder: Path | None,
                 device: torch.device, teacher: nn.Module | None = None, identity: str = ""):  # fmt: skip
        size, micro = settings.batch_size, settings.micro_batch_size or settings.batch_size
        if size % micro:
            raise UsageError(f"micro_batch_size is {micro}, but must divide batch_size, which is {size}")
        self.method, self.settings, self.folder, self.device = method, settings, folder, device
        self.batches = Batches(method, sources, settings, device)
        self.step, self.bill, self.teacher, self.identity = 0, Bill(), teacher or nn.Identity(), identity
        self.curve: list[dict[str, float]] = []
        self.milestones: list[dict[str, Any]] = []
        for player in method.players.values():
            for group in player.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        if settings.compile:
            compile_players(method)
        self._parameters = {name: list(player.module.parameters()) for name, player in method.players.items()}
        self.known_flops: dict[str, float] = {}
        self._compiled: set[str] = set()

    def train(self, until: int | None = None, progress: Progress | None = None,
              measure: Callable[[], dict[str, float]] | None = None) -> None:  # fmt: skip
        """Runs from the last checkpoint to the end, or to step `until`; `measure` is called at the milestones.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after the step under way and a checkpoint.
            RunFailed: if a loss is not finite.
        """
        self._resume()
        until = self.settings.total_steps if until is None else until
        total = self.settings.total_steps
        milestones = {math.ceil(part * total) for part in MILESTONES} - {total}
        saved = started = time.perf_counter()
        seconds_before = self.bill.seconds
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with signals_noted() as caught:
            while self.step < until:
                started += self._prepare()
                means = self._one_step()
                self.step += 1
                now = time.perf_counter()
                self.bill.seconds = seconds_before + now - started
                last = self.step == total
                if self.step % self.settings.log_every == 0 or last:
                    self.curve.append({"step": self.step, **means})
                    if progress:
                        progress(self.step, total)
                if measure and self.step in milestones:
                    self.note_quality(measure())
                    started += time.perf_counter() - now  # what measuring takes is not training
                    if self.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(self.device)
                if caught or self.step == until or now - saved > self.settings.checkpoint_seconds:
                    try:
                        self._save()
                    except HarnessError as error:
                        if not caught:
                            raise
                        raise Interrupted(f"stopped by signal {caught[0]} at step {self.step}, not saved: {error}") from error
                    saved = now
                if caught:
                    raise Interrupted(f"stopped by signal {caught[0]} at step {self.step}; the same command resumes it")

    def note_quality(self, quality: dict[str, float]) -> None:
        """Adds a milestone at the current step."""
        self.milestones.append({"step": self.step, "images": self.bill.images, "flops": self.bill.flops, "quality": quality})

    def _prepare(self) -> float:
        """Counts and compiles what the next step uses for the first time; returns the seconds that this took."""
        before, updates = time.perf_counter(), list(self.method.updates(self.step))
        self.flops_of(updates)
        if self.settings.compile and not self._compiled >= set(map(name_of, updates)):
            batches = self.batches.of_step(self.step)[:1]
            self._try(updates, lambda update: self._backward(update.loss, batches))
            self._compiled |= set(map(name_of, updates))
        return time.perf_counter() - before

    def _one_step(self) -> dict[str, float]:
        means: dict[str, float] = {}
        batches, updates = self.batches.of_step(self.step), list(self.method.updates(self.step))
        self.bill.flops += self.flops_of(updates)
        for update in updates:
            player = self.method.players[update.player]
            self._only(update.player)
            with count_passes(self.teacher) as passes:
                totals = self._backward(update.loss, batches)
            self.bill.teacher_evaluations += passes.total
            prefix = "" if len(self.method.players) == 1 else f"{update.player}/"
            found = {prefix + name: float(total) for name, total in totals.items()}
            self._apply(update.player, player, found[prefix + "loss"])
            means |= found
            self.bill.updates[update.player] = self.bill.updates.get(update.player, 0) + 1
        self.bill.images += self.settings.batch_size
        self.bill.peak_memory_bytes = max(self.bill.peak_memory_bytes, peak_memory(self.device))
        for name in self.method.end_step(self.step, means):
            restart(self.method.players[name])
        return means

    def _backward(self, loss_of: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]], batches: list[Batch]) -> dict[str, Tensor]:
        """Adds the gradients of the mean loss over the micro-batches; returns the loss and its metrics, averaged."""
        totals: dict[str, Tensor] = {}
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
                loss, metrics = loss_of(batch)
            (loss / len(batches)).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value.float() / len(batches)
        return totals

    def _only(self, name: str) -> None:
        """Turns `requires_grad` on for one player alone."""
        for other, parameters in self._parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(other == name)

    def _apply(self, name: str, player: Player, loss: float) -> None:
        parameters = self._parameters[name]
        norm = nn.utils.clip_grad_norm_(parameters, player.clip if player.clip is not None else math.inf)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise RunFailed(f"{name}: loss {loss}, gradient norm {float(norm)} at step {self.step}: not finite")
        factor = player.rate((self.step + 1) / self.settings.total_steps)
        for group in player.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
        if player.ema is not None:
            player.ema.update(player.module)

    def flops_of(self, updates: Sequence[Update]) -> float:
        """FLOPs of a step with these updates: their losses and backward passes on a whole batch."""
        names = list(map(name_of, updates))
        if not self.known_flops.keys() >= set(names):
            self._count_flops(updates)
        return sum(self.known_flops[name] for name in names) * self.settings.batch_size

    def _count_flops(self, updates: Sequence[Update]) -> None:
        """Counts each new loss and its backward on a few samples, in micro-batches as a step's are."""
        group, size = self.settings.sample_group, self.settings.batch_size
        few = -(-self.settings.counted_samples // group) * group
        parts = torch.arange(few).split(self.settings.micro_batch_size or size)
        batches = [self.batches.of_samples(self.step, part) for part in parts]

        def count(update: Update) -> None:
            with torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext():  # a compiled pass is not seen
                flops = sum(count_flops(partial(lambda batch: update.loss(batch)[0].backward(), batch)) for batch in batches)
            self.known_flops.setdefault(name_of(update), flops / few)

        self._try(updates, count)

    def _try(self, updates: Sequence[Update], call: Callable[[Update], object]) -> None:
        """Calls all of a step's updates, in order, since one may use what another left in the carry; nothing stays of it."""
        state = copy.deepcopy(self.method.state_dict())
        for update in updates:
            self._only(update.player)
            call(update)
            self.method.players[update.player].optimizer.zero_grad(set_to_none=True)
        self.method.load_state_dict(state)

    def _save(self) -> None:
        if self.folder is None:
            return
        players = {
            name: {
                "module": player.module.state_dict(),
                "optimizer": player.optimizer.state_dict(),
                "ema": player.ema.module.state_dict() if player.ema else None,
            }
            for name, player in self.method.players.items()
        }
        state = {
            "identity": self.identity,
            "step": self.step,
            "players": players,
            "method": self.method.state_dict(),
            "bill": vars(self.bill).copy(),
            "flops": self.known_flops,
            "curve": self.curve,
            "milestones": self.milestones,
        }
        write_aside(self.folder / "checkpoint" / "state.pt", lambda aside: torch.save(state, aside))
        self.write_curves()

    def write_curves(self) -> None:
        """Writes `curves.jsonl`: a line for each logged step, and one with the quality for each milestone."""
        if self.folder is None:
            return
        qualities = [{"step": point["step"], **point["quality"]} for point in self.milestones]
        lines = sorted([*self.curve, *qualities], key=lambda point: point["step"])
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_aside(self.folder / "curves.jsonl", lambda aside: aside.write_text(text))

    def _resume(self) -> None:
        path = self.folder / "checkpoint" / "state.pt" if self.folder else None
        if path is None or not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["identity"] != self.identity:
                return
            for name, player in self.method.players.items():
                saved = state["players"][name]
                player.module.load_state_dict(saved["module"])
                player.optimizer.load_state_dict(saved["optimizer"])
                if player.ema:
                    player.ema.module.load_state_dict(saved["ema"])
            self.method.load_state_dict(state["method"])
            self.step, self.bill, self.known_flops = state["step"], Bill(**state["bill"]), state["flops"]
            self.curve, self.milestones = state["curve"], state["milestones"]
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(f"checkpoint {path} cannot be read ({type(error).__name__}); delete its folder to start anew") from error


def name_of(update: Update) -> str:
    """By which an update's loss is known."""
    return f"{update.player}/{update.phase}"


def check_compiler() -> None:
    """Raises UsageError where there is nothing that torch.compile could compile with."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    if shutil.which(compiler) is None:
        raise UsageError(f"compile needs a C++ compiler, but there is no {compiler!r} here: install it or name one in CXX")


def compile_players(method: Method) -> None:
    """Sends the networks that are trained through torch.compile; of those of another method it forgets all, since it keeps a few alone."""
    check_compiler()
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # of one network in all shapes and states of a run; beyond it goes on without a word
    for player in method.players.values():
        player.module.compile()


def restart(player: Player) -> None:
    """Forgets the optimizer's moments and starts the average again from the current weights."""
    player.optimizer.state.clear()
    if player.ema is not None:
        player.ema.module.load_state_dict(player.module.state_dict())


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
