"""Metrics: pure functions of samples, features or networks. Floor 4: may import floors 0 to 3, not the methods."""

from harness.metrics import registered as _registered
from harness.metrics.base import METRICS, Judged, SampleMetric

__all__ = ["METRICS", "Judged", "SampleMetric", "_registered"]
