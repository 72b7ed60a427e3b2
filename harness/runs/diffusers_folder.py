"""A student as a folder of diffusers: its DiT, and a pipeline of a few lines that samples it.

diffusers' DiT equals the official one, whose keys ours has, under two changes: `norm_eps` 1e-6,
which its config says, and time frequencies that divide by half (`downscale_freq_shift` 0), which
`pipeline.py` sets. Only what this holds exactly is written: the samples are compared.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UsageError
from harness.files import write_text
from harness.methods import Method
from harness.networks.adapters import merged
from harness.networks.library import diffusers_for
from harness.runs.resolve import Resolved
from harness.solvers import sample

LAYERS = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
"""Layers of a block: the official names and those of diffusers."""
EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
}
"""Layers that diffusers has in every block."""
OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
"""Layers outside of the blocks: diffusers' names and the official ones."""
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PIPELINE = Path(__file__).with_name("pipeline.py")
COMPARED, TOLERANCE = 4, 1e-4
"""Samples that are compared in float64, and the largest difference that counts as rounding.

diffusers rounds time embeddings to float32, and an eps network's x_0 carries 157 times an error.
"""


def write_folder(method: Method, resolved: Resolved, folder: Path) -> None:
    """Writes `model_index.json`, `pipeline.py` and `transformer/`.

    Raises UsageError without diffusers, and for a student that a plain DiT under DDIM's or
    consistency's steps does not equal.
    """
    diffusers_for("--format diffusers")
    from harness.runs.pipeline import StudentPipeline

    network = merged(method.sampled_network)
    transformer = converted(network, resolved)
    index = {
        "steps": steps_of(method, resolved),
        "prediction_type": prediction_type(resolved),
        "stochastic": method.solver.stochastic,
        "positions": rounded_to(network, transformer),
    }
    off = difference(
        method, resolved, StudentPipeline(copy.deepcopy(transformer).double(), **index)
    )
    if not off <= TOLERANCE:
        raise UsageError(
            f"a plain DiT under the pipeline's steps gives other samples than this student "
            f"(by {off:.2g}), which has more, such as history: give --format safetensors"
        )
    transformer.save_pretrained(folder / "transformer")
    write_text(folder / "pipeline.py", PIPELINE.read_text(encoding="utf-8"))
    classes = {
        "_class_name": ["pipeline", "StudentPipeline"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
    }
    write_text(folder / "model_index.json", json.dumps({**classes, **index}, indent=1) + "\n")


def rounded_to(network: nn.Module, transformer: Any) -> str:
    """The type to which a network's position embedding was rounded, as in smaller files."""
    ours, theirs = network.state_dict()["pos_embed"], transformer.pos_embed.pos_embed
    offs = {name: (theirs.to(kind) - ours).abs().max() for name, kind in TYPES.items()}
    return min(offs, key=lambda name: float(offs[name]))


def prediction_type(resolved: Resolved) -> str:
    """What the student's network gives. Raises UsageError if it is no denoiser's output."""
    output = resolved.cls.output(resolved.config, resolved.task)
    if output not in ("eps", "x_0", "v"):
        raise UsageError(
            f"the student's network gives {output}, but the pipeline takes eps, x_0 or v: "
            "give --format safetensors"
        )
    return output


def steps_of(method: Method, resolved: Resolved) -> list[dict[str, float]]:
    """For each step the numbers that the pipeline needs; see `StudentPipeline`."""
    schedule, found = resolved.task.schedule, []
    for t, s in itertools.pairwise(method.levels):
        (alpha, sigma), (next_alpha, next_sigma) = (schedule.alpha_sigma(x) for x in (t, s))
        a, b = schedule.v_weights(t)
        numbers = {
            "time": 1 - schedule.network_time(t) if is_sit(resolved) else schedule.network_time(t),
            "alpha": alpha,
            "sigma": sigma,
            "a": a,
            "b": b,
            "next_alpha": next_alpha,
            "next_sigma": next_sigma,
        }
        found.append({name: float(value) for name, value in numbers.items()})
    return found


def converted(network: nn.Module, resolved: Resolved) -> Any:
    """A DiT with the official keys as a DiTTransformer2DModel.

    Raises UsageError for a network that has more than a square, class-conditional DiT, or less.
    """
    from diffusers import DiTTransformer2DModel

    state, options = network.state_dict(), resolved.task.network_options
    patch = state.get("x_embedder.proj.weight", torch.empty(0))
    labels, grid = state.get("y_embedder.embedding_table.weight"), state.get("pos_embed")
    side = int(grid.shape[-2] ** 0.5) if grid is not None else 0
    if patch.dim() != 4 or labels is None or side**2 != grid.shape[-2]:  # type: ignore[union-attr]
        raise UsageError(
            "diffusers' DiT has square images and class labels, but this student's network is "
            f"{options}: give --format safetensors"
        )
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    width, channels, size = len(patch), patch.shape[1], patch.shape[-1]
    heads = heads_of(network)
    made = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=len(state["final_layer.linear.bias"]) // size**2,
        num_layers=depth,
        sample_size=side * size,
        patch_size=size,
        num_embeds_ada_norm=len(labels) - 1,
        norm_eps=1e-6,
    ).eval()
    renamed, used = renamed_weights(state, depth)
    if strange := sorted(state.keys() - used - {"pos_embed"}):
        raise UsageError(
            f"the student has {', '.join(strange[:3])}, which a plain DiT lacks: "
            "give --format safetensors"
        )
    if is_sit(resolved):
        for kind in ("weight", "bias"):
            renamed[f"proj_out_2.{kind}"] = -renamed[f"proj_out_2.{kind}"]
    made.load_state_dict(renamed)
    return made


def is_sit(resolved: Resolved) -> bool:
    """Whether the network has an official SiT's weights: it is told 1 - t, and gives x_0 - eps."""
    return resolved.task.network_options.get("convention") == "sit"


def heads_of(network: nn.Module) -> int:
    """Attention heads of a DiT's blocks."""
    return next(m.num_heads for m in network.modules() if hasattr(m, "num_heads"))  # type: ignore[return-value]


def renamed_weights(state: dict[str, Tensor], depth: int) -> tuple[dict[str, Tensor], set[str]]:
    """Weights under diffusers' names, with a copy of the embedders in every block.

    Returns:
        The weights, and the official names that were used.
    """
    layers, labels = dict(OUTER), "embedding_table.weight"
    for i in range(depth):
        theirs = f"transformer_blocks.{i}"
        layers |= {f"{theirs}.{new}": f"blocks.{i}.{old}" for old, new in LAYERS.items()}
        layers |= {f"{theirs}.norm1.emb.{new}": old for old, new in EMBEDDERS.items()}
    kinds = ("weight", "bias")
    names = {f"{new}.{kind}": f"{old}.{kind}" for new, old in layers.items() for kind in kinds}
    for i in range(depth):
        own = f"transformer_blocks.{i}.norm1.emb.class_embedder.{labels}"
        names[own] = f"y_embedder.{labels}"
    found, used = {new: state[old] for new, old in names.items()}, set(names.values())
    for i, kind in itertools.product(range(depth), kinds):
        used.add(name := f"blocks.{i}.attn.qkv.{kind}")
        for letter, part in zip("qkv", state[name].chunk(3), strict=True):
            found[f"transformer_blocks.{i}.attn1.to_{letter}.{kind}"] = part.clone()
    return found, used


@torch.no_grad()
def difference(method: Method, resolved: Resolved, pipeline: Any) -> float:
    """The largest difference between our samples and a pipeline's, in float64."""
    task, rows = resolved.task, slice(0, COMPARED)
    x_T, cond = task.evaluation_inputs(0)
    x_T, cond = x_T[rows], cond[rows]
    steps = len(method.levels) - 1
    keyed = task.evaluation_noise(0, rows)
    fresh = [keyed(f"step {i}").double() for i in range(1, steps)]
    student = copy.deepcopy(method.student).double()
    ours = sample(method.solver, student, x_T.double(), method.levels, cond, keyed)
    theirs = pipeline(cond.classes, noise=torch.stack([x_T.double(), *fresh]))
    return float((ours - theirs).abs().max())
