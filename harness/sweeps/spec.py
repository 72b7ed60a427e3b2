"""The `search` of a sweep file, typed.

search:
  trials: 12
  objectives: {fid: minimize}     # metrics, latency, macs, nfe, training_flops; or several
  space: tunes                    # what each cell's method declares; or names and ranges:
  space: {options.lr: {low: 3.0e-4, high: 3.0e-2, log: true}, options.heads: [shared, per_step]}
  sampler: tpe                    # or random
  prune: false                    # stop runs that are worse than the median of finished ones
  confirm: {top: 2, seeds: [1001, 1002], budget: flops=1.5e12}    # runs the best anew
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import UsageError
from harness.methods import METHODS
from harness.runs.config import explain

TUNES = "tunes"
"""The space of a search that takes what each method declares."""
DIGITS = 4
"""Significant digits of a number that a trial takes from a range, so that it can be copied."""


class Range(BaseModel):
    """Numbers from low to high; whole ones if both are whole."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = Field(None, gt=0)

    def distribution(self) -> BaseDistribution:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)


class Confirm(BaseModel):
    """Further runs of the best settings of a search and of trial 0's, on seeds of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top: int = Field(ge=1)
    seeds: list[Annotated[int, Field(ge=0, le=2**31)]] = Field(min_length=1)
    budget: str | None = None
    """The trials' budget if it is left out."""


class SearchSpec(BaseModel):
    """The `search` of a sweep file, for one cell."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trials: int = Field(ge=1, le=10**6)
    objectives: dict[str, Literal["minimize", "maximize"]] = Field(min_length=1)
    space: dict[str, Range | list[Any]] = Field(min_length=1)
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = Field(0, ge=0, le=2**31)
    prune: bool = False
    prune_from: float = Field(0.0, ge=0, le=1)
    """Part of a run before which it is not pruned, so that slow starts are not held against it."""
    confirm: Confirm | None = None

    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            name: CategoricalDistribution(of) if isinstance(of, list) else of.distribution()
            for name, of in self.space.items()
        }

    def sampler_of(self, number: int) -> BaseSampler:
        """The sampler of a trial, seeded by its number: a search proposes the same after a stop."""
        seed = self.seed + number
        return (
            RandomSampler(seed)
            if self.sampler == "random"
            else TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
        )

    def rounded(self, params: dict[str, Any]) -> dict[str, Any]:
        """The values of a trial; broken numbers from ranges have `DIGITS` digits."""
        return {
            name: float(f"{value:.{DIGITS}g}")
            if isinstance(value, float) and isinstance(self.space.get(name), Range)
            else value
            for name, value in params.items()
        }

    @property
    def of_trials(self) -> dict[str, Any]:
        """What decides a trial. More trials, or other confirmations, go on with the same study."""
        return self.model_dump(mode="json", exclude={"trials", "confirm"})


def spec_of(search: Any, own_space: dict[str, Any], method: str, where: str) -> SearchSpec:
    """The search of one cell.

    Args:
        search: the file's `search`.
        own_space: the cell's, added to the file's space or to what its method declares.
        where: names the file in errors.

    Raises UsageError for unknown keys, and for values that make no search.
    """
    try:
        if isinstance(search, dict):
            space = search.get("space", {})
            if space == TUNES:
                space = _declared(method, where)
            if not isinstance(space, dict):
                raise ValueError(f"it is {space!r}, but should be {TUNES}, or a mapping")
            search = {**search, "space": {**space, **own_space}}
        spec = SearchSpec.model_validate(search)
        spec.distributions()
    except ValidationError as error:
        raise explain(error, f"{where}: search", list(SearchSpec.model_fields)) from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UsageError(f"{where}: search: space: {error}") from error
    if "purpose" in spec.space:
        raise UsageError(f"{where}: search: space: every trial has purpose tune: leave purpose out")
    if spec.confirm is not None and len(spec.objectives) > 1:
        raise UsageError(f"{where}: search: confirm needs a single objective")
    return spec


def _declared(method: str, where: str) -> dict[str, Any]:
    """A method's `tunes` as the space of a search. Raises UsageError if it declares none."""
    tunes = METHODS[method].tunes
    if not tunes:
        raise UsageError(
            f"{where}: search: space is {TUNES}, but {method} declares none: list its options"
        )
    return {
        f"options.{name}": list(of) if isinstance(of, tuple) else asdict(of)
        for name, of in tunes.items()
    }
