"""Sets of pictures: what is written is read, in order, from both formats."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.data.geneval import read_pictures
from harness.data.pictures import NpzPictures, Pictures, write_npz, write_pngs
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError

LABELS = torch.tensor([3, 0, 3, 9, 1, 0, 2, 2, 7, 5, 4])


def pictures(channels: int = 3) -> Tensor:
    numbers = Keyed("test", 0).uniform("pictures", torch.arange(11), (channels, 5, 7))
    return (256 * numbers).to(torch.uint8)


def whole(found: Pictures, size: int = 4) -> Tensor:
    batches = list(found.batches(size))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    return torch.cat(batches)


@pytest.mark.parametrize("channels", [1, 3])
def test_both_formats_keep_pictures_labels_and_order(channels: int, tmp_path: Path) -> None:
    made = pictures(channels)
    write_npz(tmp_path / "a.npz", made.split(3), 11, LABELS)
    write_pngs(tmp_path / "a", made.split(3), LABELS)
    for path in (tmp_path / "a.npz", tmp_path / "a"):
        found = read_pictures(path, 10)
        assert (len(found), found.shape) == (11, (channels, 5, 7))
        assert found.labels is not None
        assert torch.equal(found.labels, LABELS)
        assert torch.equal(whole(found), made)


def test_numpy_reads_the_file_as_adm_does(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", pictures().split(3), 11, LABELS)
    with np.load(tmp_path / "a.npz") as content:
        assert content["arr_0"].dtype == np.uint8
        assert np.array_equal(content["arr_0"], pictures().permute(0, 2, 3, 1).numpy())
        assert content["arr_1"].tolist() == LABELS.tolist()


@pytest.mark.parametrize("now", [0.0, 3e9])
def test_the_clock_does_not_count(
    now: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zip file knows no time before 1980, and equal sets have equal bytes."""
    write_npz(tmp_path / "a.npz", pictures().split(3), 11, LABELS)
    monkeypatch.setattr("time.time", lambda: now)
    write_npz(tmp_path / "b.npz", pictures().split(3), 11, LABELS)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_compressed_files_are_read_too(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", arr_0=pictures().permute(0, 2, 3, 1).numpy())
    found = NpzPictures(tmp_path / "a.npz")
    assert found.labels is None
    assert torch.equal(whole(found), pictures())


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", pictures().split(3), 12, LABELS)  # one is missing
    with pytest.raises(UsageError, match="is not a file of samples"):
        list(NpzPictures(tmp_path / "a.npz").batches(4))


def test_a_folder_without_subfolders_has_no_labels(tmp_path: Path) -> None:
    write_pngs(tmp_path / "a", pictures().split(3), None)
    found = read_pictures(tmp_path / "a", 10)
    assert found.labels is None
    assert torch.equal(whole(found), pictures())


def test_names_of_all_classes_are_sorted(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "ant", "bee")):
        write_pngs(tmp_path / "a" / name, [pictures()[number : number + 1]], None)
    found = read_pictures(tmp_path / "a", 3)
    assert found.labels is not None
    # The three files have one name, so classes decide their order.
    assert found.labels.tolist() == [0, 1, 2]
    assert torch.equal(next(found.batches(3)), pictures()[[1, 2, 0]])
    with pytest.raises(UsageError, match="has 3 subfolders for 10 classes"):
        read_pictures(tmp_path / "a", 10)


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    write_pngs(tmp_path / "a", pictures().split(3), LABELS)
    before = read_pictures(tmp_path / "a", 10).sha256
    (tmp_path / "a" / "0003").rename(tmp_path / "a" / "0008")
    assert read_pictures(tmp_path / "a", 10).sha256 != before


@pytest.mark.parametrize(
    ("name", "picture", "complaint"),
    [
        ("12/000100.png", Image.new("RGB", (7, 5)), "subfolder 12 is no class; classes are 0 to 9"),
        ("0001/000100.png", Image.new("RGB", (5, 5)), r"is \[3, 5, 5\], but the first picture"),
        (
            "0001/000100.png",
            Image.new("RGBA", (7, 5)),
            "is of mode RGBA, but it should",
        ),
        ("000100.png", Image.new("RGB", (7, 5)), "has both in it and in subfolders"),
        ("0001/000100.png", None, "is no readable picture"),
    ],
)
def test_folders_that_are_refused(
    name: str, picture: Image.Image | None, complaint: str, tmp_path: Path
) -> None:
    write_pngs(tmp_path, pictures().split(3), LABELS)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if picture is None:
        (tmp_path / name).write_text("text")
    else:
        picture.save(tmp_path / name)
    with pytest.raises(UsageError, match=complaint):
        list(read_pictures(tmp_path, 10).batches(4))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path} has no PNG files")):
        read_pictures(tmp_path, 10)
