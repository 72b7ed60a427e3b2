"""What a task's YAML says about judging: its kinds of feature networks, and its digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.errors import UsageError
from harness.tasks import Task, load_task
from harness.tasks.spec import INCEPTION_SHA256
from harness.training.tiny_task import tiny_spec


def task(folder: Path, **changes: Any) -> Task:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**tiny_spec(folder), **changes}))
    return load_task(str(path))


def evaluation(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"evaluation": {**tiny_spec(folder)["evaluation"], **changes}}


def test_defaults_that_came_later_are_in_no_digest(tmp_path: Path) -> None:
    plain = task(tmp_path)
    said = {**tiny_spec(tmp_path)["features"], "kind": "classifier"}
    assert task(tmp_path, features=said).digest == plain.digest
    defaults = {"labels": "balanced", "rounding": "round", "half_distances": False}
    assert task(tmp_path, **evaluation(tmp_path, **defaults)).digest == plain.digest
    for changes in ({"labels": "drawn"}, {"rounding": "floor"}, {"half_distances": True}):
        assert task(tmp_path, **evaluation(tmp_path, **changes)).digest != plain.digest


def test_inception_without_a_file_is_torch_fidelitys(tmp_path: Path) -> None:
    found = task(tmp_path, features={"kind": "inception"})
    assert found.spec.features is not None
    assert (found.spec.features.kind, found.spec.features.sha256) == ("inception", INCEPTION_SHA256)
    assert found.hashes["features"] == INCEPTION_SHA256
    assert not found.own_classifier
    with pytest.raises(UsageError, match="the features of task tiny are inception: not trained"):
        found.trained("features")


@pytest.mark.parametrize(
    ("features", "complaint"),
    [
        ({"kind": "vgg"}, "'classifier', 'detector', 'inception', 'dinov2'"),
        ({"kind": "dinov2"}, "features.dinov2.file: Field required"),
        ({"kind": "inception", "training": {}}, "Extra inputs are not permitted"),
    ],
)
def test_features_that_are_refused(
    features: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=complaint):
        task(tmp_path, features=features)


def test_where_large_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the task's YAML, then in the data folder."""
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    found = task(tmp_path)
    with pytest.raises(UsageError, match=r"needs vae, which is neither .* --data-dir names"):
        found.located("vae")
    (tmp_path / "data" / "vae").mkdir(parents=True)
    assert found.located("vae") == tmp_path / "data" / "vae"
    (tmp_path / "vae").mkdir()
    assert found.located("vae") == tmp_path / "vae"


def test_latents_are_told_by_shape_set_or_autoencoder(tmp_path: Path) -> None:
    plain = task(tmp_path)
    assert (plain.latent, plain.picture_shape) == (False, (1, 8, 8))
    data = {**tiny_spec(tmp_path)["data"], "shape": [4, 8, 8]}
    network = {**tiny_spec(tmp_path)["network"], "in_channels": 4}
    wide = task(tmp_path, data=data, network=network)
    assert (wide.latent, wide.picture_shape) == (True, None)
    entry = {"folder": "vae", "sha256": "0", "scaling": 0.5}
    coded = task(tmp_path, data=data, network=network, autoencoder=entry)
    assert coded.latent
    coded.__dict__["reference_hash"] = "1"
    assert coded.hashes["autoencoder"] == "0"
    with pytest.raises(UsageError, match="needs vae"):
        _ = coded.picture_shape
