#!/usr/bin/env python3
"""Refuses binary files outside the folders that may hold them.

pre-commit calls it with the names of the changed files.
"""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath

ALLOWED = {
    "harness/tasks/weights": ".safetensors",
    "tests/golden": ".safetensors",
    "results": ".png",
}
EXTENSIONS = {
    ".bin",
    ".ckpt",
    ".db",
    ".egg",
    ".gz",
    ".jpg",
    ".npy",
    ".npz",
    ".onnx",
    ".parquet",
    ".pdf",
    ".pickle",
    ".pkl",
    ".png",
    ".pt",
    ".pth",
    ".pyc",
    ".safetensors",
    ".so",
    ".sqlite",
    ".tar",
    ".whl",
    ".xz",
    ".zip",
}


def allowed(name: str) -> bool:
    """Whether a file of this name, relative to the root of the repository, may be binary."""
    path = PurePosixPath(name)
    return any(
        path.is_relative_to(folder) and path.suffix == suffix for folder, suffix in ALLOWED.items()
    )


def is_binary(path: Path) -> bool:
    """Whether a file is binary by its extension, or holds NUL or invalid UTF-8."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        return True
    return path.suffix.lower() in EXTENSIONS or b"\0" in content


def main(names: list[str]) -> int:
    """Prints a line for each refused file and returns the exit code: 1 if there is one."""
    refused = [name for name in names if not allowed(name) and is_binary(Path(name))]
    places = ", ".join(f"{suffix} in {folder}" for folder, suffix in ALLOWED.items())
    for name in refused:
        print(f"{name} is binary, but may not be: binary files are {places}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
