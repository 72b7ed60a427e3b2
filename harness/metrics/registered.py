"""The metrics that come with the harness; the parameters of each say what it needs."""

from __future__ import annotations

import math

from torch import Tensor

from harness.data.images import ImageSet
from harness.data.mixture import GaussianMixture
from harness.metrics import clip as clipscore
from harness.metrics import fidelity, manifold
from harness.metrics.base import Features, SampledMap, metric
from harness.metrics.exact import kl_of_map
from harness.metrics.following import Reading, within_prompts
from harness.metrics.moments import Pair

KL_SAMPLES = 500


@metric("fid", direction="lower", heading="FID ↓", digits=2, milestone=True)
def fid(features: Features) -> float:
    """Frechet distance between the features of samples and of reference images."""
    return fidelity.frechet_distance(features.moments, features.real_moments)


@metric("sfid", direction="lower", heading="sFID ↓", digits=2)
def sfid(spatial: tuple[Pair, Pair]) -> float:
    """Frechet distance between spatial features of Inception (Nash et al. 2021, 2103.03841)."""
    return fidelity.frechet_distance(*spatial)


@metric("inception_score", direction="higher", heading="IS ↑", digits=1)
def inception_score(split_score: float) -> float:
    """Inception score: confident and varied predictions, over ten contiguous parts."""
    return split_score


@metric("fid_at_floor_n", direction="lower", heading="FID at the floor's N ↓", digits=2)
def fid_at_floor_n(features: Features, floor_n: int) -> float:
    """Mean FID of parts of as many samples as the floor has real images."""
    if features.both is None or len(features.both[0]) <= floor_n:
        return math.nan
    return fidelity.fid_of_parts(*features.both, floor_n)


@metric("kid", direction="lower", heading="KID ↓", digits=1)
def kid(features: Features, kid_subset_size: int) -> float:
    """Kernel distance (unbiased) between the features of samples and of reference images."""
    return fidelity.kid(*features.both, kid_subset_size) if features.both else math.nan


@metric("label_agreement", direction="higher", heading="label agreement ↑", milestone=True)
def label_agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of samples that the feature network classifies as the requested label."""
    return fidelity.label_agreement(logits, labels)


@metric("prompts_followed", direction="higher", heading="prompts followed ↑", milestone=True)
def prompts_followed(reading: Reading) -> float:
    """Share of samples that show what their prompt says and nothing else."""
    return reading.share()


@metric("followed_seen", direction="higher", heading="followed, seen ↑")
def followed_seen(reading: Reading) -> float:
    """The same of prompts without combinations that training never shows."""
    return reading.share(held_out=False)


@metric("followed_held_out", direction="higher", heading="followed, held-out ↑")
def followed_held_out(reading: Reading) -> float:
    """The same of prompts with combinations that training never shows."""
    return reading.share(held_out=True)


@metric("followed_single_object", direction="higher", heading="one object ↑")
def followed_single_object(reading: Reading) -> float:
    """Share of followed prompts that name one object."""
    return reading.share("single_object")


@metric("followed_two_object", direction="higher", heading="two objects ↑")
def followed_two_object(reading: Reading) -> float:
    """Share of followed prompts that name two objects."""
    return reading.share("two_object")


@metric("followed_counting", direction="higher", heading="counting ↑")
def followed_counting(reading: Reading) -> float:
    """Share of followed prompts that count."""
    return reading.share("counting")


@metric("followed_colors", direction="higher", heading="colours ↑")
def followed_colors(reading: Reading) -> float:
    """Share of followed prompts that name a colour."""
    return reading.share("colors")


@metric("followed_position", direction="higher", heading="position ↑")
def followed_position(reading: Reading) -> float:
    """Share of followed prompts that relate two objects."""
    return reading.share("position")


@metric("followed_color_attr", direction="higher", heading="two colours ↑")
def followed_color_attr(reading: Reading) -> float:
    """Share of followed prompts that give two objects a colour each."""
    return reading.share("color_attr")


@metric("prompt_diversity", direction="none", heading="diversity in a prompt")
def prompt_diversity(features: Features, reading: Reading) -> float:
    """Mean distance in features between two samples of one prompt; the floor is real scenes'."""
    if features.generated is None:
        return math.nan
    return within_prompts(features.generated, reading.numbers)


@metric("fid_teacher", direction="lower", heading="FID to the teacher ↓", digits=2)
def fid_teacher(features: Features, teacher_moments: Pair) -> float:
    """Frechet distance between the features of samples and of the teacher's from the same noise."""
    return fidelity.frechet_distance(features.moments, teacher_moments)


@metric("precision", direction="higher", heading="precision ↑")
def precision(features: Features) -> float:
    """Share of samples inside the manifold of real features."""
    return features.precision_recall[0]


@metric("recall", direction="higher", heading="recall ↑")
def recall(features: Features) -> float:
    """Share of real images inside the manifold of sample features."""
    return features.precision_recall[1]


@metric("density", direction="higher", heading="density ↑")
def density(features: Features) -> float:
    """Number of real neighbourhoods around a sample, relative to its expectation."""
    return features.density_coverage[0]


@metric("coverage", direction="higher", heading="coverage ↑")
def coverage(features: Features) -> float:
    """Share of real neighbourhoods that contain a sample."""
    return features.density_coverage[1]


@metric("inception_style_score", direction="higher", heading="inception-style score ↑", digits=2)
def inception_style_score(logits: Tensor) -> float:
    """Inception score with the task's feature network: confident and varied predictions."""
    return manifold.inception_style_score(logits)


@metric("class_diversity", direction="none", heading="diversity in a class (real = 1)")
def class_diversity(features: Features, labels: Tensor, real: ImageSet) -> float:
    """Mean distance between two samples of one class, relative to real images."""
    if features.both is None:
        return math.nan
    return manifold.class_diversity(features.both[0], labels, features.both[1], real.labels)


@metric("memorised_share", direction="lower", heading="memorised ↓", digits=4)
def memorised_share(images: Tensor, real: ImageSet) -> float:
    """Share of samples that are far closer to one training image than to any other."""
    return manifold.memorised_share(images, real.images)


@metric("distance_to_teacher", direction="lower", heading="distance to teacher ↓", milestone=True)
def distance_to_teacher(images: Tensor, teacher_samples: Tensor) -> float:
    """Root mean squared difference of a pixel from the teacher's output from the same noise."""
    return fidelity.distance_to_reference(images, teacher_samples)


@metric("fid_inception", direction="lower", heading="FID, Inception ↓", digits=2)
def fid_inception(inception: tuple[Tensor, Tensor]) -> float:
    """Frechet distance in Inception-v3, in torch-fidelity's protocol."""
    return fidelity.fid(*inception)


@metric("fid_clean", direction="lower", heading="FID, clean-fid's protocol ↓", digits=2)
def fid_clean(inception_clean: tuple[Tensor, Tensor]) -> float:
    """Frechet distance in Inception-v3, in clean-fid's protocol."""
    return fidelity.fid(*inception_clean)


@metric("fd_dinov2", direction="lower", heading="FD-DINOv2 ↓", digits=1)
def fd_dinov2(dinov2: tuple[Tensor, Tensor]) -> float:
    """Frechet distance in DINOv2."""
    return fidelity.fid(*dinov2)


@metric("clip_score", direction="higher", heading="CLIPScore ↑", digits=2)
def clip_score(clip: tuple[Tensor, Tensor]) -> float:
    """Mean of max(100 cos, 0) between samples and their prompts in CLIP."""
    return clipscore.clip_score(*clip)


@metric(
    "frechet_distance", direction="lower", heading="Frechet distance ↓", digits=4, milestone=True
)
def frechet_distance(images: Tensor, mixture: GaussianMixture) -> float:
    """Frechet distance of the samples themselves to the exact moments."""
    return fidelity.frechet_distance(fidelity.sample_moments(images.flatten(1)), mixture.moments())


@metric("kl", direction="lower", heading="KL ↓", most_samples=KL_SAMPLES)
def kl(sampled_map: SampledMap, mixture: GaussianMixture) -> float:
    """KL divergence to the exact density; none for a map that ignores its noise."""
    x_T, cond = sampled_map.first(KL_SAMPLES)
    value = kl_of_map(
        lambda x: sampled_map.sample(x, cond),
        x_T,
        lambda x_0: mixture.log_density(x_0, cond.classes),
    )
    return value if math.isfinite(value) else math.nan


@metric("map_error", direction="lower", heading="error of the ODE map ↓", digits=4, milestone=True)
def map_error(images: Tensor, ode_map: Tensor) -> float:
    """Root mean squared distance of a sample from where the exact ODE leads from its noise."""
    return fidelity.distance_to_reference(images, ode_map)


@metric("solver_error", direction="lower", heading="error of the teacher's solver ↓", digits=4)
def solver_error(teacher_samples: Tensor, ode_map: Tensor) -> float:
    """Root mean squared distance of the teacher's samples from where the exact ODE leads."""
    return fidelity.distance_to_reference(teacher_samples, ode_map)
