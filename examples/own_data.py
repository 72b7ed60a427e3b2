"""Your own pictures as an .npz, and the task file that names them.

python examples/own_data.py FOLDER
harness teacher train --task FOLDER/bars.yaml
harness run --task FOLDER/bars.yaml --method ard
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TASK = """
name: bars
version: 1
summary: 8 x 8 pictures of a bar that lies or stands
like: digits
data: {set: npz, path: bars.npz, split_seed: 0, shape: [1, 8, 8], num_classes: 10, held_out: 0.2}
"""


def bars(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [count, 8, 8, 1], and labels [count]: 0 to 4 where the bar lies."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, count)
    pictures = random.integers(0, 40, (count, 8, 8, 1), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        if label < 5:
            picture[label] += 200
        else:
            picture[:, label - 5] += 200
    return pictures, labels


def main(folder: Path) -> Path:
    """Writes pictures and task, and returns the task's file."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, labels = bars(400)
    np.savez(folder / "bars.npz", arr_0=pictures, arr_1=labels)
    task = folder / "bars.yaml"
    task.write_text(TASK)
    return task


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
