"""A table of prompts: what is stored, by rank, resumed and rounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.data import shards
from harness.data.prompt_files import Prompt
from harness.data.prompt_table import Storing, encode_prompts, made_by, prompts_of
from harness.errors import UsageError
from harness.files import file_hash, read_tensors

PROMPTS = [Prompt(f"prompt {'x' * i}", {"number": i}) for i in range(11)]
LENGTH, WIDTH = 5, 3


class Letters:
    """Outputs are powers of the text's length; a mask and a pooled vector stand beside."""

    def __init__(self, fails_after: float = float("inf")):
        self.seen, self.fails_after = list[str](), fails_after

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if len(self.seen) > self.fails_after:
            raise KeyboardInterrupt
        self.seen += prompts
        size = torch.tensor([len(text) for text in prompts]).float()
        text = size.reshape(-1, 1, 1) / torch.arange(1, LENGTH * WIDTH + 1).reshape(LENGTH, WIDTH)
        return {"text": text, "mask": text[..., 0] > 2, "pooled": text[:, 0].clone()}


WANTED = Letters().encode([prompt.text for prompt in PROMPTS])


def encoded(
    path: Path, encoder: Letters | None = None, prompts: Sequence[Prompt] = PROMPTS, **more: Any
) -> tuple[int, int]:
    """Encodes 11 prompts in shards of 4, 3 at once."""
    place = {name: more.pop(name) for name in ("rank", "ranks") if name in more}
    about = {"encoder": more.pop("about", "letters")}
    how = Storing(shard_size=4, batch_size=3, **{"dtype": "float32", **more})
    return encode_prompts(prompts, encoder or Letters(), path, how, about, **place)


def test_the_table_is_the_encoders(tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    assert encoded(path) == (3, 3)
    found, null = read_tensors(path), Letters().encode([""])
    assert found.keys() == {f"{a}{b}" for a in ("table", "null") for b in ("", "_mask", "_pooled")}
    for name, part in (("", "text"), ("_mask", "mask"), ("_pooled", "pooled")):
        assert torch.equal(found[f"table{name}"], WANTED[part])
        assert torch.equal(found[f"null{name}"], null[part])
    assert prompts_of(path) == PROMPTS
    assert made_by(path)["encoder"] == "letters"
    assert [each.name for each in tmp_path.iterdir()] == ["prompts.safetensors"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_same_file(ranks: int, tmp_path: Path) -> None:
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    encoded(one)
    encoders = [Letters() for _ in range(ranks)]
    for rank, encoder in enumerate(encoders):
        assert not many.exists()
        there, of = encoded(many, encoder, rank=rank, ranks=ranks)
    assert there == of == 3
    texts = [text for encoder in encoders for text in encoder.seen if text]
    assert sorted(texts) == sorted(prompt.text for prompt in PROMPTS)
    assert file_hash(one) == file_hash(many)


def test_an_interrupted_table_goes_on(tmp_path: Path) -> None:
    path, whole = tmp_path / "prompts.safetensors", tmp_path / "whole.safetensors"
    with pytest.raises(KeyboardInterrupt):
        encoded(path, Letters(fails_after=7))
    assert not path.exists()
    encoder = Letters()
    assert encoded(path, encoder) == (3, 3)
    assert encoder.seen == ["", *(prompt.text for prompt in PROMPTS[4:])]
    encoded(whole)
    assert file_hash(path) == file_hash(whole)
    again = Letters()
    assert encoded(path, again) == (3, 3)
    assert again.seen == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"about": "another"}, "encoder"),
        ({"dtype": "float16"}, "dtype"),
        ({"prompts": PROMPTS[:9]}, "count, prompts"),
        ({"prompts": [Prompt(p.text) for p in PROMPTS]}, "prompts"),
    ],
)
def test_another_table_is_not_continued(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    encoded(path, rank=0, ranks=2)
    with pytest.raises(UsageError, match=f"holds prompts with another {name}; name another --out"):
        encoded(path, **changes)
    encoded(path)
    with pytest.raises(UsageError, match=f"safetensors holds prompts with another {name};"):
        encoded(path, **changes)


def test_float16_states_its_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    encoded(path, dtype="float16")
    found = read_tensors(path)
    assert torch.equal(found["table"], WANTED["text"].half())
    assert torch.equal(found["null_pooled"], Letters().encode([""])["pooled"].half())
    assert found["table_mask"].dtype == torch.bool
    assert "errors" not in found


def test_a_full_disk_is_said_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "free_bytes", lambda folder: 1000.0)
    encoder = Letters()
    with pytest.raises(UsageError, match=r"11 prompts need .*, and .* are free"):
        encoded(tmp_path / "prompts.safetensors", encoder)
    assert encoder.seen == [""]
