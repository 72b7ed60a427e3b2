"""Folders of diffusers: read strictly, kept as networks of diffusers, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foreign import DIFFUSERS, folder_of, plain, same, wrapped

from harness.errors import UsageError
from harness.networks.checkpoints import read_teacher, write_teacher
from harness.networks.fit import load_into
from harness.networks.said import check_said


@pytest.mark.parametrize("name", DIFFUSERS)
def test_folders_of_diffusers_stay_theirs(name: str, tmp_path: Path) -> None:
    network, folder = folder_of(name, tmp_path)
    teacher = read_teacher(str(folder))
    assert teacher.network["backbone"] == "diffusers"
    assert teacher.network["class"] == name
    assert ("source" in teacher.network) == name.startswith("DiT")
    assert not any(key.startswith("_") for key in teacher.network["config"])
    assert same(teacher.weights, wrapped(network.state_dict(), "model."))
    again = type(network).from_config(teacher.network["config"])
    load_into(again, plain(teacher), "the file")
    kind = ("vp", "eps") if name.startswith(("DiT", "PixArt")) else ("flow", "v")
    assert (teacher.schedule, teacher.prediction_type) == kind
    any_size = name.startswith(("Flux", "Qwen"))
    assert teacher.shape == ((4, 0, 0) if any_size else (4, 8, 8))
    assert teacher.network.get("guidance") == (3.5 if name.startswith("Flux") else None)
    assert teacher.num_classes == (10 if name.startswith("DiT") else 0)
    write_teacher(teacher, tmp_path / "ours.safetensors")
    assert read_teacher(str(tmp_path / "ours.safetensors")).network == teacher.network


def test_the_file_says_the_config_but_not_the_source(tmp_path: Path) -> None:
    """Whether weights were converted from official ones is the task's to say."""
    _, folder = folder_of("DiTTransformer2DModel", tmp_path)
    teacher, path = read_teacher(str(folder)), tmp_path / "ours.safetensors"
    write_teacher(teacher, path)
    network = teacher.network
    check_said(path, {**network, "source": "official"}, "vp", "eps")
    short = {k: v for k, v in network["config"].items() if k != "num_layers"}
    check_said(path, {**network, "config": {**short, "num_layers": 2}}, "vp", "eps")
    with pytest.raises(UsageError, match=r"num_layers 2 in place of 28, schedule vp in place of "):
        check_said(path, {**network, "config": short}, "flow", "eps")


def pipeline(folder: Path, **scheduler: Any) -> Path:
    """A DiTPipeline's folder as far as a teacher needs it."""
    folder_of("DiTTransformer2DModel", folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    (folder / "scheduler").mkdir()
    content = {"_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content | scheduler))
    return folder


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        ({}, ("vp", "eps")),
        ({"rescale_betas_zero_snr": False, "trained_betas": None}, ("vp", "eps")),
        ({"prediction_type": "v_prediction"}, ("vp", "v")),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, ("flow", "v")),
    ],
)
def test_a_pipeline_says_how_it_was_trained(
    scheduler: dict[str, Any], kind: tuple[str, str], tmp_path: Path
) -> None:
    teacher = read_teacher(str(pipeline(tmp_path, **scheduler)))
    assert (teacher.schedule, teacher.prediction_type) == kind


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule scaled_linear"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ],
)
def test_another_noise_schedule_is_refused(
    scheduler: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"scheduler_config.json has {words}"):
        read_teacher(str(pipeline(tmp_path, **scheduler)))


def test_shards_and_pickled_folders_are_read(tmp_path: Path) -> None:
    network, _ = folder_of("DiTTransformer2DModel", tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same(plain(read_teacher(str(tmp_path / "shards"))), network.state_dict())
    folder_of("DiTTransformer2DModel", tmp_path / "bin", safe_serialization=False)
    assert same(plain(read_teacher(str(tmp_path / "bin"))), network.state_dict())


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("DiTTransformer2DModel", {"_class_name": "Transformer2DModel", "num_vector_embeds": None}),
        ("PixArtTransformer2DModel", {"_class_name": "Transformer2DModel", "upcast_attention": 0}),
        ("QwenImageTransformer2DModel", {"pooled_projection_dim": 768}),
    ],
)
def test_configs_of_earlier_versions_are_read(
    name: str, old: dict[str, Any], tmp_path: Path
) -> None:
    """DiT and PixArt were one class, and Qwen-Image had an option without effect."""
    _, folder = folder_of(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    new = read_teacher(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, **old}))
    assert read_teacher(str(folder)).network == new.network


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 3}, "missing: transformer_blocks.2"),
        ({"num_layers": 1}, "unexpected: transformer_blocks.1"),
        ({"num_embeds_ada_norm": 9}, "misshapen: transformer_blocks.0.norm1.emb.class_embedder"),
        ({"rotary": True}, "has rotary, which DiTTransformer2DModel"),
        ({"_class_name": "UNet2DModel"}, "unknown class of diffusers 'UNet2DModel'"),
    ],
)
def test_folders_that_diffusers_would_load_with_a_warning_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _, folder = folder_of("DiTTransformer2DModel", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError) as error:
        read_teacher(str(folder))
    assert words in str(error.value)


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        read_teacher(str(tmp_path))
    _, folder = folder_of("DiTTransformer2DModel", tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(UsageError, match=r"its files: config\.json, model\.fp16\.safetensors"):
        read_teacher(str(folder))


def test_the_hub_is_asked_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline a name is found in the hub's cache, or refused in one sentence."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="some/dit is neither a file nor a folder here, nor in"):
        read_teacher("some/dit")
    cached = tmp_path / "models--some--dit"
    folder_of("DiTTransformer2DModel", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    teacher = read_teacher("some/dit")
    assert teacher.facts["source"] == "some/dit on the hub"
    assert teacher.num_classes == 10


def test_what_the_hub_does_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that answers is no network that is away."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    class Missing(RepositoryNotFoundError):
        def __init__(self) -> None:
            """The original's asks for a response of the library for HTTP."""

        def __str__(self) -> str:
            return "404 Client Error.\n\nMore text"

    def missing(*args: Any, **options: Any) -> None:
        raise Missing

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(UsageError, match=r"the hub has no some/dit for you: 404 Client Error\.$"):
        read_teacher("some/dit")
