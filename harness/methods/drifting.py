"""Drifting (arXiv 2602.04770, and its released code): a generator that drifts with its samples.

G maps noise and a label to an image in one step. In a feature space, each sample x_i is drawn by
real images of its label (positives) and pushed by other samples of it (negatives). With distances d
over their mean, and R in {0.02, 0.05, 0.2},

    A = sqrt(softmax_j(-d_ij / R) softmax_i(-d_ij / R)),    the product at least 1e-6
    V_i = (sum_j A-_ij) sum_j A+_ij (y_j - x_i) - (sum_j A+_ij) sum_j A-_ij (y_j - x_i)
    L = |x - sg(x + sum_R V / rms V)|^2

softmax_j is over all that x_i sees, softmax_i over the samples of its label. V is 0 on average
where samples and data have one distribution, and changes its sign if they change places. V's
division by its own size pins the loss. The metric `shared` says where training is: it is the share
of V's square that n samples of a label have in common, most far from the data, about 2 / n at last.
(The size of V before the division hardly differs between the two for 16 or 64 samples.)

Guidance: real images of all labels are negatives too, of weight `(w - 1) (n - 1) / m` each, for n
samples of the label and m images. w is the task's guidance scale.

Ours: the features are those of the task's classifier, and the image itself (paper: maps of an MAE,
without which it reports far worse images). **The same classifier judges samples**, so a table's FID
flatters this method. Labels are those of a batch's images, compared in groups of `group`: each has
a few of a label (paper: 64 samples of a class, and a queue of images). w is one number (paper:
drawn for each sample, which the network is told). Sizes of V are of a group, not of a label. The
network is the teacher's at t = 1, and starts there (paper: no teacher, and no time). The paper
drops no labels, and neither does this file. An eps network's samples have the gradients of a v
network (`DenoisingStudent.conditioned`).

Untrained, from the teacher's weights: a sample is the unguided teacher's x_0-prediction from noise.
Exact: V changes its sign if positives and negatives change places.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from harness.diffusion.denoiser import Guided
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.options import Span
from harness.methods.parts.student import DenoisingStudent, StudentConfig

RADII, FLOOR = (0.02, 0.05, 0.2), 1e-6
"""R, and the least product of the two softmaxes (code)."""


class DriftingConfig(StudentConfig):
    group: int = Field(64, ge=2, le=4096)
    """Samples whose features are compared, of all labels; it must divide the batch size."""
    guidance: float | None = Field(None, ge=1, le=100)
    """Guidance scale w; none is the task's scale (paper: drawn from 1 to 4)."""

    @property
    def sample_group(self) -> int:
        return self.group


def force(
    x: Tensor, y: Tensor, towards: Tensor, away: Tensor, same: Tensor, radius: float
) -> Tensor:
    """V of samples x [G, n, D] at points y [G, m, D], in units of the mean distance.

    Args:
        towards, away: weights of points as positives and negatives, [G, n, m]; 0 hides a point.
        same: which samples have the same label, [G, n, n], float.
        radius: R.
    """
    seen = (towards + away) > 0
    logits = (-torch.cdist(x, y) / radius).masked_fill(~seen, -torch.inf)
    weights = logits.exp()
    columns = weights / (same @ weights).clamp(min=torch.finfo(x.dtype).tiny)
    affinity = (logits.softmax(2) * columns).clamp(min=FLOOR).sqrt()
    pulls, pushes = affinity * towards, affinity * away
    return pushes.sum(2, keepdim=True) * (pulls @ y) - pulls.sum(2, keepdim=True) * (pushes @ y)


def drifted(x: Tensor, real: Tensor, labels: Tensor, w: float) -> tuple[Tensor, Tensor, Tensor]:
    """The drift of features, the unit of distance, and what samples share, for each group.

    Args:
        x, real: features of samples and of real images, [G, n, D] each, float64.
        labels: of both, [G, n].
        w: guidance scale.

    Returns:
        The sum over R of V / rms V in that unit [G, n, D], the unit [G, 1, 1], and the share of its
        square that is common to the samples of a label, 0-d.
    """
    same = (labels.unsqueeze(2) == labels.unsqueeze(1)).to(x.dtype)
    others = same - torch.eye(same.shape[1], dtype=x.dtype, device=x.device)
    every = (w - 1) * others.sum(2, keepdim=True).expand_as(same) / same.shape[1]
    none = torch.zeros_like(same)
    points = torch.cat([x, real, real], 1)
    towards, away = torch.cat([none, same, none], 2), torch.cat([others, none, every], 2)
    seen = ((towards + away) > 0).to(x.dtype)
    unit = (torch.cdist(x, points) * seen).sum((1, 2), keepdim=True)
    unit = (unit / seen.sum((1, 2), keepdim=True)).clamp(min=1e-12)
    drift = torch.zeros_like(x)
    for radius in RADII:
        V = force(x / unit, points / unit, towards, away, same, radius)
        drift = drift + V / V.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
    common = same @ drift / same.sum(2, keepdim=True)
    return drift, unit, common.square().mean() / drift.square().mean().clamp(min=1e-12)


@METHODS.register("drifting")
class Drifting(DenoisingStudent):
    """Drifting: samples move to images of their label and away from each other, in features."""

    Config = DriftingConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "ema_half_life": (0.02, 0.05, 0.1),
        "weight_decay": (0.0, 0.01, 0.1),
    }
    default_num_steps = 1
    needs_labels = True
    target = "data"
    reference: ClassVar = "arXiv 2602.04770, and its released code"

    def __init__(
        self,
        config: DriftingConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.w = task.guidance_scale if config.guidance is None else config.guidance
        self.target = "data" if self.w == 1 else "guided data"
        self.classifier = task.classifier(torch.device("cpu"))

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if num_steps != 1:
            raise UsageError(f"num_steps is {num_steps}, but drifting has one step: give 1")
        if not task.own_classifier:
            raise UsageError(
                "drifting compares images by the features of the task's own classifier, "
                "but this task has none: take one that has, such as digits"
            )

    @property
    def networks(self) -> list[nn.Module]:
        return [*super().networks, self.classifier]

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of images [B, C, H, W] in float64: the classifier's, and pixels; [B, D] each."""
        with torch.autocast(images.device.type, enabled=False):
            found = self.classifier.features(images.float())
        return [found.double(), images.flatten(1).double()]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        images, cond = batch.data
        one = torch.ones((), dtype=torch.float64)
        x_T = batch.normal("x_T", self.task.shape)
        samples = self.with_gradient(self.model(x_T, one, cond).x_0, one)
        groups = (-1, self.config.group)
        losses, shared = [], []
        for found, real in zip(self.features(samples), self.features(images), strict=True):
            x, y = (each.unflatten(0, groups) for each in (found, real))
            with torch.no_grad():
                drift, unit, common = drifted(x, y, cond.classes.unflatten(0, groups), self.w)
            x = x / unit
            losses.append((x - (x.detach() + drift)).square().mean())
            shared.append(common)
        return torch.stack(losses).sum().float(), {"shared": torch.stack(shared).mean()}
