"""Imported teachers compute what their source computes: the authors' numbers, and diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import DIFFUSERS, folder_of, golden, official, read
from tiny_diffusers import condition_for, direct
from torch import Tensor

from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Denoiser, Guided
from harness.diffusion.schedules import schedule_of
from harness.networks.backbones import Backbone, build
from harness.networks.checkpoints import Teacher, output_size, read_teacher, write_teacher
from harness.networks.fit import load_into
from harness.solvers import DDIM, Euler, sample


def numbers(name: str) -> dict[str, Tensor]:
    """Golden inputs and outputs in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in golden(name).items()}


def written(teacher: Teacher, folder: Path) -> Backbone:
    """The network of the file that the teacher is written to."""
    write_teacher(teacher, folder / "ours.safetensors")
    again = read_teacher(str(folder / "ours.safetensors"))
    network = build(again.network)
    load_into(network, again.weights, "the file")
    return network.requires_grad_(False).eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance


def guided(teacher: Teacher, network: Backbone) -> Guided:
    """The teacher as a task has it, at the authors' scale on three channels."""
    schedule = schedule_of(teacher.schedule)
    denoiser = Denoiser(network.double(), schedule, teacher.prediction_type)
    return Guided(denoiser, 1.5, Conditions(10).null, channels=3)


def test_a_dit_samples_as_its_authors(tmp_path: Path) -> None:
    found, teacher = numbers("dit"), read(official("dit"), tmp_path, kind="dit")
    model = guided(teacher, written(teacher, tmp_path))
    steps = found["io.ddim25_timesteps"].flip(0).double()
    levels = torch.cat([(steps + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    samples = sample(DDIM(), model, found["io.z"], levels, Condition(found["io.labels"]))
    close(samples, found["io.ddim25_w1.5_first3channels"])


def test_a_sit_samples_as_its_authors(tmp_path: Path) -> None:
    """Its time runs the other way, and its network predicts data - noise."""
    found, teacher = numbers("sit"), read(official("sit"), tmp_path, kind="sit")
    network = written(teacher, tmp_path)
    out = network.double()(found["io.x"], 1 - found["io.t"], Condition(found["io.y"]))
    close(-out[:, :4], found["io.out"])
    levels = torch.linspace(1, 0, 11, dtype=torch.float64)
    model = guided(teacher, network)
    samples = sample(Euler(), model, found["io.z"], levels, Condition(found["io.labels"]))
    close(samples, found["io.euler10_w1.5_first3channels"])


def test_a_sit_in_float32(tmp_path: Path) -> None:
    found, teacher = numbers("sit"), read(official("sit"), tmp_path, kind="sit")
    x, time = found["io.x"].float(), 1 - found["io.t"]
    out = written(teacher, tmp_path)(x, time, Condition(found["io.y"]))
    assert out.dtype == torch.float32
    close(-out[:, :4], found["io.out"], 1e-5)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_folder_of_diffusers_has_its_outputs(name: str, tmp_path: Path) -> None:
    """Bit for bit, in float32."""
    source, folder = folder_of(name, tmp_path / "source")
    teacher, cond = read_teacher(str(folder)), condition_for(name, dtype=torch.float32)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.3])
    time = schedule_of(teacher.schedule).network_time(t)
    with torch.no_grad():
        expected = direct(source.eval().requires_grad_(False), x, time, cond)
        found = written(teacher, tmp_path)(x, time, cond)
    assert torch.equal(found, expected)


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Weights that are finite may still overflow."""
    from harness.errors import UsageError

    state = official("dit")
    teacher = read(state, tmp_path, kind="dit")
    assert output_size(teacher) == pytest.approx(1.17, abs=0.2)
    state["final_layer.linear.weight"] = torch.full_like(state["final_layer.linear.weight"], 3e38)
    with pytest.raises(UsageError, match="outputs that are not finite"):
        output_size(read(state, tmp_path, kind="dit"))


@pytest.mark.parametrize("name", DIFFUSERS)
def test_outputs_are_tried_where_classes_suffice(name: str, tmp_path: Path) -> None:
    _, folder = folder_of(name, tmp_path)
    assert (output_size(read_teacher(str(folder))) is None) != name.startswith("DiT")
