"""CLIPScore: how well samples fit their prompts in CLIP (Hessel et al. 2021, arXiv 2104.08718).

The networks and their preprocessing are open_clip's, an optional library. The weights are a local
file of open_clip's plain CLIP networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from harness.errors import UsageError
from harness.files import read_tensors
from harness.metrics.extractors import Extractor

CONTEXT = 77
"""Tokens that CLIP reads, with those of start and end."""
NAMES = {
    (768, 32, 224): "ViT-B-32",
    (768, 32, 256): "ViT-B-32-256",
    (768, 16, 224): "ViT-B-16",
    (1024, 14, 224): "ViT-L-14",
    (1024, 14, 336): "ViT-L-14-336",
    (1280, 14, 224): "ViT-H-14",
    (1408, 14, 224): "ViT-g-14",
    (1664, 14, 224): "ViT-bigG-14",
}
"""open_clip's names of networks, by width, pixels of a patch's side and pixels of the side."""


def clip_score(images: Tensor, prompts: Tensor) -> float:
    """Mean of max(100 cos, 0) between features of samples and of their prompts.

    The paper weighs with 2.5; 100 is what later work reports.

    Args:
        images, prompts: [n, d] each.
    """
    return float((100 * F.cosine_similarity(images, prompts)).clamp(min=0).mean())


class CLIP(Extractor):
    """A CLIP with exact GELUs, as those that were trained by LAION or on DataComp.

    The weights determine the size of the network.
    """

    metric, need = "clip_score", "clip"
    quick_gelu = False

    def fetched(self) -> Path:
        raise UsageError(
            "CLIPScore downloads nothing: give a local file of weights as clip=FILE, such as the "
            "open_clip_model.safetensors of a repository on the hub"
        )

    def read(self) -> dict[str, Tensor]:
        return read_tensors(self.path) if self.path.suffix == ".safetensors" else super().read()

    def build(self, state: dict[str, Tensor]) -> nn.Module:
        name = _name(state)
        library = _open_clip()
        network, _, self._prepared = library.create_model_and_transforms(
            name, precision="fp32", device="cpu", force_quick_gelu=self.quick_gelu
        )
        network.load_state_dict(state)
        self._tokenize = library.get_tokenizer(name)
        return network

    def features(self, images: Tensor) -> Tensor:
        pictures = [Image.fromarray(x) for x in images.permute(0, 2, 3, 1).cpu().numpy()]
        ready = torch.stack([self._prepared(picture) for picture in pictures]).to(self.device)
        return self.network.encode_image(ready)  # type: ignore[operator]

    @torch.no_grad()
    def of_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Features of prompts, float64 [n, d] on the CPU.

        Raises UsageError for a prompt of more than 77 tokens, which CLIP would cut short.
        """
        found = []
        for start in range(0, len(prompts), self.at_once):
            part = list(prompts[start : start + self.at_once])
            tokens = self._tokenize(part, context_length=CONTEXT + 1)  # padded with zeros
            for prompt, last in zip(part, tokens[:, CONTEXT].tolist(), strict=True):
                if last:
                    raise UsageError(
                        f"prompt {prompt[:60]!r} has more than {CONTEXT} tokens, which CLIP does "
                        "not read: shorten it, or leave clip out of extra_features"
                    )
            ready = tokens[:, :CONTEXT].to(self.device)
            found.append(self.network.encode_text(ready).double().cpu())  # type: ignore[operator]
        return torch.cat(found)


class QuickCLIP(CLIP):
    """A CLIP with quick GELUs, as those of OpenAI, of MetaCLIP and of DFN."""

    quick_gelu = True


def _name(state: dict[str, Tensor]) -> str:
    """open_clip's name of the network that has these weights. Raises KeyError for others."""
    patch, places = state["visual.conv1.weight"], state["visual.positional_embedding"]
    side = patch.shape[-1] * round((len(places) - 1) ** 0.5)
    return NAMES[patch.shape[0], patch.shape[-1], side]


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UsageError(
            "CLIPScore needs open_clip: pip install 'distillation-harness[clip]'"
        ) from error
    return open_clip
