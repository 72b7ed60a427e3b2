"""A student's adapters as a LoRA file for its teacher's transformer of diffusers.

The file has the name and the keys that diffusers' pipelines load. It holds low-rank changes of the
teacher's weights and nothing else, so a student that has more is refused.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from harness.errors import UsageError
from harness.files import write_tensors
from harness.methods import Method
from harness.networks.adapters import adapter_weights, merged
from harness.networks.backbones import Backbone
from harness.networks.history import History
from harness.runs.diffusers_folder import prediction_type
from harness.runs.resolve import CPU, Resolved

NAME = "pytorch_lora_weights.safetensors"
"""The name by which a pipeline of diffusers finds the file in a folder."""


def write_lora(method: Method, resolved: Resolved, run_id: str, folder: Path) -> None:
    """Writes the adapters of a student to `NAME`.

    A layer's keys are `transformer.<layer>.lora_A.weight` [rank, inputs] and `.lora_B.weight`
    [outputs, rank]. The layer has diffusers' name, and B holds the factor `alpha / rank`.

    Raises UsageError for a network that is not diffusers', and for a student that differs from its
    teacher in more than adapters.
    """
    network = method.sampled_network
    if resolved.task.network_options.get("backbone") != "diffusers":
        raise UsageError(
            "a LoRA file is for a transformer of diffusers, but the teacher of task "
            f"{resolved.task.spec.name} is none: give --format safetensors"
        )
    prediction_type(resolved)
    _refuse_more(network, resolved)
    named = {
        f"transformer.{name.removeprefix('model.')}": weight  # the backbone's name for it
        for name, weight in adapter_weights(network).items()
    }
    write_tensors(folder / NAME, named, {"format": "pt", "run_id": run_id})


def _refuse_more(network: nn.Module, resolved: Resolved) -> None:
    """Raises UsageError for a student that differs from its teacher in more than adapters."""
    plain = merged(network)
    assert isinstance(plain, Backbone)
    teacher = resolved.task.teacher(CPU).denoiser.network
    more = sorted(plain.added_weights(teacher.state_dict()))
    if isinstance(plain, History) and plain.history_layers and resolved.num_steps > 1:
        more = ["history"]
    if more:
        raise UsageError(
            f"the student has {', '.join(more[:3])}, which its teacher lacks and a LoRA file "
            "cannot hold: give --format safetensors"
        )
