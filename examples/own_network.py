"""A network of your own as a teacher: train it anywhere, save it, and make a task of it.

    python examples/own_network.py FOLDER
    harness run --task FOLDER/mine.yaml --method ard

Here it is a small DiT without training, where yours would come from your own loop. Data and
features are those of the task `digits`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from harness.networks.backbones.dit import DiT


def network() -> DiT:
    """A DiT of 2 layers for 8 x 8 digits; it predicts eps, as the official one does."""
    torch.manual_seed(0)
    return DiT(
        image_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=10,
    )


def main(folder: Path) -> Path:
    """Writes the checkpoint and a task whose teacher it is, and returns the task's file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"ema": network().state_dict()}, folder / "mine.pt")
    words = "task new mine --set digits --teacher mine.pt --kind dit --num-heads 2"
    subprocess.run([sys.executable, "-m", "harness", *words.split()], cwd=folder, check=True)
    return folder / "mine.yaml"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
