"""Files: atomic writes, reads with one-sentence errors, order-independent digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import files
from harness.asides import write_aside
from harness.documents import read_yaml
from harness.errors import UsageError
from harness.files import (
    cache_folder,
    digest,
    file_hash,
    header_of,
    map_tensors,
    read_tensors,
    room_for,
    tensors_digest,
    write_sealed,
    write_tensors,
    write_text,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def half_written(error: Exception):
    """A writer that fails in the middle."""

    def write(path: Path) -> None:
        path.write_text("ne")
        raise error

    return write


def test_text_is_written_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "note.txt"
    write_text(path, "first")
    write_text(path, "sécond")
    assert path.read_text(encoding="utf-8") == "sécond"
    assert list(path.parent.iterdir()) == [path]


def test_the_target_is_old_or_new_never_between(tmp_path: Path) -> None:
    path, seen = tmp_path / "note.txt", []
    write_text(path, "old")

    def write(aside: Path) -> None:
        aside.write_text("half")
        seen.append((aside.parent, path.read_text()))
        aside.write_text("whole")

    write_aside(path, write)
    assert seen == [(tmp_path, "old")]  # beside it, so that the rename is atomic
    assert path.read_text() == "whole"


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError("bug"), RuntimeError), (OSError(28, "No space left"), UsageError)],
)
def test_a_failing_writer_leaves_the_old_file(
    tmp_path: Path, error: Exception, raised: type[Exception]
) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with pytest.raises(raised):
        write_aside(path, half_written(error))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*note\.txt: No space left"):
        write_aside(tmp_path / "note.txt", half_written(OSError(28, "No space left")))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_text(tmp_path / "file" / "note.txt", "new")


def test_tensors_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    """Of all types that tasks and runs have; the library's reader finds them and the metadata."""
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    tensors = {f"{kind}": torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    tensors |= {"yes": torch.tensor([True, False]), "one": torch.tensor(2.5), "no": torch.empty(0)}
    metadata = {"é": "\n", "b": ""}
    write_tensors(tmp_path / "ours.safetensors", tensors, metadata)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    found = [load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs")]
    assert tensors_digest(found[0]) == tensors_digest(found[1]) == tensors_digest(tensors)
    assert header_of(tmp_path / "ours.safetensors") == header_of(tmp_path / "theirs.safetensors")


def test_tensors_come_back(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {**TENSORS, "turned": TENSORS["a"].T.requires_grad_(False)})
    found = read_tensors(path, file_hash(path))
    assert found.keys() == {"a", "b", "turned"}
    assert torch.equal(found["a"], TENSORS["a"])
    assert torch.equal(found["b"], TENSORS["b"])
    assert torch.equal(found["turned"], TENSORS["a"].T)


def test_tensors_may_be_read_by_those_who_may_read_texts(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_broken_yaml_file_is_told_by_name_and_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1\nb: [")
    with pytest.raises(UsageError, match=r"x.yaml is not YAML: .* in line 2") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "unicode" not in str(caught.value)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, TENSORS)
    expected = file_hash(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UsageError, match=f"has SHA-256 {file_hash(path)}, but {expected} was expected"
    ):
        read_tensors(path, expected)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        read_tensors(path)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_tensors(tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="there is no file"):
        read_tensors(tmp_path)


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_hash(tmp_path / "abc") == hashlib.sha256(b"abc").hexdigest()


def test_a_digest_does_not_depend_on_order() -> None:
    assert digest({"a": 1, "b": {"c": [1, 2], "d": None}}) == digest(
        {"b": {"d": None, "c": [1, 2]}, "a": 1}
    )
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert digest({"a": 1}) != digest({"a": "1"})


def test_a_digest_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"a": float("nan")})


def test_a_digest_of_tensors_sees_names_types_shapes_and_values() -> None:
    a, b = TENSORS["a"], TENSORS["b"]
    assert tensors_digest({"a": a, "b": b}) == tensors_digest({"b": b, "a": a})
    # The memory layout does not count.
    assert tensors_digest({"a": a}) == tensors_digest({"a": a.T.contiguous().T})
    others = [
        {"c": a},
        {"a": a.view(torch.int32)},
        {"a": a.reshape(3, 2)},
        {"a": a + 1},
        {"a": a, "b": b},
    ]
    assert tensors_digest({"a": a}) not in [tensors_digest(other) for other in others]


@pytest.mark.parametrize("dtype", files.DTYPES, ids=str)
def test_a_sealed_file_keeps_every_type_of_the_format(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.tensor([0, 1] * 4, dtype=torch.uint8).view(dtype)
    write_sealed(tmp_path / "file", {"x": bits}, of="bits")
    found = map_tensors(tmp_path / "file", of="bits")["x"]
    assert found.dtype == dtype
    assert found.view(torch.uint8).tolist() == [0, 1] * 4


def test_a_type_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no torch.complex128, which phase has"):
        write_tensors(tmp_path / "file", {"phase": torch.zeros(1, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("HARNESS_CACHE")
    assert cache_folder().name == "distillation-harness"


def test_a_large_tensor_lies_in_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it ends with the process; its numbers are those of any tensor."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    plain = room_for((2, 3))
    monkeypatch.setattr(files, "LARGE", 1)
    mapped = room_for((2, 3))
    assert list(tmp_path.iterdir()) == []
    assert mapped.shape == plain.shape
    for found in (plain, mapped):
        found[:] = TENSORS["a"]
        found[1] *= 2
        assert found.tolist() == [[0, 1, 2], [6, 8, 10]]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set HARNESS_CACHE to another folder"):
        room_for((2, 3))
