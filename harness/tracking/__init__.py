"""Trackers that follow a run. No number depends on this room, and `runs` does not import it."""

TRACKERS = {"tensorboard": "TensorBoard", "wandb": "Wandb", "trackio": "Trackio"}
"""The class of each tracker, in the file of its name; the package that it needs has that name."""
