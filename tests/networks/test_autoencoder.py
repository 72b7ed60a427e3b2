"""The autoencoder is diffusers' own, with the scaling and shift of its family."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import change_config, latents, write_autoencoder
from safetensors.torch import load_file, save_file

from harness.errors import UsageError
from harness.files import file_hash
from harness.networks.autoencoder import (
    WEIGHTS,
    Autoencoder,
    autoencoder_config,
    image_shape,
    stated_scaling,
)

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def opened(entry: dict[str, Any]) -> Autoencoder:
    return Autoencoder(Path(entry["folder"]), entry["sha256"], entry["scaling"], entry["shift"])


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, Any]:
    return write_autoencoder(tmp_path)


def test_it_decodes_and_encodes_as_diffusers_does(entry: dict[str, Any]) -> None:
    """diffusers' pipelines decode `latents / scaling_factor + shift_factor`."""
    from diffusers import AutoencoderKL

    theirs, mine = AutoencoderKL.from_pretrained(entry["folder"]).eval(), opened(entry)
    z = latents(3)
    with torch.no_grad():
        images = theirs.decode(z / 0.5 + 0.25).sample
        assert torch.equal(mine.decode(z), images)
        posterior = theirs.encode(images).latent_dist
    torch.testing.assert_close(mine.encode(images), (posterior.mean - 0.25) * 0.5)
    noise = latents(3, "noise")
    drawn = (posterior.mean + posterior.std * noise - 0.25) * 0.5
    torch.testing.assert_close(mine.encode(images, noise), drawn)
    assert not mine.network.training
    assert not any(parameter.requires_grad for parameter in mine.network.parameters())


def test_the_shape_of_images_follows_from_the_config(entry: dict[str, Any]) -> None:
    config = autoencoder_config(Path(entry["folder"]))
    assert image_shape(config, (4, 4, 4)) == (3, 8, 8)
    assert image_shape({**config, "block_out_channels": [8, 8, 8, 8]}, (4, 32, 32)) == (3, 256, 256)
    with pytest.raises(UsageError, match="have 16 channels, but those of its autoencoder have 4"):
        image_shape(config, (16, 4, 4))


def test_sanas_autoencoder_draws_nothing(tmp_path: Path) -> None:
    """Its pipeline decodes `latents / scaling_factor`; a config without one has 1."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": [8, 8, 8], "decoder_block_out_channels": [8, 8, 8]}
    layers = {"encoder_layers_per_block": [1] * 3, "decoder_layers_per_block": [1] * 3}
    scales = {"encoder_qkv_multiscales": [[]] * 3, "decoder_qkv_multiscales": [[]] * 3}
    kinds = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    AutoencoderDC(
        latent_channels=4, scaling_factor=0.41407, **widths, **layers, **scales, **kinds
    ).save_pretrained(tmp_path)
    theirs = AutoencoderDC.from_pretrained(tmp_path).eval()
    mine, z = Autoencoder(tmp_path, None, 0.41407), latents(3)
    with torch.no_grad():
        images = theirs.decode(z / 0.41407).sample
        assert torch.equal(mine.decode(z), images)
        expected = theirs.encode(images).latent * 0.41407
    assert torch.equal(mine.encode(images), expected)
    assert torch.equal(mine.encode(images, latents(3, "noise")), expected)
    config = autoencoder_config(tmp_path)
    assert image_shape(config, (4, 4, 4)) == tuple(images.shape[1:]) == (3, 16, 16)
    assert stated_scaling(config) == (0.41407, 0)
    assert stated_scaling({**config, "scaling_factor": None}) == (1, 0)


def test_qwen_images_autoencoder_scales_each_channel(tmp_path: Path) -> None:
    """Its pipeline decodes `latents std + mean` as a video of one frame."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    mean, std = torch.linspace(-1, 1, 4), torch.linspace(1, 2, 4)
    AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=mean.tolist(),
        latents_std=std.tolist(),
    ).save_pretrained(tmp_path)
    theirs = AutoencoderKLQwenImage.from_pretrained(tmp_path).eval()
    mine, z = Autoencoder(tmp_path, None, 1.0), latents(3)
    mean, std = (numbers.view(1, 4, 1, 1) for numbers in (mean, std))
    with torch.no_grad():
        images = theirs.decode((z * std + mean).unsqueeze(2)).sample[:, :, 0]
        close(mine.decode(z), images)
        posterior = theirs.encode(images.unsqueeze(2)).latent_dist
    close(mine.encode(images), (posterior.mean[:, :, 0] - mean) / std)
    noise = latents(3, "noise")
    close(
        mine.encode(images, noise),
        (posterior.mean[:, :, 0] + posterior.std[:, :, 0] * noise - mean) / std,
    )
    config = autoencoder_config(tmp_path)
    assert image_shape(config, (4, 4, 4)) == tuple(images.shape[1:]) == (3, 8, 8)
    assert stated_scaling(config) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"_class_name": "VQModel"}, "must be an AutoencoderKL, AutoencoderDC, "),
        ({"scaling_factor": 0.18215}, "autoencoder.scaling is 0.5, but .* says 0.18215"),
        ({"scaling_factor": None}, "autoencoder.scaling is 0.5, but .* says 0.18215"),
        ({"shift_factor": None}, "autoencoder.shift is 0.25, but .* says 0.0"),
        ({"latents_mean": [0.0] * 4}, "scales each channel of latents on its own"),
        ({"layers_per_block": 2}, "do not fit its config.json: missing keys"),
    ],
)
def test_another_config_is_refused(
    changes: dict[str, Any], complaint: str, entry: dict[str, Any]
) -> None:
    change_config(Path(entry["folder"]), **changes)
    with pytest.raises(UsageError, match=complaint):
        opened(entry)


def test_changed_and_missing_weights_are_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    weights = Path(entry["folder"]) / WEIGHTS
    state = load_file(weights)
    state["decoder.conv_in.bias"] += 1
    save_file(state, weights)
    with pytest.raises(UsageError, match=f"but {entry['sha256']} was expected"):
        opened(entry)
    save_file({**state, "more": torch.zeros(1)}, weights)
    with pytest.raises(UsageError, match="unexpected keys more"):
        opened({**entry, "sha256": file_hash(weights)})
    weights.unlink()
    with pytest.raises(UsageError, match="there is no file"):
        opened(entry)
    with pytest.raises(UsageError, match="should be a folder of diffusers"):
        opened({**entry, "folder": str(tmp_path)})
