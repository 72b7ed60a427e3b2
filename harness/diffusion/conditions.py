"""Conditions of samples: class labels, text, both or neither, and named numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.diffusion.randomness import Keyed

T = TypeVar("T")
PARTS = ("labels", "text", "text_mask", "pooled")
"""The parts of a condition beside the scalars."""


@dataclass(frozen=True, eq=False)
class Condition:
    """The conditions of a batch, which is the first axis of every tensor.

    Two conditions are equal if they are the same object.

    Attributes:
        labels: class labels [B], int64, or None.
        text: outputs of a text encoder [B, length, width], or None; for a network that has an
            encoder of its own, tokens [B, length], int64.
        scalars: further inputs of a student by name, float32 [B] each, e.g. a target time or a
            guidance scale. A network reads those that it was built with.
        text_mask: which of the text's outputs belong to the text [B, length], bool; None means all.
        pooled: one vector for the whole text [B, width], which some networks take beside it.
        kept: what `once` keeps; None keeps nothing.
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    kept: dict[Hashable, Any] | None = None

    @property
    def classes(self) -> Tensor:
        """The labels [B]. Raises ValueError if there are none."""
        if self.labels is None:
            raise ValueError("class labels are needed, but the conditions have none")
        return self.labels

    @property
    def mean_text(self) -> Tensor:
        """The mean [B, width] of the text's outputs. Raises ValueError if there is no text."""
        if self.text is None:
            raise ValueError("text is needed, but the conditions have none")
        if self.text_mask is None:
            return self.text.mean(1)
        mask = self.text_mask.unsqueeze(-1).to(self.text.dtype)
        return (self.text * mask).sum(1) / mask.sum(1)

    @property
    def _parts(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in PARTS}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        parts = {name: None if x is None else change(x) for name, x in self._parts.items()}
        scalars = {name: change(x) for name, x in self.scalars.items()}
        return Condition(**parts, scalars=scalars, kept=self._none_yet)

    @property
    def _none_yet(self) -> dict[Hashable, Any] | None:
        """What other conditions, made of these, have kept."""
        return None if self.kept is None else {}

    def keeping(self) -> Condition:
        """The same conditions for one run of sampling, in which no weight changes."""
        return replace(self, kept={})

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`; conditions that keep compute it at the first call with this key alone.

        Conditions that are made of these, by an index or for guidance, keep for themselves. Those
        with other scalars share what is kept.

        Args:
            key: names what is computed, such as the module that computes it.
            compute: reads the labels and the text, but no scalar.
        """
        if self.kept is None:
            return compute()
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]

    def __getitem__(self, index: slice | Tensor) -> Condition:
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> Condition:
        return self._each(lambda x: x.to(device))

    def widened(self) -> Condition:
        """The same in float32 where it is stored in 16 bits."""
        return self._each(lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)

    def repeat(self, times: int) -> Condition:
        """`times` copies of the batch, one after the other."""
        return self._each(lambda x: x.repeat(times, *[1] * (x.dim() - 1)))

    def of_states(self, count: int) -> Condition:
        """Each condition repeated for the states of its sample, `count` [B S] in all."""
        return self._each(lambda x: x.repeat_interleave(count // len(x), 0))

    def with_scalars(self, **scalars: Tensor) -> Condition:
        """The same with these numbers [B] added; they replace earlier ones of the same name."""
        more = {name: value.float() for name, value in scalars.items()}
        return replace(self, scalars={**self.scalars, **more})

    def replaced(self, where: Tensor, null: Condition) -> Condition:
        """The same with the parts of `null`, a batch of one, where the mask [B] is true.

        The scalars stay.

        Raises:
            ValueError: if only one of the two has labels, text, its mask or its pooled vector.
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

        theirs = null._parts
        parts = {name: one(mine, theirs[name]) for name, mine in self._parts.items()}
        return Condition(**parts, scalars=self.scalars, kept=self._none_yet)


@dataclass(frozen=True)
class Conditions:
    """The numbered conditions of a task: class labels, or prompts if there is a table.

    Attributes:
        count: the number of conditions.
        prompts: the conditions of all prompts, a batch of `count`, which may lie in a mapped file
            in 16 bits; None means class labels.
        no_prompt: the condition of the empty prompt, a batch of one.
    """

    count: int
    prompts: Condition | None = None
    no_prompt: Condition | None = None

    def of(self, number: Tensor) -> Condition:
        """The conditions with these numbers [B]."""
        return Condition(number) if self.prompts is None else self.prompts[number].widened()

    def balanced(self, index: Tensor) -> Condition:
        """Condition i mod `count` for sample i; a multiple of `count` samples is balanced."""
        return self.of(index % self.count)

    def drawn(self, keyed: Keyed, index: Tensor) -> Condition:
        """A condition for each sample, uniform over all `count`."""
        return self.of(self.drawn_numbers(keyed, index))

    def drawn_numbers(self, keyed: Keyed, index: Tensor) -> Tensor:
        """The numbers [B] of these conditions."""
        return (keyed.uniform("labels", index) * self.count).long()

    @property
    def null(self) -> Condition:
        """The null condition of guidance and label dropout, a batch of one.

        It is the label after the last class, or the empty prompt.
        """
        if self.no_prompt is not None:
            return self.no_prompt.widened()
        return Condition(torch.tensor([self.count], device="cpu"))
