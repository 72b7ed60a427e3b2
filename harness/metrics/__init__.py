"""Metrics: decorated functions of samples that state what they need, and the one evaluator."""

import harness.metrics.registered  # noqa: F401
from harness.metrics.base import METRICS, SampleMetric, metric

__all__ = ["METRICS", "SampleMetric", "metric"]
