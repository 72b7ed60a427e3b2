"""Teachers from others: every wrapping of the official files, folders of diffusers, refusals.

The weights are those of `tests/golden`, written in the formats that people have.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import golden, official, read, same, wrapped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.errors import UsageError
from harness.networks.backbones.dit import DiT
from harness.networks.checkpoints import kind_of, read_teacher, write_teacher
from harness.networks.fit import load_into

ARGS = argparse.Namespace(model="DiT-tiny/2", num_heads=4, image_size=128, num_classes=10)
SIZES = {
    "depth": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "patch_size": 2,
    "image_size": 16,
    "in_channels": 4,
    "num_classes": 10,
    "learn_sigma": True,
}


def shifted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same shapes."""
    return {name: value + 1 for name, value in state.items()}


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torch's AveragedModel of a compiled network in DistributedDataParallel keeps it."""
    return {"n_averaged": torch.tensor(7), **wrapped(state, "module.module._orig_mod.")}


def compiled_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a network has it whose blocks went through torch.compile one by one."""
    return {
        ".".join([*name.split(".")[:2], "_orig_mod", *name.split(".")[2:]])
        if name.startswith("blocks.")
        else name: value
        for name, value in state.items()
    }


def checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """What DiT's train.py writes, its averaged weights under `ema`."""
    steps = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
    return {"model": shifted(state), "ema": state, "opt": steps, "args": ARGS}


WRAPPINGS = {
    "plain": (lambda state: state, "the whole file", None),
    "train.py": (checkpoint, "ema", None),
    "model alone": (lambda state: {"model": state, "args": ARGS}, "model", None),
    "state_dict": (lambda state: {"epoch": 3, "state_dict": state}, "state_dict", None),
    "nested": (lambda state: {"model": {"state_dict": state}}, "model.state_dict", None),
    "DDP": (lambda state: {"model": wrapped(state, "module.")}, "model", "module."),
    "script": (lambda state: wrapped(state, "model."), "the whole file", "model."),
    "compiled": (lambda state: wrapped(state, "_orig_mod."), "the whole file", "_orig_mod."),
    "compiled blocks": (compiled_blocks, "the whole file", "_orig_mod."),
    "averaged": (
        lambda state: {"ema": averaged(state), "model": shifted(state)},
        "ema",
        "_orig_mod., module., module.",
    ),
}


def refusal(content: Any, folder: Path, name: str = "DiT.pt", **options: Any) -> str:
    """The error for a file, one sentence on one line."""
    with pytest.raises(UsageError) as error:
        read(content, folder, name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_come_off(wrapping: str, tmp_path: Path) -> None:
    wrap, taken, prefixes = WRAPPINGS[wrapping]
    teacher = read(wrap(official()), tmp_path)
    assert same(teacher.weights, official())
    assert teacher.network == SIZES
    assert (teacher.schedule, teacher.prediction_type) == ("vp", "eps")
    assert teacher.facts["taken"] == taken
    assert teacher.facts.get("prefixes taken off") == prefixes
    assert (teacher.shape, teacher.num_classes) == ((4, 16, 16), 10)


def test_an_old_file_of_torch_is_read(tmp_path: Path) -> None:
    """One that is no zip archive, with a Namespace in it."""
    path = tmp_path / "DiT.pt"
    torch.save(checkpoint(official()), path, _use_new_zipfile_serialization=False)
    assert same(read_teacher(str(path)).weights, official())


def test_safetensors_of_others_are_read(tmp_path: Path) -> None:
    save_file(wrapped(official(), "module."), tmp_path / "DiT.safetensors")
    teacher = read_teacher(str(tmp_path / "DiT.safetensors"), num_heads=4)
    assert same(teacher.weights, official())


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-10), (False, 1e-5)])
def test_an_imported_dit_has_the_authors_output(
    double: bool, tolerance: float, tmp_path: Path
) -> None:
    """In float32 the inputs of the time embedding's network are taken in float64.

    A float32 cosine of 999 differs between CPUs.
    """
    teacher, numbers = read(checkpoint(official()), tmp_path), golden("dit")
    write_teacher(teacher, tmp_path / "teacher.safetensors")
    network = DiT(**teacher.network).requires_grad_(False)
    load_into(network, load_file(tmp_path / "teacher.safetensors"), "the file")
    network = network.double() if double else network
    x = numbers["io.x"].to(next(network.parameters()).dtype)
    found = network(x, numbers["io.t"].double(), Condition(numbers["io.y"]))
    error = (found.double() - numbers["io.out"]).abs().max() / numbers["io.out"].abs().max()
    assert float(error) < tolerance


def test_a_sit_is_told_from_its_options(tmp_path: Path) -> None:
    args = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity")
    teacher = read({"ema": official("sit"), "args": args}, tmp_path, "0400000.pt")
    assert teacher.network == {"convention": "sit", **SIZES}
    assert (teacher.schedule, teacher.prediction_type) == ("flow", "v")
    assert same(teacher.weights, official("sit"))
    assert teacher.facts["kind"] == "sit, by the model in its options"


def test_a_sit_of_another_path_is_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(model="SiT-XL/2", path_type="GVP", prediction="velocity")
    text = refusal({"ema": official("sit"), "args": args}, tmp_path)
    assert "trained with path_type GVP" in text


@pytest.mark.parametrize(("model", "kind"), [("SiT-XL/2", "dit"), ("DiT-XL/2", "sit")])
def test_a_kind_that_the_files_options_deny_is_refused(
    model: str, kind: str, tmp_path: Path
) -> None:
    content = {"ema": official(), "args": argparse.Namespace(model=model)}
    text = refusal(content, tmp_path, "0400000.pt", kind=kind)
    assert f"--kind is {kind}, but" in text
    assert f"was trained as {model}" in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [("SiT-XL-2-256.pt", "sit"), ("DiT-XL-2-256x256.pt", "dit"), ("my-dit.pt", "dit")],
)
def test_the_name_of_a_file_tells_its_kind(name: str, kind: str) -> None:
    assert kind_of(Path("dit-or-sit") / name, {}) == (kind, "by the name of the file")


@pytest.mark.parametrize("name", ["0400000.pt", "edit.pt", "site.pt", "sit-from-dit.pt"])
def test_a_kind_that_nothing_tells_is_asked_for(name: str, tmp_path: Path) -> None:
    assert "give --kind dit or --kind sit" in refusal(official(), tmp_path, name)
    assert read(official(), tmp_path, name, kind="sit").schedule == "flow"


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    torch.save(official(), tmp_path / "DiT.pt")
    with pytest.raises(UsageError, match=r"width 48.*give --num-heads"):
        read_teacher(str(tmp_path / "DiT.pt"))
    with pytest.raises(UsageError, match="5 attention heads do not divide"):
        read_teacher(str(tmp_path / "DiT.pt"), num_heads=5)


def test_heads_are_those_of_the_model_that_was_trained(tmp_path: Path) -> None:
    """Of a known model by its name; an unknown name tells nothing."""
    for model, heads in (("SiT-L/2", 16), ("DiT-S/2", 6)):
        args = argparse.Namespace(model=model)
        torch.save({"ema": official(), "args": args}, tmp_path / "0.pt")
        assert read_teacher(str(tmp_path / "0.pt")).network["num_heads"] == heads
    torch.save({"ema": official(), "args": argparse.Namespace(model="DiT-my/2")}, tmp_path / "0.pt")
    with pytest.raises(UsageError, match="give --num-heads"):
        read_teacher(str(tmp_path / "0.pt"))


def test_sizes_of_the_paper_have_names(tmp_path: Path) -> None:
    """DiT-S/2 on a grid of 2 x 3 patches, in half precision, which is kept."""
    with torch.device("meta"):
        network = DiT((4, 6), in_channels=3, depth=12, hidden_size=384, num_heads=6, patch_size=2)
    state = {k: torch.zeros(v.shape, dtype=torch.half) for k, v in network.state_dict().items()}
    state["pos_embed"] = DiT((4, 6), 2, 3, 384, 0, 6).pos_embed.half()
    torch.save(state, tmp_path / "DiT.pt")
    teacher = read_teacher(str(tmp_path / "DiT.pt"))
    assert teacher.network == {"size": "DiT-S/2", "image_size": [4, 6], "in_channels": 3}
    assert teacher.shape == (3, 4, 6)
    write_teacher(teacher, tmp_path / "ours.safetensors")
    again = read_teacher(str(tmp_path / "ours.safetensors"))
    assert again.network == teacher.network
    assert again.weights["pos_embed"].dtype == torch.half


def test_an_own_file_says_what_it_holds(tmp_path: Path) -> None:
    teacher = read(official("sit"), tmp_path, kind="sit")
    write_teacher(teacher, tmp_path / "any.safetensors")
    again = read_teacher(str(tmp_path / "any.safetensors"))
    assert (again.network, again.schedule, again.prediction_type) == (
        teacher.network,
        teacher.schedule,
        teacher.prediction_type,
    )
    assert same(again.weights, teacher.weights)
    with pytest.raises(UsageError, match="leave --kind out"):
        read_teacher(str(tmp_path / "any.safetensors"), kind="dit")


def test_a_student_is_no_teacher(tmp_path: Path) -> None:
    """Its tensors may be those of a teacher: what it is says only its metadata."""
    path = tmp_path / "DiT.safetensors"
    save_file(official(), path, {"run_id": "ard-4-0123456789", "student": "{}"})
    with pytest.raises(UsageError, match="is a student of this harness, not a teacher"):
        read_teacher(str(path), "dit", 4)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = official()
    for name in [name for name in state if name.startswith("blocks.0.attn")]:
        del state[name]
    state["blocks.1.attn.q_norm.weight"] = torch.ones(12)
    state["t_embedder.mlp.0.weight"] = torch.ones(48, 128)
    text = refusal(state, tmp_path)
    assert "missing: blocks.0.attn.qkv.weight, blocks.0.attn.qkv.bias" in text
    assert "unexpected: blocks.1.attn.q_norm.weight" in text
    assert "misshapen: t_embedder.mlp.0.weight [48, 128] in place of [48, 256]" in text
    assert "normalises queries and keys" in text


def test_at_most_five_names_of_a_kind_are_shown(tmp_path: Path) -> None:
    state = {k: v for k, v in official().items() if not k.startswith("blocks.0.") or "fc1" in k}
    text = refusal(state, tmp_path)
    assert text.count("blocks.0.") == 5
    assert "and 3 more" in text
    assert "a part of a larger file" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"blocks.0.attn.qkv.lora_A.weight": torch.ones(2)}, "LoRA factors"),
        (
            {"decoder.conv_in.bias": torch.ones(2), "encoder.down_blocks.0.b": torch.ones(2)},
            "autoenc",
        ),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(2)}, "a U-Net"),
        ({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2)}, "give the folder"),
        ({"state": {}, "param_groups": []}, "the state of an optimizer"),
        ({"weights": {"a": torch.ones(2)}, "step": 3}, "no network under ema, model, state_dict"),
        ([torch.ones(2)], "holds a list"),
        ({}, "holds a dict"),
        ({"module.a": torch.ones(2), "a": torch.ones(2)}, "is not a DiT's state dict"),
        ({"_orig_mod.a": torch.ones(2), "a": torch.ones(2)}, "two networks"),
    ],
)
def test_other_files_are_refused_with_a_reason(content: Any, words: str, tmp_path: Path) -> None:
    assert words in refusal(content, tmp_path)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"ema": {}, "args": argparse.Namespace(path=Path("x"))}, "pathlib.PosixPath"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_not_unpickled(content: Any, name: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "DiT.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=f"holds a pickled {name}"):
        read_teacher(str(path))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(UsageError, match="holds a pickled"):
        read({"ema": official(), "args": Trap()}, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [pickle.dumps({"a": torch.ones(2)}), b"hello", b"", b"PK\3\4x"])
def test_broken_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "DiT.pt").write_bytes(content)
    with pytest.raises(UsageError, match=r"not a file that torch\.save wrote"):
        read_teacher(str(tmp_path / "DiT.pt"))


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "DiT.pt"
    torch.save(official(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match="or it is broken"):
        read_teacher(str(path))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = official()
    state["t_embedder.mlp.0.bias"][0] = torch.nan
    assert "not finite: t_embedder.mlp.0.bias" in refusal(state, tmp_path)


def test_a_network_without_null_class_is_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(num_heads=4, num_classes=11)
    assert "no null class" in refusal({"ema": official(), "args": args}, tmp_path)


def test_positions_that_are_not_dits_are_refused(tmp_path: Path) -> None:
    state = official()
    state["pos_embed"] = state["pos_embed"] * 2
    assert "not DiT's fixed sines" in refusal(state, tmp_path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file weights/DiT"):
        read_teacher("weights/DiT.pt")  # no repository on the hub
    with pytest.raises(UsageError, match="there is no file"):
        read_teacher(str(tmp_path / "DiT.pt"))
