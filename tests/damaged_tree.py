"""A complete tiny run with every kind of file that the harness reads, and how each is read."""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from damage import Kind
from foreign import official
from inprocess import driver
from PIL import Image
from searched import content as search_content
from torch import Tensor
from written import record as written_record

from harness.data.arrays import Arrays
from harness.data.encode import Encoding, encode
from harness.data.images import ImageSet
from harness.data.latents import Latents
from harness.data.sets import Wanted, load_split
from harness.data.trajectories import open_store
from harness.documents import read_yaml
from harness.files import digest, file_hash, read_tensors, tensors_digest
from harness.networks.checkpoint_files import read_state_dict
from harness.records import publish_records, published_records
from harness.report.baseline import baseline_of, read_baseline, write_baseline
from harness.report.claims import read_claims
from harness.report.rows import load_records
from harness.report.status import summary, working
from harness.runs.build import Reference
from harness.runs.config import parse_config
from harness.runs.export import export
from harness.runs.external import read_samples
from harness.runs.locks import held
from harness.runs.resolve import find_parent, resolve
from harness.runs.run import Run
from harness.runs.student_file import student_config
from harness.sweeps.child import MILESTONES_FILE, Pruning, milestones
from harness.sweeps.database import known_study, lines_of
from harness.sweeps.outcome import outcome_of, read_outcomes, write_outcome
from harness.sweeps.search import Searcher
from harness.sweeps.study import study_plans
from harness.sweeps.sweep import expand
from harness.tasks import load_task
from harness.tasks.task_files import FOLDER as SHIPPED
from harness.training.case import Case, weights
from harness.training.power_average import average_of_width
from harness.training.settings import Execution
from harness.training.tiny_task import tiny_spec, tiny_text_spec

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
LATENT = (2, 4, 4)
COUNT = 24
STUDENT = "step-distillation"
SWEEP = {
    "base": {"task": "tiny", "method": STUDENT, "options": {"lr": 1e-3}},
    "axes": {"num_steps": [1, 2]},
    "seeds": [0, 1],
}


class Halves:
    """An encoder: latents are halved images of two channels."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 2).expand(-1, 2, -1, -1)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)


def write_images(folder: Path) -> None:
    """The same pictures as two archives, a tar file and a folder of PNG."""
    images, labels = pixels(), np.arange(COUNT) % 3
    folder.mkdir()
    np.savez(folder / "stored.npz", arr_0=images, arr_1=labels)
    np.savez_compressed(folder / "packed.npz", arr_0=images, arr_1=labels)
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            stream = io.BytesIO()
            Image.fromarray(image[:, :, 0]).save(stream, "png")
            for name, part in (("png", stream.getvalue()), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{number:04}.{name}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
            if number < 4:
                place = folder / "pngs" / f"{label}" / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(stream.getvalue())


class Place:
    """The folder of the tree, with the readers of its files."""

    def __init__(self, folder: Path):
        self.folder, self.results = folder, folder / "results"
        self.tasks, self.images = folder / "tasks", folder / "images"

    def make(self) -> None:
        """Makes every file once."""
        (self.tasks / "weights").mkdir(parents=True)
        (self.tasks / "text").mkdir()
        (self.tasks / "tiny.yaml").write_text(yaml.safe_dump(tiny_spec(self.tasks / "weights")))
        text = yaml.safe_dump(tiny_text_spec(self.tasks / "text"))
        (self.tasks / "tiny-text.yaml").write_text(text)
        self._copy_scenes()
        write_images(self.images)
        for name in ("stored", "packed", "tars", "pngs"):
            self.split(name)
        self.encode()
        self.store()
        self.reference()
        self._make_run()
        self._make_search()
        self._make_checkpoint()
        torch.save({"ema": official(), "step": 7}, self.folder / "DiT.pt")
        state = {"model": official()}
        torch.save(state, self.folder / "old.pt", _use_new_zipfile_serialization=False)
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
        (self.folder / "search.yaml").write_text(yaml.safe_dump(search_content(trials=2)))
        (self.folder / "claims.yaml").write_bytes(Path("baselines/claims.yaml").read_bytes())

    def _copy_scenes(self) -> None:
        spec = read_yaml(SHIPPED / "scenes.yaml")
        (self.tasks / "scenes.yaml").write_text(yaml.safe_dump(spec))
        encoder = "weights/scenes-encoder.safetensors"
        (self.tasks / encoder).write_bytes((SHIPPED / encoder).read_bytes())

    def _make_run(self) -> None:
        asked = {"method": STUDENT, "task": "tiny", "num_steps": 2, "budget": "steps=2"}
        self.resolved = resolve(parse_config({**asked, "noise_sets": 1}))
        execution = Execution(snapshots=1)
        run = Run(self.resolved, self.results, CPU, save="npz", execution=execution)
        made = run.execute()
        self.run_id, self.run = made.run_id, run.folder
        publish_records(self.folder / "published" / "tiny", [made, written_record()])
        write_baseline(self.folder / "baseline.json", baseline_of([made], "a command"))
        export(self.run_id, "safetensors", self.results, self.folder / "student", None)
        judge = Pruning(objective="fid", sign=1, medians={}).judge(self.run / MILESTONES_FILE)
        for part in (0.125, 0.25, 0.5):
            judge(part, {"fid": 10 / part})

    def _make_search(self) -> None:
        (self.plan,) = study_plans(search_content(trials=2), "here", self.results, CPU)
        study = Searcher(self.plan, self.results, CPU, driver(), say=lambda line: None).make()
        write_outcome(outcome_of(self.plan, study, []), self.results)

    def _make_checkpoint(self) -> None:
        self.case = Case(STUDENT, load_task("tiny"), self.folder)
        self.case.trainer(self.case.build(), self.folder / "stopped").train(until=5)

    # Readers

    def weights(self, task: str, part: str) -> str:
        return tensors_digest(getattr(load_task(task), part)(CPU).state_dict())

    def teacher(self) -> str:
        return tensors_digest(load_task("tiny").teacher(CPU).denoiser.network.state_dict())

    def prompts(self, task: str) -> str:
        conditions = load_task(task).conditions
        return tensors_digest({"text": conditions.prompts.text, "null": conditions.null.text})

    def split(self, name: str) -> tuple[str, str]:
        """What a set says of its content, and what it holds."""
        kinds = {"tars": "webdataset", "pngs": "folder"}
        path = {"stored": "stored.npz", "packed": "packed.npz"}.get(name, name)
        found = load_split(
            Wanted(kinds.get(name, "npz"), SHAPE, None, path=path, folder=self.images)
        )
        parts = {"train": found.train, "held out": found.held_out}
        said = digest([part.content() for part in parts.values()])
        images = {f"images {which}": part.images[:] for which, part in parts.items()}
        labels = {f"labels {which}": part.labels for which, part in parts.items()}
        return said, tensors_digest(images | labels)

    def encode(self, path: Path | None = None) -> None:
        labels = torch.arange(COUNT) % 3
        images = ImageSet(Arrays(pixels(), labels, SHAPE), labels)
        how = Encoding(LATENT, shard_size=8, batch_size=3)
        encode(images, Halves(), self.folder / "latents", how, {"autoencoder": "halves"})

    def latents(self) -> str:
        found = Latents(self.folder / "latents", LATENT)
        return tensors_digest({"latents": found[:], "labels": found.labels})

    def encoded(self) -> str:
        self.encode()
        return self.latents()

    def store(self) -> str:
        task = load_task("tiny")
        recipe = task.recipe
        store = open_store(recipe, task.teacher(CPU), CPU, shard_size=5, batch_size=5)
        path = store.batch(torch.arange(len(store)))
        return tensors_digest({"states": path.states, "predictions": path.predictions})

    def reference(self) -> str:
        return tensors_digest({"samples": Reference(load_task("tiny"), CPU).samples(0)})

    def resumed(self) -> str:
        """The weights after the second half of training."""
        method = self.case.build()
        folder = self.folder / "stopped"
        trainer = self.case.trainer(method, folder)
        trainer.train(until=7)
        return digest([tensors_digest(weights(method)), trainer.step, trainer.bill.images])

    def again(self, path: Path) -> None:
        """What a refused checkpoint asks for."""
        path.unlink()
        self.case.trainer(self.case.build(), self.folder / "stopped").train(until=5)

    def records(self) -> str:
        found = load_records(self.results)
        Run(self.resolved, self.results, CPU).finished_record()
        return digest(sorted((json.loads(one.model_dump_json()) for one in found), key=str))

    def published(self) -> list[str]:
        return [one.model_dump_json() for one in published_records(self.folder / "published")]

    def trials(self) -> list[dict[str, Any]]:
        study = known_study(self.plan, self.results)
        return [] if study is None else lines_of(self.plan, study)

    def outcomes(self) -> list[str]:
        return [one.model_dump_json() for one in read_outcomes(self.results)]

    def parent(self) -> str:
        task = load_task("tiny")
        output = self.resolved.cls.output(self.resolved.config, task)
        found = find_parent(self.run_id, self.results, task, output)
        return tensors_digest(read_tensors(found.weights, found.sha256))

    def average(self) -> str:
        return tensors_digest(average_of_width(self.run / "averages", 0.07))

    def exported(self) -> str:
        path = self.folder / "student" / "student.safetensors"
        config = student_config(path, {})
        return digest([config.model_dump(mode="json"), tensors_digest(read_tensors(path))])

    def saved(self) -> str:
        found = read_samples(self.run / "samples-0.npz", load_task("tiny"))
        whole = torch.cat(list(found.batches(16)))
        labels = found.labels if found.labels is not None else torch.empty(0)
        return tensors_digest({"pictures": whole, "labels": labels})

    def foreign(self, name: str) -> tuple[str, str]:
        path = self.folder / name
        return file_hash(path), tensors_digest(read_state_dict(path).tensors)

    def expanded(self) -> list[str]:
        found = expand(read_yaml(self.folder / "sweep.yaml"), str(self.folder / "sweep.yaml"))
        return [one.model_dump_json() for one in found]

    def plans(self) -> list[str]:
        path = self.folder / "search.yaml"
        content = read_yaml(path)
        if "search" not in content:  # then it is a file of plain runs
            return [one.model_dump_json() for one in expand(content, str(path))]
        return [plan.name for plan in study_plans(content, str(path), self.results, CPU)]

    def task_said(self) -> str:
        return load_task(str(self.tasks / "tiny.yaml")).digest

    def claims(self) -> list[str]:
        return [one.model_dump_json() for one in read_claims(self.folder / "claims.yaml")]

    def progress(self) -> int:
        """Whether the state of a results folder can be shown."""
        with held(self.results, self.run_id):
            summary(self.results)
            return len(working(self.results))

    def kinds(self) -> dict[str, Kind]:
        """Every kind of file, by name."""
        refused, rebuilt, both = ("refused",), ("rebuilt",), ("refused", "rebuilt")
        pairs: Any = {"outcomes": (*both, "told"), "told": self._said_otherwise}
        mine: Any = {"outcomes": (*both, "told"), "told": lambda found, expected: True}
        return {
            "teacher": Kind(("tasks/weights/teacher.safetensors",), self.teacher),
            "classifier": Kind(
                ("tasks/weights/features.safetensors",), partial(self.weights, "tiny", "classifier")
            ),
            "prompt embeddings": Kind(
                ("tasks/text/prompts0.safetensors",), partial(self.prompts, "tiny-text")
            ),
            "text encoder": Kind(
                ("weights/scenes-encoder.safetensors",), partial(self.prompts, "scenes")
            ),
            "npz": Kind(("images/stored.npz",), partial(self.split, "stored"), **pairs),
            "compressed npz": Kind(("images/packed.npz",), partial(self.split, "packed"), **pairs),
            "tar shards": Kind(("images/tars/0.tar",), partial(self.split, "tars"), **pairs),
            "PNG": Kind(("images/pngs/0/0.png",), partial(self.split, "pngs"), **pairs),
            "index of a tar file": Kind(("cache/indexes/*",), partial(self.split, "tars"), rebuilt),
            "unpacked npz": Kind(("cache/unpacked/*",), partial(self.split, "packed"), rebuilt),
            "digest of images": Kind(
                ("cache/contents/*/content.json",), partial(self.split, "tars"), rebuilt
            ),
            "latents": Kind(
                ("latents/*.safetensors", "latents/manifest.json", "latents/verified.json"),
                self.latents,
                both,
                remedy=self.encode,
            ),
            "plan of latents": Kind(("latents/plan.json",), self.encoded, both),
            "trajectories": Kind(
                ("cache/trajectories/*/*.safetensors", "trajectories/*/*.json"), self.store, rebuilt
            ),
            "samples and features": Kind(
                ("cache/samples/*/samples.safetensors",), self.reference, rebuilt
            ),
            "checkpoint": Kind(
                ("stopped/checkpoint/state.pt",), self.resumed, both, remedy=self.again
            ),
            "record": Kind((f"runs/{self.run_id}/record.json",), self.records, both),
            "published records": Kind(
                ("published/tiny/records.jsonl", "published/tiny/shared.json"),
                self.published,
                both,
            ),
            "student": Kind((f"runs/{self.run_id}/student.safetensors",), self.parent, refused),
            "snapshots of averages": Kind(
                (f"runs/{self.run_id}/averages/*.safetensors",), self.average, refused
            ),
            "exported student": Kind(("student/student.safetensors",), self.exported, refused),
            "saved samples": Kind((f"{self.run_id}/samples-0.npz",), self.saved, both),
            "milestones": Kind(
                (f"runs/{self.run_id}/{MILESTONES_FILE}",),
                lambda: milestones(self.run / MILESTONES_FILE),
                ("rebuilt", "told"),
                told=lambda found, expected: found.items() < expected.items(),
            ),
            "log": Kind((f"runs/{self.run_id}/run.log",), self.progress, rebuilt),
            "database of a search": Kind(
                ("results/harness.db",),
                self.trials,
                (*both, "told"),
                told=lambda found, expected: found == [],
            ),
            "outcome of a search": Kind(("searches/*.json",), self.outcomes, both),
            "baseline": Kind(
                ("baseline.json",), lambda: read_baseline(self.folder / "baseline.json"), both
            ),
            "others' checkpoint": Kind(("DiT.pt",), partial(self.foreign, "DiT.pt"), **pairs),
            "others' old checkpoint": Kind(("old.pt",), partial(self.foreign, "old.pt"), **pairs),
            "sweep file": Kind(("sweep.yaml",), self.expanded, **mine),
            "search file": Kind(("search.yaml",), self.plans, **mine),
            "task file": Kind(("tasks/tiny.yaml",), self.task_said, **mine),
            "claims": Kind(("claims.yaml",), self.claims, **mine),
        }

    @staticmethod
    def _said_otherwise(found: Any, expected: Any) -> bool:
        """Whether another content has another digest, which stands in each record."""
        return found[0] != expected[0]
