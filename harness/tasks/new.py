"""Writes a task's file for data and a teacher that a person has, with a comment on each entry."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

from harness.errors import UsageError
from harness.files import write_text
from harness.networks.backbones import depth_of
from harness.networks.checkpoints import Teacher, write_teacher
from harness.tasks.adopt import UNKNOWN, check_free, teacher_entries, weights_file
from harness.tasks.edit import entry_text
from harness.tasks.load import load_task, spec_of
from harness.tasks.task import Task

TOKENS = 64
"""Most tokens of a network that is trained here."""
PUBLISHED_SCALE = 1.5
"""Guidance of a teacher from others, as DiT's and SiT's tables have it."""
ARD_LAYERS = 6
"""Layers with history by ARD's default."""
COPIED = ("trajectories", "evaluation", "reference", "batch_size", "budgets")
"""Entries that come from the task that a new one is like."""
COMMENTS = {
    "name": "Any entry can be changed before the first run. A later change makes new runs.",
    "data": "The images: [channels, height, width] and the number of classes. What is not held out "
    "is also the reference of FID.",
    "network": "The teacher's network. `size: DiT-S/2` would stand for depth, hidden_size, "
    "num_heads and patch_size.",
    "schedule": "vp is DiT's noise schedule, flow that of SiT and of flow matching.",
    "prediction_type": "What the network predicts: eps, v or x_0.",
    "guidance": "Guidance of the teacher in every table; students sample without. `channels` are "
    "the leading ones that are guided, as the authors of DiT do; without it all are.",
    "guidance_scan": "Scales that `harness teacher train` tries with a teacher that it trains.",
    "trajectories": "What students learn from: the teacher's paths. They take {disk} on disk.",
    "evaluation": "N samples for each of several sets of noise, the same for all methods. "
    "`harness describe digits` shows the other choices.",
    "reference": "The row beside which every other one stands.",
    "batch_size": "Samples in a training step of a student.",
    "autoencoder": "What decodes latents to images: a latent is (z - shift) x scaling.",
    "defaults": "Options of methods on this task: ARD's history in half of the layers.",
    "budgets": "Named lengths of training; `--budget table` is for results that are shown.",
}
"""What stands above an entry."""


def new_task(
    folder: Path,
    name: str,
    data: dict[str, Any],
    teacher: Teacher | None,
    like: str,
    autoencoder: dict[str, Any] | None = None,
) -> Task:
    """Writes `NAME.yaml` and the teacher's weights, and loads the task to check both.

    Args:
        folder: where to write.
        data: the entry `data`.
        teacher: a teacher from others; None leaves it to `harness teacher train`.
        like: the task with the numbers of trajectories, evaluation and training.
        autoencoder: the entry `autoencoder`, for latents.

    Returns:
        The new task.

    Raises:
        UsageError: if files exist already, or if teacher and data do not fit each other.
    """
    model = load_task(like)
    _check(teacher, model)
    path = folder / f"{name}.yaml"
    content = _content(name, data, teacher, model, autoencoder)
    source = "this teacher" if teacher else "this network"
    draft = Task(spec_of(content, f"{source} does not suit the data"), folder)
    _suit_size(content, draft)
    check_free(path)
    if teacher is not None:
        weights = folder / content["teacher"]["file"]
        check_free(weights)
        content["teacher"]["sha256"] = write_teacher(teacher, weights)
    write_text(path, _text(content, teacher))
    return load_task(str(path))


def _check(teacher: Teacher | None, like: Task) -> None:
    """Raises UsageError for a teacher that needs prompts, and for a task without a recipe."""
    if not like.network_teacher:
        raise UsageError(f"--like {like.spec.name} has no trained teacher: give another task")
    if teacher is not None and teacher.conditioned_on_text:
        raise UsageError(
            f"{teacher.facts['source']} needs prompts, which a new task does not have: write the "
            "entry `prompts` into a task's file, then harness teacher import --task FILE.yaml"
        )


def _content(
    name: str,
    data: dict[str, Any],
    teacher: Teacher | None,
    like: Task,
    autoencoder: dict[str, Any] | None,
) -> dict[str, Any]:
    """The entries of a new task, in order."""
    spec = like.spec.model_dump(mode="json")
    made = (
        teacher_entries(teacher, weights_file(name, "teacher"), UNKNOWN)
        if teacher
        else _trained_here(name, data, spec)
    )
    what = "a teacher from others" if teacher else "a teacher that is trained here"
    return {
        "name": name,
        "version": 1,
        "summary": f"{data.get('path', data['set'])}, {count(data['num_classes'])}, and {what}",
        "data": data,
        **made,
        "guidance": _guidance(teacher),
        "guidance_scan": spec["guidance_scan"],
        "features": _features(name, data, spec),
        **({"autoencoder": autoencoder} if autoencoder else {}),
        **{entry: spec[entry] for entry in COPIED},
        **_defaults(made["network"]),
    }


def count(classes: int) -> str:
    """A number of classes in words."""
    return "1 class" if classes == 1 else f"{classes} classes"


def _trained_here(name: str, data: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Network and training of a teacher of the other task's width and depth."""
    channels, height, width = data["shape"]
    sizes = {key: like["network"][key] for key in ("hidden_size", "depth", "num_heads")}
    network = {
        "image_size": height if height == width else [height, width],
        "patch_size": patch_size(height, width),
        "in_channels": channels,
        **sizes,
        "num_classes": data["num_classes"],
    }
    training = like["teacher"]["training"]
    return {
        "network": network,
        "schedule": like["schedule"],
        "prediction_type": like["prediction_type"],
        "teacher": {"file": weights_file(name, "teacher"), "training": _short(training)},
    }


def _defaults(network: dict[str, Any]) -> dict[str, Any]:
    """ARD's history in half of the layers, if these are too few for its default."""
    layers = depth_of(network) // 2
    return {} if layers >= ARD_LAYERS else {"defaults": {"ard": {"history_layers": layers}}}


def patch_size(height: int, width: int) -> int:
    """The smallest side of patches, from 2 on, that makes at most 64 tokens of an image."""
    for patch in range(2, min(height, width) + 1):
        if height % patch == width % patch == 0 and height * width // patch**2 <= TOKENS:
            return patch
    return 1


def _short(training: dict[str, Any]) -> dict[str, Any]:
    """A recipe of training without the defaults."""
    idle = {"precision": "fp32", "compile": False, "options": {}}
    return {key: value for key, value in training.items() if idle.get(key) != value}


def _guidance(teacher: Teacher | None) -> dict[str, Any]:
    if teacher is None or not teacher.num_classes:
        return {"scale": 1.0}
    latents = teacher.network.get("learn_sigma") and teacher.shape[0] == 4
    return {"scale": PUBLISHED_SCALE, **({"channels": 3} if latents else {})}


def _features(name: str, data: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The other task's network for the same set; Inception for images without classes."""
    if data["set"] == like["data"]["set"]:
        return {"file": like["features"]["file"], "sha256": like["features"]["sha256"]}
    if data["num_classes"] == 1:
        return {"kind": "inception"}
    training = _short(like["features"]["training"])
    return {"file": weights_file(name, "features"), "training": training}


def _suit_size(content: dict[str, Any], draft: Task) -> None:
    """Keeps subsets within the images that there are."""
    evaluation, split = content["evaluation"], draft.split
    most = min(len(split.train), len(split.held_out), evaluation["samples"])
    evaluation["kid_subset_size"] = min(evaluation["kid_subset_size"], most)
    if (neighbours := evaluation.get("neighbours")) and neighbours > len(split.train):
        evaluation["neighbours"] = None
    content["evaluation"] = {k: v for k, v in evaluation.items() if v is not None}


def _text(content: dict[str, Any], teacher: Teacher | None) -> str:
    """The file: entries with comments."""
    comments = {**COMMENTS, **_of_networks(content, teacher)}
    comments["trajectories"] = comments["trajectories"].format(disk=_disk(content))
    lines = list[str]()
    for name, value in content.items():
        lines += [f"# {line}" for line in wrap(comments.get(name, ""), 98)]
        lines.append(entry_text(name, value))
    return "\n".join(lines) + "\n"


def _of_networks(content: dict[str, Any], teacher: Teacher | None) -> dict[str, str]:
    """Comments on the two networks."""
    train = f"`harness teacher train --task {content['name']}.yaml` makes it and adds its sha256."
    reread = f"`harness teacher import CHECKPOINT --task {content['name']}.yaml`"
    features = content["features"]
    found = (
        "A network that the package has."
        if features.get("sha256")
        else train
        if "training" in features
        else "Its weights are torch-fidelity's file, in torch's hub folder."
    )
    return {
        "teacher": f"From others. {reread} puts another one here." if teacher else train,
        "features": f"The network whose features judge samples. {found} `kind: inception` or "
        "`kind: dinov2` take published ones.",
    }


def _disk(content: dict[str, Any]) -> str:
    """The size of the stored trajectories, in float32."""
    channels, height, width = content["data"]["shape"]
    recipe = content["trajectories"]
    numbers = recipe["count"] * (2 * recipe["steps"] + 1) * channels * height * width
    return f"{4 * numbers / 1e6:,.0f} MB" if numbers < 2.5e8 else f"{4 * numbers / 1e9:,.1f} GB"
