"""Networks by description, and transformers of diffusers through the same interface as ours."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_diffusers import CLASSES, TEXT, built, condition_for, direct, network_of, states_for
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.errors import UsageError
from harness.metrics.compute import count_macs
from harness.networks.backbones import Backbone, build, depth_of
from harness.networks.backbones.diffusers import DiffusersBackbone
from harness.networks.backbones.dit import DiT, size_options
from harness.networks.passes import count_passes
from harness.runs.cost import without_weights
from harness.training.tiny_task import NETWORK

DIT, PIXART, SD3, FLUX, SANA, QWEN = CLASSES
GOLDEN = Path(__file__).parents[1] / "golden" / "dit.safetensors"
classes = pytest.mark.parametrize("name", CLASSES)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def one_state(name: str, batch: int = 2) -> tuple[Tensor, Tensor, Condition]:
    x, t = states_for(name, 1, batch)
    return x[:, 0], t[:, 0], condition_for(name, batch)


def test_a_size_stands_for_its_numbers() -> None:
    rest = {"image_size": 8, "in_channels": 1, "num_classes": 10}
    small = build({"size": "DiT-S/4", "depth": 1, **rest})
    assert (small.depth, small.width, depth_of({"size": "DiT-XL/2"})) == (1, 384, 28)
    expected = DiT(**{**rest, **size_options("DiT-S/4"), "depth": 1}).state_dict()
    assert {k: v.shape for k, v in small.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"backbone": "dits"}, "unknown backbone 'dits' in network; did you mean dit"),
        ({**NETWORK, "with": 3}, "unknown option 'with' in network"),
        ({**NETWORK, "convention": "edm"}, "convention is 'edm', but must be 'dit' or 'sit'"),
        ({"size": "DiT-S/3"}, "unknown network 'DiT-S/3'; did you mean DiT-S/8"),
        ({"size": "DiT-S/2", "image_size": 8}, "network lacks in_channels: give them"),
        ({"backbone": "diffusers"}, "unknown class of diffusers 'none' in network; known: DiTTr"),
        (network_of(DIT, num_layer=2), "unknown option 'num_layer' in the config of DiTTransf"),
        ({**network_of(DIT), "size": "S"}, "unknown option 'size' in network; known: class"),
        ({**network_of(DIT), "source": "sit"}, "unknown source 'sit' in network"),
        ({**network_of(SD3), "source": "official"}, "source official is for DiT's weights"),
        (network_of(SANA, guidance_embeds=True), "guidance_embeds True is not supported"),
        (network_of(QWEN, zero_cond_t=True), "zero_cond_t must be False"),
        ({**network_of(FLUX), "guidance": None}, "network.guidance is None, but must be a number"),
        ({**network_of(SD3), "guidance": 3.5}, "takes no guidance scale as an input: leave"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(network: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        build(network)


def test_a_depth_needs_no_network() -> None:
    assert depth_of(NETWORK) == 3
    assert depth_of(network_of(DIT)) == 2
    assert depth_of({"backbone": "diffusers", "class": PIXART}) == 28
    with pytest.raises(UsageError, match="network lacks depth"):
        depth_of({"image_size": 8})


@classes
def test_outputs_are_those_of_diffusers(name: str) -> None:
    import diffusers

    network, (x, t, _) = built(name, torch.float32), one_state(name)
    x, t, cond = x.float(), t.float(), condition_for(name, dtype=torch.float32)
    model = getattr(diffusers, name).from_config(network_of(name)["config"])
    model.eval().requires_grad_(False)  # torch multiplies in another order where gradients may flow
    model.load_state_dict({k.removeprefix("model."): v for k, v in network.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(network(x, t, cond), direct(model, x, t, cond))


def test_pixart_at_1024_pixels_is_told_the_size() -> None:
    network = built(PIXART, torch.float64)
    network.model.use_additional_conditions = True
    seen: dict[str, Tensor] = {}
    network.model.adaln_single.register_forward_pre_hook(lambda module, args: seen.update(args[1]))
    network(*one_state(PIXART))
    assert seen["resolution"].tolist() == [[64.0, 64.0]] * 2
    assert seen["aspect_ratio"].tolist() == [[1.0]] * 2


def of_official(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Official DiT weights under the names of diffusers, as its converter renames them."""
    names = {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "attn.proj": "attn1.to_out.0"}
    names |= {"adaLN_modulation.1": "norm1.linear"}
    found: dict[str, Tensor] = {}
    for end in ("weight", "bias"):
        found[f"pos_embed.proj.{end}"] = state[f"x_embedder.proj.{end}"]
        found[f"proj_out_1.{end}"] = state[f"final_layer.adaLN_modulation.1.{end}"]
        found[f"proj_out_2.{end}"] = state[f"final_layer.linear.{end}"]
        for i in range(depth):
            block, embedding = f"transformer_blocks.{i}", f"transformer_blocks.{i}.norm1.emb"
            for old, new in names.items():
                found[f"{block}.{new}.{end}"] = state[f"blocks.{i}.{old}.{end}"]
            parts = state[f"blocks.{i}.attn.qkv.{end}"].chunk(3)
            found |= {
                f"{block}.attn1.to_{part}.{end}": value
                for part, value in zip("qkv", parts, strict=True)
            }
            for layer in (1, 2):
                found[f"{embedding}.timestep_embedder.linear_{layer}.{end}"] = state[
                    f"t_embedder.mlp.{2 * layer - 2}.{end}"
                ]
            found[f"{embedding}.class_embedder.embedding_table.weight"] = state[
                "y_embedder.embedding_table.weight"
            ]
    return {f"model.{name}": value for name, value in found.items()}


def test_official_weights_need_the_official_rule() -> None:
    """The golden numbers in diffusers' DiT; by its own rule the outputs are others."""
    golden = load_file(GOLDEN)
    config = {
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 16,
        "num_embeds_ada_norm": 10,
    }
    state = {k.removeprefix("dit."): v for k, v in golden.items() if k.startswith("dit.")}
    weights, outputs = of_official(state, 2), {}
    for source in ("official", "diffusers"):
        network = build(network_of(DIT) | {"config": config, "source": source})
        network.load_state_dict(weights)
        x, t = golden["io.x"].double(), golden["io.t"].double()
        outputs[source] = network.double()(x, t, Condition(golden["io.y"])).detach()
    close(outputs["official"], golden["io.out"].double())
    error = (outputs["diffusers"] - outputs["official"]).abs().max()
    assert error > 1e-2 * outputs["official"].abs().max()


def test_labels_are_never_dropped_inside() -> None:
    network, (x, t, cond) = built(DIT), one_state(DIT)
    expected = network(x, t, cond)
    assert all(torch.equal(network.train()(x, t, cond), expected) for _ in range(20))


def test_another_image_size_is_refused() -> None:
    x, t, cond = one_state(DIT)
    with pytest.raises(ValueError, match="takes the image size of its config alone"):
        built(DIT)(torch.cat([x, x], 2), t, cond)


@classes
def test_what_the_conditions_lack_is_said(name: str) -> None:
    x, t, _ = one_state(name)
    with pytest.raises(ValueError, match=r"need.*, but the conditions have none"):
        built(name)(x, t, Condition())


def test_padding_has_no_effect() -> None:
    network, (x, t, cond) = built(PIXART), one_state(PIXART)
    changed = cond.text.clone()
    changed[0, 3:] += 100
    expected = network(x, t, cond)
    assert torch.equal(network(x, t, replace(cond, text=changed)), expected)
    assert not torch.allclose(network(x, t, replace(cond, text=cond.text + 1)), expected)


def test_padding_has_no_effect_in_our_dit() -> None:
    options = {name: value for name, value in NETWORK.items() if name != "num_classes"}
    with torch.random.fork_rng():
        network = build({**options, "text_width": TEXT}).double().requires_grad_(False)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    cond = condition_for(PIXART)
    x, t = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.full((2,), 500.0)
    short = Condition(text=cond.text[:1, :3])
    close(network(x, t, cond)[:1], network(x[:1], t[:1], short))
    assert not torch.allclose(network(x, t, Condition(text=cond.text))[:1], network(x, t, cond)[:1])


@classes
def test_one_condition_serves_several_states(name: str) -> None:
    network, (x, t), cond = built(name), states_for(name, 3), condition_for(name)
    together = network(x.flatten(0, 1), t.flatten(), cond).unflatten(0, (2, 3))
    for state in range(3):
        close(together[:, state], network(x[:, state], t[:, state], cond))


@classes
def test_scalars_change_nothing_until_they_are_trained(name: str) -> None:
    plain, student = built(name), built(name, scalars=("s", "w"))
    x, t, cond = one_state(name)
    one, two = (
        cond.with_scalars(s=torch.tensor([s, 900.0]), w=torch.ones(2)) for s in (1.0, 700.0)
    )
    assert torch.equal(student(x, t, one), plain(x, t, cond))
    with torch.no_grad():
        student.scalar_embedders["s"].mlp[2].weight.normal_()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(student)))
    for network in (student, copied):
        moved = (network(x, t, two) - network(x, t, one)).abs().amax((1, 2, 3))
        assert moved[0] > 1e-4
        assert moved[1] == 0
    with torch.no_grad():
        student.scalar_embedders["s"].mlp[2].weight.zero_()
    assert (copied(x, t, two) - copied(x, t, one)).abs().max() > 1e-4  # its own embedder
    with pytest.raises(KeyError, match="w"):
        student(x, t, cond.with_scalars(s=torch.ones(2)))


@classes
def test_extra_channels_change_nothing_at_the_start(name: str) -> None:
    teacher, student = built(name), built(name, extra_channels=2, scalars=("s",))
    student.load_teacher(teacher.state_dict())
    x, t, cond = one_state(name)
    wide = torch.cat([x, torch.randn(2, 2, 8, 8, dtype=torch.float64)], 1)
    close(student(wide, t, cond.with_scalars(s=torch.ones(2))), teacher(x, t, cond))


@classes
def test_features_are_the_tokens_of_each_block(name: str) -> None:
    network, (x, t, cond) = built(name), one_state(name)
    (first, second), c = network.features(x, t, cond)
    tokens = 16 if name in (FLUX, QWEN) else 4
    assert first.shape == second.shape == (2, tokens, network.width)
    assert c.shape == (2, network.width)
    (alone,), _ = network.features(x, t, cond, 1)
    assert torch.equal(alone, first)
    assert not torch.allclose(first, second)
    assert network.depth == len(network.attentions) == 2
    with torch.no_grad():
        network.attentions[1].to_q.weight.add_(1.0)
    (again, other), _ = network.features(x, t, cond)
    assert torch.equal(again, first)
    assert not torch.allclose(other, second)


@classes
def test_blocks_are_replaced_by_what_they_added(name: str) -> None:
    network, (x, t, cond) = built(name), one_state(name)
    output, added = network.reuse(x, t, cond, 1)
    assert torch.equal(output, network(x, t, cond))
    again, same = network.reuse(x, t, cond, 1, added)
    close(again, output)
    assert same is added
    other, _ = network.reuse(x, t, cond, 1, 2 * added)
    assert not torch.allclose(other, output)
    assert network.depth == 2
    with torch.no_grad():  # the upper block does not run
        network.attentions[1].to_q.weight.fill_(torch.nan)
    assert torch.equal(network.reuse(x, t, cond, 1, added)[0], again)


@classes
def test_every_pass_is_counted(name: str) -> None:
    network, (x, t, cond) = built(name), one_state(name)
    with count_passes(network) as passes:
        network(x, t, cond)
        network.features(x, t, cond, 1)
        network.reuse(x, t, cond, 1)
    assert passes.total == 6


@classes
def test_work_is_counted_without_weights(name: str) -> None:
    network, (x, t, cond) = built(name), one_state(name)
    with without_weights():
        empty = build(network_of(name))
    half = condition_for(name, dtype=torch.float32).to("meta")
    with torch.no_grad():
        found = count_macs(lambda: empty(x.float().to("meta"), t.float().to("meta"), half))
        assert found == count_macs(lambda: network(x, t, cond)) > 0


@pytest.mark.parametrize("name", [FLUX, QWEN])
def test_packed_latents_of_any_even_size(name: str) -> None:
    """Extra rows are further tokens; a token that the size cuts is refused."""
    network, (x, t, cond) = built(name), one_state(name)
    assert network(torch.cat([x, x], 2), t, cond).shape == (2, 3, 16, 8)
    with pytest.raises(ValueError, match=r"\(8, 7\), but a token holds 2 x 2 .* multiples of 2"):
        network(x[..., :7], t, cond)


def test_the_guidance_scale_is_an_input_of_flux() -> None:
    """One pass, whose output moves with the scale of the description."""
    x, t, cond = one_state(FLUX)
    state = built(FLUX).state_dict()
    found = []
    for scale in (1, 3.5, 7.0):
        network = build({**network_of(FLUX), "guidance": scale}).double()
        network.load_state_dict(state)
        found.append(network(x, t, cond).detach())
    assert torch.equal(found[1], built(FLUX)(x, t, cond))
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[2], found[1])


def test_scalars_reach_every_block_of_dit() -> None:
    network = built(DIT, scalars=("s",))
    assert isinstance(network, DiffusersBackbone)
    assert len(network.embeddings) == 2


@classes
def test_a_backbone_names_its_parts(name: str) -> None:
    network: Backbone = built(name)
    patch = 2 if name in (FLUX, QWEN) else 4
    assert network.last_layer(network.head).out_features in (3 * patch**2, 6 * patch**2)
    assert network.patch_embedding.proj.weight.shape[1] in (3, 3 * patch**2)
    assert network.width == 16
