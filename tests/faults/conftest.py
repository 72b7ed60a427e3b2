"""The place of a scenario, for tests that kill its command or let it fail."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_scenarios import Place
from injection import forked_children

from harness.metrics.latency import Latency
from harness.training.trainer import Trainer


class Drawn:
    """Stands for a figure."""

    @staticmethod
    def savefig(path: Path, format: str) -> None:
        path.write_text(format)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Place]]:
    """Finds the place of a scenario at its beginning.

    Nothing is timed, estimated, drawn or claimed, and each training step is saved.
    """
    if torch.cuda.is_available():
        pytest.skip("a process that has met a GPU cannot be forked")
    places = dict[str, Place]()
    with pytest.MonkeyPatch.context() as patch:
        patch_for_speed(patch)

        def find(name: str) -> Place:
            made = places.setdefault(name, Place(tmp_path_factory.mktemp("place"), name))
            patch.setenv("HARNESS_CACHE", str(made.work / "cache"))
            forked_children(patch, Path(os.devnull))
            made.reset() if made.expected else made.make()
            return made

        yield find


def patch_for_speed(patch: pytest.MonkeyPatch) -> None:
    """What has no part in keeping files takes no time."""
    patch.setattr("harness.runs.plan.macs_a_pass", None)  # so that no estimate is made
    patch.setattr("harness.runs.preview.preview", None)
    patch.setattr(
        "harness.runs.evaluation.interleaved_latency", lambda *args, **more: Latency(1.0, 1.0, 1.0)
    )
    patch.setattr("harness.report.publish.claims_section", lambda records: [])
    for panels in ("_wide_panels", "_small_panels"):
        patch.setattr(f"harness.report.pictures.{panels}", lambda plot: Drawn())
    init = Trainer.__init__

    def saving(self: Trainer, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        self.settings = dataclasses.replace(self.settings, checkpoint_seconds=-1.0)

    patch.setattr(Trainer, "__init__", saving)
