"""Latents: what is stored, by rank, resumed, mirrored, rounded, and read as a task's images."""

from __future__ import annotations

import json
import shutil
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from harness.cli.main import main
from harness.data import shards
from harness.data.arrays import Arrays
from harness.data.encode import Encoding, encode
from harness.data.images import ImageSet
from harness.data.latents import Latents
from harness.data.sets import Wanted, load_split
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.files import tensors_digest
from harness.runs.encoding import rank_of

SHAPE = (2, 4, 4)
PIXELS = np.random.default_rng(0).integers(0, 256, (22, 8, 8, 3), dtype=np.uint8)
LABELS = torch.arange(22) % 3
IMAGES = ImageSet(Arrays(PIXELS, LABELS, (3, 8, 8)), LABELS)


class Halves:
    """Latents are halved images of two channels; their posterior has deviation 1/8."""

    def __init__(self, fails_after: float = float("inf")):
        self.seen, self.fails_after = Counter[int](), fails_after

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        if sum(self.seen.values()) + len(images) > self.fails_after:
            raise KeyboardInterrupt
        self.seen["images"] += len(images)
        mean = torch.nn.functional.avg_pool2d(images, 2)[:, :2]
        return mean if noise is None else mean + noise / 8


MEANS = Halves().encode(IMAGES.images[:])


def encoded(folder: Path, encoder: Halves | None = None, **changes: Any) -> tuple[int, int]:
    """Encodes the 22 images in shards of 8, 3 at once."""
    place = {name: changes.pop(name) for name in ("rank", "ranks") if name in changes}
    about = {"autoencoder": changes.pop("autoencoder", "halves")}
    how = Encoding(SHAPE, shard_size=8, batch_size=3, **changes)
    return encode(IMAGES, encoder or Halves(), folder, how, about, **place)


def content(folder: Path) -> str:
    return tensors_digest(
        {"latents": Latents(folder, SHAPE)[:], "labels": Latents(folder, SHAPE).labels}
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_latents_are_those_of_the_images(tmp_path: Path) -> None:
    assert encoded(tmp_path) == (3, 3)
    found = Latents(tmp_path, SHAPE)
    assert (len(found), found.shape) == (22, (22, *SHAPE))
    items = torch.tensor([21, 0, 8, 7])
    assert torch.equal(found[items], MEANS[items])
    assert torch.equal(found.labels, LABELS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["labels"] == {"0": 8, "1": 7, "2": 7}
    assert (manifest["count"], manifest["posterior"], manifest["mirrored"]) == (22, "mean", False)
    assert (manifest["autoencoder"], manifest["images"]) == ("halves", IMAGES.content())
    assert "error" not in manifest


def test_a_sample_of_the_posterior_is_keyed(tmp_path: Path) -> None:
    """Not by shard or batch, so that ranks and sizes do not matter."""
    encoded(tmp_path, posterior="sample", seed=4)
    noise = Keyed("encode", 4).normal("latents", torch.arange(22), SHAPE)
    assert torch.equal(Latents(tmp_path, SHAPE)[:], MEANS + noise / 8)


def test_ranks_share_a_folder(tmp_path: Path) -> None:
    encoded(tmp_path / "one")
    first, second = Halves(), Halves()
    assert encoded(tmp_path / "two", first, rank=0, ranks=2) == (2, 3)
    with pytest.raises(UsageError, match=r"no manifest.json: let `harness data encode` finish"):
        Latents(tmp_path / "two", SHAPE)
    assert encoded(tmp_path / "two", second, rank=1, ranks=2) == (3, 3)
    assert (first.seen["images"], second.seen["images"]) == (14, 8)
    names = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert names == [path.name for path in sorted((tmp_path / "two").iterdir())]
    names.remove("verified.json")  # which has times
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_interrupted_encoding_goes_on(tmp_path: Path) -> None:
    encoded(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path / "cut", Halves(fails_after=13))
    encoder = Halves()
    encoded(tmp_path / "cut", encoder)
    assert encoder.seen["images"] == 14  # the first shard of 8 was kept
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    again = Halves()
    assert encoded(tmp_path / "cut", again) == (3, 3)
    assert not again.seen


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"posterior": "sample"}, "posterior"),
        ({"autoencoder": "other"}, "autoencoder"),
        ({"dtype": "float16", "seed": 1}, "dtype, seed"),
    ],
)
def test_other_latents_are_not_mixed_in(changes: dict, what: str, tmp_path: Path) -> None:
    encoded(tmp_path)
    with pytest.raises(UsageError, match=f"holds latents with another {what}; name another --out"):
        encoded(tmp_path, **changes)


def test_a_damaged_shard_is_told_and_encoded_again(tmp_path: Path) -> None:
    encoded(tmp_path)
    path = tmp_path / "00001-of-8.safetensors"
    before = path.read_bytes()
    path.unlink()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"00001-of-8\.safetensors was changed .* data encode"):
        Latents(tmp_path, SHAPE)
    encoded(tmp_path)
    assert path.read_bytes() == before
    Latents(tmp_path, SHAPE)


def test_a_shard_of_other_latents_is_told(tmp_path: Path) -> None:
    """It is whole and has the right shapes, but it is not the one that the manifest names."""
    encoded(tmp_path / "one")
    encoded(tmp_path / "other", posterior="sample")
    name = "00001-of-8.safetensors"
    (tmp_path / "other" / name).replace(tmp_path / "one" / name)
    with pytest.raises(UsageError, match=rf"{name} is not what manifest\.json names"):
        Latents(tmp_path / "one", SHAPE)
    encoded(tmp_path / "one")
    found = Latents(tmp_path / "one", SHAPE)[:]
    encoded(tmp_path / "fresh")
    assert torch.equal(found, Latents(tmp_path / "fresh", SHAPE)[:])


def test_mirrored_images_are_a_second_view(tmp_path: Path) -> None:
    """Of the images, not of the latents: an autoencoder does not commute with mirroring."""
    encoded(tmp_path, mirrored=True, posterior="sample")
    keys, items = Keyed("encode", 0), torch.arange(22)
    mirrored = Halves().encode(IMAGES.images[:].flip(3)) + keys.normal("mirrored", items, SHAPE) / 8
    found = ImageSet(Latents(tmp_path, SHAPE, flip=True), LABELS)
    plain = MEANS + keys.normal("latents", items, SHAPE) / 8
    mask = items % 2 == 1
    assert torch.equal(found.batch(items, mask)[0][mask], mirrored[mask])
    assert torch.equal(found.batch(items, mask)[0][~mask], plain[~mask])
    encoded(tmp_path / "plain")
    with pytest.raises(UsageError, match="have no mirrored view: encode with --flips"):
        Latents(tmp_path / "plain", SHAPE, flip=True)


def test_float16_states_its_error(tmp_path: Path) -> None:
    encoded(tmp_path, dtype="float16")
    found = Latents(tmp_path, SHAPE)[:]
    assert found.dtype == torch.float32
    assert torch.equal(found, MEANS.half().float())
    stated = json.loads((tmp_path / "manifest.json").read_text())["error"]["latents"]
    off = (found.double() - MEANS.double()).flatten()
    assert stated["largest"] == float(off.abs().max()) > 0
    assert stated["relative_rms"] == pytest.approx(float(off.norm() / MEANS.double().norm()))


def test_too_little_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage(22 * 32 * 4 - 1))
    with pytest.raises(UsageError, match=r"22 latents need .* MB are free in .*: name another --o"):
        encoded(tmp_path)


def test_another_shape_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"have the shape \[2, 4, 4\], but \[4, 4, 4\] was"):
        encode(IMAGES, Halves(), tmp_path, Encoding((4, 4, 4)), {})
    encoded(tmp_path / "right")
    with pytest.raises(UsageError, match=r"the shape \[2, 4, 4\], but data.shape is \[4, 4, 4\]"):
        Latents(tmp_path / "right", (4, 4, 4))


def test_ranks_are_read_as_torchrun_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (rank_of(None), rank_of("2/4")) == ((0, 1), (2, 4))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rank_of(None) == (3, 8)
    for text in ("4/4", "1", "a/2", "-1/2"):
        with pytest.raises(UsageError, match="should be 0/4 to 3/4"):
            rank_of(text)


# the command, with an autoencoder of diffusers in its own file format


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderKL with random weights that halves images, saved by diffusers."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    network.save_pretrained(folder)
    return folder


def pictures(folder: Path) -> None:
    for item, pixels in enumerate(PIXELS[:12]):
        place = folder / f"class{item % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{item:02d}.png")


def call(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["data", "encode", "--device", "cpu", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_encodes_a_folder_that_a_task_reads(tmp_path: Path, vae: Path) -> None:
    import diffusers

    pictures(tmp_path / "set")
    out = tmp_path / "latents"
    words = (
        "--images",
        tmp_path / "set",
        "--size",
        8,
        "--autoencoder",
        vae,
        "--out",
        out,
        "--flips",
    )
    said = call(*words)
    assert "train: 9 images, 1 shards" in said
    assert "held_out: 3 images, 1 shards" in said
    wanted = Wanted("latents", (4, 4, 4), 3, path=str(out), flip=True)
    split, source = (
        load_split(wanted),
        load_split(Wanted("folder", (3, 8, 8), 3, path=str(tmp_path / "set"))),
    )
    network = diffusers.AutoencoderKL.from_pretrained(vae).eval()
    for part, real in ((split.train, source.train), (split.held_out, source.held_out)):
        assert torch.equal(part.labels, real.labels)
        with torch.no_grad():
            mean = network.encode(real.images[:]).latent_dist.mean
        torch.testing.assert_close(part.images[:], (mean - 0.0609) * 1.5305, rtol=0, atol=1e-5)
    everything = torch.arange(9)
    with torch.no_grad():
        mean = network.encode(source.train.images[:].flip(3)).latent_dist.mean
    mirrored = split.train.batch(everything, torch.ones(9, dtype=torch.bool))[0]
    torch.testing.assert_close(mirrored, (mean - 0.0609) * 1.5305, rtol=0, atol=1e-5)
    manifest = json.loads((out / "train" / "manifest.json").read_text())
    assert manifest["classes"] == ["class0", "class1", "class2"]
    assert manifest["crop"] == "ADM's centre crop to 8 pixels"
    assert manifest["autoencoder"]["scaling"] == 1.5305
    again = json.loads(call(*words, "--json"))
    assert again["train"] == {"images": 9, "shards_there": 1, "shards": 1}


def test_what_the_command_cannot_do_is_told(tmp_path: Path, vae: Path) -> None:
    pictures(tmp_path / "set")
    images, out = ("--images", tmp_path / "set"), ("--out", tmp_path / "latents")
    given = ("--autoencoder", vae)
    for words, complaint in (
        ((*images, *out, "--size", 8), "no autoencoder is named; give --autoencoder"),
        ((*out, *given), "no images are named; give --images, or a --task"),
        ((*images, *out, *given), "--images needs --size"),
        ((*images, *given, "--size", 8), "no folder is named; give --out"),
        ((*images, *out, *given, "--size", 7), "--size is 7, but the autoencoder needs a multiple"),
        ((*images, *out, *given, "--size", 8, "--rank", "2/2"), "should be 0/4 to 3/4"),
        (("--images", "gone", *out, *given, "--size", 8), "there is no gone; --images names"),
        (
            (*images, *out, "--autoencoder", "some/vae", "--size", 8),
            "the hub cannot be reached",
        ),
        (("--task", "digits", *out, *given), "have 1 channels, but the autoencoder takes 3"),
    ):
        said = call(*words, code=2)
        assert complaint in said
        assert said.count("\n") == 1, said
    shutil.copytree(vae, tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    words = (*images, *out, "--autoencoder", tmp_path / "vae", "--size", 8)
    assert "there is no file" in call(*words, code=2)
