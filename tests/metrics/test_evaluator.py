"""The evaluator: scores of real images, the identity of a metric, the cost of sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_runs import changed
from torch import Tensor, nn

from harness.data.images import ImageSet
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed
from harness.errors import RunFailed
from harness.files import digest
from harness.methods import METHODS
from harness.metrics import evaluator as evaluator_module
from harness.metrics import spaces
from harness.metrics.evaluator import Evaluator
from harness.metrics.features import classify
from harness.metrics.fidelity import fid, kid
from harness.metrics.manifold import density_coverage, precision_recall
from harness.metrics.sampling import sample_grid, sample_set, sampling_cost
from harness.metrics.spaces import numeric_mode
from harness.records import Metric
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.solvers import Noise, sample
from harness.tasks import Task

CPU = torch.device("cpu")


def noise_images(task: Task, count: int) -> Tensor:
    return Keyed("test", 0).normal("images", torch.arange(count), task.shape)


class Replay:
    """A perfect sampler: it returns given images in order."""

    def __init__(self, images: Tensor):
        self.images, self.calls = images, list[int]()

    def __call__(self, x_T: Tensor, cond: Condition, noise: Noise) -> Tensor:
        start = sum(self.calls)
        self.calls.append(len(x_T))
        return self.images[start : start + len(x_T)]


def test_the_reference_itself_has_no_distance(tiny: Task) -> None:
    real = tiny.split.train.images
    task = changed(tiny, evaluation={"samples": len(real), "batch_size": 500})
    sampler = Replay(real)
    samples = sample_set(sampler, task, 0, CPU)
    assert sampler.calls == [500, 500, len(real) - 1000]
    assert torch.equal(samples, real)
    metrics = Evaluator(task, lambda k: real, CPU).evaluate({0: samples})
    other = Evaluator(task, lambda k: real, CPU).evaluate({0: noise_images(task, len(real))})
    assert abs(metrics["fid"].mean) < 1e-4 * other["fid"].mean
    assert abs(metrics["kid"].mean) < 0.1 * other["kid"].mean
    assert metrics["distance_to_teacher"].mean == 0
    assert other["distance_to_teacher"].mean > 0.5


def test_the_floor_is_that_of_held_out_images(tiny: Task) -> None:
    held_out = tiny.split.held_out
    task = changed(tiny, evaluation={"samples": len(held_out)})
    evaluator = Evaluator(task, lambda k: held_out.images, CPU)
    metrics = evaluator.evaluate({0: held_out.images})
    assert metrics["fid_floor"].n == len(held_out) == 360
    for name in ("fid", "kid"):
        assert metrics[name].mean == pytest.approx(metrics[f"{name}_floor"].mean, rel=1e-9)
        assert metrics[name].direction == metrics[f"{name}_floor"].direction == "lower"


def with_held_out(task: Task, index: Tensor) -> Task:
    """The task with some of its held-out images."""
    other, whole = Task(task.spec), task.split.held_out
    part = ImageSet(whole.images[index], whole.labels[index])
    other.__dict__["split"] = replace(task.split, held_out=part)
    return other


def test_the_floor_is_at_the_samples_n_where_there_are_enough_images(
    tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are drawn from all classes, also where the classes lie one after the other."""
    by_class = with_held_out(tiny, tiny.split.held_out.labels.argsort())
    found = Evaluator(by_class, lambda k: noise_images(tiny, 40), CPU)
    floors = found.evaluate({0: noise_images(tiny, 40)})
    assert floors["fid_floor"].n == floors["fid"].n == 40
    assert floors["fid_floor"].identity["n"] == 40
    asked: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(Evaluator, "of_samples", lambda self, *args: asked.append(args) or {})
    found.floors(100)
    ((images, labels),) = asked
    held_out = by_class.split.held_out
    places = torch.cdist(images.flatten(1), held_out.images.flatten(1)).argmin(1)
    assert len(places.unique()) == len(images) == 100
    assert torch.equal(held_out.labels[places], labels)
    assert labels.unique().tolist() == list(range(10))


def test_samples_are_also_measured_at_the_floors_n(tiny: Task) -> None:
    """As the mean over disjoint parts of as many samples; none where the floor has their N."""
    images = noise_images(tiny, 40)
    few = Evaluator(with_held_out(tiny, torch.arange(15)), lambda k: images, CPU)
    metrics = few.evaluate({0: images})
    features = classify(few.space.classifier, images)[0]
    halves = [fid(part, few.reference) for part in (features[:15], features[15:30])]
    assert metrics["fid_at_floor_n"].mean == pytest.approx(sum(halves) / 2)
    assert metrics["fid_at_floor_n"].n == metrics["fid_floor"].n == 15
    assert "fid_at_floor_n_floor" not in metrics
    assert "fid_at_floor_n" not in Evaluator(tiny, lambda k: images, CPU).evaluate({0: images})


def test_kid_takes_equal_subsets_of_samples_and_of_the_floor(tiny: Task) -> None:
    images = noise_images(tiny, 40)
    for held_out, size in ((360, 20), (15, 15)):
        some = Evaluator(with_held_out(tiny, torch.arange(held_out)), lambda k: images, CPU)
        metrics = some.evaluate({0: images})
        expected = kid(
            classify(some.space.classifier, images)[0], some.reference, size, subsets=100
        )
        assert metrics["kid"].mean == expected
        for name in ("kid", "kid_floor"):
            identity = metrics[name].identity
            assert (identity["kid_subset_size"], identity["kid_subsets"]) == (size, 100)


def test_neighbourhoods_of_a_part_of_the_reference(tiny: Task) -> None:
    """The part is in the identity; other metrics see all."""
    images = noise_images(tiny, 40)
    some = changed(tiny, evaluation={"neighbours": 100})
    for task, count in ((tiny, 1437), (some, 100)):
        evaluator = Evaluator(task, lambda k: images, CPU)
        found = evaluator.evaluate({0: images})
        features = classify(evaluator.space.classifier, images)[0]
        assert found["coverage"].mean == density_coverage(features, evaluator.reference[:count])[1]
        assert found["recall"].mean == precision_recall(features, evaluator.reference[:count])[1]
        assert found["fid"].mean == fid(features, evaluator.reference)
        assert found["coverage"].identity.get("neighbours") == (100 if task is some else None)
    assert some.digest != tiny.digest


def test_features_of_many_images_are_kept(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "FEW", 1000)
    first = Evaluator(tiny, lambda k: noise_images(tiny, 40), CPU).reference
    with monkeypatch.context() as patch:
        patch.setattr(spaces, "classify", lambda *args, **more: pytest.fail("they are made again"))
        assert torch.equal(Evaluator(tiny, lambda k: noise_images(tiny, 40), CPU).reference, first)
    other = changed(tiny, data={"split_seed": 1})
    assert not torch.equal(Evaluator(other, lambda k: noise_images(tiny, 40), CPU).reference, first)
    assert torch.equal(first, classify(tiny.classifier(CPU), tiny.split.train.images)[0])


def test_features_of_many_images_are_kept_for_each_rounding_and_arithmetic(
    tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spaces, "FEW", 1000)
    keys: list[str] = []

    def keep(key: dict[str, Any], compute: Any) -> Tensor:
        keys.append(digest(key))
        return torch.zeros(2, 3)

    monkeypatch.setattr(spaces, "cached_samples", keep)
    for task in (tiny, changed(tiny, evaluation={"rounding": "floor"})):
        Evaluator(task, lambda k: noise_images(tiny, 40), CPU)
    monkeypatch.setattr(spaces, "numeric_mode", lambda device: {"device": "cpu", "tf32": True})
    Evaluator(tiny, lambda k: noise_images(tiny, 40), CPU)
    assert len(set(keys)) == len(keys) == 3


class Extractor:
    """Two metrics of the literature may rest on the same weights."""

    sha256, at_once = "the same", 64

    def __init__(self, metric: str):
        self.metric, self.need = metric, "dinov2"

    def of_pictures(self, batches: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(batches))


def test_the_floor_beside_many_images_is_kept(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluator(task: Task, *extra: Any) -> Evaluator:
        return Evaluator(task, lambda k: noise_images(task, 40), CPU, extra)

    measured = evaluator(tiny).floors(360)
    monkeypatch.setattr(evaluator_module, "FEW", 1000)
    assert evaluator(tiny).floors(360) == measured
    calls: list[int] = []
    monkeypatch.setattr(
        Evaluator, "of_samples", lambda *args: calls.append(0) or {"fid": float(len(calls))}
    )
    assert evaluator(tiny).floors(360) == measured
    # for each thing that decides it there is one
    other_held_out, other_train = Task(tiny.spec), Task(tiny.spec)
    fewer = {
        name: ImageSet(part.images[10:], part.labels[10:])
        for name, part in vars(tiny.split).items()
        if part is not None
    }
    other_held_out.__dict__["split"] = replace(tiny.split, held_out=fewer["held_out"])
    other_train.__dict__["split"] = replace(tiny.split, train=fewer["train"])
    some = changed(tiny, evaluation={"neighbours": 100})
    smaller = changed(tiny, evaluation={"kid_subset_size": 50})
    floored = changed(tiny, evaluation={"rounding": "floor"})
    halved = changed(tiny, evaluation={"half_distances": True})
    tasks = (other_held_out, other_train, some, smaller, floored, halved)
    others = [evaluator(task) for task in tasks]
    others += [evaluator(tiny, Extractor("fid_inception")), evaluator(tiny, Extractor("fid_clean"))]
    for _ in range(2):
        assert [other.floors(360)["fid_floor"].mean for other in others] == [*range(1, 9)]
        with monkeypatch.context() as patch:
            patch.setattr(evaluator_module, "code_digest", lambda *args: "other code")
            assert evaluator(tiny).floors(360)["fid_floor"].mean == 9


def test_every_noise_set_has_its_value(tiny: Task) -> None:
    samples = {k: noise_images(tiny, 80)[40 * k : 40 * k + 40] for k in (0, 1)}
    metrics = Evaluator(tiny, samples.__getitem__, CPU).evaluate(samples)
    for name, metric in metrics.items():
        if not name.endswith("_floor"):
            assert metric.values.keys() == {0, 1}
            assert metric.n == 40
    assert metrics["fid"].values[0] != metrics["fid"].values[1]
    alone = Evaluator(tiny, samples.__getitem__, CPU).evaluate({1: samples[1]})
    assert alone["fid"].values[1] == metrics["fid"].values[1]


class Oracle(nn.Module):
    """Reads the label from the first pixel, which is -1 for label 0 and 0.8 for label 9."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.arange(10) / 5 - 1, requires_grad=False)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        return -(features[:, :1] - self.levels).abs()


def test_label_agreement_asks_for_the_sets_own_labels(
    tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "classifier", lambda device: Oracle())
    images, labels = noise_images(tiny, 40), tiny.evaluation_inputs(0)[1].labels
    images[:, 0, 0, 0] = labels / 5 - 1
    images[:10, 0, 0, 0] = (labels[:10] + 1) % 10 / 5 - 1  # ten wrong ones
    assert (
        Evaluator(tiny, lambda k: images, CPU).evaluate({0: images})["label_agreement"].mean == 0.75
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_refused(value: float, tiny: Task) -> None:
    images = noise_images(tiny, 40)
    images[3, 0, 0, 0] = value
    evaluator = Evaluator(tiny, lambda k: images, CPU)
    for judge in (lambda: evaluator.evaluate({0: images}), lambda: evaluator.quality(images)):
        with pytest.raises(RunFailed, match="samples of noise set 0 are not finite"):
            judge()


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_a_handful_of_samples_has_the_metrics_that_exist(count: int, tiny: Task) -> None:
    """A set of k vectors has no k-th nearest other one, and no precision by it."""
    task = changed(tiny, evaluation={"samples": count, "kid_subset_size": 2})
    images = noise_images(task, count)
    evaluator = Evaluator(task, lambda k: images, CPU)
    found = evaluator.evaluate({0: images})
    assert ("precision" in found) == ("recall" in found) == (count > 3)
    assert all(math.isfinite(metric.mean) for metric in found.values())
    assert evaluator.caveats(count)[0].startswith(f"fid has 64 features but {count} samples")


def test_one_picture_in_all_has_finite_metrics(tiny: Task) -> None:
    """Its covariance is 0; the record says that the samples collapsed."""
    teacher, images = noise_images(tiny, 40), torch.full((40, 1, 8, 8), 0.5)
    evaluator = Evaluator(tiny, lambda k: teacher, CPU)
    found = evaluator.evaluate({0: images})
    assert {"fid", "kid", "precision", "class_diversity"} <= found.keys()
    assert all(math.isfinite(metric.mean) for metric in found.values())
    assert found["class_diversity"].mean == 0
    assert [flag.split(":")[0] for flag in evaluator.beside_teacher(images)] == ["collapsed"]


def test_samples_that_ran_away_are_flagged(tiny: Task) -> None:
    """Rounding to 8 bits clips them, so metrics of images see no difference."""
    teacher = noise_images(tiny, 40)
    evaluator = Evaluator(tiny, lambda k: teacher, CPU)
    assert evaluator.beside_teacher(50 * teacher) == []
    for factor in (1e3, 1e30):
        (flag,) = evaluator.beside_teacher(factor * teacher)
        assert flag == f"outgrown: samples are {factor:.2g} times as large as the teacher's"
        assert all(
            math.isfinite(metric.mean)
            for metric in evaluator.evaluate({0: factor * teacher}).values()
        )


def identity_hash(task: Task, name: str = "fid", n: int = 40) -> str:
    identity = Evaluator(task, lambda k: torch.zeros(1), CPU).identity(name, n)
    return Metric(values={0: 1.0}, n=n, direction="lower", identity=identity).identity_hash


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"name": "other"},
        {"evaluation": {"seed": 1}},
        {"evaluation": {"kid_subset_size": 10}},
        {"data": {"split_seed": 1}},
        {"guidance": {"scale": 1.5}},
    ],
    ids=str,
)
def test_what_a_metrics_identity_holds(changes: dict[str, Any], tiny: Task) -> None:
    assert identity_hash(changed(tiny, **changes)) != identity_hash(tiny)


def test_an_identity_holds_n_and_the_metric(tiny: Task) -> None:
    assert identity_hash(tiny) == identity_hash(changed(tiny))
    assert identity_hash(tiny, n=41) != identity_hash(tiny)
    assert identity_hash(tiny, "kid") != identity_hash(tiny)


@contextmanager
def tf32_allowed(matrices: bool, convolutions: bool) -> Iterator[None]:
    """Torch's settings; `monkeypatch` would delete them afterwards."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32, cudnn.allow_tf32 = matrices, convolutions
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("kind", "matrices", "convolutions", "tf32"),
    [
        ("cpu", True, True, False),
        ("cuda", False, False, False),
        ("cuda", True, False, True),
        ("cuda", False, True, True),
    ],
)
def test_an_identity_holds_the_numeric_mode(
    kind: str,
    matrices: bool,
    convolutions: bool,
    tf32: bool,
    tiny: Task,
) -> None:
    evaluator, mode = Evaluator(tiny, lambda k: torch.zeros(1), CPU), {"device": kind, "tf32": tf32}
    evaluator.device = torch.device(kind)
    with tf32_allowed(matrices, convolutions):
        assert numeric_mode(torch.device(kind)) == mode
        assert mode.items() <= evaluator.identity("fid", 40).items()


@pytest.mark.parametrize("network", ["features", "teacher"])
def test_an_identity_holds_the_networks_weights(
    network: str, tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity_hash(tiny)
    other = changed(tiny, **{network: {"sha256": "0" * 64}})
    monkeypatch.setattr(other, "classifier", lambda device: tiny.classifier(device))
    assert identity_hash(other) != before


@pytest.mark.parametrize(
    ("method", "options", "nfe"),
    [
        ("teacher", {}, 8),
        ("step-distillation", {}, 4),
        ("ard", {"history_layers": 2}, 4),
        ("denoising", {}, 4),
    ],
)
def test_a_guided_step_costs_two_passes_and_a_students_one(
    method: str, options: dict[str, Any], nfe: int, tiny: Task
) -> None:
    resolved = resolve(RunConfig(method=method, options=options, task="tiny"), tiny)
    built = METHODS[method](resolved.config, tiny.teacher(CPU), tiny, 4, 10)

    def sampler(x_T: Tensor, cond: Condition, noise: Noise) -> Tensor:
        return sample(built.solver, built.student, x_T, built.levels, cond)

    found, macs = sampling_cost(sampler, built.sampled_network, tiny, CPU)
    assert found == nfe
    tokens, d = 4, 16
    linear = tokens * 12 * d * d + 6 * d * d
    forward = (
        tokens * 16 * d
        + 256 * d
        + d * d
        + 3 * (linear + 2 * tokens**2 * d)
        + 2 * d * d
        + tokens * d * 16
    )
    extra = 2 * tokens**2 * d * 2 * 6 if method == "ard" else 0
    assert macs == nfe * forward + extra


def test_a_grid_shows_rows_of_samples_enlarged() -> None:
    rows = [torch.full((30, 1, 8, 8), value) for value in (-1.0, 1.0)]
    picture = sample_grid(rows, columns=6, scale=5, gap=2)
    assert picture.shape == (2 * (8 * 5 + 4), 6 * (8 * 5 + 4), 3)
    assert picture.dtype == torch.uint8
    assert picture[0].unique().tolist() == [255]
    assert picture[2:42, 2:42].unique().tolist() == [0]
    assert picture[46:86].unique().tolist() == [255]


def test_a_grid_keeps_colours_and_takes_fewer_samples_than_columns() -> None:
    picture = sample_grid(
        [torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 4)],
        columns=20,
        scale=2,
        gap=1,
    )
    assert picture.shape == (10, 20, 3)
    assert picture[5, 5].tolist() == [0, 128, 255]
