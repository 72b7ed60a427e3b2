"""Metrics: pure functions of samples, features or networks. Floor 4: may import floors 0 to 3, not the methods."""

import harness.metrics.registered  # noqa: F401
from harness.metrics.base import METRICS, Judged, SampleMetric

__all__ = ["METRICS", "Judged", "SampleMetric"]
