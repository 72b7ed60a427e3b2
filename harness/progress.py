"""The callback to which every long computation reports how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the number of items that are done and the number of all."""
