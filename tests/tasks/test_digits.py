"""The shipped digits task: its files are what its cards say, and its teacher draws digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from harness.cli.options import DEFAULT_TASK
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import few_step_levels
from harness.errors import UsageError
from harness.files import file_hash
from harness.metrics.features import classify
from harness.metrics.fidelity import label_agreement
from harness.runs.config import RunConfig, parse_options
from harness.runs.teacher_training import features_quality
from harness.solvers import DDIM, sample
from harness.tasks import borrows, load_task, task_names
from harness.tasks.spec import Training

CPU = torch.device("cpu")
COMPLETE = [name for name in task_names() if not load_task(name).spec.sources]
"""Tasks that need no file but those of the package, and data that anybody can download."""
WITH_TEACHER = [name for name in COMPLETE if load_task(name).network_teacher]
OWN_TEACHER = [name for name in WITH_TEACHER if not borrows(load_task(name), "teacher")]


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_cards_name_the_files_that_ship(name: str) -> None:
    task, size = load_task(name), 0
    for weights in (task.trained("features"), task.trained("teacher")):
        path = task.path(weights)
        card = yaml.safe_load(path.with_suffix(".yaml").read_text())
        assert card["sha256"] == weights.sha256 == file_hash(path)
        assert Training(**card["training"]) == weights.training
        size += path.stat().st_size
    assert size <= 8e6


@pytest.mark.parametrize("name", task_names())
def test_tuned_defaults_are_options(name: str) -> None:
    for method, values in load_task(name).spec.defaults.items():
        plain, tuned = (
            parse_options(method, {}).model_dump(),
            parse_options(method, values).model_dump(),
        )
        changed = {option for option in plain if plain[option] != tuned[option]}
        # A protocol stands for several options.
        assert set(values) - changed == ({"protocol"} & set(values)), method
        assert changed <= set(values) or "protocol" in values, method


@pytest.mark.parametrize("name", OWN_TEACHER)
def test_the_guidance_is_the_scans_best(name: str) -> None:
    task = load_task(name)
    scan = yaml.safe_load(task.path(task.trained("teacher")).with_suffix(".yaml").read_text())[
        "quality"
    ]["guidance_scan"]
    assert list(scan) == task.spec.guidance_scan
    assert min(scan, key=lambda scale: scan[scale]["fid"]) == task.spec.guidance.scale


def test_teachers_of_two_kinds_share_data_network_and_features() -> None:
    """Only the teacher, its schedule, what it predicts and the tuned defaults differ."""
    flow, noise = load_task("digits").spec, load_task("digits-eps").spec
    assert (flow.schedule, flow.prediction_type) == ("flow", "v")
    assert (noise.schedule, noise.prediction_type) == ("vp", "eps")
    different = {name for name, value in flow if value != getattr(noise, name)}
    named = {"name", "like", "summary", "defaults"}
    assert different == {*named, "teacher", "schedule", "prediction_type"}


def test_the_default_task_has_the_better_teacher() -> None:
    """By the FIDs of the cards, at the tasks' guidance."""

    def fid(name: str) -> float:
        task = load_task(name)
        card = yaml.safe_load(task.path(task.trained("teacher")).with_suffix(".yaml").read_text())
        return float(card["quality"]["guidance_scan"][task.spec.guidance.scale]["fid"])

    assert RunConfig(method="ard").task == DEFAULT_TASK == "digits"
    assert fid("digits") < 1.3 < fid("digits-eps")


@pytest.mark.parametrize("name", COMPLETE)
def test_noise_sets_suffice_for_an_interval_of_their_own(name: str) -> None:
    """Noise sets are a random factor beside seeds, in tables five of them."""
    spec = load_task(name).spec
    assert spec.evaluation.noise_sets == spec.budgets["table"].noise_sets == 5


@pytest.mark.parametrize("name", ["imagenet256", "imagenet256-sit", "imagenet64"])
def test_imagenet_is_judged_as_in_the_papers(name: str) -> None:
    """ADM's protocol on 50,000 samples of drawn labels; latents of Stable Diffusion's scale."""
    task = load_task(name)
    judged = task.spec.evaluation
    assert (judged.samples, judged.noise_sets, judged.labels) == (50_000, 1, "drawn")
    assert (judged.rounding, judged.half_distances) == ("floor", True)
    assert task.spec.guidance.scale == 1.5
    if task.latent:
        assert task.spec.guidance.channels == 3
        assert task.spec.autoencoder is not None
        assert task.spec.autoencoder.scaling == 0.18215


def test_the_reference_of_imagenet_is_dits_respacing() -> None:
    """DDIM at levels round(999 i / 24), of which level k is t = (k + 1) / 1000."""
    reference = load_task("imagenet256").spec.reference
    assert reference.num_steps == 25
    assert reference.options["levels"] == [round(999 * i / 24) + 1 for i in range(24)]


def test_a_cutoff_of_six_is_one() -> None:
    assert load_task("digits").network_options["depth"] > 6


def test_features_are_as_good_as_their_card_says() -> None:
    """To one image of the 360, whose label rounding may decide on another CPU."""
    task = load_task("digits")
    card = yaml.safe_load(task.path(task.spec.features).with_suffix(".yaml").read_text())
    assert features_quality(task, CPU) == pytest.approx(card["quality"], rel=5e-3)
    assert card["quality"]["held_out_accuracy"] > 0.97


@pytest.mark.parametrize("name", ["digits", "digits-eps"])
def test_the_teacher_draws_the_digits_asked_for(name: str) -> None:
    task = load_task(name)
    x_T, cond = task.evaluation_inputs(0)
    with torch.no_grad():
        samples = sample(DDIM(), task.teacher(CPU), x_T[:100], few_step_levels(24), cond[:100])
    logits = classify(task.classifier(CPU), samples)[1]
    assert label_agreement(logits, cond.labels[:100]) > 0.9
    assert label_agreement(logits, (cond.labels[:100] + 1) % 10) < 0.1


def test_evaluation_noise_sets_are_disjoint_and_balanced() -> None:
    task = load_task("digits")
    sets = [task.evaluation_inputs(k) for k in range(task.spec.evaluation.noise_sets)]
    noise = torch.cat([noise.flatten(1) for noise, _ in sets])
    assert len(noise.unique(dim=0)) == len(noise)
    for _, cond in sets:
        assert cond.labels.bincount().tolist() == [task.spec.evaluation.samples // 10] * 10


def test_no_student_trains_on_the_evaluations_noise() -> None:
    task = load_task("digits")
    index = torch.arange(task.recipe.count)
    trained = Keyed("trajectory", task.recipe.seed).normal("x_T", index, task.shape).flatten(1)
    evaluated = torch.cat(
        [task.evaluation_inputs(k)[0].flatten(1) for k in range(task.spec.evaluation.noise_sets)]
    )
    assert len(torch.cat([trained, evaluated]).unique(dim=0)) == len(trained) + len(evaluated)


def test_an_unknown_task_names_the_near_one() -> None:
    with pytest.raises(UsageError, match="did you mean digits"):
        load_task("digit")


def test_a_tasks_file_is_found_by_its_bare_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos.yaml").touch()
    with pytest.raises(UsageError, match="is here: give photos"):
        load_task("photos")


DIGESTS = {
    "scenes": (1, "c2f18942ab8b4f84"),
    "digits": (2, "ccda8ec6dee6cb01"),
    "digits-eps": (2, "ff8a4424c82387f8"),
    "digits-guided": (3, "d0a2fa2680bebe34"),
    "fashion-mnist": (4, "a865deaaff4e83a8"),
    "mixture": (2, "86c7ede937e7818c"),
    "cifar10": (1, "59119868671ac688"),
    "imagenet256": (1, "4f59c2dd7c01d331"),
    "imagenet256-sit": (1, "e0061c8873eec765"),
    "imagenet64": (1, "9882a44d1fbea0e2"),
    "pixart-1024": (1, "6dd3c73dbc6c5e5f"),
    "sd3-1024": (1, "7fdd35954cb23663"),
    "flux-1024": (1, "d548d1ea1bdbaed6"),
}


@pytest.mark.parametrize("name", task_names())
def test_numbers_do_not_change_without_a_new_version(name: str) -> None:
    """A change of a task needs a new version, with its digest here.

    Budgets are names for numbers of steps.
    """
    task = load_task(name)
    assert (task.spec.version, task.digest[:16]) == DIGESTS[name]
