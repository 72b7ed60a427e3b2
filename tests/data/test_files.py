"""Image sets that are files: order, labels, crop, streaming, and sentences for what is broken."""

from __future__ import annotations

import io
import math
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.data.arrays import Arrays
from harness.data.folders import Folder
from harness.data.images import ImageSet, to_uint8
from harness.data.readers import Reader, centre_crop
from harness.data.sets import Wanted, drawn, load_split
from harness.data.tars import Tars
from harness.errors import UsageError

SHAPE = (3, 8, 8)
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache and data folders of this test."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))


def picture(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, (value, 255 - value, 7))


def write_folder(folder: Path, classes: dict[str, int], first: int = 0) -> None:
    """PNG files, each of a colour of its own, by class."""
    value = first
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for item in range(count):
            picture(value).save(folder / name / f"{item:03d}.png")
            value += 1


def png(value: int) -> bytes:
    made = io.BytesIO()
    picture(value).save(made, "PNG")
    return made.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def values(images: Reader | ImageSet) -> list[int]:
    """The first channel of each image, as 8-bit numbers."""
    found = images.images if isinstance(images, ImageSet) else images
    return [int(value) for value in to_uint8(found[:])[:, 0, 0, 0]]


# the crop of ADM


def box(x: np.ndarray) -> np.ndarray:
    """The kernel of a mean."""
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resized(pixels: np.ndarray, height: int, width: int, kernel: Callable) -> np.ndarray:
    """Columns, then rows, weighted by a kernel that widens where it shrinks; rounded each time."""
    for axis, size in ((1, width), (0, height)):
        before = pixels.shape[axis]
        scale = before / size
        centres = (np.arange(size) + 0.5) * scale
        weights = kernel((np.arange(before) + 0.5 - centres[:, None]) / max(scale, 1.0))
        weights /= weights.sum(1, keepdims=True)
        found = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
        pixels = np.clip(np.floor(found + 0.5), 0, 255)
    return pixels


def cropped(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle square, by formulas that do not use Pillow."""
    found = pixels.astype(np.float64)
    while min(found.shape[:2]) >= 2 * size:
        found = resized(found, found.shape[0] // 2, found.shape[1] // 2, box)
    scale = size / min(found.shape[:2])
    height, width = (round(side * scale) for side in found.shape[:2])
    found = resized(found, height, width, cubic)
    top, left = (height - size) // 2, (width - size) // 2
    return found[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (40, 64), (64, 34), (13, 9), (5, 7), (11, 30)])
def test_the_crop_is_adms(size: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    found = centre_crop(Image.fromarray(pixels), 8)
    assert found.shape == (8, 8, 3)
    assert found.dtype == np.uint8
    assert np.abs(found - cropped(pixels, 8)).max() <= 1  # Pillow rounds its weights


def test_halving_is_exact() -> None:
    """Two halvings of blocks of 4 x 4 whose means are whole: the golden answer has no error."""
    small = RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8)
    large = small.repeat(4, 0).repeat(4, 1)
    assert np.array_equal(centre_crop(Image.fromarray(large), 8), small[:, 4:12])


def test_the_middle_is_cut_out_as_adm_rounds() -> None:
    wide = np.arange(11, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)
    assert centre_crop(Image.fromarray(wide), 8)[0, :, 0].tolist() == list(range(1, 9))


# order and labels


def test_a_folder_is_read_in_torchvisions_order(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    write_folder(tmp_path, {"b": 2, "a": 3})
    write_folder(tmp_path / "c", {"inner": 1, "deep": 2}, first=50)
    picture(99).save(tmp_path / "c" / "top.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    found, theirs = Folder(tmp_path, SHAPE), ImageFolder(str(tmp_path))
    assert [found.name(item) for item in range(len(found))] == [path for path, _ in theirs.samples]
    assert found.labels.tolist() == theirs.targets
    assert found.classes == tuple(theirs.classes)
    assert found.shape == (9, 3, 8, 8)
    assert values(found) == [np.array(theirs[item][0])[0, 0, 0] for item in range(9)]


def test_a_class_list_chooses_and_orders(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 1, "c": 1})
    found = Folder(tmp_path, SHAPE, ("c", "a"))
    assert values(found) == [3, 0, 1]
    assert found.labels.tolist() == [0, 1, 1]


def test_imagenets_layout(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"n1": 3, "n2": 2})
    write_folder(tmp_path / "val", {"n1": 1, "n2": 1}, first=100)
    split = load_split(Wanted("folder", SHAPE, 2, path=str(tmp_path)))
    assert (values(split.train), split.train.labels.tolist()) == ([0, 1, 2, 3, 4], [0, 0, 0, 1, 1])
    assert (values(split.held_out), split.held_out.labels.tolist()) == ([100, 101], [0, 1])
    drawn_part = load_split(Wanted("folder", SHAPE, 2, path=str(tmp_path), held_out=0.4))
    assert (len(drawn_part.train), len(drawn_part.held_out)) == (3, 2)  # of train alone


def test_a_folder_without_classes_has_one(tmp_path: Path) -> None:
    for value in range(5):
        picture(value).save(tmp_path / f"{value}.png")
    split = load_split(Wanted("folder", SHAPE, 1, path=str(tmp_path)))
    assert (len(split.train), len(split.held_out)) == (4, 1)
    assert split.train.labels.tolist() == [0] * 4


def test_the_held_out_part_is_drawn_by_class() -> None:
    labels = torch.tensor([0] * 20 + [1] * 5 + [2] + [0] * 10)
    train, held_out = drawn(labels, 0.2, 0)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(36))
    assert labels[held_out].bincount(minlength=3).tolist() == [6, 1, 0]
    assert held_out.tolist() == sorted(held_out.tolist())
    assert torch.equal(drawn(labels, 0.2, 0)[1], held_out)
    assert not torch.equal(drawn(labels, 0.2, 1)[1], held_out)


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "b.tar",
        {"x/1.cls": b"1\n", "x/1.png": png(3), "x/2.txt": b"?", "x/2.PNG": png(2), "x/2.cls": b"0"},
    )
    write_tar(tmp_path / "a.tar", {"9.png": png(9), "9.cls": b"2", "8.png": png(8), "8.cls": b"0"})
    found = Tars(tmp_path, SHAPE)
    assert values(found) == [9, 8, 3, 2]
    assert found.labels.tolist() == [2, 0, 1, 0]
    assert "x/1.png" in found.name(2)
    assert values(Tars(tmp_path, SHAPE)) == [9, 8, 3, 2]  # from the kept index
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 2


def test_shards_that_webdataset_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pixels = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    with webdataset.ShardWriter(f"{tmp_path}/%03d.tar", maxcount=2, verbose=0) as writer:
        for item, image in enumerate(pixels):
            writer.write({"__key__": f"{item:05d}", "png": Image.fromarray(image), "cls": item % 3})
    found = Tars(tmp_path, SHAPE)
    assert torch.equal(to_uint8(found[:]), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert found.labels.tolist() == [0, 1, 2, 0, 1]


def test_classes_by_name_in_shards(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", {"1.png": png(1), "1.cls": b"dog", "2.png": png(2), "2.cls": b"cat"}
    )
    assert Tars(tmp_path, SHAPE, ("cat", "dog")).labels.tolist() == [1, 0]
    with pytest.raises(UsageError, match=r"says 'dog', but should say a number or one of data.cl"):
        Tars(tmp_path, SHAPE, ("cat", "cow"))
    with pytest.raises(UsageError, match=r"1.cls in .*a.tar says 'dog', but should say a number"):
        Tars(tmp_path, SHAPE)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_mapped(save: Callable, tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    save(tmp_path / "set.npz", pixels, np.arange(10) % 2)
    split = load_split(Wanted("npz", SHAPE, 2, path=str(tmp_path / "set.npz"), held_out=0.4))
    assert (len(split.train), len(split.held_out)) == (6, 4)
    whole = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(to_uint8(split.held_out.images[:]), whole[split.held_out.images.items])
    assert split.held_out.labels.tolist() == (split.held_out.images.items % 2).tolist()
    assert isinstance(split.train.images.whole.images, np.memmap)


def test_grey_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1))
    split = load_split(Wanted("npz", (1, 8, 8), 1, path=str(tmp_path / "set.npz")))
    assert split.train.images.shape == (3, 1, 8, 8)
    assert values(split.held_out) == [64 * int(split.held_out.images.items)]


def test_another_file_is_the_held_out_part(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 2)):
        np.savez(
            tmp_path / f"{name}.npz", np.zeros((count, 8, 8, 3), np.uint8), np.zeros(count, int)
        )
    wanted = Wanted("npz", SHAPE, 1, path="a.npz", folder=tmp_path, held_out="b.npz")
    split = load_split(wanted)
    assert (len(split.train), len(split.held_out)) == (3, 2)


def test_a_path_is_relative_to_the_task_or_to_the_data(tmp_path: Path) -> None:
    for place, count in (("data", 5), ("task", 10)):
        write_folder(tmp_path / place / "set", {"a": count})
        wanted = Wanted("folder", SHAPE, 1, path="set", folder=tmp_path / "task")
        split = load_split(wanted)
        assert len(split.train) + len(split.held_out) == count


# streaming


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """Of 4,000 pictures of 192 KB, a batch of 4 is in memory; their index takes bytes an item."""
    (tmp_path / "a").mkdir()
    picture(3, (256, 256)).save(tmp_path / "a" / "first.png")
    for item in range(4000):
        (tmp_path / "a" / f"{item:06d}.png").hardlink_to(tmp_path / "a" / "first.png")
    found = Folder(tmp_path, (3, 256, 256))
    found[torch.arange(4)]  # warms Pillow up
    tracemalloc.start()
    try:
        index = Folder(tmp_path, (3, 256, 256)).names
        kept = tracemalloc.get_traced_memory()[0]
        assert len(index) == 4001
        assert kept < 4001 * 64
        tracemalloc.reset_peak()
        for start in (0, 1000, 3000):
            found[torch.arange(start, start + 4)]
        assert tracemalloc.get_traced_memory()[1] < kept + 20 * 4 * 3 * 256 * 256
    finally:
        tracemalloc.stop()


def test_statistics_in_parts_equal_those_of_the_whole() -> None:
    pixels = RNG.integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    labels = torch.arange(600)
    streamed = ImageSet(Arrays(pixels, labels, SHAPE), labels)
    whole = ImageSet(streamed.images[:], labels)
    assert math.isclose(streamed.std, whole.std, rel_tol=1e-12)


def test_mirroring() -> None:
    pixels = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    labels = torch.arange(6)
    streamed = ImageSet(Arrays(pixels, labels, SHAPE), labels)
    for images in (streamed, ImageSet(streamed.images[:], labels)):
        plain, _ = images.batch(torch.tensor([4, 2, 0]))
        found, cond = images.batch(torch.tensor([4, 2, 0]), torch.tensor([True, False, True]))
        assert torch.equal(found[0], plain[0].flip(2))
        assert torch.equal(found[1], plain[1])
        assert torch.equal(found[2], plain[2].flip(2))
        assert cond.classes.tolist() == [4, 2, 0]


def test_the_content_follows_files_and_not_their_place(tmp_path: Path) -> None:
    contents = []
    for place in ("one", "two"):
        write_folder(tmp_path / place, {"a": 5, "b": 5})
        contents.append(load_split(Wanted("folder", SHAPE, 2, path=str(tmp_path / place))).train)
    assert contents[0].content() == contents[1].content()
    picture(77).save(tmp_path / "two" / "a" / "000.png")
    other = load_split(Wanted("folder", SHAPE, 2, path=str(tmp_path / "two"))).train
    assert other.content() != contents[0].content()
    seeded = load_split(Wanted("folder", SHAPE, 2, 1, path=str(tmp_path / "one"))).train
    assert seeded.content() != contents[0].content()


# what is wrong is told in one sentence


def broken_folder(folder: Path) -> Wanted:
    write_folder(folder, {"a": 2, "b": 2})
    (folder / "a" / "001.png").write_bytes(png(1)[:40])
    return Wanted("folder", SHAPE, 2, path=str(folder))


def broken_member(folder: Path) -> Wanted:
    members = {f"{n}.png": png(n)[:40] for n in range(2)} | {f"{n}.cls": b"0" for n in range(2)}
    write_tar(folder / "a.tar", members)
    return Wanted("webdataset", SHAPE, 2, path=str(folder))


@pytest.mark.parametrize(
    ("make", "name"), [(broken_folder, "a/001.png"), (broken_member, ".png in")]
)
def test_a_broken_picture_is_named(make: Callable, name: str, tmp_path: Path) -> None:
    split = load_split(make(tmp_path / "set"))
    with pytest.raises(UsageError, match=rf"{name}.* is no readable image \(.*; replace or remove"):
        values(split.train) + values(split.held_out)


def test_a_damaged_header_drops_no_pictures(tmp_path: Path) -> None:
    """tarfile takes a broken header, and one of zeros, for the end of the file."""
    write_tar(tmp_path / "a.tar", {f"{n}.png": png(n) for n in range(4)})
    with tarfile.open(tmp_path / "a.tar") as tar:
        place = tar.getmembers()[2].offset
    whole = (tmp_path / "a.tar").read_bytes()
    for damage in (bytes(512), whole[place : place + 100] + bytes(412)):
        (tmp_path / "a.tar").write_bytes(whole[:place] + damage + whole[place + 512 :])
        with pytest.raises(UsageError, match=rf"a\.tar is damaged after byte {place}; fetch it"):
            Tars(tmp_path, SHAPE, labelled=False)
    (tmp_path / "a.tar").write_bytes(whole)
    assert len(Tars(tmp_path, SHAPE, labelled=False)) == 4


def no_class(folder: Path) -> None:
    write_tar(folder / "a.tar", {"7.png": png(1)})


def cut_off(folder: Path) -> None:
    write_tar(folder / "a.tar", {"7.png": png(1), "7.cls": b"0"})
    content = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(content[:560])


def floats(folder: Path) -> None:
    np.savez(folder / "a.npz", np.zeros((3, 8, 8, 3)))


def few_labels(folder: Path) -> None:
    np.savez(folder / "a.npz", np.zeros((3, 8, 8, 3), np.uint8), np.zeros(2, int))


def large_labels(folder: Path) -> None:
    np.savez(folder / "a.npz", np.zeros((10, 8, 8, 3), np.uint8), np.arange(10))


@pytest.mark.parametrize(
    ("make", "wanted", "complaint"),
    [
        (None, {"name": "folder", "path": "gone"}, r"there is no .*gone and no .*data/gone;"),
        (None, {"name": "folder"}, "set folder needs data.path"),
        (None, {"name": "folder", "path": __file__}, "cannot read the folder .*: Not a directory"),
        (
            lambda f: write_folder(f, {"a": 2, "b": 2}),
            {"name": "folder", "held_out": 5.0},
            "held_out is 5.0, but a share lies between 0 and 1",
        ),
        (None, {"name": "folders"}, "unknown image set 'folders'; did you mean folder"),
        (lambda f: write_folder(f, {"a": 1}), {"name": "folder"}, "has 1 classes, but .* is 2"),
        (lambda f: write_folder(f, {"a": 1, "b": 0}), {"name": "folder"}, "b holds no picture"),
        (
            lambda f: write_folder(f, {"a": 1, "b": 1}),
            {"name": "folder", "classes": ("a", "z")},
            "has no subfolder 'z', which data.classes names; it has a, b",
        ),
        (
            lambda f: write_folder(f, {"a": 2, "b": 2}),
            {"name": "folder", "shape": (4, 8, 8)},
            r"\[4, 8, 8\], but pictures are cropped to squares with 1 or 3 channels",
        ),
        (no_class, {"name": "webdataset"}, r"7 in .*a.tar has a picture, but no .cls"),
        (cut_off, {"name": "webdataset"}, "a.tar is (cut off|no readable tar file)"),
        (lambda f: None, {"name": "webdataset"}, "holds no shard"),
        (floats, {"name": "npz", "path": "a.npz"}, r"float64 \[3, 8, 8, 3\] as arr_0, but uint8"),
        (few_labels, {"name": "npz", "path": "a.npz"}, "3 whole numbers are needed"),
        (large_labels, {"name": "npz", "path": "a.npz"}, "labels 0 to 9, but .* allows 0 to 1"),
        (
            lambda f: (f / "a.npz").write_text("no"),
            {"name": "npz", "path": "a.npz"},
            "a.npz is no readable npz file",
        ),
        (None, {"name": "latents", "path": "."}, "has no manifest.json: let `harness data encode`"),
        (None, {"name": "digits"}, r"shape \[1, 8, 8\], but data.shape is \[3, 8, 8\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(
    make: Callable | None, wanted: dict, complaint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    if make:
        make(folder)
    path = {"path": str(folder)} if make else {}
    asked = {"shape": SHAPE, "num_classes": 2, "folder": folder, **path, **wanted}
    with pytest.raises(UsageError, match=complaint) as told:
        load_split(Wanted(**asked))
    assert "\n" not in str(told.value)


def test_cifar10_as_torchvision_lays_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    pixels = RNG.integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8)
    for name, part in zip(names, pixels, strict=True):
        content = {"data": part.reshape(4, -1), "labels": [0, 9, 3, 4]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    split = load_split(Wanted("cifar10", (3, 32, 32), 10, flip=True))
    assert torch.equal(
        to_uint8(split.train.images[:]), torch.from_numpy(pixels[:5].reshape(20, 3, 32, 32))
    )
    assert torch.equal(to_uint8(split.held_out.images[:]), torch.from_numpy(pixels[5]))
    assert split.held_out.labels.tolist() == [0, 9, 3, 4]
    assert (split.train.flip, split.held_out.flip) == (True, False)
