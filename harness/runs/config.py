"""What a person asks for: the fields of a run, typed once for YAML, command line and record.

This file imports no torch, so that the command line can make its options of it quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.errors import UsageError, shown, unknown
from harness.registry import registry_of

if TYPE_CHECKING:
    from harness.methods import MethodConfig

METHODS = registry_of("method")
FIRST_TUNING_SEED = 1000
"""Seeds from here on are for searches; tables use those below."""


class RunConfig(BaseModel):
    """A run as a person asks for it; `resolve` settles what is left open."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: str
    """Name of a method."""
    task: str = "digits"
    """Name of a task, or a task file."""
    options: dict[str, Any] = {}
    """Options of the method that differ from its defaults."""
    num_steps: int = Field(4, ge=1, le=1000)
    """Steps in which the student samples (1 for a one-step method)."""
    seed: int = Field(0, ge=0, le=2**31)
    """Seed of initialisation, batches and training noise: 1000 or more for purpose tune, less for
    evaluate."""
    purpose: Literal["evaluate", "tune"] = "evaluate"
    """Evaluation noise that judges the run: that of tables, or that of searches."""
    budget: str = "quick"
    """Training budget: one that the task names, or steps=NUMBER (0 leaves the student untrained),
    images=NUMBER, flops=NUMBER (trajectories included) or seconds=NUMBER."""
    noise_sets: int | None = Field(None, ge=1, le=1000)
    """Noise sets on which the student is evaluated (by default those of a named budget; all sets
    of the task for a NUMBER)."""
    batch_size: int | None = Field(None, ge=1, le=2**20)
    """Samples per training step (by default the task's)."""
    micro_batch_size: int | None = Field(None, ge=1, le=2**20)
    """Samples per forward pass; it must divide the batch size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward passes of a loss."""
    compile: bool = False
    """Whether to compile the trained networks with torch.compile, which takes a minute or so and
    makes steps faster."""
    init_from: str | None = None
    """Run id in the results folder; training starts from the student of that run."""
    extra_features: list[str] = []
    """Further feature networks, separated by commas, each NAME or NAME=FILE of weights: inception,
    inception-clean, dinov2; or clip, clip-quickgelu for CLIPScore, which need a file."""

    @model_validator(mode="before")
    @classmethod
    def _steps_of_the_method(cls, values: Any) -> Any:
        if (
            isinstance(values, dict)
            and "num_steps" not in values
            and values.get("method") in METHODS.names()
        ):
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
    problem = first["msg"].replace("Input should", "it should")
    return UsageError(f"{where}: {name} is {shown(first['input'])}, but {problem}")


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
