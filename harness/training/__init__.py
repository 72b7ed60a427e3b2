"""The one trainer, what a run will cost, and what every method must keep."""
