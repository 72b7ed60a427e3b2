"""What a person asks for: the fields of a run, typed once for YAML, command line and record."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.errors import UsageError, unknown
from harness.methods import METHODS, MethodConfig


class RunConfig(BaseModel):
    """What a person asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: str
    """Name of the method."""
    task: str = "digits"
    """Name of the task."""
    options: dict[str, Any] = {}
    """Options of the method that differ from its defaults."""
    num_steps: int = Field(4, ge=1, le=1000)
    """Steps that the student takes (1 for a method that knows only one)."""
    seed: int = Field(0, ge=0, le=2**31)
    """Seed of initialisation, batches and training noise."""
    budget: str = "quick"
    """A budget of the task, or steps=NUMBER (0: the untrained student), images=NUMBER, flops=NUMBER or seconds=NUMBER of training."""
    noise_sets: int | None = Field(None, ge=1)
    """Noise sets that the student is evaluated on (by default a named budget's, and all of the task's for NUMBERs)."""
    batch_size: int | None = Field(None, ge=1, le=2**20)
    """Samples a training step (the task's by default)."""
    micro_batch_size: int | None = Field(None, ge=1, le=2**20)
    """Samples a forward pass; must divide the batch size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the losses' forward passes."""
    compile: bool = False
    """Whether torch.compile compiles the trained networks: about a minute more, then faster steps."""
    init_from: str | None = None
    """Run id in the results folder whose student this one starts from."""
    extra_features: list[str] = []
    """Further feature networks, NAME or NAME=FILE of weights, with commas between: inception, inception-clean, dinov2."""

    @model_validator(mode="before")
    @classmethod
    def _steps_of_the_method(cls, values: Any) -> Any:
        if isinstance(values, dict) and "num_steps" not in values and values.get("method") in METHODS.names():
            return {**values, "num_steps": METHODS[values["method"]].default_num_steps}
        return values

    @field_validator("extra_features", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value


def explain(error: ValidationError, where: str, known: list[str]) -> UsageError:
    """The first complaint of a validation as one sentence."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return unknown("option", name, known, where)
    if first["type"] == "missing":
        return UsageError(f"{where}: {name} is missing")
    return UsageError(f"{where}: {name} is {first['input']!r}, but {first['msg'].replace('Input should', 'it should')}")


def parse_config(values: dict[str, Any]) -> RunConfig:
    """A run config from plain values. Raises UsageError in one sentence."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, "run config", list(RunConfig.model_fields)) from error


def parse_options(method: str, values: dict[str, Any], where: str = "") -> MethodConfig:
    """A method's options from plain values. Raises UsageError in one sentence."""
    model = METHODS[method].Config
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, where or f"options of {method}", list(model.model_fields)) from error
