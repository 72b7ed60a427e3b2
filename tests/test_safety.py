"""What the code never does: start a shell, unpickle what is not safe, or run code of the hub."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.cli.main import main

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "harness").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
STARTS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
EVALUATES = {"eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "torch.jit.load"}
EVALUATES |= {"yaml.unsafe_load", "yaml.full_load", "shelve.open", "np.fromfile", "joblib.load"}
KEPT = "spec.loader.exec_module"
"""The one call that runs a file: that of --plugin."""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls of a file by their dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_starts_no_shell_and_evaluates_no_text(path: Path) -> None:
    for name, call in calls(path):
        assert name not in SHELLS | EVALUATES
        assert keyword(call, "shell") is None
        if name in STARTS:  # words, or a variable of them; never one text
            assert isinstance(call.args[0], ast.List | ast.Name), ast.unparse(call)
        if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
            assert is_true(keyword(call, "weights_only")), ast.unparse(call)
        if name == "np.load":
            assert keyword(call, "allow_pickle") is None or not is_true(
                keyword(call, "allow_pickle")
            )
        if name == "yaml.load":
            assert "Safe" in ast.unparse(call)
        assert name != "yaml.safe_load" or "paths[name]" in ast.unparse(call)  # those that ship


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_of_the_hub_is_never_trusted(path: Path) -> None:
    for name, call in calls(path):
        assert not is_true(keyword(call, "trust_remote_code")), name
        transformers = name.endswith("cls.from_pretrained")
        if transformers:  # without an answer, transformers asks whoever sits there
            assert isinstance(keyword(call, "trust_remote_code"), ast.Constant)


def test_pictures_are_opened_in_one_place() -> None:
    """Pillow opens EPS with Ghostscript, so formats are listed there."""
    found = [path.name for path in SOURCES for name, _ in calls(path) if name == "Image.open"]
    assert [name for name in found if name != "device.py"] == ["readers.py"]


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    """Each test above can fail."""
    bad = {
        "import os\nos.system(x)": test_a_file_starts_no_shell_and_evaluates_no_text,
        "subprocess.run('ls')": test_a_file_starts_no_shell_and_evaluates_no_text,
        "subprocess.run(['ls'], shell=x)": test_a_file_starts_no_shell_and_evaluates_no_text,
        "torch.load(x)": test_a_file_starts_no_shell_and_evaluates_no_text,
        "np.load(x, allow_pickle=True)": test_a_file_starts_no_shell_and_evaluates_no_text,
        "yaml.load(x, yaml.Loader)": test_a_file_starts_no_shell_and_evaluates_no_text,
        "a.from_pretrained(x, trust_remote_code=True)": test_code_of_the_hub_is_never_trusted,
        "cls.from_pretrained(x)": test_code_of_the_hub_is_never_trusted,
    }
    for number, (text, check) in enumerate(bad.items()):
        path = tmp_path / f"{number}.py"
        path.write_text(text)
        with pytest.raises(AssertionError):
            check(path)


@pytest.mark.parametrize("command", ["run", "sweep", "report", "evaluate"])
def test_help_says_that_a_plugin_is_code(command: str) -> None:
    text = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    assert "its code runs with your rights" in text


def test_docs_say_that_a_plugin_is_code() -> None:
    text = (ROOT / "docs" / "adding-a-method.md").read_text()
    assert "A plug-in is code: it runs with your rights" in " ".join(text.split())
