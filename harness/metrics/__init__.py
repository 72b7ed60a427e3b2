"""Metrics: pure functions of samples, features or networks. Floor 4: may import floors 0 to 3, not the methods."""
