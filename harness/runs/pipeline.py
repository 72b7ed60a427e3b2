"""Samples a distilled DiT in its few steps. It needs torch and diffusers alone.

from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(
    FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
samples = pipeline(torch.tensor([3, 7]))
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor


class StudentPipeline(DiffusionPipeline):
    """A student with its steps, which stand in model_index.json.

    Args:
        transformer: the DiTTransformer2DModel.
        steps: for each step the network's time, alpha and sigma before and after it, and the
            weights a and b of v = a x_0 + b eps.
        prediction_type: "eps", "x_0" or "v", which the network gives.
        stochastic: whether each step but the last adds fresh noise, rather than the old one.
        positions: the type to which the position embedding was rounded, such as "float16".
    """

    def __init__(
        self,
        transformer: Any,
        steps: Any = (),
        prediction_type: Any = "eps",
        stochastic: Any = False,
        positions: Any = "float32",
    ):
        super().__init__()
        # The official DiT's time frequencies, and rounded positions; config.json cannot say them.
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        table = transformer.pos_embed.pos_embed
        table.copy_(table.to(getattr(torch, positions)))
        self.register_modules(transformer=transformer)
        self.register_to_config(
            steps=steps,
            prediction_type=prediction_type,
            stochastic=stochastic,
            positions=positions,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Samples [B, C, H, W] for class labels [B].

        Args:
            noise: standard normal, [1 + fresh draws, B, C, H, W]; it replaces the generator's.
        """
        config, device = self.transformer.config, self._execution_device
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        given = iter(noise) if noise is not None else None

        def draw() -> Tensor:
            drawn = torch.randn(shape, generator=generator) if given is None else next(given)
            return drawn.to(device, self.transformer.dtype)

        x, labels = draw(), class_labels.to(device)
        for step in self.config.steps:
            time = torch.full((len(x),), step["time"], device=device)
            output = self.transformer(x, time, labels, return_dict=False)[0][:, : x.shape[1]]
            x_0, eps = self.predict(output, x, step)
            if self.config.stochastic and step["next_sigma"] > 0:
                eps = draw()
            x = step["next_alpha"] * x_0 + step["next_sigma"] * eps
        return x

    def predict(self, output: Tensor, x: Tensor, step: dict[str, float]) -> tuple[Tensor, Tensor]:
        """x_0 and eps of the network's output at x."""
        alpha, sigma = step["alpha"], step["sigma"]
        if self.config.prediction_type == "eps":
            return (x - sigma * output) / alpha, output
        if self.config.prediction_type == "x_0":
            return output, (x - alpha * output) / sigma
        return step["b"] * x - sigma * output, alpha * output - step["a"] * x
