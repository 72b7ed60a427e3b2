"""Conditions of samples: class labels, text, both or neither, and named numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.diffusion.randomness import Keyed


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch, which is the first axis of every tensor.

    Attributes:
        labels: class labels [B], int64, or None.
        text: outputs of a text encoder [B, length, width], or None.
        scalars: further inputs of a student by name, float32 [B] each, e.g. a target time or a
            guidance scale. A network reads those that it was built with (`Trunk`, `scalars`).
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def classes(self) -> Tensor:
        """The labels [B]. Raises ValueError if there are none."""
        if self.labels is None:
            raise ValueError("class labels are needed, but the conditions have none")
        return self.labels

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        labels, text = (None if x is None else change(x) for x in (self.labels, self.text))
        return Condition(
            labels, text, {name: change(value) for name, value in self.scalars.items()}
        )

    def __getitem__(self, index: slice | Tensor) -> Condition:
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> Condition:
        return self._each(lambda x: x.to(device))

    def repeat(self, times: int) -> Condition:
        """`times` copies of the batch, one after the other."""
        return self._each(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def with_scalars(self, **scalars: Tensor) -> Condition:
        """The same with these numbers [B] added; they replace earlier ones of the same name."""
        return Condition(
            self.labels,
            self.text,
            {**self.scalars, **{name: value.float() for name, value in scalars.items()}},
        )

    def replaced(self, where: Tensor, null: Condition) -> Condition:
        """The same with labels and text of `null`, a batch of one, where the mask [B] is true.

        Raises:
            ValueError: if only one of the two has labels, or text.
        """

        def one(mine: Tensor | None, other: Tensor | None) -> Tensor | None:
            if mine is None and other is None:
                return None
            if mine is None or other is None:
                raise ValueError(
                    "the null condition has other parts (labels, text) than the conditions: "
                    "give both the same"
                )
            return torch.where(
                where.reshape(-1, *[1] * (mine.dim() - 1)), other.to(mine.device), mine
            )

        return Condition(one(self.labels, null.labels), one(self.text, null.text), self.scalars)


@dataclass(frozen=True)
class Conditions:
    """The numbered conditions of a task: class labels, or prompts if there is a table.

    Attributes:
        count: the number of conditions.
        table: a text encoder's outputs for the prompts, [count, length, width].
        null_text: its output for the empty prompt, [1, length, width].
    """

    count: int
    table: Tensor | None = None
    null_text: Tensor | None = None

    def of(self, number: Tensor) -> Condition:
        """The conditions with these numbers [B]."""
        return Condition(number) if self.table is None else Condition(text=self.table[number])

    def balanced(self, index: Tensor) -> Condition:
        """Condition i mod `count` for sample i; a multiple of `count` samples is balanced."""
        return self.of(index % self.count)

    def drawn(self, keyed: Keyed, index: Tensor) -> Condition:
        """A condition for each sample, uniform over all `count`."""
        return self.of((keyed.uniform("labels", index) * self.count).long())

    @property
    def null(self) -> Condition:
        """The null condition of guidance and label dropout, a batch of one.

        It is the label after the last class, or the empty prompt.
        """
        return (
            Condition(torch.tensor([self.count], device="cpu"))
            if self.table is None
            else Condition(text=self.null_text)
        )
