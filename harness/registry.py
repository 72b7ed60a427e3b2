"""Names for things of one kind: methods, solvers, metrics.

The registry of kind `method` has three sources of names: the files of `harness/methods`, which it
reads without importing them; the entry points of the group `harness.methods`, which installed
packages declare; and whatever a plug-in file registers. A class is imported when it is looked up.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from harness.errors import UsageError, unknown

T = TypeVar("T")
ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Declared:
    """A class or function that a source file declares by a decorator; it is not imported yet."""

    module: str
    attribute: str
    summary: str

    def load(self) -> Any:
        """The class or function itself; imports its module."""
        return getattr(import_module(self.module), self.attribute)


@cache
def declared(room: str, *decorators: str) -> dict[str, Declared]:
    """What the files of a room declare by lines such as `@METHODS.register("ard")`, by name.

    Args:
        room: folder in the package, such as "methods"; one that does not exist declares nothing.
        decorators: their dotted names; the first argument of a call is the declared name.
    """
    found = {}
    for path in sorted((ROOT / room).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            for call in node.decorator_list:
                if (
                    isinstance(call, ast.Call)
                    and call.args
                    and ast.unparse(call.func) in decorators
                ):
                    summary = first_line(ast.get_docstring(node))
                    found[ast.literal_eval(call.args[0])] = Declared(
                        f"harness.{room}.{path.stem}", node.name, summary
                    )
    return found


def first_line(doc: str | None) -> str:
    """The first paragraph of a docstring on one line, without its full stop."""
    return " ".join((doc or "").partition("\n\n")[0].split()).removesuffix(".")


class Registry(Generic[T]):
    """A mapping from names to classes of one kind, or to metrics.

    Args:
        kind: the kind in the singular, such as "method". Errors show it, and three names follow
            from it: the room `harness/methods`, the decorator `METHODS.register` and the
            entry-point group `harness.methods`.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._files = declared(f"{kind}s", f"{kind.upper()}S.register", kind)
        self._entries: dict[str, T] = {}

    def register(self, name: str, source: Any = None) -> Callable[[T], T]:
        """Decorator that enters a class, or whatever was made of a function, under `name`.

        Args:
            source: the decorated function, if the entry is not the decorated thing itself.

        Raises ValueError if the name is taken.
        """

        def enter(entry: T) -> T:
            file, made = self._files.get(name), cast(Any, source or entry)
            if file and (file.module, file.attribute) != (
                made.__module__,
                getattr(made, "__name__", name),
            ):
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: "
                    f"{file.module}.{file.attribute} and {made}"
                )
            if self._entries.get(name, entry) is not entry:
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: {self._entries[name]} and {made}"
                )
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """The entry of that name, imported if necessary. Raises UsageError for an unknown name."""
        for point in self._points:
            if point.name == name:
                self.register(name)(self._loaded(point))
        if name not in self._entries and name in self._files:
            self._files[name].load()
        if name not in self._entries:
            raise unknown(self.kind, name, self.names())
        return self._entries[name]

    def name_of(self, entry: T) -> str:
        """The name of an entry. Raises KeyError if it is not."""
        for name, registered in self._entries.items():
            if registered is entry:
                return name
        raise KeyError(entry)

    def names(self) -> list[str]:
        """All names, sorted; imports nothing."""
        return sorted({*self._files, *self._entries, *(point.name for point in self._points)})

    def summaries(self) -> dict[str, str]:
        """One line on each name, sorted; imports nothing, so an entry point shows its target."""
        lines = {point.name: f"plug-in {point.value}" for point in self._points}
        lines |= {name: first_line(inspect.getdoc(entry)) for name, entry in self._entries.items()}
        lines |= {name: file.summary for name, file in self._files.items()}
        return dict(sorted(lines.items()))

    @cached_property
    def _points(self) -> list[EntryPoint]:
        return list(entry_points(group=f"harness.{self.kind}s"))

    def _loaded(self, point: EntryPoint) -> T:
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"{self.kind} plug-in {point.name!r} ({point.value}) cannot be loaded: {error}"
            ) from error


@cache
def registry_of(kind: str) -> Registry[Any]:
    """The one registry of a kind; `harness list` needs no more than this."""
    return Registry(kind)
