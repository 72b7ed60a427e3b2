"""Names: duplicates raise, unknown ones list near ones; files and entry points declare them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import registry
from harness.errors import UsageError
from harness.registry import Registry


class Hammer:
    """A class to register."""


class Saw:
    """Another one."""


@pytest.fixture
def tools() -> Registry:
    """A registry of tools that holds a hammer."""
    registry = Registry("tool")
    registry.register("hammer")(Hammer)
    return registry


def plug_in(monkeypatch: pytest.MonkeyPatch, **classes: type) -> list[str]:
    """Pretends that packages declare these entry points; returns the groups looked up so far."""
    asked = []
    points = [
        SimpleNamespace(name=name, value=f"box:{cls.__name__}", load=lambda cls=cls: cls)
        for name, cls in classes.items()
    ]

    def entry_points(group: str) -> list[SimpleNamespace]:
        asked.append(group)
        return points

    monkeypatch.setattr("harness.registry.entry_points", entry_points)
    return asked


def test_a_class_is_found_by_its_name(tools: Registry) -> None:
    assert tools["hammer"] is Hammer
    assert tools.name_of(Hammer) == "hammer"


def test_register_returns_the_class(tools: Registry) -> None:
    assert tools.register("saw")(Saw) is Saw


def test_names_are_sorted(tools: Registry) -> None:
    tools.register("awl")(Saw)
    assert tools.names() == ["awl", "hammer"]


def test_a_duplicate_raises_and_changes_nothing(tools: Registry) -> None:
    with pytest.raises(ValueError, match=r"tool 'hammer' is registered twice: .*Hammer.*Saw"):
        tools.register("hammer")(Saw)
    assert tools["hammer"] is Hammer


def test_the_same_class_may_be_registered_again(tools: Registry) -> None:
    tools.register("hammer")(Hammer)
    assert tools.names() == ["hammer"]


def test_an_unknown_name_lists_the_near_ones(tools: Registry) -> None:
    tools.register("saw")(Saw)
    with pytest.raises(UsageError, match=r"^unknown tool 'hamer'; did you mean hammer\?$"):
        tools["hamer"]


def test_a_name_that_is_near_to_none_lists_all(tools: Registry) -> None:
    tools.register("saw")(Saw)
    with pytest.raises(UsageError, match=r"^unknown tool 'qqq'; known: hammer, saw$"):
        tools["qqq"]


def test_name_of_a_stranger_raises(tools: Registry) -> None:
    with pytest.raises(KeyError):
        tools.name_of(Saw)


def test_a_plug_in_is_found_under_its_kinds_group(
    tools: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plug_in(monkeypatch, saw=Saw)
    assert tools["saw"] is Saw
    assert tools.names() == ["hammer", "saw"]
    assert asked == ["harness.tools"]  # looked up once


def test_summaries_come_from_docstrings_and_entry_points(
    tools: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, saw=Saw)
    assert tools.summaries() == {"hammer": "A class to register", "saw": "plug-in box:Saw"}


def test_a_plug_in_cannot_take_a_name_that_is_taken(
    tools: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, hammer=Saw)
    with pytest.raises(ValueError, match="registered twice"):
        tools["hammer"]


def test_a_broken_plug_in_harms_only_those_who_look_it_up(
    tools: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        name, value = "drill", "nowhere:Drill"

        def load(self) -> type:
            raise ImportError("No module named 'nowhere'")

    monkeypatch.setattr("harness.registry.entry_points", lambda group: [Broken()])
    assert tools["hammer"] is Hammer
    for _ in range(2):
        with pytest.raises(
            UsageError, match=r"tool plug-in 'drill' \(nowhere:Drill\) cannot be loaded"
        ):
            tools["drill"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry of screws, one of which is declared by a file that cannot be imported."""
    (tmp_path / "screws").mkdir()
    (tmp_path / "screws" / "long.py").write_text(
        'import nothing_like_it\n\n@SCREWS.register("long")\nclass Long:\n'
        '    """A long\n    screw.\n\n    More."""\n'
        '\n@OTHERS.register("short")\nclass Short: ...\n'
    )
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    yield Registry("screw")
    registry.declared.cache_clear()


def test_files_are_read_and_not_imported(files: Registry) -> None:
    assert files.names() == ["long"]
    assert files.summaries() == {"long": "A long screw"}
    assert "harness.screws.long" not in sys.modules


def test_a_name_that_a_file_declares_is_taken(files: Registry) -> None:
    with pytest.raises(
        ValueError, match=r"screw 'long' is registered twice: harness.screws.long.Long and .*Saw"
    ):
        files.register("long")(Saw)
