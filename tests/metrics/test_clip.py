"""CLIPScore through a stand-in for open_clip, which has the signatures of the real library."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from harness.errors import UsageError
from harness.files import write_tensors
from harness.metrics.clip import CLIP, QuickCLIP, clip_score
from harness.metrics.evaluator import Evaluator
from harness.tasks import Task

CPU = torch.device("cpu")
TOLD = tuple({"prompt": ("dark", "light")[number % 2]} for number in range(10))
"""A prompt for each digit of the tiny task."""


class Network(nn.Module):
    """Features of images are their mean and the rest to 1, those of texts of their first word."""

    def __init__(self, quick: bool):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 768, 32, 32, bias=False)
        self.visual.positional_embedding = nn.Parameter(torch.zeros(50, 768))
        self.quick, self.scale = quick, nn.Parameter(torch.ones(1))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        assert image.shape[1:] == (3, 224, 224)
        mean = image.mean((1, 2, 3))
        return self.scale * torch.stack([mean, 1 - mean], 1)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        assert text.shape[1] == 77
        light = (text[:, 1] == 2).float()
        return torch.stack([2 * light - 1, 1 - light], 1)


def create_model_and_transforms(
    model_name: str,
    pretrained: str | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    **more: Any,
) -> tuple[nn.Module, Callable, Callable]:
    assert (model_name, pretrained) == ("ViT-B-32", None)

    def prepared(image: Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image.resize((224, 224)))) / 255
        return pixels.permute(2, 0, 1)

    return Network(force_quick_gelu), prepared, prepared


class Tokenizer:
    """A token a word, cut at `context_length`, which keeps the end and pads with zeros."""

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        length = context_length or 77
        found = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in enumerate(texts):
            words = [3 - len(word) % 2 for word in text.split()]
            tokens = [49406, *words, 49407][:length]
            found[row, : len(tokens)] = torch.tensor([*tokens[:-1], 49407])
        return found


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the stand-in's weights; the library is there."""
    library = ModuleType("open_clip")
    library.create_model_and_transforms = create_model_and_transforms  # type: ignore[attr-defined]
    library.get_tokenizer = lambda model_name, context_length=None, **more: Tokenizer()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "open_clip", library)
    path = tmp_path / "open_clip_model.safetensors"
    write_tensors(path, Network(False).state_dict())
    return path


def test_the_score_is_the_papers_with_100() -> None:
    images = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    prompts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert clip_score(images, prompts) == pytest.approx((100 + 100 * math.sqrt(0.5) + 0) / 3)


def test_samples_are_compared_with_their_own_prompts(weights: Path, tiny: Task) -> None:
    """A task of labels stands for one whose prompts are "dark" and "light"."""
    tiny.__dict__["judged_prompts"] = TOLD
    tiny.evaluation_numbers = lambda noise_set: torch.arange(40) % 10  # type: ignore[method-assign]
    clip = CLIP(weights, CPU)
    samples = torch.full((40, 1, 8, 8), -1.0)
    samples[1::2] = 1.0
    samples += 0.05 * torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    evaluator = Evaluator(tiny, lambda k: samples, CPU, [clip])
    right = evaluator.evaluate({0: samples})["clip_score"]
    swapped = evaluator.evaluate({0: samples.roll(1, 0)})["clip_score"]
    assert right.mean > 70 > 10 > swapped.mean
    assert right.identity["features"] == clip.sha256
    assert right.identity["extractor"] == "CLIP"
    features, own = evaluator.extra.of_samples(samples, torch.arange(40) % 10)["clip"]
    cosines = F.cosine_similarity(features, own)
    assert right.mean == pytest.approx(float((100 * cosines).clamp(min=0).mean()))
    assert "clip" not in evaluator.extra.of_samples(samples, None)
    assert evaluator.extra.widths == {}


def test_a_prompt_past_77_tokens_is_refused(weights: Path) -> None:
    clip = CLIP(weights, CPU)
    assert clip.of_prompts(["dark " * 75]).shape == (1, 2)
    with pytest.raises(UsageError, match=r"prompt 'light .*' has more than 77 tokens"):
        clip.of_prompts(["dark", "light " * 76])


def test_a_task_without_words_is_refused(weights: Path, tiny: Task) -> None:
    with pytest.raises(UsageError, match="needs prompts in words, but task tiny has none"):
        Evaluator(tiny, lambda k: torch.zeros(1), CPU, [CLIP(weights, CPU)])


def test_the_activation_follows_the_name(weights: Path) -> None:
    assert not CLIP(weights, CPU).network.quick
    assert QuickCLIP(weights, CPU).network.quick


def test_what_is_missing_is_said(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="CLIPScore downloads nothing"):
        CLIP(None, CPU)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UsageError, match=r"CLIPScore needs open_clip: pip install .*\[clip\]"):
        CLIP(weights, CPU)


def test_other_weights_are_refused(weights: Path) -> None:
    write_tensors(weights, {**Network(False).state_dict(), "text.weight": torch.zeros(1)})
    with pytest.raises(UsageError, match="holds other weights than CLIP needs"):
        CLIP(weights, CPU)
    state = Network(False).state_dict()
    write_tensors(weights, {**state, "visual.positional_embedding": torch.zeros(10, 768)})
    with pytest.raises(UsageError, match="holds other weights than CLIP needs"):
        CLIP(weights, CPU)
