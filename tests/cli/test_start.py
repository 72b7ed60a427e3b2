"""Commands that only look something up start without the libraries that take seconds to import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.cli.main import COMMANDS
from harness.methods import METHODS
from harness.metrics import METRICS
from harness.registry import Registry, first_line
from harness.solvers import SOLVERS

WATCHED = """
import atexit, sys
heavy = {"torch", "pydantic", "pandas", "matplotlib", "optuna", "scipy", "sklearn", "numpy"}
atexit.register(lambda: print("imported:", *sorted(heavy & sys.modules.keys())))
from harness.__main__ import main
main()
"""


def started(*words: str, **environment: str) -> tuple[str, set[str]]:
    """The output of `harness ...` in its own process, and the heavy libraries that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr
    output, _, imported = done.stdout.rpartition("imported:")
    return output + done.stderr, set(imported.split())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--help"], "Benchmark and ablate"),
        (["--version"], "version"),
        (["list", "methods"], "Autoregressive distillation: the lowest N layers"),
        (["list", "solvers"], "dpm-solver++2m"),
        (["list", "tasks"], "handwritten digits"),
        (["list", "method"], "methods"),
        (["reprot"], "report"),
    ],
    ids=" ".join,
)
def test_looking_up_imports_nothing_heavy(words: list[str], text: str) -> None:
    output, imported = started(*words)
    assert text in output
    assert imported == set()


def test_an_unknown_method_is_refused_without_torch() -> None:
    output, imported = started("run", "--method", "ardd")
    assert "did you mean ard" in output
    assert "torch" not in imported


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["ru"], {"run"}),
        (["list", "m"], {"methods", "metrics"}),
        (["run", "--num"], {"--num-steps"}),
        (["run", "--method", "consistency-"], {"consistency-distillation", "consistency-training"}),
        (["run", "--method", "ard", "--dry"], {"--dry-run"}),
        (["teacher", "le"], {"levels"}),
        (["evaluate", "--cal"], {"--callable"}),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else " ".join(value),
)
def test_completing_a_word_imports_no_torch(words: list[str], completed: set[str]) -> None:
    line = {
        "_HARNESS_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["harness", *words]),
        "COMP_CWORD": str(len(words)),
    }
    output, imported = started(**line)
    assert {entry.partition(",")[2] for entry in output.splitlines()} == completed
    assert "torch" not in imported


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_is_found_where_its_file_declares_it(name: str) -> None:
    command = COMMANDS[name].load()
    assert command.name == name
    assert first_line(command.help) == COMMANDS[name].summary


@pytest.mark.parametrize(
    "registry", [METHODS, SOLVERS, METRICS], ids=lambda registry: registry.kind
)
def test_declared_names_are_those_that_register(registry: Registry) -> None:
    for name, summary in registry.summaries().items():
        cls = registry[name]
        assert registry.name_of(cls) == name
        declared = cls.function if registry.kind == "metric" else cls
        assert first_line(declared.__doc__) == summary
        assert 20 <= len(summary) <= 120
