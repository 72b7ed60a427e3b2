"""Prompts from a file: what is read, and one sentence for each thing that is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.data.prompt_files import Prompt, read_prompts
from harness.errors import UsageError


def written(folder: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "a dog\ntwo cats ",
        "a dog\ntwo cats \n",
        "a dog\r\ntwo cats \r\n",
        "\ufeffa dog\ntwo cats \n",
    ],
)
def test_a_prompt_a_line(content: str, tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, content)) == [Prompt("a dog"), Prompt("two cats ")]


def test_only_line_ends_end_lines(tmp_path: Path) -> None:
    """Python's splitlines would also split at U+2028."""
    assert read_prompts(written(tmp_path, "a\u2028b\n")) == [Prompt("a\u2028b")]


def test_json_lines_keep_what_belongs_to_a_prompt(tmp_path: Path) -> None:
    lines = '{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}\n'
    (found,) = read_prompts(written(tmp_path, lines, "metadata.jsonl"))
    assert found.text == "two dogs"
    assert found.about == {"tag": "counting", "include": [{"class": "dog", "count": 2}]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no prompts"),
        ("a dog\n\na cat\n", "line 2 is empty"),
        ("a dog\n \t \n", "line 2 is empty"),
        ("a\tdog\n", "line 1 has the control character U+0009 at place 2"),
        ("a dog\nred\x07\n", "line 2 has the control character U+0007 at place 4"),
        ("a dog\n" + "x" * 10_000, "line 2 has 10000 characters, but a prompt has at most 4096"),
        (b"a dog\ncaf\xe9\n", "line 2 is not UTF-8"),
    ],
)
def test_a_wrong_prompt_is_one_sentence(
    content: str | bytes, sentence: str, tmp_path: Path
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=re.escape(sentence)) as error:
        read_prompts(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("a dog", "line 1 is not JSON"),
        ('["a dog"]', "line 1 has no prompt"),
        ('{"text": "a dog"}', "line 1 has no prompt"),
        ('{"prompt": 3}', "line 1 has no prompt"),
        ('{"prompt": ""}', "line 1 is empty"),
        ('{"prompt": "a\\ud800"}', "line 1 is not JSON: it holds half of a surrogate pair"),
    ],
)
def test_a_wrong_line_of_json_is_one_sentence(line: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        read_prompts(written(tmp_path, line, "prompts.jsonl"))


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
