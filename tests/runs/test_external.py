"""External samplers and samples: the same numbers, one record, and errors in one sentence."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from harness.cli.main import main
from harness.data.images import to_uint8
from harness.report.rows import load_records, rows_and_apart, rows_of
from harness.runs.build import Reference
from harness.runs.config import parse_config
from harness.runs.resolve import reference_of, resolve
from harness.runs.run import Run
from harness.tasks import Task

CPU = torch.device("cpu")
ARD = {"method": "ard", "task": "tiny", "num_steps": 2, "options": {"history_layers": 2}}


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def evaluate(folder: Path, *words: object) -> dict[str, Any]:
    done = call(
        "evaluate", *words, "--task", "tiny", "--results", folder, "--device", "cpu", "--json"
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def teachers(tiny: Task, tmp_path: Path) -> tuple[Tensor, Any]:
    """The reference's samples of noise set 0, and its record."""
    run = Run(reference_of(tiny), tmp_path / "inside", CPU)
    return Reference(tiny, CPU).samples(0), run.execute()


def save(path: Path, images: Tensor, labels: Tensor | None = None, **changes: Any) -> Path:
    arrays = (
        {"arr_0": to_uint8(images).permute(0, 2, 3, 1).numpy()}
        | ({} if labels is None else {"arr_1": labels.numpy()})
        | changes
    )
    np.savez(path, **arrays)
    return path


def test_a_sample_file_has_the_numbers_of_its_samples(
    tiny: Task, teachers: tuple[Tensor, Any], tmp_path: Path
) -> None:
    images, record = teachers
    file = save(tmp_path / "theirs.npz", images, tiny.evaluation_inputs(0)[1].labels)
    found = evaluate(
        tmp_path / "out", "--samples", file, "--num-steps", 4, "--stated", "2 GPU days"
    )
    for name in ("fid", "kid", "label_agreement", "recall", "fid_floor"):
        assert found["metrics"][name]["values"]["0"] == pytest.approx(
            record.metrics[name].values[0], rel=1e-6
        ), name
        assert found["metrics"][name]["identity"] == record.metrics[name].identity
    assert "distance_to_teacher" not in found["metrics"]
    assert (found["method"], found["cost"], found["flags"]) == (
        "theirs",
        None,
        ["not trained here; bill as stated: 2 GPU days"],
    )


def test_without_labels_what_needs_them_is_left_out(
    teachers: tuple[Tensor, Any], tmp_path: Path
) -> None:
    found = evaluate(tmp_path / "out", "--samples", save(tmp_path / "theirs.npz", teachers[0]))[
        "metrics"
    ]
    assert "fid" in found
    assert not {"label_agreement", "class_diversity"} & found.keys()


def test_it_stands_in_the_table_beside_ours_if_n_is_equal(
    tiny: Task, teachers: tuple[Tensor, Any], tmp_path: Path
) -> None:
    images, labels = teachers[0], tiny.evaluation_inputs(0)[1].labels
    evaluate(tmp_path / "inside", "--samples", save(tmp_path / "theirs.npz", images, labels))
    assert {row.label for row in rows_of(load_records(tmp_path / "inside"))} == {
        "teacher",
        "theirs",
    }
    assert "theirs" in call("report", tmp_path / "inside").output
    fewer = save(tmp_path / "fewer.npz", images[:30], labels[:30])
    done = call(
        "evaluate",
        "--samples",
        fewer,
        "--task",
        "tiny",
        "--results",
        tmp_path / "inside",
        "--device",
        "cpu",
    )
    assert "these are 30 samples, but rows of tiny have 40" in done.stderr
    records = load_records(tmp_path / "inside")
    assert {row.label for row in rows_of(records)} == {"teacher", "theirs"}
    (apart,) = rows_and_apart(records)[1]
    assert (apart.record.method, apart.reason) == ("fewer", "n 30 instead of 40")
    done = call("report", tmp_path / "inside")
    assert done.exit_code == 0
    assert "n 30 instead of 40" in done.stdout


def test_a_function_is_evaluated_on_the_tasks_noise(
    tiny: Task, teachers: tuple[Tensor, Any], tmp_path: Path
) -> None:
    sampler = Reference(tiny, CPU).sampler
    module = types.ModuleType("somebodys_work")
    module.sample = lambda x_T, labels: sampler(
        x_T, type(tiny.evaluation_inputs(0)[1])(labels), None
    )  # type: ignore[attr-defined, arg-type]
    sys.modules["somebodys_work"] = module
    found = evaluate(
        tmp_path / "out",
        "--callable",
        "somebodys_work:sample",
        "--num-steps",
        4,
        "--name",
        "theirs",
    )
    assert found["metrics"]["fid"]["values"].keys() == {"0", "1"}
    assert found["metrics"]["fid"]["values"]["0"] == pytest.approx(
        teachers[1].metrics["fid"].values[0], rel=1e-6
    )
    assert found["metrics"]["distance_to_teacher"]["values"]["0"] == 0


def test_a_students_weights_are_sampled_as_the_method_does(tiny: Task, tmp_path: Path) -> None:
    run = Run(resolve(parse_config({**ARD, "budget": "steps=3"})), tmp_path / "inside", CPU)
    record = run.execute()
    file = run.folder / "student.safetensors"
    found = evaluate(
        tmp_path / "out",
        "--student",
        file,
        "--method",
        "ard",
        "--num-steps",
        2,
        "--history-layers",
        2,
        "--stated",
        "free",
    )
    assert found["metrics"]["fid"]["values"]["0"] == record.metrics["fid"].values[0]
    assert found["cost"]["macs_per_sample"] == record.cost.macs_per_sample
    assert found["cost"]["training"] is None
    singular, stated = found["flags"]
    assert singular.startswith("fid has 64 features but 40 samples")
    assert stated == "not trained here; bill as stated: free"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "give one of --samples, --student, --callable and --geneval-results"),
        (["--samples", "a.npz", "--callable", "a:b"], "give one of"),
        (["--samples", "nowhere.npz"], "cannot read nowhere.npz: No such file"),
        (
            ["--callable", "nothing_like_it:f"],
            "cannot be loaded (No module named 'nothing_like_it')",
        ),
        (["--callable", "json:nothing"], "cannot be loaded"),
        (["--student", "nowhere.safetensors"], "there is no file of weights"),
        (
            ["--student", "nowhere.safetensors", "--method", "step-distillation"],
            "there is no file of weights nowhere.safetensors",
        ),
    ],
)
def test_what_cannot_be_evaluated(
    words: list[str], complaint: str, tiny: Task, tmp_path: Path
) -> None:
    done = call("evaluate", *words, "--task", "tiny", "--results", tmp_path)
    assert done.exit_code == 2
    assert complaint in done.output


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"arr_0": np.zeros((4, 8, 8, 3), np.uint8)},
            "holds pictures of 8 x 8 with 3 channels, but task tiny needs 8 x 8 with 1",
        ),
        ({"arr_0": np.zeros((4, 8, 8, 1), np.float32)}, "arr_0 is float32"),
        ({"arr_1": np.array([0, 10] * 10)}, "arr_1 should hold 20 labels from 0 to 9"),
        ({"arr_1": np.array([0, 1])}, "arr_1 should hold 20 labels"),
        ({"arr_0": np.zeros((4, 8, 8, 1), np.uint8)}, "holds 4 samples, but task tiny needs"),
        ({"arr_0": np.array([object()])}, "is not a file of samples"),
    ],
)
def test_sample_files_that_do_not_fit(
    changes: dict[str, Any], complaint: str, tiny: Task, tmp_path: Path
) -> None:
    file = save(tmp_path / "theirs.npz", torch.zeros(20, 1, 8, 8), **changes)
    done = call("evaluate", "--samples", file, "--task", "tiny", "--results", tmp_path)
    assert (done.exit_code, complaint in done.output) == (2, True), done.output


def test_too_few_samples(tiny: Task, tmp_path: Path) -> None:
    done = call(
        "evaluate",
        "--samples",
        save(tmp_path / "few.npz", torch.zeros(10, 1, 8, 8)),
        "--task",
        "tiny",
        "--results",
        tmp_path,
    )
    assert (done.exit_code, "holds 10 samples, but task tiny needs at least 20" in done.output) == (
        2,
        True,
    )


def test_files_that_are_no_archive(tiny: Task, tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros((4, 8, 8, 1), np.uint8))
    np.savez_compressed(
        tmp_path / "damaged.npz", arr_0=np.arange(40_000, dtype=np.uint8).reshape(-1, 8, 8, 1)
    )
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    (tmp_path / "damaged.npz").write_bytes(content)
    for name in ("array.npy", "damaged.npz"):
        done = call(
            "evaluate", "--samples", tmp_path / name, "--task", "tiny", "--results", tmp_path
        )
        assert (done.exit_code, "is not a file of samples" in done.output) == (2, True), done.output


def test_a_function_whose_samples_are_not_finite(tiny: Task, tmp_path: Path) -> None:
    module = types.ModuleType("not_finite")
    module.sample = lambda x_T, labels: x_T / 0  # type: ignore[attr-defined]
    sys.modules["not_finite"] = module
    done = call(
        "evaluate", "--callable", "not_finite:sample", "--task", "tiny", "--results", tmp_path
    )
    assert (done.exit_code, "samples of noise set 0 are not finite" in done.output) == (3, True), (
        done.output
    )


def test_a_function_of_another_shape(tiny: Task, tmp_path: Path) -> None:
    module = types.ModuleType("other_shape")
    module.sample = lambda x_T, labels: x_T[:, :, :4]  # type: ignore[attr-defined]
    sys.modules["other_shape"] = module
    done = call(
        "evaluate", "--callable", "other_shape:sample", "--task", "tiny", "--results", tmp_path
    )
    assert done.exit_code == 2
    assert "gives (16, 1, 4, 8) for noise (16, 1, 8, 8)" in done.output
