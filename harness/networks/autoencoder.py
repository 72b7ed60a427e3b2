"""Autoencoders of latent diffusion from a local folder of diffusers.

`AutoencoderKL`: Rombach et al. 2022, arXiv 2112.10752. `AutoencoderDC`, which Sana has and which
draws nothing: Chen et al. 2024, arXiv 2410.10733. A latent is `(z - shift) scaling` for the
encoder's z. Each family has its own numbers: scaling 0.18215 (Stable Diffusion), 0.13025 (SDXL),
1.5305 with shift 0.0609 (SD3), 0.3611 with shift 0.1159 (FLUX), 0.41407 (Sana).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UsageError
from harness.files import check_hash
from harness.networks.library import diffusers_for

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The file of weights in a folder of diffusers."""


@dataclass(frozen=True)
class Kind:
    """What differs between classes of autoencoders.

    Attributes:
        blocks: the option whose length tells how often images are halved.
        scaling: scaling where a config states none, the class's default.
        latent: z of what `encode` returns, drawn with standard normal noise where there is any.
    """

    blocks: str
    scaling: float
    latent: Callable[[Any, Tensor | None], Tensor]


def _drawn(encoded: Any, noise: Tensor | None) -> Tensor:
    posterior = encoded.latent_dist
    return posterior.mean if noise is None else posterior.mean + posterior.std * noise


KINDS = {
    "AutoencoderKL": Kind("block_out_channels", 0.18215, _drawn),
    "AutoencoderDC": Kind("encoder_block_out_channels", 1.0, lambda encoded, noise: encoded.latent),
}
"""Classes of autoencoders by name."""


class Autoencoder:
    """An autoencoder with frozen weights.

    Args:
        folder: holds `config.json` and `diffusion_pytorch_model.safetensors`.
        sha256: SHA-256 of the weights; None takes any.
        scaling, shift: a latent is (z - shift) x scaling for the encoder's z.

    Raises UsageError for a folder that is missing, changed, of another class or family, and where
    diffusers is not installed.
    """

    def __init__(
        self,
        folder: Path,
        sha256: str | None,
        scaling: float,
        shift: float = 0.0,
        device: torch.device | None = None,
    ):
        self.scaling, self.shift = scaling, shift
        self.device = device or torch.device("cpu")
        config = autoencoder_config(folder)
        self.kind = KINDS[config["_class_name"]]
        _check_family(folder, config, scaling, shift)
        check_hash(folder / WEIGHTS, sha256)
        self.network = (
            _loaded(folder, config["_class_name"])
            .float()
            .requires_grad_(False)
            .eval()
            .to(self.device)
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about in [-1, 1] and not clamped, of latents [B, C, h, w]."""
        z = latents.to(self.device).float() / self.scaling + self.shift
        return self.network.decode(z).sample

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1].

        Args:
            noise: standard normal numbers [B, C, h, w] that draw from the posterior; without them
                the latent is its mean. An `AutoencoderDC` has no posterior.
        """
        encoded = self.network.encode(images.to(self.device).float())
        z = self.kind.latent(encoded, None if noise is None else noise.to(self.device))
        return (z - self.shift) * self.scaling


def autoencoder_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder. Raises UsageError if it is missing or broken."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read; autoencoder.folder should be a folder of diffusers, "
            "with config.json in it"
        ) from error
    name = found.get("_class_name") if isinstance(found, dict) else None
    if name not in KINDS:
        raise UsageError(
            f"{path} is of class {name}, but an autoencoder must be an {' or '.join(KINDS)}"
        )
    return found


def factor_of(config: dict[str, Any]) -> int:
    """Pixels a latent, along each side, by a config."""
    return 2 ** (len(config.get(KINDS[config["_class_name"]].blocks, [64])) - 1)


def image_shape(config: dict[str, Any], latent: tuple[int, int, int]) -> tuple[int, int, int]:
    """Shape [C, H, W] of the images that latents of a shape [c, h, w] are decoded to.

    Raises UsageError for another number of channels than the autoencoder's.
    """
    channels, height, width = latent
    if (own := config.get("latent_channels", 4)) != channels:
        raise UsageError(
            f"the task's latents have {channels} channels, but those of its autoencoder have {own}"
        )
    factor, colours = factor_of(config), config.get("out_channels", config.get("in_channels", 3))
    return colours, factor * height, factor * width


def stated_scaling(config: dict[str, Any]) -> tuple[float, float]:
    """Scaling and shift of latents by a config; one without them has its class's."""
    plain = KINDS[config["_class_name"]].scaling
    return config.get("scaling_factor") or plain, config.get("shift_factor") or 0.0


def _check_family(folder: Path, config: dict[str, Any], scaling: float, shift: float) -> None:
    """Raises UsageError for other numbers of scaling than those that a config states."""
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UsageError(
            f"{folder / 'config.json'} scales each channel of latents on its own, "
            "which tasks cannot state: use an autoencoder with scaling_factor alone"
        )
    numbers = zip(("scaling", "shift"), (scaling, shift), stated_scaling(config), strict=True)
    for name, mine, stated in numbers:
        if abs(stated - mine) > 1e-6:
            raise UsageError(
                f"autoencoder.{name} is {mine}, but {folder / 'config.json'} says {stated}"
            )


def _loaded(folder: Path, name: str) -> Any:
    """The network of a folder. Raises UsageError if weights and config differ."""
    library = diffusers_for("an autoencoder")
    try:
        network, info = getattr(library, name).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise UsageError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
    # from_pretrained is not strict: it leaves missing weights empty.
    wrong = [
        f"{kind.replace('_', ' ')} {', '.join(sorted(map(str, keys))[:5])}"
        for kind, keys in info.items()
        if keys
    ]
    if wrong:
        raise UsageError(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong)}")
    return network
