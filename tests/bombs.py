"""Files that attack their reader: small here, and huge, code or a path to who reads them."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

GIGABYTES = 4 * 10**9


class Code:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def zeros(stream: Any, count: int) -> None:
    """Writes so many zeros, a piece at a time."""
    piece = bytes(2**24)
    while count > 0:
        stream.write(piece[:count])
        count -= len(piece)


def npy_header(shape: tuple[int, ...], kind: str) -> bytes:
    made = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(made, header)
    return made.getvalue()


def write_npz(path: Path, arrays: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.save(made, array)
    return made.getvalue()


def packed_zeros(path: Path, name: str, head: bytes, count: int = GIGABYTES) -> Path:
    """An archive of one deflated member: a head, then zeros, a thousandth of its size on the disk.

    A stream of zeros repeats, so it is deflated once for a piece and copied.
    """
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = pack.compress(head) + pack.flush(zlib.Z_FULL_FLUSH)
    piece, pack = bytes(2**24), zlib.compressobj(9, zlib.DEFLATED, -15)
    middle = pack.compress(piece) + pack.flush(zlib.Z_FULL_FLUSH)
    times, size = count // len(piece), len(head) + count // len(piece) * len(piece)
    data = first + middle * times + b"\x03\x00"
    own = name.encode()
    sizes = (0, len(data), size, len(own))
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, *sizes, 0)
    central = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, *sizes, 0, 0, 0, 0, 0, 0)
    start = len(local) + len(own) + len(data)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(central) + len(own), start, 0)
    path.write_bytes(local + own + data + central + own + end)
    return path


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header states a size, with too few pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def laughs(levels: int = 9) -> str:
    """YAML of 400 bytes whose aliases stand for 10^levels values."""
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for level in range(levels - 1):
        inner, outer = chr(97 + level), chr(98 + level)
        lines.append(f"{outer}: &{outer} [{', '.join([f'*{inner}'] * 10)}]")
    return "\n".join(lines)


def repacked(path: Path, to: Path) -> Path:
    """A file of torch.save with its members deflated."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return to


def pickles(folder: Path, mark: Path) -> dict[str, Path]:
    """Checkpoints with code, by how it hides."""
    hidden: dict[str, Callable[[Path], None]] = {
        "whole": lambda path: torch.save(Code(mark), path),
        "beside": lambda path: torch.save(
            {"model": {"a": torch.zeros(1)}, "args": Code(mark)}, path
        ),
        "legacy": lambda path: torch.save(
            {"a": Code(mark)}, path, _use_new_zipfile_serialization=False
        ),
        "bare": lambda path: path.write_bytes(pickle.dumps(Code(mark), 2)) and None,
    }
    found = {}
    for name, write in hidden.items():
        found[name] = folder / f"dit-{name}.pt"
        write(found[name])
    return found
