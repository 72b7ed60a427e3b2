"""FID and KID against closed forms and against torch-fidelity's own pipeline."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from harness.data.images import to_uint8
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.metrics.features import classify
from harness.metrics.fidelity import distance_to_reference, fid, kid, label_agreement
from harness.networks.classifier import Classifier


def normal(name: str, *shape: int) -> Tensor:
    return Keyed("test", 0).normal(name, torch.arange(shape[0]), shape[1:]).double()


def features(name: str, mean: Tensor, covariance: Tensor, count: int = 500) -> Tensor:
    """Features whose sample mean and sample covariance are exactly these."""
    x = normal(name, count, len(mean))
    x -= x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_fid_of_axis_aligned_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    mean = torch.tensor([0.0, 3.0, -1.0]).double()
    expected = 9 + 1 + float((a.sqrt() - b.sqrt()).square().sum())
    found = fid(features("a", torch.zeros(3).double(), a.diag()), features("b", mean, b.diag()))
    assert found == pytest.approx(expected, rel=1e-6)


def test_fid_of_gaussians_whose_covariances_do_not_commute() -> None:
    root_a, root_b = normal("root a", 4, 4), normal("root b", 4, 4)
    a, b = root_a @ root_a.T + torch.eye(4), root_b @ root_b.T + torch.eye(4)
    assert not torch.allclose(a @ b, b @ a)
    trace_of_root = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = float((a + b).trace() - 2 * trace_of_root)
    zero = torch.zeros(4).double()
    assert fid(features("a", zero, a), features("b", zero, b)) == pytest.approx(expected, rel=1e-6)


def test_identical_sets_have_no_distance() -> None:
    x = normal("x", 300, 8)
    assert fid(x, x) == pytest.approx(0, abs=1e-6)
    assert fid(x, x.flip(0)) == pytest.approx(0, abs=1e-6)


def test_fid_is_symmetric() -> None:
    x, y = normal("x", 300, 8), 1 + 2 * normal("y", 200, 8)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-6)


def test_kid_is_near_zero_for_one_distribution_and_grows_with_a_shift() -> None:
    x, y = normal("x", 600, 8), normal("y", 600, 8)
    found = [kid(x + shift, y, subset_size=200) for shift in (0.0, 0.3, 0.6, 1.2)]
    assert abs(found[0]) < 0.01
    assert found == sorted(found)
    assert found[1] > 5 * abs(found[0])


def test_kid_of_whole_sets_is_the_unbiased_mmd() -> None:
    x, y, n = normal("x", 50, 6), normal("y", 50, 6) + 0.5, 50

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 6 + 1) ** 3

    own = sum((kernel(z, z).sum() - kernel(z, z).trace()) / (n * (n - 1)) for z in (x, y))
    expected = float(own - 2 * kernel(x, y).mean())
    assert kid(x, y, subset_size=n, subsets=3) == pytest.approx(expected, rel=1e-9)


class Bare(Dataset):
    """Yields images alone, as torch-fidelity wants them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> Tensor:
        return self.images[item]


def test_our_pipeline_equals_torch_fidelitys() -> None:
    from torch_fidelity import calculate_metrics, register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    with keyed_initialisation(0, "features"):
        network = Classifier((1, 8, 8), 10).eval()

    class Ours(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **kwargs: object):
            super().__init__(name, features_list)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            assert images.dtype == torch.uint8
            return (network.features(images.float() / 127.5 - 1).double(),)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("penultimate",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "penultimate"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    register_feature_extractor("ours-test-fidelity", Ours)
    first, second = normal("first", 90, 1, 8, 8).clamp(-1, 1), (normal("second", 70, 1, 8, 8) * 0.5).clamp(-1, 1)
    theirs = calculate_metrics(
        input1=Bare(to_uint8(first)), input2=Bare(to_uint8(second)), feature_extractor="ours-test-fidelity",
        fid=True, kid=True, kid_subsets=20, kid_subset_size=30, batch_size=32, cuda=False, cache=False, verbose=False,
        save_cpu_ram=True,
    )  # fmt: skip
    mine, reference = (classify(network, images, batch_size=40)[0] for images in (first, second))
    assert fid(mine, reference) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert kid(mine, reference, 30, subsets=20) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert fid(mine, reference) > 1e-6


def test_classify_rounds_to_8_bits_and_does_not_depend_on_the_batch() -> None:
    with keyed_initialisation(0, "features"):
        network = Classifier((1, 8, 8), 10).eval()
    images = normal("images", 20, 1, 8, 8).float()
    whole, logits = classify(network, images)
    assert whole.shape == (20, 64)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(classify(network, images, batch_size=7)[0], whole, rtol=1e-4, atol=1e-5)
    rounded = ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(network.features(rounded).double(), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(rounded).double(), logits, rtol=1e-4, atol=1e-5)


def test_label_agreement_is_a_share() -> None:
    logits = torch.tensor([[0.0, 5.0], [1.0, 0.5], [2.0, 3.0], [9.0, 1.0]])
    assert label_agreement(logits, torch.tensor([1, 0, 0, 0])) == 0.75


def test_distance_to_reference_is_the_rms_of_a_pixel() -> None:
    samples = torch.zeros(2, 1, 2, 2)
    reference = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0]).reshape(2, 1, 2, 2)
    assert distance_to_reference(samples, reference) == pytest.approx((25 / 8) ** 0.5)
    assert distance_to_reference(samples, samples) == 0
