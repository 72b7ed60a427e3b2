"""What a sample is conditioned on: class labels, text, both or nothing, and named numbers. Floor 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch; every tensor in it has the batch as its first axis.

    Attributes:
        labels: class labels [B], int64, where there are classes.
        text: outputs of a text encoder [B, length, width], where there is text.
        scalars: further numbers by name, float32 [B] each, which a student is told: where to jump to, a guidance scale. A network
            takes those that it was built with (`Trunk`, `scalars`).
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def classes(self) -> Tensor:
        """The labels [B], where they must be there; ValueError if there are none."""
        if self.labels is None:
            raise ValueError("class labels are needed here, but the conditions have none")
        return self.labels

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        labels, text = (None if x is None else change(x) for x in (self.labels, self.text))
        return Condition(labels, text, {name: change(value) for name, value in self.scalars.items()})

    def __getitem__(self, index: slice | Tensor) -> Condition:
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> Condition:
        return self._each(lambda x: x.to(device))

    def repeat(self, times: int) -> Condition:
        """The whole batch `times` times, one after the other."""
        return self._each(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def with_scalars(self, **scalars: Tensor) -> Condition:
        """The same with these numbers [B] beside, or in the place of those with their names."""
        return Condition(self.labels, self.text, {**self.scalars, **{name: value.float() for name, value in scalars.items()}})

    def replaced(self, where: Tensor, null: Condition) -> Condition:
        """The same with the labels and text of `null`, a batch of one, wherever the mask [B] is true (label dropout)."""

        def one(mine: Tensor | None, other: Tensor | None) -> Tensor | None:
            if mine is None and other is None:
                return None
            if mine is None or other is None:
                raise ValueError("the null condition has other parts (labels, text) than the conditions that it replaces")
            return torch.where(where.reshape(-1, *[1] * (mine.dim() - 1)), other.to(mine.device), mine)

        return Condition(one(self.labels, null.labels), one(self.text, null.text), self.scalars)


@dataclass(frozen=True)
class Conditions:
    """The conditions of a task, by number: class labels, or with a table the prompts in it.

    Attributes:
        count: how many there are.
        table, null_text: a text encoder's outputs for the prompts, [count, length, width], and for no prompt, [1, length, width].
    """

    count: int
    table: Tensor | None = None
    null_text: Tensor | None = None

    def of(self, number: Tensor) -> Condition:
        """The conditions of these numbers [B]."""
        return Condition(number) if self.table is None else Condition(text=self.table[number])

    def balanced(self, index: Tensor) -> Condition:
        """Sample i has number i mod `count`, so that any multiple of it is exactly balanced."""
        return self.of(index % self.count)

    @property
    def null(self) -> Condition:
        """The null condition of guidance and label dropout, a batch of one: one label more, or the text of no prompt."""
        return Condition(torch.tensor([self.count], device="cpu")) if self.table is None else Condition(text=self.null_text)
