"""Options of methods: the base class of all configs, ranges for searches, and AdamW's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import nn

from harness.methods.parts.players import EMA, Player, cosine


def _split(value: Any) -> Any:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError):
        return parts  # pydantic reports the error


Numbers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split)]
"""Positive whole numbers, typed as 1,2,4: each once, in ascending order."""


@dataclass(frozen=True)
class Span:
    """A range of an option that a search varies.

    Attributes:
        low, high: its ends, both included; two whole numbers make a range of whole numbers.
        log: whether values are drawn by their logarithm.
    """

    low: int | float
    high: int | float
    log: bool = False

    @property
    def ends(self) -> tuple[int | float, int | float]:
        return self.low, self.high

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


class MethodConfig(BaseModel):
    """Options of a method, typed once; command line, YAML and record derive from them.

    Tables always name a field with `json_schema_extra={"in_label": True}`. They name other fields
    where these differ from the default.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
    named: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}
    """By option and name, the options that the name stands for; tables show the name."""

    @property
    def sample_group(self) -> int:
        """The number of consecutive samples that a loss treats together; it divides every batch."""
        return 1

    @property
    def counted_samples(self) -> int:
        """How many samples FLOPs are counted on, so that every kind of sample has its share."""
        return 8

    @property
    def whole_batch(self) -> bool:
        """Whether a loss needs the whole batch at once, which forbids micro-batches."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Whether a loss reads activations inside a trained network, which forbids compiling it."""
        return False

    @property
    def needs_network_teacher(self) -> bool:
        """Whether the options need a teacher that is a network, not a closed formula."""
        return False


class OptimizerConfig(MethodConfig):
    """Options of AdamW. The defaults suit runs of about 1,000 steps on a small task."""

    lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Weight decay of AdamW."""
    clip: float = Field(1.0, gt=0, le=1e6)
    """Norm to which the gradient is clipped."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Fraction of the run over which the learning rate rises."""
    ema_half_life: float = Field(0.05, gt=0, le=1)
    """Half-life of the evaluated weights' average, as a fraction of the run."""

    def player(self, module: nn.Module, total_steps: int) -> Player:
        """A player with these options, for `total_steps` optimizer steps.

        Weights that are frozen already stay as they are.
        """
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, self.lr, betas=(0.9, 0.999), weight_decay=self.weight_decay
        )
        return Player(
            module,
            optimizer,
            self.clip,
            EMA(module, self.ema_half_life, total_steps),
            cosine(self.warmup),
        )
