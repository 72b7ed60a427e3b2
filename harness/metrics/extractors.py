"""Feature networks of the literature: Inception-v3 under two protocols, and DINOv2.

The weights are a local file or a download.

- `inception`: torch-fidelity's network and resizing, the TensorFlow protocol of most published
  FIDs.
- `inception-clean`: the same network after clean-fid's resizing (Parmar et al. 2022,
  arXiv 2104.11222), which is PIL's bicubic filter with antialiasing, without further rounding.
- `dinov2`: the class token of a DINOv2 vision transformer, for FD-DINOv2 (Stein et al. 2023,
  arXiv 2306.04675). timm resamples the position embedding to 224 pixels with antialiasing; the
  original does not. So compare these numbers with one another, not with published ones.

Images of one channel are repeated to three. A file's SHA-256 is compared before anything reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from harness import ranks
from harness.data.images import to_uint8
from harness.errors import UsageError
from harness.files import file_hash
from harness.networks.checkpoint_files import load_pickled

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2 = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
"""Size of a DINOv2 network by its width."""


class Extractor(ABC):
    """A network from images to features.

    Args:
        weights: the file of weights; None downloads it, or finds it in torch's hub folder.
        sha256: the SHA-256 that the file must have; "" takes any file.

    Attributes:
        metric: the name of the metric on these features.
        need: the parameter through which that metric gets them.
        sha256: SHA-256 of the weights file.
        at_once: pictures that the network sees at once.
    """

    metric: str
    need: str
    at_once = 64

    def __init__(self, weights: Path | None, device: torch.device, sha256: str = ""):
        self.path, self.device = self.fetched() if weights is None else weights, device
        if not self.path.is_file():
            raise UsageError(f"there is no file of weights {self.path}")
        self.sha256 = file_hash(self.path)
        if sha256 and self.sha256 != sha256:
            raise UsageError(
                f"{self.path} has SHA-256 {self.sha256}, but {sha256} was expected: "
                "it is not the file of weights that the task names"
            )
        try:
            self.network = self.build(self.read()).requires_grad_(False).eval().to(device)
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{self.path} holds other weights than {type(self).__name__} needs: {problem}"
            ) from error

    def read(self) -> dict[str, Tensor]:
        """The file's tensors; nothing in it is executed."""
        return load_pickled(self.path)

    def download(self, url: str) -> Path:
        """Downloads a file to torch's hub folder, if it is missing, and returns its path.

        A hash in the file's name is checked. Raises UsageError if the download fails.
        """
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        try:
            with redirect_stdout(stderr):
                torch.hub.load_state_dict_from_url(
                    url, map_location="cpu", check_hash=True, weights_only=True
                )
        except (URLError, OSError) as error:
            raise UsageError(
                f"cannot download {url} ({error}); put the file into {folder}, "
                "or give a local file as NAME=FILE, or as features.file of a task"
            ) from error
        return folder / url.rpartition("/")[2]

    @abstractmethod
    def fetched(self) -> Path:
        """The weights where none are given. Raises UsageError if they cannot be downloaded."""

    @abstractmethod
    def build(self, state: dict[str, Tensor]) -> nn.Module:
        """The network with these weights."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features [n, d] of images [n, 3, H, W], uint8 on the device."""

    def parts(self, images: Tensor) -> dict[str, Tensor]:
        """What the network says of images [n, 3, H, W], uint8 on the device.

        Returns:
            "features" [n, d]; of Inception also "spatial" [n, 2023] and "logits" [n, 1008].
        """
        return {"features": self.features(images)}

    @torch.no_grad()
    def of_pictures(self, batches: Iterable[Tensor]) -> Tensor:
        """Features of pictures, uint8 [B, 1 or 3, H, W] each: float64 [n, d] on the CPU."""

        def features(batch: Tensor) -> Tensor:
            return self.features(batch.expand(-1, 3, -1, -1).to(self.device)).double().cpu()

        return torch.cat(list(ranks.each(features, batches)))

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images [n, 1 or 3, H, W] in [-1, 1], rounded to 8 bits: float64 [n, d]."""
        return self.of_pictures(to_uint8(images).split(self.at_once))


class Inception(Extractor):
    """Inception-v3's 2,048 pooled features.

    `parts` adds what ADM's evaluator takes (Dhariwal and Nichol 2021, arXiv 2105.05233): spatial
    features, the first 7 channels of `Mixed_6d.branch1x1` as [17, 17, 7], and logits without bias.
    """

    metric, need = "fid_inception", "inception"

    def fetched(self) -> Path:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        return self.download(URL_INCEPTION_V3)

    def build(self, state: dict[str, Tensor]) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        return FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(self.path),
        )

    def features(self, images: Tensor) -> Tensor:
        return self.network(images)[0]

    def parts(self, images: Tensor) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        handle = self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
            # Reference files hold the channel last.
            lambda module, args, out: seen.append(out[:, :7].permute(0, 2, 3, 1).flatten(1))
        )
        try:
            features, logits = self.network(images)
        finally:
            handle.remove()
        return {"features": features, "logits": logits, "spatial": seen[0]}


class CleanInception(Inception):
    """The same after clean-fid's resizing."""

    metric, need = "fid_clean", "inception_clean"

    def features(self, images: Tensor) -> Tensor:
        from cleanfid.resize import make_resizer

        resize = make_resizer("PIL", False, "bicubic", (299, 299))
        resized = np.stack([resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()])
        ready = (torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device) - 128) / 128
        # torch-fidelity's network resizes and rounds its input. So a hook feeds the resized images
        # to its first layer.
        handle = self.network.get_submodule("Conv2d_1a_3x3").register_forward_pre_hook(
            lambda module, args: (ready,)
        )
        try:
            return self.network(images)[0]
        finally:
            handle.remove()


class DINOv2(Extractor):
    """The class token of a DINOv2 vision transformer with patches of 14 pixels, at 224 pixels.

    The weights determine the size of the network.
    """

    metric, need = "fd_dinov2", "dinov2"

    def fetched(self) -> Path:
        return self.download(
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
        )

    def build(self, state: dict[str, Tensor]) -> nn.Module:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        size = DINOV2[state["cls_token"].shape[-1]]
        network = timm.create_model(
            f"vit_{size}_patch14_dinov2", img_size=224, num_classes=0, global_pool="token"
        )
        network.load_state_dict(checkpoint_filter_fn(state, network))
        return network

    def features(self, images: Tensor) -> Tensor:
        pictures = [
            Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
            for image in images.permute(0, 2, 3, 1).cpu().numpy()
        ]
        x = (
            torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
            .permute(0, 3, 1, 2)
            .to(self.device)
            / 255
        )
        mean, std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return self.network((x - mean) / std)
