"""Names for classes: one `Registry` a kind (methods, solvers, ...). Floor 0.

A duplicate raises, an unknown name lists the near ones, and packages outside add theirs by the entry-point group
`harness.<kind>s`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from harness.errors import UsageError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from a name to a class of one kind.

    Args:
        kind: what is registered, in the singular ("method"); it words the errors and names the entry-point group.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type[T]] = {}
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters the class under `name`. Raises ValueError if the name is taken."""

        def enter(cls: type[T]) -> type[T]:
            if self._classes.get(name, cls) is not cls:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._classes[name]} and {cls}")
            self._classes[name] = cls
            return cls

        return enter

    def __getitem__(self, name: str) -> type[T]:
        """The class of that name. Raises UsageError, naming the near ones, if there is none."""
        self._load_plugins()
        if name not in self._classes:
            raise unknown(self.kind, name, self._classes)
        return self._classes[name]

    def name_of(self, cls: type[T]) -> str:
        """The name under which a class was entered. Raises KeyError if it was not."""
        for name, registered in self._classes.items():
            if registered is cls:
                return name
        raise KeyError(cls)

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load_plugins()
        return sorted(self._classes)

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True  # before loading: a plug-in may look names up itself
        for point in entry_points(group=f"harness.{self.kind}s"):
            try:
                self.register(point.name)(point.load())
            except (ImportError, AttributeError) as error:
                self._plugins_loaded = False
                raise UsageError(f"{self.kind} plug-in {point.name!r} ({point.value}) cannot be loaded: {error}") from error
