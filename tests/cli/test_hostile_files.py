"""Files that attack their reader: each is refused in a sentence with exit code 2, and runs no code.

tests/bombs.py writes them; tests/test_hostile_memory.py measures what the refusals cost.
"""

from __future__ import annotations

import errno
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bombs
import numpy as np
import pytest
import torch
from commands import Harness, sentence
from PIL import Image
from safetensors.torch import save_file

from harness.documents import MOST_LINE, MOST_YAML, parse_json, read_lines, read_text
from harness.tasks import Task

IMAGES = np.zeros((40, 8, 8, 1), np.uint8)
LABELS = np.arange(40) % 10
STATE = {"x_embedder.proj.weight": torch.zeros(16, 1, 4, 4)}


# checkpoints


@pytest.mark.parametrize("how", ["whole", "beside", "legacy", "bare"])
def test_a_pickle_with_code_is_not_run(how: str, harness: Harness, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = bombs.pickles(tmp_path, mark)[how]
    done = harness("teacher", "import", path, "--kind", "dit", "--out", tmp_path / "o.safetensors")
    assert f"{path} holds a pickled " in sentence(done, 2)
    assert "posix.system" in done.err or "os.system" in done.err
    assert not mark.exists()


@pytest.mark.parametrize("place", ["transformer", "."])
def test_a_pickle_in_a_folder_of_diffusers_is_not_run(
    place: str, harness: Harness, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    folder = tmp_path / "pipeline"
    (folder / place).mkdir(parents=True)
    if place == "transformer":
        (folder / "model_index.json").write_text("{}")
    config = {"_class_name": "DiTTransformer2DModel", "num_layers": 1}
    (folder / place / "config.json").write_text(json.dumps(config))
    torch.save({"a": bombs.Code(tmp_path / "mark")}, folder / place / "diffusion_pytorch_model.bin")
    done = harness("teacher", "import", folder, "--out", tmp_path / "o.safetensors")
    assert "holds a pickled" in sentence(done, 2)
    assert not (tmp_path / "mark").exists()


def test_an_index_of_shards_names_no_file_elsewhere(harness: Harness, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    save_file(STATE, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        done = harness("teacher", "import", folder, "--out", tmp_path / "o.safetensors")
        assert "should be a name" in sentence(done, 2)
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "link.safetensors"}}))
    done = harness("teacher", "import", folder, "--out", tmp_path / "o.safetensors")
    assert "is a link that leads out of" in sentence(done, 2)


def expanded(path: Path) -> None:
    torch.save({**STATE, "pos_embed": torch.zeros(1).expand(10**6, 10**6)}, path)


def packed(path: Path) -> None:
    torch.save(STATE, path.with_suffix(".plain"))
    bombs.repacked(path.with_suffix(".plain"), path)


def sparse(path: Path) -> None:
    torch.save({**STATE, "a": torch.sparse_coo_tensor(size=(10**6, 10**6))}, path)


def meta(path: Path) -> None:
    torch.save({**STATE, "a": torch.zeros(10**6, 10**6, device="meta")}, path)


def quantized(path: Path) -> None:
    torch.save({"a": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)}, path)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (expanded, "holds pos_embed [1000000, 1000000], but fewer numbers are stored"),
        (packed, "is not a file that torch.save wrote"),
        (sparse, "holds a, which is no plain tensor"),
        (meta, "holds a, which is no plain tensor"),
        (quantized, "holds a, which is no plain tensor"),
        (lambda path: path.write_bytes(b""), "is not a file that torch.save wrote"),
        (lambda path: path.write_bytes(b"\x80\x04" + b"(" * 10**5), "is not a file that torch"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_a_checkpoint_that_would_grow_is_refused(
    write: Callable[[Path], Any], words: str, harness: Harness, tmp_path: Path
) -> None:
    path = tmp_path / "dit.pt"
    write(path)
    done = harness("teacher", "import", path, "--out", tmp_path / "o.safetensors")
    assert words in sentence(done, 2)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"network": "{"}, "has broken metadata"),
        ({"network": "[" * 10**5}, "has broken metadata (it is nested too deeply)"),
        ({"network": "[]"}, "network is no mapping"),
        ({"network": '{"depth": 3}'}, "has broken metadata ('schedule')"),
        ({"network": '{"depth": 1e999}'}, "inf is no finite number"),
        (
            {"network": '{"size": "DiT-S/2"}', "schedule": "flow-inf", "prediction_type": "v"},
            "a shift must be above 0",
        ),
        (
            {"network": "{}", "schedule": "vp", "prediction_type": "<script>"},
            "unknown prediction_type '<script>'",
        ),
        (
            {
                "network": '{"image_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16,'
                ' "num_heads": 2, "depth": 1000000}',
                "schedule": "vp",
                "prediction_type": "v",
            },
            "depth is 1000000, but should be 1 to 10000",
        ),
    ],
)
def test_metadata_that_lie_are_refused(
    metadata: dict[str, str], words: str, harness: Harness, tmp_path: Path
) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file(STATE, path, metadata)
    done = harness("teacher", "import", path, "--out", tmp_path / "o.safetensors")
    assert words in sentence(done, 2)


# archives of samples


def fake_shape(folder: Path) -> Path:
    head = bombs.npy_header((10**6, 10**6, 10**3, 3), "|u1")
    return bombs.write_npz(folder / "a.npz", {"arr_0": head + bytes(100)})


def huge_labels(folder: Path) -> Path:
    labels = bombs.npy_header((10**12,), "<i8") + bytes(80)
    return bombs.write_npz(folder / "a.npz", {"arr_0": bombs.npy(IMAGES), "arr_1": labels})


def negative_shape(folder: Path) -> Path:
    head = bombs.npy_header((-1, 8, 8, 1), "|u1")
    return bombs.write_npz(folder / "a.npz", {"arr_0": head + bytes(64)})


def objects(folder: Path) -> Path:
    np.savez(folder / "a.npz", np.array([bombs.Code(folder / "mark")], dtype=object))
    return folder / "a.npz"


def object_labels(folder: Path) -> Path:
    np.savez(folder / "a.npz", IMAGES, np.array([bombs.Code(folder / "mark")] * 40, dtype=object))
    return folder / "a.npz"


def lzma(folder: Path) -> Path:
    arrays = {"arr_0": bombs.npy(IMAGES)}
    return bombs.write_npz(folder / "a.npz", arrays, zipfile.ZIP_LZMA)


def locked(folder: Path) -> Path:
    """An archive whose members say that they are encrypted."""
    path = bombs.write_npz(folder / "a.npz", {"arr_0": bombs.npy(IMAGES)})
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + place] |= 1
    path.write_bytes(content)
    return path


def climbing(folder: Path) -> Path:
    return bombs.write_npz(folder / "a.npz", {"../../arr_0": bombs.npy(IMAGES)})


@pytest.mark.parametrize(
    "write",
    [fake_shape, huge_labels, negative_shape, objects, object_labels, lzma, locked, climbing],
)
@pytest.mark.parametrize("command", ["evaluate", "encode"])
def test_an_npz_that_attacks_is_refused(
    write: Callable[[Path], Path], command: str, tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    path = write(tmp_path)
    done = read_set(command, path, harness, tmp_path)
    assert f"{path} " in sentence(done, 2)
    assert not (tmp_path / "mark").exists()
    assert not list((tmp_path / "cache").glob("unpacked/*"))


def read_set(command: str, path: Path, harness: Harness, folder: Path) -> Any:
    """A command that reads samples, or one that reads a training set."""
    if command == "evaluate":
        return harness("evaluate", "--task", "tiny", "--samples", path, "--results", folder / "r")
    autoencoder = folder / "autoencoder"
    autoencoder.mkdir(exist_ok=True)
    (autoencoder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    words = ("--size", 8, "--autoencoder", autoencoder, "--out", folder / "latents")
    return harness("data", "encode", "--images", path, *words)


@pytest.mark.parametrize("command", ["evaluate", "encode"])
def test_a_zip_bomb_is_not_unpacked(
    command: str, tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    rows = bombs.GIGABYTES // 2**24 * 2**24 // 64
    head = bombs.npy_header((rows, 8, 8, 1), "|u1")
    path = bombs.packed_zeros(tmp_path / "a.npz", "arr_0.npy", head)
    assert path.stat().st_size < bombs.GIGABYTES / 200
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        assert len(stream.read(10**6)) == 10**6  # it is a true archive
    done = read_set(command, path, harness, tmp_path)
    assert "would be unpacked to 3.99 GB" in sentence(done, 2)
    assert not list((tmp_path / "cache").glob("unpacked/*"))


def test_a_packed_set_of_pictures_is_fine(tiny: Task, harness: Harness, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", IMAGES, LABELS)
    assert read_set("evaluate", tmp_path / "a.npz", harness, tmp_path).code == 0


# tar shards


def member(name: str, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info


def picture() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (8, 8)).save(made, "PNG")
    return made.getvalue()


def long_label(path: Path) -> None:
    bombs.tar_of(path, [(member("a.png"), picture()), (member("a.cls"), b"9" * 10**4)])


def negative_size(path: Path) -> None:
    info = member("a.cls")
    info.size = -512
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    path.write_bytes(bytes(head) + bytes(10240))


def sparse_label(path: Path) -> None:
    """A GNU sparse member of 10^12 bytes, of which none is stored."""
    info = member("a.cls", type=tarfile.GNUTYPE_SPARSE)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[483:495] = tarfile.itn(10**10, 12, tarfile.GNU_FORMAT)
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head[:512]):06o}\0 ".encode()
    path.write_bytes(bytes(head) + bytes(10240))


def cut_off(path: Path) -> None:
    info = member("a.png", size=10**12)
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


def chain(path: Path) -> None:
    """Long names of long names, each of which tarfile reads by a call of itself."""
    info = member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=2)
    path.write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"a" + bytes(511)) * 3000 + bytes(1024))


@pytest.mark.parametrize("write", [long_label, negative_size, sparse_label, cut_off, chain])
def test_a_tar_that_attacks_is_refused(
    write: Callable[[Path], None], harness: Harness, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.tar"
    write(path)
    assert f"{path}" in sentence(read_set("encode", path, harness, tmp_path), 2)


def test_a_tar_writes_nothing_outside_and_follows_no_link(
    harness: Harness, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "secret.png").write_bytes(picture())
    link = member("b.png", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret.png"))
    members = [
        (member("../../outside.png"), b"no picture"),
        (member("../../outside.cls"), b"0"),
        (member("/tmp/absolute.png"), b"no picture"),
        (member("/tmp/absolute.cls"), b"0"),
        (link, b""),
    ]
    (tmp_path / "in").mkdir()
    path = bombs.tar_of(tmp_path / "in" / "a.tar", members)
    from harness.data.tars import index_of

    assert len(index_of(path, (), True)) == 2  # those that have bytes here
    assert {each.name for each in tmp_path.iterdir()} == {"cache", "in", "secret.png"}


# pictures


def postscript(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(bombs.png_of(10**6, 10**6)), "picture"),
        (lambda path: path.write_bytes(bombs.png_of(2**31 - 1, 1)), "picture"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "picture"),
        (postscript, "picture"),
    ],
)
@pytest.mark.parametrize("command", ["task", "evaluate", "encode"])
def test_a_picture_that_attacks_is_refused(
    write: Callable[[Path], None],
    words: str,
    command: str,
    tiny: Task,
    harness: Harness,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    (folder / "0").mkdir(parents=True)
    for number in range(2):
        write(folder / "0" / f"{number}.png")
    done = (
        harness("task", "new", "mine", "--images", folder)
        if command == "task"
        else read_set(command, folder, harness, tmp_path)
    )
    if command == "encode":  # reads pictures only once it has its network
        assert sentence(done, 2)
        return
    assert words in sentence(done, 2)


def test_a_thin_picture_is_not_stretched(tmp_path: Path) -> None:
    from harness.data.folders import Folder
    from harness.errors import UsageError

    Image.new("L", (40_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="it is so narrow that"):
        Folder(tmp_path, (1, 256, 256))[:1]


@pytest.mark.parametrize("links", [[("a", "."), ("b", ".")], [("x/l", "../y"), ("y/l", "../x")]])
def test_links_in_a_circle_end(
    links: list[tuple[str, str]], harness: Harness, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    for name, target in links:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    Image.new("L", (8, 8)).save(folder / links[0][0].split("/")[0] / "0.png")
    done = read_set("encode", folder, harness, tmp_path)
    assert "which holds it: delete the link" in sentence(done, 2)


# YAML and JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bombs.laughs(), "its aliases stand for more than 100000 values"),
        ("a: &a [*a]", "its aliases stand for more than 100000 values"),
        ("a: &a {b: 1}\nc: {<<: [" + "*a, " * 10**5 + "]}", "its aliases stand for more than"),
        ("a: " + "[" * 10**4, "it is nested too deeply"),
        ("a: " * 10**4, "is not YAML"),
        ("options: {lr: .nan}", "options.lr is nan, but should be a finite number"),
        ("options: {lr: -.inf}", "options.lr is -inf, but should be a finite number"),
        ("num_steps: " + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("num_steps: 99999999999999999999", "num_steps is a number that does not fit 64 bits"),
        ("seed: 0b_", "is not YAML: invalid literal"),
        ("seed: 2001-99-99", "is not YAML: month must be in 1..12"),
        ("seed: 2001-01-01", "seed is a date, not a plain value"),
        ("seed: !!timestamp x", "is not YAML"),
        ("seed: !!bool x", "is not YAML"),
        ("seed: !!binary aGk=", "seed is a bytes, not a plain value"),
        ("seed: !!python/object/apply:os.system [touch mark]", "could not determine a constructor"),
        ("1: 2", "1 is a key, but keys should be text"),
        ("? [a, b]\n: 2", "is not YAML"),
        ('task: "a\\0b"', "task has the control character U+0000"),
        ('method: "\\e[2J"', "method has the control character U+001B"),
        ("method: ard\n" + "#" * MOST_YAML, "it has more than 1 MB"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("command", ["run", "sweep", "task"])
def test_yaml_that_attacks_is_refused(
    text: str, words: str, command: str, harness: Harness, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    given: dict[str, tuple[Any, ...]] = {
        "run": ("run", "--config", path),
        "sweep": ("sweep", path),
        "task": ("run", "--method", "ard", "--task", path),
    }
    done = harness(*given[command])
    assert words in sentence(done, 2)
    assert len(done.err) < 3000
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]


def test_many_keys_take_no_square_of_time(tmp_path: Path) -> None:
    """Each key is compared with none before it but by its hash."""
    from harness.documents import read_yaml

    path = tmp_path / "many.yaml"
    path.write_text("\n".join(f"key{number}: 1" for number in range(20_000)))
    assert len(read_yaml(path)) == 20_000


def test_a_file_without_an_end_is_not_read_to_it(harness: Harness) -> None:
    assert "it has more than 1 MB" in sentence(harness("run", "--config", "/dev/zero"), 2)
    done = harness("data", "prompts", "/dev/zero", "--encoder", "x", "--out", "a.safetensors")
    assert "it has more than 268 MB" in sentence(done, 2)


def test_lines_have_an_end_too(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"a\n" + bytes(MOST_LINE + 1))
    lines = read_lines(path)
    assert next(lines) == "a"
    with pytest.raises(OSError, match="line of more than") as raised:
        next(lines)
    assert raised.value.errno == errno.EFBIG
    with pytest.raises(OSError, match="it has more than"):
        read_text(path, 10)
    with pytest.raises(OSError, match=r"U\+0000"):
        read_text(Path("a\0b"))


@pytest.mark.parametrize("text", ["[" * 10**5, "NaN", "-Infinity", "1e999", "9" * 30, '"\\ud800"'])
def test_json_that_attacks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_plain_json_is_read() -> None:
    found = parse_json('{"a": [1, -2.5e3, null, true, "\\ud83d\\ude00"], "b": 9223372036854775807}')
    assert found == {"a": [1, -2500.0, None, True, "😀"], "b": 2**63 - 1}


# SQLite


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(4000), "link"])
def test_a_database_that_is_none_is_refused(
    content: Any, tiny: Task, harness: Harness, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    if content == "link":
        (tmp_path / "outside.db").write_bytes(b"")
        (results / "harness.db").symlink_to(tmp_path / "outside.db")
    else:
        (results / "harness.db").write_bytes(content)
    path = tmp_path / "search.yaml"
    path.write_text(
        "base: {task: tiny, method: step-distillation, num_steps: 2, budget: steps=1}\n"
        "search: {trials: 1, objectives: {fid: minimize}, space: {options.lr: {low: 0.001, high: "
        "0.01}}}\n"
    )
    done = harness("sweep", path, "--results", results, "--dry-run")
    assert "harness.db" in sentence(done, 2)
    if content == "link":
        assert (tmp_path / "outside.db").read_bytes() == b""
