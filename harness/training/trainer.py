"""The one trainer: it knows the contract of a method (`methods/base.py`) and no method.

All randomness is keyed by step and sample number. So the state of a run is its step, its weights,
its optimizers and averages, and the method's own state. A resumed run continues bit for bit on the
CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import ranks
from harness.asides import write_aside
from harness.errors import HarnessError, Interrupted, RunFailed, UsageError
from harness.methods.base import Batch, Loss, Method, Player, Update
from harness.networks.compiling import blocks_of, compile_networks, uncompiled
from harness.networks.passes import count_passes
from harness.progress import NOBODY, Follower, Progress
from harness.training.batches import Batches, Source
from harness.training.checkpoints import NAME, load_checkpoint, save_checkpoint
from harness.training.distributed import mean_over_ranks, share_of
from harness.training.flops import loss_flops, loss_key, rehearse, require_grad_of
from harness.training.interrupts import signals_noted
from harness.training.power_average import PowerAverages
from harness.training.settings import Bill, TrainSettings, autocast, peak_memory
from harness.training.sharding import clip_gradients, gathered_no_more, shard

MILESTONES = (1 / 8, 1 / 4, 1 / 2)
"""Parts of the budget at which quality is measured; the evaluation itself measures the whole."""
STEERING = ("gradient_norm", "learning_rate")
"""What a point of the curve holds of each player beside its losses and metrics."""
Measure = Callable[[], dict[str, float]]
"""Measures the current student: metrics by name."""
Look = Callable[[], None]
"""Looks at what is trained and leaves it as it is."""


class Trainer:
    """Trains the players of a method.

    Args:
        sources: the sources that `Method.sources` names.
        folder: the folder of `checkpoint/` and `curves.jsonl`; None writes nothing.
        device: the device on which everything runs.
        teacher: the network whose passes are billed as teacher evaluations, if there is one.
        identity: a name of the run and its code; a checkpoint of another identity is ignored.
        sharded: whether ranks divide the networks among them.
        averages: averages of the student beside its own, if they are wanted.
        follower: is told the points of the curve and the milestones.

    Raises UsageError if micro-batches do not divide the batch.
    """

    def __init__(
        self,
        method: Method,
        sources: Mapping[str, Source],
        settings: TrainSettings,
        folder: Path | None,
        device: torch.device,
        teacher: nn.Module | None = None,
        identity: str = "",
        sharded: bool = False,
        averages: PowerAverages | None = None,
        follower: Follower = NOBODY,
    ):
        share = share_of(settings.batch_size, settings.sample_group)
        if share % (micro := settings.micro_batch_size or share):
            whole = "batch_size" if ranks.count() == 1 else "a rank's share of batch_size"
            raise UsageError(
                f"micro_batch_size is {micro}, but must divide {whole}, which is {share}"
            )
        self.method, self.settings, self.folder, self.device = method, settings, folder, device
        self.batches = Batches(method, sources, settings, device)
        self.step, self.bill = 0, Bill()
        self.teacher, self.identity = teacher or nn.Identity(), identity
        self.sharded = shard(method, self.teacher, device) if sharded else []
        self.averages, self.follower = averages, follower
        self.curve: list[dict[str, float]] = []
        self.milestones: list[dict[str, Any]] = []
        for player in method.players.values():
            for group in player.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                if device.type == "cuda":  # one kernel for all weights
                    group |= {"fused": True, "foreach": False}
        if settings.compile:
            players = [player.module for player in method.players.values()]
            # Blocks alone: a graph of the whole teacher would hide its passes from the bill.
            compile_networks([*players, *blocks_of(self.teacher)])
        self._parameters = {name: player.trained for name, player in method.players.items()}
        self.known_flops: dict[str, float] = {}
        self._compiled: set[str] = set()

    def train(
        self,
        until: int | None = None,
        progress: Progress | None = None,
        measure: Measure | None = None,
        look: Look = lambda: None,
    ) -> None:
        """Trains from the last checkpoint to the end.

        Args:
            until: the step at which to stop; None is the end of the run.
            progress: is called at each point of the curve.
            measure: is called at the milestones.
            look: is called before the first step, at the milestones and after the last step.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after the current step and a checkpoint.
            RunFailed: if a loss is not finite.
        """
        with ranks.together():
            self._train(until, progress, measure, look)

    def _train(
        self, until: int | None, progress: Progress | None, measure: Measure | None, look: Look
    ) -> None:
        self._resume()
        self._tell_past()
        if self.step == 0:
            look()
        until = self.settings.total_steps if until is None else until
        saved = started = time.perf_counter()
        seconds_before = self.bill.seconds
        self._reset_peak_memory()
        with signals_noted() as caught:
            while self.step < until:
                started += self._prepare()
                found = self.one_step()
                self.step += 1
                now = time.perf_counter()
                self.bill.seconds = seconds_before + now - started
                self._log(found, progress)
                if measure and self.step in self._milestone_steps():
                    with uncompiled(self.settings.compile):
                        self.note_quality(measure())
                if self.step in self._milestone_steps() | {self.settings.total_steps}:
                    look()
                    self._reset_peak_memory()
                started += time.perf_counter() - now  # telling and measuring are not training
                if self.averages and self.step == self.settings.total_steps:
                    self.averages.write()  # before the last checkpoint: a resumed run is past it
                late = ranks.is_first() and now - saved > self.settings.checkpoint_seconds
                stopped, due = ranks.anywhere(bool(caught), late)
                if stopped or due or self.step == until:
                    self._save(caught)
                    saved = now
                if stopped:
                    ranks.wait()  # for the first one's checkpoint: torchrun kills what is left
                    raise Interrupted(f"{self._stopped(caught)}; the same command resumes it")

    def _stopped(self, caught: Sequence[int]) -> str:
        """Which signal stopped the run, and where."""
        signal = f"signal {caught[0]}" if caught else "a signal to another rank"
        return f"stopped by {signal} at step {self.step}"

    def _milestone_steps(self) -> set[int]:
        total = self.settings.total_steps
        return {math.ceil(part * total) for part in MILESTONES} - {total}

    def _log(self, found: dict[str, float], progress: Progress | None) -> None:
        """Adds a point to the curve every few steps, and at the end."""
        total = self.settings.total_steps
        if self.step % self.settings.log_every == 0 or self.step == total:
            self.curve.append({"step": self.step, **found})
            self.follower.numbers("train", self.step, found)
            if progress:
                progress(self.step, total)

    def _tell_past(self) -> None:
        """Tells what a checkpoint holds, for a follower that was not there."""
        for point in self.curve:
            values = {name: value for name, value in point.items() if name != "step"}
            self.follower.numbers("train", int(point["step"]), values)
        for milestone in self.milestones:
            self.follower.numbers("quality", milestone["step"], milestone["quality"])

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def note_quality(self, quality: dict[str, float]) -> None:
        """Adds a milestone at the current step."""
        self.milestones.append(
            {
                "step": self.step,
                "images": self.bill.images,
                "flops": self.bill.flops,
                "quality": quality,
            }
        )
        self.follower.numbers("quality", self.step, quality)

    def _prepare(self) -> float:
        """Counts and compiles the losses that the next step uses for the first time.

        Returns:
            The seconds that this took.
        """
        before, updates = time.perf_counter(), list(self.method.updates(self.step))
        self.flops_of(updates)
        if self.settings.compile and not self._compiled >= set(map(loss_key, updates)):
            batches = self.batches.of_step(self.step)[:1]
            rehearse(
                self.method,
                self._parameters,
                updates,
                lambda update: self._backward(update.loss, batches),
            )
            self._compiled |= set(map(loss_key, updates))
        return time.perf_counter() - before

    def one_step(self) -> dict[str, float]:
        """Trains one step and bills it.

        Returns:
            The means of losses and metrics over the batch, and for each player the gradient's norm
            before clipping and the learning rate.
        """
        means: dict[str, float] = {}
        steered: dict[str, float] = {}
        batches, updates = self.batches.of_step(self.step), list(self.method.updates(self.step))
        self.bill.flops += self.flops_of(updates)
        for update in updates:
            player = self.method.players[update.player]
            gathered_no_more(self.sharded)  # gathered weights keep what they were told of gradients
            require_grad_of(self._parameters, update.player)
            with count_passes(self.teacher) as passes:
                totals = self._backward(update.loss, batches)
            totals, made = mean_over_ranks(self._parameters[update.player], totals, passes.total)
            self.bill.teacher_evaluations += made
            prefix = "" if len(self.method.players) == 1 else f"{update.player}/"
            found = {prefix + name: float(total) for name, total in totals.items()}
            applied = self._apply(update.player, player, found[prefix + "loss"])
            steered |= {prefix + name: value for name, value in applied.items()}
            means |= found
            self.bill.updates[update.player] = self.bill.updates.get(update.player, 0) + 1
        self.bill.images += self.settings.batch_size
        self.bill.peak_memory_bytes = max(self.bill.peak_memory_bytes, peak_memory(self.device))
        ranks.add(self.method.sums())
        for name in self.method.end_step(self.step, means):
            restart(self.method.players[name])
            if self.averages and name == "student":
                self.averages.restart()
        return means | steered

    def _backward(self, loss_of: Loss, batches: list[Batch]) -> dict[str, Tensor]:
        """Adds the gradients of the mean loss over the micro-batches.

        Returns:
            The means of the loss and of its metrics.
        """
        totals: dict[str, Tensor] = {}
        for batch in batches:
            with autocast(self.device, self.settings.precision):
                loss, metrics = loss_of(batch)
            (loss / len(batches)).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(
                    name, torch.zeros((), device=self.device)
                ) + value.float() / len(batches)
        return totals

    def _apply(self, name: str, player: Player, loss: float) -> dict[str, float]:
        """Clips the gradients of a player, makes its optimizer step and updates its average.

        Returns:
            The `STEERING` of the step.

        Raises RunFailed if the loss or the gradient norm is not finite.
        """
        parameters = self._parameters[name]
        gathered_no_more(self.sharded)
        norm = clip_gradients(parameters, player.clip if player.clip is not None else math.inf)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunFailed(
                f"{name}: loss {loss}, gradient norm {norm} at step {self.step}: not finite"
            )
        factor = player.rate((self.step + 1) / self.settings.total_steps)
        for group in player.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
        if player.ema is not None:
            player.ema.update(player.module)
        if self.averages and name == "student":
            self.averages.update(player.module)
        return dict(zip(STEERING, (norm, player.optimizer.param_groups[0]["lr"]), strict=True))

    def flops_of(self, updates: Sequence[Update]) -> float:
        """FLOPs of a step with these updates: their losses and backward passes on a whole batch."""
        names = list(map(loss_key, updates))
        if not self.known_flops.keys() >= set(names):
            counted = loss_flops(self.method, self._parameters, updates, self.batches, self.step)
            for name, flops in counted.items():
                self.known_flops.setdefault(name, flops)
        return sum(self.known_flops[name] for name in names) * self.settings.batch_size

    def _save(self, caught: Sequence[int]) -> None:
        """Writes the curves and a checkpoint.

        Raises Interrupted if this fails after a signal was caught.
        """
        if self.folder is None:
            return
        state = {
            "identity": self.identity,
            "step": self.step,
            "bill": vars(self.bill).copy(),
            "flops": self.known_flops,
            "curve": self.curve,
            "milestones": self.milestones,
            **({"averages": self.averages.state_dict()} if self.averages else {}),
        }
        try:
            self.write_curves()  # first: a run that is resumed at its end writes none
            save_checkpoint(self._checkpoint, self.method, state)
        except HarnessError as error:
            if not caught:
                raise
            raise Interrupted(f"{self._stopped(caught)}, not saved: {error}") from error

    def _resume(self) -> None:
        """Loads the last checkpoint of this run, if there is one."""
        if self.folder is None:
            return
        state = load_checkpoint(self._checkpoint, self.method, self.identity, self.device)
        if state is not None:
            self.step, self.bill = state["step"], Bill(**state["bill"])
            self.known_flops = state["flops"]
            self.curve, self.milestones = state["curve"], state["milestones"]
        if self.averages:
            self._resume_averages(state)
        if (first := ranks.told_by_first(lambda: self.step)) != self.step:
            raise RunFailed(
                f"rank {ranks.number()} resumes at step {self.step}, but the first rank at "
                f"{first}: give all ranks one results folder"
            )

    def _resume_averages(self, state: dict[str, Any] | None) -> None:
        """Restores the averages of a checkpoint; without one they begin anew.

        Raises UsageError if the checkpoint was written without averages.
        """
        assert self.averages is not None
        if state is None:
            if self.step == 0:  # snapshots of a run that left no checkpoint are another one's
                self.averages.restart()
            return
        if "averages" not in state:
            raise UsageError(
                f"{self._checkpoint} was written without --snapshots: resume without them, or "
                "delete the run's folder"
            )
        self.averages.load_state_dict(state["averages"])

    @property
    def _checkpoint(self) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoint" / NAME

    def write_curves(self) -> None:
        """Writes `curves.jsonl`: a line for each logged step and for each milestone's quality.

        A number that is not finite is left out, since JSON has none.
        """
        if self.folder is None or not ranks.is_first():
            return
        qualities = [{"step": point["step"], **point["quality"]} for point in self.milestones]
        lines = sorted([*self.curve, *qualities], key=lambda point: point["step"])
        finite = ({n: x for n, x in line.items() if math.isfinite(x)} for line in lines)
        text = "".join(json.dumps(line) + "\n" for line in finite)
        write_aside(self.folder / "curves.jsonl", lambda aside: aside.write_text(text))


def restart(player: Player) -> None:
    """Clears the optimizer's moments and restarts the average from the current weights."""
    player.optimizer.state.clear()
    if player.ema is not None:
        player.ema.module.load_state_dict(player.module.state_dict())
