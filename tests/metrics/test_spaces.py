"""Published networks as a task's features: protocols, references, decoding, identities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged import (
    TinyInception,
    change_config,
    latent_task,
    latents,
    with_split,
    write_autoencoder,
    write_inception,
)
from torch import Tensor

from harness.data.images import to_uint8
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.files import digest, file_hash, read_tensors, write_tensors
from harness.metrics import spaces
from harness.metrics.evaluator import Evaluator
from harness.metrics.fidelity import fid, frechet_distance
from harness.metrics.manifold import half_distances, precision_recall
from harness.metrics.moments import SplitScores
from harness.metrics.pixels import Pixels, drawable, floored_uint8
from harness.metrics.sampling import sample_grid
from harness.metrics.spaces import PublishedSpace
from harness.networks.autoencoder import WEIGHTS
from harness.networks.classifier import Classifier
from harness.tasks import Task, TaskSpec, load_task
from harness.training.tiny_task import tiny_spec

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(autouse=True)
def _small_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "Inception", TinyInception)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))


def images(count: int, name: str = "images") -> Tensor:
    numbers = Keyed("test", 0).normal(name, torch.arange(count), (3, 8, 8))
    return (numbers * 0.6 + numbers.mean((2, 3), keepdim=True)).clamp(-1.2, 1.2)


def pixel_task(folder: Path, evaluation: dict[str, Any] | None = None, **changes: Any) -> Task:
    """A task of colour images that the tiny Inception judges."""
    spec = tiny_spec(folder)
    spec |= {
        "data": {**spec["data"], "shape": [3, 8, 8]},
        "network": {**spec["network"], "in_channels": 3},
        "features": write_inception(folder),
        "evaluation": {**spec["evaluation"], **(evaluation or {})},
        **changes,
    }
    task = Task(TaskSpec.model_validate(spec), folder)
    return with_split(task, images(60, "train"), images(30, "held out"))


def extractor(task: Task) -> TinyInception:
    spec = task.spec.features
    assert spec is not None
    assert spec.file
    return TinyInception(Path(spec.file), CPU)


def parts(task: Task, pictures: Tensor) -> dict[str, Tensor]:
    return extractor(task).parts(pictures)


def moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
    return vectors.double().mean(0), torch.cov(vectors.double().t())


def evaluator(task: Task, samples: Tensor) -> Evaluator:
    return Evaluator(task, lambda k: samples, CPU)


def test_metrics_in_a_published_network_are_those_of_its_features(tmp_path: Path) -> None:
    task, samples = pixel_task(tmp_path), images(40)
    found = evaluator(task, samples).evaluate({0: samples})
    mine, real = (parts(task, to_uint8(x)) for x in (samples, task.split.train.images))
    features = mine["features"].double(), real["features"].double()
    assert found["fid"].mean == pytest.approx(fid(*features), rel=1e-9)
    assert found["sfid"].mean == pytest.approx(
        frechet_distance(moments(mine["spatial"]), moments(real["spatial"])), rel=1e-9
    )
    assert (found["precision"].mean, found["recall"].mean) == precision_recall(*features)
    scores = SplitScores(40)
    scores.add(mine["logits"])
    assert found["inception_score"].mean == pytest.approx(scores.mean, rel=1e-9)
    assert 1 < found["inception_score"].mean < 5
    held_out = parts(task, to_uint8(task.split.held_out.images))["features"].double()
    assert found["fid_floor"].mean == pytest.approx(fid(held_out, features[1]), rel=1e-9)
    # A classifier of the task's own is needed for these.
    assert not {"label_agreement", "inception_style_score"} & found.keys()


def test_half_distances_are_adms(tmp_path: Path) -> None:
    task = pixel_task(tmp_path, {"half_distances": True})
    found = evaluator(task, images(40)).evaluate({0: images(40)})
    mine, real = (
        parts(task, to_uint8(x))["features"].double() for x in (images(40), images(60, "train"))
    )
    expected = precision_recall(mine, real, distances=half_distances)
    assert (found["precision"].mean, found["recall"].mean) == expected
    assert found["recall"].identity["distances"] == "float16, as in ADM's evaluator"
    assert "distances" not in found["coverage"].identity


def test_both_formulas_of_8_bits(tmp_path: Path) -> None:
    """DiT's is `floor(127.5 x + 128)`, clamped; they differ where 127.5 x ends in a half."""
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
    assert floored_uint8(x).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 191, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(floored_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    halves = (levels[:-1] + 0.5) / 127.5 - 1
    assert bool((floored_uint8(halves) != to_uint8(halves)).any())
    names = {}
    for rounding in ("round", "floor"):
        task = pixel_task(tmp_path, {"rounding": rounding})
        names[rounding] = evaluator(task, images(40)).identity("fid", 40)["rounding"]
    assert names == {
        "round": "uint8: round(127.5 (x + 1)), clamped to 0..255",
        "floor": "uint8: floor(127.5 x + 128), clamped to 0..255",
    }


def test_labels_are_balanced_or_drawn(tmp_path: Path) -> None:
    balanced, drawn = pixel_task(tmp_path), pixel_task(tmp_path, {"labels": "drawn"})
    labels = drawn.evaluation_labels(1)
    assert labels is not None
    assert torch.equal(labels, drawn.evaluation_inputs(1)[1].classes)
    assert torch.equal(labels[5:9], drawn.evaluation_inputs(1, slice(5, 9))[1].classes)
    assert len(labels.bincount(minlength=10).unique()) > 1
    assert len(balanced.evaluation_inputs(1)[1].classes.bincount().unique()) == 1
    found = {
        task: evaluator(task, images(40)).identity("fid", 40)["labels"]
        for task in (balanced, drawn)
    }
    assert list(found.values()) == ["balanced", "drawn"]
    assert balanced.digest != drawn.digest


def reference(folder: Path, **arrays: Any) -> dict[str, Any]:
    path = folder / "reference.npz"
    np.savez(path, **arrays)
    return {"reference_npz": {"file": str(path), "sha256": file_hash(path)}}


def test_a_reference_batch_takes_the_place_of_training_images(tmp_path: Path) -> None:
    real = to_uint8(images(50, "reference"))
    entry = reference(tmp_path, arr_0=real.permute(0, 2, 3, 1).numpy())
    task = pixel_task(tmp_path, entry)
    del task.__dict__["split"]  # nothing may ask for it
    found = evaluator(task, images(40)).evaluate({0: images(40)})
    mine, theirs = (parts(task, x)["features"].double() for x in (to_uint8(images(40)), real))
    assert found["fid"].mean == pytest.approx(fid(mine, theirs), rel=1e-9)
    assert found["precision"].mean == precision_recall(mine, theirs)[0]
    assert found["fid"].identity["reference"] == entry["reference_npz"]["sha256"]
    assert not [name for name in found if name.endswith("_floor")]


def test_stated_moments_go_before_those_of_the_batch(tmp_path: Path) -> None:
    """As in ADM's file for ImageNet: moments of all images beside 10,000 of them."""
    stated = {"mu": np.full(6, 0.2), "sigma": np.eye(6), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    real = to_uint8(images(50, "reference"))
    both = pixel_task(
        tmp_path, reference(tmp_path, arr_0=real.permute(0, 2, 3, 1).numpy(), **stated)
    )
    found = evaluator(both, images(40)).evaluate({0: images(40)})
    mine = parts(both, to_uint8(images(40)))
    pair = torch.full((6,), 0.2).double(), torch.eye(6).double()
    assert found["fid"].mean == pytest.approx(
        frechet_distance(moments(mine["features"]), pair), rel=1e-6
    )
    zero = torch.zeros(7).double(), torch.eye(7).double()
    assert found["sfid"].mean == pytest.approx(
        frechet_distance(moments(mine["spatial"]), zero), rel=1e-6
    )
    assert "recall" in found
    assert found["fid"].identity["reference_moments"] == "as stated in the file"
    alone = pixel_task(tmp_path, reference(tmp_path, **stated))
    bare = evaluator(alone, images(40)).evaluate({0: images(40)})
    assert bare["fid"].mean == found["fid"].mean
    assert not {"recall", "precision", "kid", "coverage"} & bare.keys()


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "moments of 5 features, but its network has 6"),
        ({"other": np.zeros(5)}, "holds other, but neither arr_0 nor mu"),
        ({"arr_0": np.zeros((4, 8, 8, 3))}, "should be uint8"),
    ],
)
def test_references_that_are_refused(
    arrays: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    task = pixel_task(tmp_path, reference(tmp_path, **arrays))
    with pytest.raises(UsageError, match=complaint):
        evaluator(task, images(40)).evaluate({0: images(40)})


def test_a_changed_reference_is_refused(tmp_path: Path) -> None:
    task = pixel_task(tmp_path, reference(tmp_path, mu=np.zeros(6), sigma=np.eye(6)))
    reference(tmp_path, mu=np.ones(6), sigma=np.eye(6))
    with pytest.raises(UsageError, match=r"reference\.npz has SHA-256"):
        evaluator(task, images(40))


def test_weights_are_compared_before_anything_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = pixel_task(tmp_path)
    (tmp_path / "tiny-inception.pth").write_bytes(b"something else")
    monkeypatch.setattr(TinyInception, "read", lambda self: pytest.fail("it was read"))
    with pytest.raises(UsageError, match="is not the file of weights that the task names"):
        evaluator(task, images(40))


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    task = pixel_task(tmp_path)
    found = Evaluator(
        task,
        lambda k: images(40),
        CPU,
        report=lambda stage: lambda done, n: seen.setdefault(stage, []).append((done, n)),
    )
    found.evaluate({0: images(40)})
    assert seen["features of the reference"] == [(16, 60), (32, 60), (48, 60), (60, 60)]
    # The samples, then the 30 held-out images.
    assert seen["features of samples"] == [(16, 40), (32, 40), (40, 40), (16, 30), (30, 30)]


def test_features_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = pixel_task(tmp_path)
    first = evaluator(task, images(40)).evaluate({0: images(40)})
    monkeypatch.setattr(TinyInception, "parts", lambda *args: pytest.fail("they are made again"))
    again = evaluator(task, images(40)).evaluate({0: images(40)})
    assert again["fid"] == first["fid"]
    assert again["inception_score"] == first["inception_score"]


# latents


def test_latents_are_decoded_and_then_rounded_once(tmp_path: Path) -> None:
    task = latent_task(
        tmp_path,
        features=write_inception(tmp_path),
        autoencoder=write_autoencoder(tmp_path),
    )
    samples, autoencoder = latents(40), task.autoencoder(CPU)
    assert autoencoder is not None
    assert samples.abs().max() > 3
    found = evaluator(task, samples).evaluate({0: samples})
    mine, real = (
        parts(task, to_uint8(autoencoder.decode(x)))["features"].double()
        for x in (samples, task.split.train.images)
    )
    # Of decoding in batches of another size a pixel may be rounded apart.
    assert found["fid"].mean == pytest.approx(fid(mine, real), rel=1e-3)
    clamped = parts(task, to_uint8(autoencoder.decode(samples.clamp(-1, 1))))["features"]
    assert abs(fid(clamped.double(), real) - found["fid"].mean) > 0.01 * found["fid"].mean
    assert task.picture_shape == (3, 8, 8)
    assert found["fid"].identity["decoding"]["scaling"] == 0.5  # type: ignore[union-attr]
    assert found["distance_to_teacher"].mean == 0


def test_extra_networks_see_decoded_latents(tmp_path: Path) -> None:
    task = latent_task(tmp_path, autoencoder=write_autoencoder(tmp_path))
    network = TinyInception(Path(write_inception(tmp_path)["file"]), CPU)
    found = Evaluator(task, lambda k: latents(40), CPU, [network]).evaluate({0: latents(40)})
    pixels = Pixels(task, CPU)
    mine, real = (network.of_pictures([pixels(x)]) for x in (latents(40), latents(60, "train")))
    assert found["fid_inception"].mean == pytest.approx(fid(mine, real), rel=1e-6)
    identity = found["fid_inception"].identity
    assert identity["rounding"] == "uint8: round(127.5 (x + 1)), clamped to 0..255"
    assert identity["decoding"]["shift"] == 0.25


def test_a_changed_autoencoder_decodes_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the task states no SHA-256, so that its file alone tells one from another."""
    entry = write_autoencoder(tmp_path) | {"sha256": None}
    features = write_inception(tmp_path)

    def fids() -> tuple[float, float]:
        task = latent_task(tmp_path, features=features, autoencoder=entry)
        found = evaluator(task, latents(40)).evaluate({0: latents(40)})
        return found["fid"].mean, found["fid_floor"].mean

    first, weights = fids(), tmp_path / "autoencoder" / WEIGHTS
    write_tensors(weights, {name: 1.5 * x for name, x in read_tensors(weights).items()})
    second = fids()
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "empty"))
    assert second == fids()
    assert second[0] != first[0]
    assert second[1] != first[1]


def test_all_that_decides_a_picture_is_in_the_key_of_its_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, features = write_autoencoder(tmp_path), write_inception(tmp_path)

    def key(evaluation: dict[str, Any] | None = None, **changes: float) -> str:
        stated = {f"{name}_factor": entry[name] for name in ("scaling", "shift")}
        stated |= {f"{name}_factor": value for name, value in changes.items()}
        change_config(tmp_path / "autoencoder", **stated)
        task = latent_task(tmp_path, features=features, autoencoder={**entry, **changes})
        spec = task.spec.evaluation.model_copy(update=evaluation or {})
        task.spec = task.spec.model_copy(update={"evaluation": spec})
        space = evaluator(task, latents(40)).space
        assert isinstance(space, PublishedSpace)
        return digest(space._key)

    found = [key(), key({"rounding": "floor"}), key(scaling=0.25), key(shift=0.5)]
    monkeypatch.setattr(spaces, "numeric_mode", lambda device: {"device": "cpu", "tf32": True})
    found.append(key())
    monkeypatch.setattr(spaces, "code_digest", lambda *rooms: "other code")
    found.append(key())
    assert len(set(found)) == len(found)


def test_pictures_are_decoded_in_batches(tmp_path: Path) -> None:
    task = latent_task(tmp_path, autoencoder=write_autoencoder(tmp_path))
    pixels, samples = Pixels(task, CPU), latents(10)
    sizes = [len(batch) for batch in pixels.batches(samples, 4)]
    assert sizes == [4, 4, 2]
    autoencoder = task.autoencoder(CPU)
    assert autoencoder is not None
    torch.testing.assert_close(
        torch.cat(list(pixels.batches(samples, 4))).int(),
        to_uint8(autoencoder.decode(samples)).int(),
        atol=1,
        rtol=0,
    )


def test_latents_alone_have_no_metric_of_8_bits(tmp_path: Path) -> None:
    task = latent_task(tmp_path)
    samples = latents(40)
    found = evaluator(task, samples).evaluate({0: samples})
    assert found.keys() == {"distance_to_teacher"}
    assert found["distance_to_teacher"].identity["rounding"] == "none"
    (sentence,) = evaluator(task, samples).caveats(40)
    assert sentence.startswith("nothing judges the samples")
    with pytest.raises(
        UsageError, match="are latents, which are no 8-bit images: give the task an"
    ):
        Evaluator(latent_task(tmp_path, features=write_inception(tmp_path)), lambda k: samples, CPU)


def test_a_classifier_of_latents_sees_them_as_they_are(tmp_path: Path) -> None:
    classifier = Classifier((4, 4, 4), 10)
    write_tensors(tmp_path / "own.safetensors", classifier.state_dict())
    features = {
        "file": str(tmp_path / "own.safetensors"),
        "sha256": file_hash(tmp_path / "own.safetensors"),
        "training": {"steps": 1, "batch_size": 1, "seed": 0},
    }
    task, samples = latent_task(tmp_path, features=features), latents(40)
    found = evaluator(task, samples).evaluate({0: samples})
    with torch.no_grad():
        mine, real = (classifier.features(x).double() for x in (samples, task.split.train.images))
    assert found["fid"].mean == pytest.approx(fid(mine, real), rel=1e-6)
    assert found["fid"].identity["rounding"] == "none"
    assert "label_agreement" in found


def test_grids_of_latents(tmp_path: Path) -> None:
    """Decoded, or their first three channels, each over its own range in both rows."""
    decoded = drawable(latent_task(tmp_path, autoencoder=write_autoencoder(tmp_path)), CPU)
    rows = [latents(6), latents(6, "others")]
    assert sample_grid(rows, 6, 2, draw=decoded).shape == (2 * (16 + 4), 6 * (16 + 4), 3)
    plain = drawable(latent_task(tmp_path), CPU)
    picture = sample_grid(rows, 6, 1, gap=0, draw=plain)
    assert picture.shape == (8, 24, 3)
    assert picture.flatten(0, 1).amin(0).tolist() == [0, 0, 0]
    assert picture.flatten(0, 1).amax(0).tolist() == [255, 255, 255]


# shipped tasks


def test_identities_of_digits_are_those_of_published_records() -> None:
    """A change would part all records of a task from new ones."""
    published = json.loads((RESULTS / "digits" / "shared.json").read_text())["identities"]
    found = Evaluator(load_task("digits"), lambda k: torch.empty(0), CPU)
    for metric, n in (("fid", 4000), ("recall", 4000), ("kid_floor", 360)):
        assert found.identity(metric, n) in published.values()


def test_the_identity_of_the_mixture_stays() -> None:
    found = Evaluator(load_task("mixture"), lambda k: torch.empty(0), CPU)
    assert digest(found.identity("frechet_distance", 4000)) == (
        "01817db28d9ced8b7ed259909de9111b44cc9c717e419ebd97b62ee49afc6434"
    )
