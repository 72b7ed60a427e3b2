"""Options of students that start from their teacher: all weights train, or LoRA adapters alone."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import nn

from harness.errors import UsageError
from harness.methods.parts.options import OptimizerConfig
from harness.networks.adapters import add_adapters
from harness.networks.backbones import Backbone


def _split(value: Any) -> Any:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(sorted(set(parts))) if isinstance(parts, (list, tuple)) else parts


Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_split)]
"""Words, typed as a,b,c: each once, in alphabetical order."""


OWN = ("lora_rank", "lora_alpha", "lora_targets")
"""The options of adapters."""


class LoRAOptions(OptimizerConfig):
    """Options of low-rank adapters; `lora_rank` turns them on."""

    added: ClassVar[frozenset[str]] = frozenset()
    """Options that are newer than published runs of a method."""

    lora_rank: int | None = Field(None, ge=1, le=4096)
    """Rank of adapters (LoRA) on the teacher's frozen weights, which train in their place with
    whatever the teacher lacks; none trains all weights. Needs peft."""
    lora_alpha: float | None = Field(None, gt=0, le=1e6)
    """Adapters add alpha / rank times B A x to a layer's output; none is the rank."""
    lora_targets: Words = ()
    """Linear layers of the blocks with adapters, by the ends of their names, as in attn.qkv,fc1;
    none means all."""

    @model_validator(mode="after")
    def _need_a_rank(self) -> LoRAOptions:
        """Raises UsageError for options of adapters that are not there."""
        for name in OWN:
            if self.lora_rank is None and getattr(self, name):
                raise UsageError(f"{name} is given without lora_rank: give both, or leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All options but those of adapters that are not given, and newer ones at their defaults.

        So a run has the name that it had before there were any.
        """
        fields = type(self).model_fields
        unused = [name for name in OWN if not getattr(self, name)]
        unused += [n for n in self.added if getattr(self, n) == fields[n].default]
        return {name: value for name, value in whole(self).items() if name not in unused}

    @property
    def needs_network_teacher(self) -> bool:
        return self.lora_rank is not None

    def start_from_teacher(self, network: Backbone, teacher: nn.Module) -> None:
        """Gives a new network the teacher's weights, and adapters if there are any.

        Raises UsageError without peft, and for targets that the network lacks.
        """
        weights = teacher.state_dict()
        network.load_teacher(weights)
        if self.lora_rank is not None:
            alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
            add_adapters(network, weights, self.lora_rank, alpha, self.lora_targets)

    def merged(self) -> LoRAOptions:
        """The options of the same student once its adapters are merged into its weights."""
        defaults = {name: LoRAOptions.model_fields[name].default for name in OWN}
        return self.model_copy(update=defaults)
