"""Where a task's files are, and the SHA-256 of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from harness.data.geneval import metadata_of
from harness.data.prompt_table import prompts_of
from harness.errors import UsageError
from harness.files import data_folder, found_hash
from harness.networks.autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from harness.tasks.prompts import texts_hash, written
from harness.tasks.spec import (
    ClassifierFeatures,
    EncoderSpec,
    Part,
    PromptSpec,
    TaskSpec,
    Weights,
    WrittenPrompts,
)

FOLDER = Path(str(files("harness.tasks")))
"""The folder of the shipped tasks and their weights."""


def check_place(name: str, folders: Sequence[Path], task: str) -> None:
    """Raises UsageError for a file that lies in none of the folders that a task's files lie in.

    So a task from elsewhere neither reads nor replaces other files. Links count as what they are
    named, since whoever owns a folder may keep large files on another disk.
    """
    lexical = [Path(os.path.normpath((folder / name).absolute())) for folder in folders]
    if not any(
        path.is_relative_to(os.path.normpath(folder.absolute()))
        for path in lexical
        for folder in folders
    ):
        raise UsageError(
            f"task {task} names {name}, which lies outside its folder: put the file beside the "
            "task, or into the data folder, or put a link there"
        )


class TaskFiles:
    """The files that a task names.

    Args:
        folder: the first place to look; others are the shipped folder and the data folder.
    """

    def __init__(self, spec: TaskSpec, folder: Path | None = None):
        self.spec, self.folder = spec, folder

    @property
    def own_classifier(self) -> bool:
        """Whether the task's own classifier judges samples."""
        return isinstance(self.spec.features, ClassifierFeatures)

    def trained(self, part: Part) -> Weights:
        """The task's entry for a trained network. Raises UsageError if the task has none."""
        weights = getattr(self.spec, part)
        if weights is None:
            raise UsageError(f"task {self.spec.name} has no trained {part}: it is exact")
        if not isinstance(weights, Weights):
            raise UsageError(f"the {part} of task {self.spec.name} are {weights.kind}: not trained")
        return weights

    @property
    def features_hash(self) -> str:
        """SHA-256 of the feature network's weights file, or "none"."""
        if self.own_classifier:
            return self.made("features")
        if (features := self.spec.features) is None:
            return "none"
        return features.sha256 or found_hash(self.located(str(features.file)))

    @property
    def teacher_hash(self) -> str:
        """SHA-256 of the teacher's weights file."""
        return self.made("teacher")

    @cached_property
    def conditions_hash(self) -> str:
        """SHA-256 of the prompts and of what encodes them; empty for class labels."""
        prompts = self.spec.prompts
        if isinstance(prompts, WrittenPrompts):
            return texts_hash(self._sha256(prompts.encoder, "text encoder"))
        if prompts is None:
            return ""
        return prompts.sha256 or found_hash(self.path(prompts))

    @cached_property
    def judged_prompts(self) -> tuple[dict[str, Any], ...] | None:
        """What GenEval's files say of each prompt of evaluation; None where no words are known."""
        prompts = self.spec.prompts
        if isinstance(prompts, WrittenPrompts):
            return tuple(metadata_of(prompt) for prompt in written(judged=True))
        if prompts is None or not (path := self.path(prompts)).is_file():
            return None
        return tuple({**each.about, "prompt": each.text} for each in prompts_of(path)) or None

    def made(self, part: Part) -> str:
        """SHA-256 of a trained network.

        Raises UsageError if it is still to be trained, or missing where the task has no SHA-256.
        """
        return self._sha256(self.trained(part), part)

    def _sha256(self, weights: Weights, what: str) -> str:
        if weights.sha256 is not None:
            return weights.sha256
        if weights.training is None and not isinstance(weights, EncoderSpec):
            return found_hash(self.located(weights.file))
        raise UsageError(
            f"task {self.spec.name} has no {what} yet: harness teacher train "
            f"--task {self.spec.name}.yaml makes it and puts its sha256 into the file"
        )

    @property
    def _folders(self) -> list[Path]:
        """Where weights lie: beside the task, among the shipped ones, or in the data folder."""
        return [self.folder or FOLDER, FOLDER, data_folder()]

    def check_places(self) -> None:
        """Raises UsageError for weights or prompts that a task's file names outside its folders."""
        prompts = self.spec.prompts
        named = [
            self.spec.teacher,
            self.spec.features,
            prompts.encoder if isinstance(prompts, WrittenPrompts) else prompts,
        ]
        for found in named:
            if isinstance(found, Weights | PromptSpec):
                check_place(found.file, self._folders, self.spec.name)

    def path(self, weights: Weights | PromptSpec) -> Path:
        """The path of a file of weights; its card has the same name with `.yaml`.

        It lies beside the task, among the shipped ones, or in the data folder.
        """
        places = [folder / weights.file for folder in self._folders]
        return next((path for path in places if path.is_file()), places[0])

    def located(self, name: str) -> Path:
        """The path of a file or folder that does not ship: beside the task, or the data folder's.

        Raises UsageError if it is in neither.
        """
        if not Path(name).is_absolute():
            check_place(name, [self.folder or FOLDER, data_folder()], self.spec.name)
        places = [(self.folder or FOLDER) / name, data_folder() / name]
        for place in places:
            if place.exists():
                return place
        raise UsageError(
            f"task {self.spec.name} needs {name}, which is neither {places[0]} nor {places[1]}; "
            "--data-dir names the folder of the second"
        )

    @property
    def autoencoder_hash(self) -> str:
        """SHA-256 of the autoencoder's weights."""
        assert self.spec.autoencoder is not None
        stated, folder = self.spec.autoencoder.sha256, self.spec.autoencoder.folder
        return stated or found_hash(self.located(folder) / AUTOENCODER_WEIGHTS)

    @property
    def autoencoder_facts(self) -> dict[str, Any]:
        """SHA-256, scaling and shift of the autoencoder; no SHA-256 while its file is missing.

        Empty for a task that has none.
        """
        if (spec := self.spec.autoencoder) is None:
            return {}
        found: dict[str, Any] = {"scaling": spec.scaling, "shift": spec.shift}
        with suppress(UsageError):  # whoever decodes says that it is missing
            found["sha256"] = self.autoencoder_hash
        return found
