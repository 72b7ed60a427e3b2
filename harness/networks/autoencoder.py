"""Autoencoders of latent diffusion from a local folder of diffusers.

A latent is `(z - shift) scaling` for the encoder's z. Each family has its own numbers: scaling
0.18215 (Stable Diffusion), 0.13025 (SDXL), 1.5305 with shift 0.0609 (SD3), 0.3611 with shift 0.1159
(FLUX), 0.41407 (Sana). Qwen-Image's has numbers for each channel, and scaling 1 beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.documents import parse_json, read_text
from harness.errors import UsageError
from harness.files import check_hash
from harness.networks.autoencoder_kinds import KINDS, Kind
from harness.networks.library import diffusers_for

MOST = 4096
"""The largest number of channels, of halvings and of a scale that a config may state."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The file of weights in a folder of diffusers."""


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
        self.kind = kind_of(config)
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
        return self.kind.decode(self.network, z)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1].

        Args:
            noise: standard normal numbers [B, C, h, w] that draw from the posterior; without them
                the latent is its mean. An `AutoencoderDC` has no posterior.
        """
        noise = None if noise is None else noise.to(self.device)
        z = self.kind.encode(self.network, images.to(self.device).float(), noise)
        return (z - self.shift) * self.scaling


def autoencoder_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder. Raises UsageError if it is missing or broken."""
    path = folder / "config.json"
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read; autoencoder.folder should be a folder of diffusers, "
            "with config.json in it"
        ) from error
    name = found.get("_class_name") if isinstance(found, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise UsageError(
            f"{path} is of class {name}, but an autoencoder must be an {', '.join(KINDS)}"
        )
    try:
        sizes = (*channels_of(found), KINDS[name].halvings(found), *stated_scaling(found))
    except (LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{path} does not say the sizes of an {name}: {error}") from error
    if not all(isinstance(size, int | float) and 0 <= size <= MOST for size in sizes):
        raise UsageError(f"{path} states sizes that no {name} has: {', '.join(map(str, sizes))}")
    return found


def kind_of(config: dict[str, Any]) -> Kind:
    """What is special about the class of a config."""
    return KINDS[config["_class_name"]]


def channels_of(config: dict[str, Any]) -> tuple[int, int]:
    """Channels of the latents and of the images, by a config."""
    kind = kind_of(config)
    return config.get(kind.channels, 4), config.get(kind.colours, 3)


def factor_of(config: dict[str, Any]) -> int:
    """Pixels a latent, along each side, by a config."""
    return 2 ** kind_of(config).halvings(config)


def image_shape(config: dict[str, Any], latent: tuple[int, int, int]) -> tuple[int, int, int]:
    """Shape [C, H, W] of the images that latents of a shape [c, h, w] are decoded to.

    Raises UsageError for another number of channels than the autoencoder's.
    """
    channels, height, width = latent
    own, colours = channels_of(config)
    if own != channels:
        raise UsageError(
            f"the task's latents have {channels} channels, but those of its autoencoder have {own}"
        )
    factor = factor_of(config)
    return colours, factor * height, factor * width


def stated_scaling(config: dict[str, Any]) -> tuple[float, float]:
    """Scaling and shift of latents by a config; one without them has its class's."""
    return config.get("scaling_factor") or kind_of(config).scaling, config.get(
        "shift_factor"
    ) or 0.0


def _check_family(folder: Path, config: dict[str, Any], scaling: float, shift: float) -> None:
    """Raises UsageError for other numbers of scaling than those that a config states."""
    by_channel = [config[name] for name in ("latents_mean", "latents_std") if config.get(name)]
    if by_channel and not kind_of(config).by_channel:
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
