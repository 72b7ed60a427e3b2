"""Feature networks of the literature, on files of random weights: protocols, hashes, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from scipy import linalg
from torch import Tensor, nn

from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.errors import UsageError
from harness.files import file_hash
from harness.metrics import extractors
from harness.metrics.evaluator import Evaluator
from harness.metrics.extra import EXTRACTORS
from harness.metrics.extractors import CleanInception, DINOv2, Inception
from harness.metrics.fidelity import fid
from harness.runs.config import RunConfig, parse_config
from harness.runs.resolve import resolve
from harness.tasks import MixtureTask, Task, load_task
from harness.tasks.spec import INCEPTION_SHA256

CPU = torch.device("cpu")
IMAGES = Keyed("test", 0).normal("images", torch.arange(3), (1, 8, 8)).clamp(-1, 1)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch, keyed_initialisation(0, "inception"):
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            lambda *a, **k: {},
        )
        patch.setattr(Network, "load_state_dict", lambda self, state: None)
        torch.save(Network("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm

    path = tmp_path_factory.mktemp("weights") / "dinov2.pth"
    with keyed_initialisation(0, "dinov2"):
        state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    state["mask_token"] = torch.zeros(1, 384)  # the published files hold it, the network does not
    torch.save(state, path)
    return path


def test_inception_is_torch_fidelitys(inception_file: Path) -> None:
    found = Inception(inception_file, CPU)
    features = found(IMAGES)
    assert features.shape == (3, 2048)
    assert features.dtype == torch.float64
    assert found.sha256 == file_hash(inception_file)
    rounded = ((IMAGES + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)
    torch.testing.assert_close(features, found.network(rounded)[0].double())


def test_inception_gives_what_adms_evaluator_takes(inception_file: Path) -> None:
    """17 x 17 x 7 spatial features with the channel last, and logits without their bias."""
    found, seen = Inception(inception_file, CPU), []
    found.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
        lambda module, args, out: seen.append(out.clone())
    )
    image = ((IMAGES[:1] + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)
    with torch.no_grad():
        parts = found.parts(image)
    assert parts["spatial"].shape == (1, 2023)
    assert torch.equal(parts["spatial"].view(17, 17, 7), seen[0][0, :7].permute(1, 2, 0))
    weight = found.network.get_parameter("fc.weight")
    torch.testing.assert_close(parts["logits"], parts["features"] @ weight.t())
    assert parts["features"].shape == (1, 2048)


def test_another_file_of_weights_than_the_named_one(inception_file: Path) -> None:
    with pytest.raises(UsageError, match=r"has SHA-256 .*, but 6726825d.* was expected"):
        Inception(inception_file, CPU, INCEPTION_SHA256)
    assert Inception(inception_file, CPU, file_hash(inception_file)).network is not None


def test_torchs_hub_folder_holds_the_weights(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is downloaded; the whole SHA-256 counts, not the eight digits of the name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "weights-inception-2015-12-05-6726825d.pth").symlink_to(inception_file)
    assert Inception(None, CPU).path.parent == folder
    with pytest.raises(UsageError, match="is not the file of weights that the task names"):
        Inception(None, CPU, INCEPTION_SHA256)


def test_clean_inception_sees_clean_fids_images(inception_file: Path) -> None:
    """Both protocols agree at 299 pixels, where nothing is resized.

    Below 299 they differ, and the network sees the images that clean-fid makes.
    """
    plain, clean = Inception(inception_file, CPU), CleanInception(inception_file, CPU)
    large = Keyed("test", 0).uniform("large", torch.arange(1), (1, 299, 299)).float() * 2 - 1
    torch.testing.assert_close(clean(large), plain(large), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(clean(IMAGES), plain(IMAGES), rtol=1e-2)
    seen: list[Tensor] = []
    clean.network.get_submodule("Conv2d_1a_3x3.conv").register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    clean(IMAGES[:1])
    rounded = (
        ((IMAGES[0] + 1) * 127.5).round().to(torch.uint8).repeat(3, 1, 1).permute(1, 2, 0).numpy()
    )
    resized = cleanfid.build_resizer("clean")(rounded)
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy() * 128 + 128, resized, atol=1e-3)


def test_the_two_libraries_frechet_distances_agree_on_equal_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One Frechet function serves both protocols.

    clean-fid passes `disp` to SciPy's matrix root, where newer versions have no such argument.
    """
    root = linalg.sqrtm
    monkeypatch.setattr(
        cleanfid,
        "linalg",
        SimpleNamespace(
            sqrtm=lambda matrix, disp=True: root(matrix) if disp else (root(matrix), 0.0)
        ),
    )
    a, b = (Keyed("test", 0).normal(name, torch.arange(400), (16,)).double() for name in ("a", "b"))
    b = 1.3 * b + 0.2
    moments = [(x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b)]
    assert fid(a, b) == pytest.approx(cleanfid.frechet_distance(*moments[0], *moments[1]), rel=1e-9)


def test_dinov2s_size_follows_from_its_weights(dinov2_file: Path) -> None:
    features = DINOv2(dinov2_file, CPU)(IMAGES)
    assert features.shape == (3, 384)
    assert not torch.allclose(features[0], features[1])


def test_foreign_weights_are_refused(tmp_path: Path, dinov2_file: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in EXTRACTORS:
        with pytest.raises(UsageError, match="holds other weights"):
            EXTRACTORS[name](tmp_path / "other.pth", CPU)
        with pytest.raises(UsageError, match=r"is not a file that torch\.save wrote"):
            EXTRACTORS[name](tmp_path / "text.pth", CPU)
        with pytest.raises(UsageError, match="there is no file"):
            EXTRACTORS[name](tmp_path / "nothing.pth", CPU)


class Boom:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_a_file_that_would_execute_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": Boom()}, tmp_path / "boom.pth")
    for name in EXTRACTORS:
        with pytest.raises(UsageError, match="holds a pickled print, and reading it"):
            EXTRACTORS[name](tmp_path / "boom.pth", CPU)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["inception", "inception-clean", "dinov2"])
def test_without_a_network_a_file_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(extractors.torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UsageError, match=r"cannot download .* give a local file as NAME=FILE"):
        EXTRACTORS[name](None, CPU)


def test_they_stand_beside_the_tasks_own(tiny: Task, dinov2_file: Path) -> None:
    extractor = DINOv2(dinov2_file, CPU)
    # A quick network, since another test covers the features.
    extractor.network = nn.Sequential(nn.AvgPool2d(56), nn.Flatten())
    split = tiny.split
    small = type(split)(
        type(split.train)(split.train.images[:24], split.train.labels[:24]),
        type(split.held_out)(split.held_out.images[:24], split.held_out.labels[:24]),
    )
    tiny.__dict__["split"] = small
    images = small.train.images[:20].repeat(2, 1, 1, 1)
    evaluator = Evaluator(tiny, lambda k: images, CPU, [extractor])
    metrics = evaluator.evaluate({0: images})
    assert metrics["fd_dinov2"].mean == pytest.approx(
        fid(extractor(images), extractor(small.train.images))
    )
    assert metrics["fd_dinov2"].identity["features"] == extractor.sha256
    assert metrics["fid"].identity["features"] == tiny.hashes["features"]
    assert metrics["fd_dinov2_floor"].n == 24
    caveat, own = evaluator.caveats(len(images))
    assert own.startswith("fid has 64 features but 40 samples and 24 held-out images and")
    assert caveat.startswith("fd_dinov2 has 48 features but 40 samples and 24 held-out images and")


def test_their_weights_are_in_the_run_id(tiny: Task, dinov2_file: Path) -> None:
    def asked(**more: object) -> str:
        return resolve(parse_config({"method": "teacher", "task": "tiny", **more})).run_id

    other = dinov2_file.with_name("other.pth")
    other.write_bytes(dinov2_file.read_bytes() + b"x")
    assert (
        len({asked(), *(asked(extra_features=f"dinov2={file}") for file in (dinov2_file, other))})
        == 3
    )
    assert parse_config(
        {"method": "teacher", "extra_features": "inception,dinov2=a.pth"}
    ).extra_features == ["inception", "dinov2=a.pth"]


@pytest.mark.parametrize(
    ("features", "complaint"),
    [
        ("dino", "did you mean dinov2"),
        ("dinov2=nowhere.pth", "there is no file of weights"),
        ("inception,inception", "names two networks of fid_inception: leave one out"),
        ("clip,clip-quickgelu", "names two networks of clip_score: leave one out"),
    ],
)
def test_what_is_refused_before_anything_runs(features: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        resolve(RunConfig(method="teacher", extra_features=features))


def test_samples_that_are_no_images_have_none(dinov2_file: Path) -> None:
    task = load_task("mixture")
    assert isinstance(task, MixtureTask)
    with pytest.raises(UsageError, match="samples of task mixture are none"):
        Evaluator(task, lambda k: torch.zeros(1), CPU, [DINOv2(dinov2_file, CPU)])
