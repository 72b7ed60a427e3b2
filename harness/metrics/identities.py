"""What a metric's number depends on: the identity that two numbers of one column share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harness.metrics.extractors import Extractor
from harness.metrics.fidelity import KID_SUBSETS
from harness.metrics.moments import SPLITS
from harness.metrics.pixels import decoding_of, formula_name, rounding_name
from harness.metrics.spaces import PublishedSpace, Space, numeric_mode
from harness.tasks import Task


def identity(
    task: Task,
    space: Space | None,
    device: torch.device,
    name: str,
    n: int,
    kid_subset_size: int,
    extra: Sequence[Extractor] = (),
) -> dict[str, Any]:
    """A metric's identity: everything that determines the meaning of its number.

    Args:
        name: the metric's name, with `_floor` for real images.
        n: samples behind the number.
    """
    spec = task.spec
    return {
        "metric": name,
        "n": n,
        "task": spec.name,
        "task_version": spec.version,
        **task.hashes,
        "noise_seed": spec.evaluation.seed,
        "labels": spec.evaluation.labels,
        "guidance": spec.guidance.model_dump(),
        "metrics_version": 1,
        "rounding": rounding_name(task),
        "library": _library(task, space),
        "kid_subset_size": kid_subset_size,
        "kid_subsets": KID_SUBSETS,
        **numeric_mode(device),
        **_where_it_matters(task, space, name.removesuffix("_floor"), extra),
    }


def _where_it_matters(
    task: Task, space: Space | None, plain: str, extra: Sequence[Extractor]
) -> dict[str, Any]:
    """The entries that only some tasks and metrics have; they replace those that all have.

    Args:
        plain: the metric's name.
    """
    found, spec = dict[str, Any](), task.spec.evaluation
    if task.purpose != "evaluate":
        found["noise_purpose"] = task.purpose
    if spec.neighbours:
        found["neighbours"] = spec.neighbours
    if isinstance(space, PublishedSpace):
        found |= space.identity | _of_published(plain)
    if plain in ("precision", "recall") and spec.half_distances:
        found["distances"] = "float16, as in ADM's evaluator"
    for extractor in extra:
        if plain == extractor.metric:
            found |= {"features": extractor.sha256, "extractor": type(extractor).__name__}
            if task.latent:  # whatever judges them beside it
                found |= {"rounding": formula_name(task), **decoding_of(task)}
    return found


def _library(task: Task, space: Space | None) -> str:
    if task.mixture:
        return "torch-fidelity's Frechet distance on exact moments"
    if isinstance(space, PublishedSpace):
        return "torch-fidelity's Frechet distance on float64 moments merged in batches"
    return "torch-fidelity for fid and kid"


def _of_published(plain: str) -> dict[str, Any]:
    """What single metrics in a published network add."""
    more: dict[str, dict[str, Any]] = {
        "sfid": {"spatial": "Mixed_6d.branch1x1, first 7 channels"},
        "inception_score": {"splits": f"{SPLITS} contiguous"},
        "precision": {"distances": "float64", "nearest": 3},
        "recall": {"distances": "float64", "nearest": 3},
    }
    return more.get(plain, {})
