"""What differs between the classes of autoencoders of diffusers, as declarations.

`AutoencoderKL`: Rombach et al. 2022, arXiv 2112.10752. `AutoencoderDC`, of Sana: Chen et al. 2024,
arXiv 2410.10733. `AutoencoderKLQwenImage` is for videos, and an image is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def drawn(posterior: Any, noise: Tensor | None) -> Tensor:
    """The mean of a posterior, or what standard normal noise of the mean's shape draws from it."""
    return posterior.mean if noise is None else posterior.mean + posterior.std * noise


def _encode_kl(network: Any, images: Tensor, noise: Tensor | None) -> Tensor:
    return drawn(network.encode(images).latent_dist, noise)


def _encode_dc(network: Any, images: Tensor, noise: Tensor | None) -> Tensor:
    return network.encode(images).latent


def _decode(network: Any, z: Tensor) -> Tensor:
    return network.decode(z).sample


def _by_channel(network: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel [1, C, 1, 1] by an autoencoder's config."""
    numbers = (network.config.latents_mean, network.config.latents_std)
    return tuple(z.new_tensor(part).view(1, -1, 1, 1) for part in numbers)  # type: ignore[return-value]


def _encode_qwen(network: Any, images: Tensor, noise: Tensor | None) -> Tensor:
    posterior = network.encode(images.unsqueeze(2)).latent_dist
    z = drawn(posterior, None if noise is None else noise.unsqueeze(2)).squeeze(2)
    mean, std = _by_channel(network, z)
    return (z - mean) / std


def _decode_qwen(network: Any, z: Tensor) -> Tensor:
    mean, std = _by_channel(network, z)
    return network.decode((z * std + mean).unsqueeze(2)).sample.squeeze(2)


@dataclass(frozen=True)
class Kind:
    """A class of autoencoders.

    Attributes:
        halvings: how often images are halved, from the config.
        encode: z [B, C, h, w] of images [B, 3, H, W]; noise [B, C, h, w] draws it, where the class
            has a posterior.
        decode: images of z.
        scaling: scaling where a config states none.
        channels: the option that is the number of latent channels.
        colours: the option that is the number of channels of images.
        by_channel: whether z has each channel's mean and standard deviation taken off already.
    """

    halvings: Callable[[Mapping[str, Any]], int]
    encode: Callable[[Any, Tensor, Tensor | None], Tensor]
    decode: Callable[[Any, Tensor], Tensor] = _decode
    scaling: float = 1.0
    channels: str = "latent_channels"
    colours: str = "in_channels"
    by_channel: bool = False


KINDS = {
    "AutoencoderKL": Kind(
        lambda config: len(config.get("block_out_channels", [64])) - 1, _encode_kl, scaling=0.18215
    ),
    "AutoencoderDC": Kind(lambda config: len(config["encoder_block_out_channels"]) - 1, _encode_dc),
    "AutoencoderKLQwenImage": Kind(
        lambda config: len(config["temperal_downsample"]),
        _encode_qwen,
        _decode_qwen,
        channels="z_dim",
        colours="input_channels",
        by_channel=True,
    ),
}
"""Classes of autoencoders by name."""
