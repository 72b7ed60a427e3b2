"""Weights & Biases: a run of wandb for each run, a group for each sweep.

The step of a point is a number of its own, since wandb drops what has no larger step than the last
point, and a milestone has the step of a point of the curve.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from harness.errors import UsageError, sentence
from harness.progress import Follower, Kind, Subject

if TYPE_CHECKING:
    from PIL.Image import Image


class Wandb(Follower):
    """A run of wandb, which a resumed run goes on with. Files lie in `wandb` in the results folder.

    With WANDB_MODE=offline it needs neither an account nor a network.
    """

    @staticmethod
    def check() -> None:
        """Raises UsageError if wandb would need an account and knows none."""
        import wandb

        try:
            if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
                wandb.login(verify=False)
        except Exception as error:
            raise UsageError(
                f"--track wandb cannot begin: {sentence(str(error))} Or set WANDB_MODE=offline"
            ) from error

    def begin(self, run: Subject) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.project),
            id=run.name,
            name=run.name,
            group=run.group or None,
            config=run.config,
            dir=os.environ.get("WANDB_DIR", str(run.results)),
            resume="allow",
            settings=wandb.Settings(console="off", quiet=True, disable_git=True),
        )
        self.run.define_metric("*", step_metric="step")

    def numbers(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **{f"{kind}/{name}": x for name, x in values.items()}})

    def picture(self, step: int, draw: Callable[[], Image]) -> None:
        self.run.log({"step": step, "samples": self.wandb.Image(draw())})

    def end(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
