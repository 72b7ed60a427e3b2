"""Our guided teachers sample what the pipelines of diffusers sample, from the same weights.

The pipelines run as they are, without encoders and autoencoder. Each has 4 steps, guidance 2 and
the levels that its own scheduler makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_diffusers import CLASSES, built, condition_for, network_of, states_for
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided
from harness.diffusion.schedules import few_step_levels, schedule_of
from harness.networks.diffusers_folders import trained_as
from harness.solvers import DDIM, sample

DIT, PIXART, SD3, FLUX, SANA, QWEN = CLASSES
STEPS, SCALE = 4, 2.0
SIGMAS = [1, 0.75, 0.5, 0.25]
"""What FLUX's pipeline gives to its scheduler. Without it those of SD3 and Sana shift twice."""
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
Run = Callable[[Any, Any, Tensor, Condition, Condition], Tensor]


def encoded(cond: Condition, null: Condition, mask: str) -> dict[str, Any]:
    """Prompts as a pipeline takes them; `mask` is its name of a mask."""
    return {
        "prompt_embeds": cond.text,
        mask: cond.text_mask,
        "negative_prompt_embeds": null.text,
        f"negative_{mask}": null.text_mask,
    }


def pooled(cond: Condition, null: Condition) -> dict[str, Any]:
    """Prompts of a pipeline without a mask, which takes pooled vectors."""
    return {
        "prompt_embeds": cond.text,
        "pooled_prompt_embeds": cond.pooled,
        "negative_prompt_embeds": null.text,
        "negative_pooled_prompt_embeds": null.pooled,
    }


def run(pipeline: Any, side: int, **arguments: Any) -> Tensor:
    """Latents of a pipeline for images of `side` pixels."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "height": side, "width": side, "prompt": None}
    return pipeline(**options, **arguments, output_type="latent").images


def packed(x: Tensor) -> Tensor:
    return diffusers.FluxPipeline._pack_latents(x, *x.shape)


def unpacked(tokens: Tensor) -> Tensor:
    return diffusers.FluxPipeline._unpack_latents(tokens, 64, 64, 8)


def pixart(model: Any, scheduler: Any, x: Tensor, cond: Condition, null: Condition) -> Tensor:
    pipeline = diffusers.PixArtAlphaPipeline(None, None, None, model, scheduler)
    return run(
        pipeline,
        8 * x.shape[-1],
        **encoded(cond, null, "prompt_attention_mask"),
        negative_prompt=None,
        latents=x,
        guidance_scale=SCALE,
        use_resolution_binning=False,
    )


def sd3(model: Any, scheduler: Any, x: Tensor, cond: Condition, null: Condition) -> Tensor:
    pipeline = diffusers.StableDiffusion3Pipeline(model, scheduler, *[None] * 7)
    prompts = pooled(cond, null)
    return run(pipeline, 64, **prompts, latents=x, guidance_scale=SCALE, sigmas=SIGMAS)


def flux(model: Any, scheduler: Any, x: Tensor, cond: Condition, null: Condition) -> Tensor:
    """The scale that is an input of the network, and true guidance beside it."""
    pipeline = diffusers.FluxPipeline(scheduler, *[None] * 5, model)
    scales = {"guidance_scale": 3.5, "true_cfg_scale": SCALE}
    return unpacked(run(pipeline, 64, **pooled(cond, null), latents=packed(x), **scales))


def sana(model: Any, scheduler: Any, x: Tensor, cond: Condition, null: Condition) -> Tensor:
    pipeline = diffusers.SanaPipeline(None, None, None, model, scheduler)
    return run(
        pipeline,
        256,
        **encoded(cond, null, "prompt_attention_mask"),
        negative_prompt=None,
        latents=x,
        guidance_scale=SCALE,
        use_resolution_binning=False,
        sigmas=SIGMAS,
    )


def qwen(model: Any, scheduler: Any, x: Tensor, cond: Condition, null: Condition) -> Tensor:
    pipeline = diffusers.QwenImagePipeline(scheduler, None, None, None, model)
    prompts = encoded(cond, null, "prompt_embeds_mask")
    return unpacked(run(pipeline, 64, **prompts, latents=packed(x), true_cfg_scale=SCALE))


def flow_match(**options: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**options)


def by_size() -> Any:
    """Levels shifted by e^0.5 at 256 tokens and by e^1.15 at 4096: e^0.46 at the 16 of here."""
    return flow_match(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def ddim() -> Any:
    return DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing", clip_sample=False)


BY_SIZE = f"flow-{math.exp(0.5 - 0.65 * 240 / 3840):.6g}"
CASES: dict[str, tuple[Run, Callable[[], Any], str, dict[str, Any]]] = {
    PIXART: (pixart, ddim, "vp", {}),
    SD3: (sd3, lambda: flow_match(shift=3.0), "flow-3", {}),
    FLUX: (flux, by_size, BY_SIZE, {}),
    SANA: (sana, lambda: flow_match(shift=3.0), "flow-3", {}),
    QWEN: (qwen, by_size, BY_SIZE, {"norm_patch": 2}),
}
"""For each class its pipeline and scheduler, and a task's schedule and guidance."""


TOLD = {"num_attention_heads": 3, "cross_attention_dim": 24, "sample_size": 128, "patch_size": 32}
"""A PixArt for latents of 128 x 128, which is told the size of its images."""


@pytest.mark.parametrize(("name", "config"), [*((name, {}) for name in CASES), (PIXART, TOLD)])
def test_guided_samples_are_the_pipelines(name: str, config: dict[str, Any]) -> None:
    pipeline, scheduler, schedule, guidance = CASES[name]
    network = built(name, torch.float32, **config)
    model = getattr(diffusers, name).from_config(network_of(name, **config)["config"]).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in network.state_dict().items()})
    cond, null = (condition_for(name, batch, torch.float32) for batch in (2, 1))
    null = replace(null, text=-null.text, pooled=-null.pooled)
    x, kind = states_for(name, 1)[0][:, 0].float(), "eps" if schedule == "vp" else "v"
    x = x.repeat(1, 1, *[config.get("sample_size", 8) // 8] * 2)
    teacher = Guided(Denoiser(network, schedule_of(schedule), kind), SCALE, null, **guidance)
    with torch.no_grad():
        found = sample(DDIM(), teacher, x, few_step_levels(STEPS), cond)
        expected = pipeline(model, scheduler(), x, cond, null.repeat(2))
        plain = sample(DDIM(), teacher.at(1.0), x, few_step_levels(STEPS), cond)
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * largest
    assert float((plain - expected).abs().max()) > 1e-2 * largest


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_levels_are_those_of_the_scheduler(shift: float, steps: int) -> None:
    """It is given sigmas, as FLUX's pipeline does."""
    scheduler, schedule = flow_match(shift=shift), schedule_of(f"flow-{shift:g}")
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    levels = few_step_levels(steps)
    close(schedule.alpha_sigma(levels)[1].float(), scheduler.sigmas)
    close(schedule.network_time(levels[:-1]), scheduler.timesteps / 1000)


@pytest.mark.parametrize(
    ("options", "mu"),
    [
        ({"use_dynamic_shifting": True, "shift": 3.0}, 1.15),
        ({"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192}, 0.69355),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.15),
        ({"shift": 3.0}, None),
    ],
)
def test_a_folder_says_the_shift_of_its_scheduler(
    options: dict[str, Any], mu: float | None, tmp_path: Path
) -> None:
    """Latents of FLUX's default size have 4096 tokens."""
    scheduler = flow_match(**options)
    scheduler.save_pretrained(tmp_path / "scheduler")
    name, kind = trained_as(tmp_path, {"class": FLUX, "config": {}})
    scheduler.set_timesteps(sigmas=SIGMAS, mu=mu)
    assert kind == "v"
    close(schedule_of(name).alpha_sigma(few_step_levels(STEPS))[1].float(), scheduler.sigmas)


def test_sanas_own_scheduler_says_its_shift(tmp_path: Path) -> None:
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    diffusers.DPMSolverMultistepScheduler(**options).save_pretrained(tmp_path / "scheduler")
    assert trained_as(tmp_path, {"class": SANA, "config": {}}) == ("flow-3", "v")
