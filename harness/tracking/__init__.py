"""Trackers that follow a run. No number depends on this room, and `runs` does not import it."""
