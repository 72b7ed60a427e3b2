"""The metrics that a task can have."""

from __future__ import annotations

from typing import Any

from harness.metrics import METRICS
from harness.metrics.base import SampleMetric
from harness.tasks import Task

OF_KIND = {
    "classifier": ("logits",),
    "detector": ("reading", "teacher_moments"),
    "inception": ("spatial", "split_score"),
}
"""What a feature network knows beside features, by its kind."""


def metrics_of(task: Task) -> dict[str, SampleMetric]:
    """The metrics that a task's runs can have, by name, without those of extra feature networks."""
    known = {"images", "kid_subset_size", "teacher_samples", "sampled_map"}
    if not task.spec.prompts:
        known.add("labels")
    if task.judged_prompts:
        known.add("prompts")
    if task.mixture:
        known |= {"mixture", "ode_map"}
    elif task.spec.features is not None:
        known |= {"features", *OF_KIND.get(task.spec.features.kind, ())}
        if task.spec.evaluation.reference_npz is None:
            known |= {"real", "floor_n"}
    found: dict[str, Any] = {name: METRICS[name] for name in METRICS.names()}
    return {name: metric for name, metric in found.items() if set(metric.needs) <= known}


def milestone_metrics(task: Task) -> list[str]:
    """The metrics that are measured during a task's training."""
    return [name for name, metric in metrics_of(task).items() if metric.milestone]
