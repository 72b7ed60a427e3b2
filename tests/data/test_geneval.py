"""GenEval's files: metadata as its `create_prompts.py` writes them, and the order of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.data.geneval import (
    PromptFolders,
    Verdict,
    metadata_of,
    read_pictures,
    read_results,
    write_folders,
    write_results,
)
from harness.data.pictures import FolderPictures, write_pngs
from harness.data.scene_prompts import parse
from harness.errors import UsageError


@pytest.mark.parametrize(
    ("text", "tag", "rest"),
    [
        ("a seven", "single_object", {"include": [{"class": "seven", "count": 1}]}),
        (
            "three blue sevens",
            "counting",
            {
                "include": [{"class": "seven", "count": 3, "color": "blue"}],
                "exclude": [{"class": "seven", "count": 4}],
            },
        ),
        (
            "a red circle left of a green four",
            "position",
            {
                "include": [
                    {"class": "four", "count": 1, "color": "green"},
                    {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
                ]
            },
        ),
        (
            "a red circle and a green four",
            "color_attr",
            {
                "include": [
                    {"class": "circle", "count": 1, "color": "red"},
                    {"class": "four", "count": 1, "color": "green"},
                ]
            },
        ),
    ],
)
def test_metadata_are_those_of_geneval(text: str, tag: str, rest: dict[str, Any]) -> None:
    assert metadata_of(parse(text)) == {"tag": tag, "prompt": text, **rest}


def test_folders_keep_pictures_prompts_and_order(tmp_path: Path) -> None:
    pictures = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 3, 4, 4) * 40
    told = [{"prompt": text, "more": [1]} for text in ("a", "b", "unused")]
    write_folders(tmp_path, pictures.split(4), torch.tensor([0, 1, 1, 0, 1, 0]), told)
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.glob("*/**/*.png")) == [
        f"0000{prompt}/samples/000{k}.png" for prompt in range(2) for k in range(3)
    ]
    found = read_pictures(tmp_path, 3)
    assert isinstance(found, PromptFolders)
    assert found.metadata == tuple(told[:2])
    assert found.numbers.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.prompts == ["a", "b"] * 3
    read = torch.cat(list(found.batches(4)))
    assert read[:, 0, 0, 0].tolist() == [0, 40, 120, 80, 200, 160]
    before = found.sha256
    (tmp_path / "00001/metadata.jsonl").write_text('{"prompt": "c"}')
    assert read_pictures(tmp_path, 3).sha256 != before


def test_a_folder_of_classes_stays_one(tmp_path: Path) -> None:
    write_pngs(tmp_path, [torch.zeros(4, 3, 4, 4, dtype=torch.uint8)], torch.arange(4) % 2)
    assert type(read_pictures(tmp_path, 2)) is FolderPictures


def test_result_lines_come_back(tmp_path: Path) -> None:
    """Any key more is left alone; lines without a file's name are not compared."""
    lines = [
        {"tag": "counting", "prompt": "two dogs", "correct": True, "details": "{}"},
        {"tag": "colors", "prompt": "a red dög", "correct": False},
        {"tag": "colors", "prompt": "a red dög", "correct": False, "filename": "x/1.png"},
    ]
    write_results(tmp_path / "r.jsonl", lines)
    assert [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()] == lines
    assert read_results(tmp_path / "r.jsonl") == [
        Verdict("counting", "two dogs", True),
        Verdict("colors", "a red dög", False),
        Verdict("colors", "a red dög", False, "x/1.png"),
    ]


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_numbers_that_json_lacks_are_refused(tmp_path: Path, number: str) -> None:
    line = '{"tag": "a", "prompt": "b", "correct": true, "x": NUMBER}'
    (tmp_path / "r.jsonl").write_text(line.replace("NUMBER", number))
    with pytest.raises(UsageError, match="line 1 is not JSON"):
        read_results(tmp_path / "r.jsonl")
