"""Transformers in the folders of diffusers: config.json, and weights that fit it exactly.

A folder is a pipeline's, with `model_index.json` and `transformer/`, or a transformer's own. A name
such as `facebook/DiT-XL-2-256` is downloaded from the hub, or found in its cache.

diffusers' DiT is not the official one: its time frequencies and an epsilon differ, by 61 % of the
output at t = 999. So such weights stay a network of diffusers and are not renamed to our DiT's.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.documents import parse_json, read_text
from harness.errors import UsageError, unknown
from harness.files import check_name, inside, read_tensors
from harness.networks.backbones.families import DIT, FAMILIES
from harness.networks.checkpoint_files import read_state_dict
from harness.networks.library import diffusers_for

WEIGHTS = "diffusion_pytorch_model"
"""diffusers' name of a file of weights, without its suffix."""
LEGACY = {"ada_norm_zero": DIT, "ada_norm_single": "PixArtTransformer2DModel"}
"""Classes that were a `Transformer2DModel` with this `norm_type` once."""
GUIDANCE = 3.5
"""The default of FLUX's pipeline for the guidance scale that is an input of the network."""
LATENT_SIDE = 128
"""Side of the latents of pipelines whose transformers take any size: FLUX and Qwen-Image."""
DOWNLOADED = ("model_index.json", "config.json", f"{WEIGHTS}*", "transformer/*", "scheduler/*")


def is_hub_name(source: str) -> bool:
    """Whether a source has the form of a repository's name, `owner/name`, and not of a file's."""
    if source.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors")):
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def transformer_folder(folder: Path) -> Path:
    """The transformer of a pipeline's folder, or the folder itself.

    Raises UsageError if there is no config.json.
    """
    own = folder / "transformer" if (folder / "model_index.json").is_file() else folder
    if not (own / "config.json").is_file():
        raise UsageError(
            f"{own} has no config.json: give a folder that save_pretrained of diffusers wrote"
        )
    return own


def read_config(folder: Path) -> dict[str, Any]:
    """`{backbone: diffusers, class, config}` of a transformer's folder, as a task's `network`.

    A DiT has `source: diffusers` beside, which names the rule of its time frequencies. A network
    that is told its guidance scale has `guidance` beside, at its pipeline's default.

    Raises UsageError for a class that is not supported, and for options that diffusers ignores.
    """
    content = _json(folder / "config.json")
    name = str(content.get("_class_name"))
    legacy = name == "Transformer2DModel" and content.get("norm_type") in LEGACY
    name = LEGACY[content["norm_type"]] if legacy else name
    if name not in FAMILIES:
        raise unknown("class of diffusers", name, FAMILIES, str(folder / "config.json"))
    options = {key: value for key, value in content.items() if not key.startswith("_")}
    known = FAMILIES[name].idle | set(inspect.signature(_class(name).__init__).parameters)
    idle = _defaults("Transformer2DModel") if legacy else {}
    strange = [key for key in options if key not in known and options[key] != idle.get(key)]
    if strange:
        raise UsageError(
            f"{folder / 'config.json'} has {', '.join(strange[:5])}, which {name} of the installed "
            "diffusers does not know: install the version that wrote it"
        )
    config = {key: v for key, v in options.items() if key in known - FAMILIES[name].idle}
    source = {"source": "diffusers"} if name == DIT else {}
    guidance = {"guidance": GUIDANCE} if config.get("guidance_embeds") else {}
    return {"backbone": "diffusers", "class": name, **source, **guidance, "config": config}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a transformer's folder, from all its shards.

    Raises UsageError if files are missing or broken.
    """
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    whole, pickled = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"
    if index.is_file():
        shards = [inside(folder / name, folder) for name in _shards(index)]
        return {name: v for shard in shards for name, v in read_tensors(shard).items()}
    if whole.is_file() or pickled.is_file():
        return read_tensors(whole) if whole.is_file() else read_state_dict(pickled).tensors
    raise UsageError(
        f"{folder} has no {WEIGHTS}.safetensors; its files: "
        f"{', '.join(sorted(path.name for path in folder.iterdir()))}"
    )


def trained_as(folder: Path, network: Mapping[str, Any]) -> tuple[str, str]:
    """Schedule and prediction type of a folder: its scheduler's, or those of the class.

    Args:
        network: the description of the folder's transformer.

    Raises UsageError for a scheduler that is not DDPM's linear one or rectified flow's.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return FAMILIES[network["class"]].trained_as
    config = _json(path)
    flow_match = str(config.get("_class_name", "")).startswith("FlowMatch")
    if flow_match or config.get("prediction_type") == "flow_prediction":
        shift = _flow_shift(config, network)
        return "flow" if shift == 1 else f"flow-{shift:.6g}", "v"
    needed = {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
    }
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise UsageError(
                f"{path} has {key} {config[key]}, but the schedule vp has {value}: "
                "this teacher's schedule is not known"
            )
    types = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
    said = config.get("prediction_type", "epsilon")
    if said not in types:
        raise unknown("prediction_type", said, types, str(path))
    return "vp", types[said]


def _flow_shift(config: Mapping[str, Any], network: Mapping[str, Any]) -> float:
    """The shift of a scheduler's levels; one that depends on the size is that of the largest.

    `shift_terminal` is left out, since it moves the last level of a pipeline and no training.
    """
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", config.get("flow_shift")) or 1.0
    family, sizes = FAMILIES[network["class"]], network["config"]
    patch = family.packed if family.packed > 1 else sizes["patch_size"]
    tokens = (sizes.get("sample_size", LATENT_SIDE) // patch) ** 2
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = least + (most - least) * (tokens - low) / (high - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _class(name: str) -> Any:
    return getattr(diffusers_for(name), name)


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(_class(name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items()}


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists; they lie beside it."""
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(n, str) for n in listed.values()):
        raise UsageError(f"{index} has no weight_map from names to files: download it again")
    return [check_name(name, f"a file in {index}") for name in sorted(set(listed.values()))]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path), finite=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping from names to values")
    return content
