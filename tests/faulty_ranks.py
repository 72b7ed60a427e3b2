"""Ranks that forget something; new processes import this, so that a patch holds in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.methods.parts.adversarial import Adversary
from harness.training import trainer
from harness.training.case import Case
from harness.training.rank_checks import write_outcomes


def without_sums(cases: Mapping[str, Case], folder: Path) -> None:
    """The GAN stage weighs its loss by a rank's own gradients."""
    Adversary.sums = lambda self: ()  # type: ignore[method-assign]
    write_outcomes(cases, folder)


def without_mean(cases: Mapping[str, Case], folder: Path) -> None:
    """Each rank trains on its own share."""
    trainer.mean_over_ranks = lambda parameters, metrics, passes: (metrics, passes)  # type: ignore[attr-defined]
    write_outcomes(cases, folder)


def without_passes(cases: Mapping[str, Case], folder: Path) -> None:
    """The bill holds the teacher's passes of one rank."""
    whole = trainer.mean_over_ranks  # type: ignore[attr-defined]
    trainer.mean_over_ranks = lambda parameters, metrics, passes: (  # type: ignore[attr-defined]
        whole(parameters, metrics, passes)[0],
        passes,
    )
    write_outcomes(cases, folder)
