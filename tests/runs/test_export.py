"""Students out and back in: the metadata decide, and the diffusers pipeline equals our sampler."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from commands import Done, sentence
from tiny_runs import CPU, config, new_run
from written import record as written_record

from harness.cli.main import main
from harness.errors import UsageError
from harness.files import read_tensors, write_tensors
from harness.methods import Method
from harness.networks.checkpoint_files import STUDENT
from harness.records import Record, write_record
from harness.runs.build import build
from harness.runs.diffusers_folder import write_folder
from harness.runs.export import command_of
from harness.runs.resolve import Resolved, resolve
from harness.runs.student_file import facts_of, read_facts, student_config
from harness.solvers import sample
from harness.tasks import Task


def call(*words: object) -> Done:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert not isinstance(done.exception, Exception), done.exception
    return Done(done.exit_code, done.stdout, done.stderr)


@pytest.fixture
def made(tiny: Task, tmp_path: Path) -> tuple[Record, Path]:
    """The record and the folder of a short run."""
    run = new_run(tmp_path / "results", budget="steps=2", seed=3, batch_size=4)
    return run.execute(), run.folder


def student(method: str, task: str = "tiny", **options: Any) -> tuple[Resolved, Method]:
    """A student as it starts, which on the tiny task has random weights."""
    resolved = resolve(config(method=method, task=task, options=options, budget="steps=0"))
    return resolved, build(resolved, resolved.task.teacher(CPU), CPU)


def file_of(folder: Path, method: str = "ard", **options: Any) -> Path:
    """The file of a student as it starts."""
    resolved, built = student(method, **options)
    path = folder / "student.safetensors"
    facts = facts_of(resolved).model_copy(update={"run_id": folder.name})
    write_tensors(path, built.sampled_network.state_dict(), facts.metadata())
    return path


def test_a_student_comes_back_as_it_was(made: tuple[Record, Path], tmp_path: Path) -> None:
    record, folder = made
    done = call("student", "export", record.run_id, "--results", tmp_path / "results", "--json")
    files = [Path(path) for path in json.loads(done.out)]
    assert [path.name for path in files] == ["README.md", "student.safetensors"]
    words = ["--student", files[1], "--results", tmp_path / "out", "--device", "cpu", "--json"]
    found = json.loads(call("evaluate", *words).out)
    assert (found["method"], found["config"]["num_steps"]) == ("ard", 2)
    assert found["options"] == json.loads(record.model_dump_json())["options"]
    assert found["metrics"]["fid"]["values"]["0"] == record.metrics["fid"].values[0]
    kept = read_tensors(folder / "student.safetensors")
    assert all(torch.equal(v, kept[name]) for name, v in read_tensors(files[1]).items())
    refused = call("evaluate", *words, "--method", "ard", "--history-layers", 1)
    assert sentence(refused, 2) == (
        f"history_layers is 1, but {files[1]} is a student with history_layers 2: leave it out"
    )


def test_the_card_has_the_command_that_makes_the_run(
    made: tuple[Record, Path], tmp_path: Path
) -> None:
    record, folder = made
    results = tmp_path / "results"
    done = call("student", "export", folder, "--results", results, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert done.code == 0, done.err
    command = card.partition("## Made by\n\n```\n")[2].splitlines()[0]
    assert "--history-layers 2" in command
    dry = call(*command.split()[1:], "--results", results, "--device", "cpu", "--dry-run", "--json")
    assert json.loads(dry.out)["run_id"] == record.run_id
    for part in ("tags:\n- diffusion", "| fid |", record.hashes["teacher"], "seed 3"):
        assert part in card


def test_a_command_without_a_task_states_every_option() -> None:
    """What trains nothing has no batch and no budget."""
    start = "harness run --task FILE.yaml --method"
    assert command_of(written_record("teacher", steps=0), None, "FILE.yaml") == (
        f"{start} teacher --num-steps 4 --seed 0 --noise-sets 2 --solver ddim"
    )
    assert command_of(written_record(), None, "FILE.yaml") == (
        f"{start} ard --num-steps 4 --seed 0 --budget steps=100 --noise-sets 2 --batch-size 64 "
        "--history-layers 6"
    )


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"options": {"history_layers": "1"}}, "history_layers is 1, but {} is a student with"),
        ({"num_steps": 4}, "num_steps is 4, but {} was trained for 2 steps"),
        ({"method": "lcm"}, "method is lcm, but {} is a student of ard"),
        ({"task": "other"}, "unknown task 'other'"),
    ],
)
def test_what_contradicts_a_student_is_refused(
    given: dict[str, Any], complaint: str, tiny: Task, tmp_path: Path
) -> None:
    path = file_of(tmp_path, history_layers=2)
    agreed = {"method": "ard", "num_steps": 2, "options": {"history_layers": "2"}, "task": "tiny"}
    assert student_config(path, agreed) == student_config(path, {})
    with pytest.raises(UsageError) as refused:
        student_config(path, given)
    assert complaint.format(path) in str(refused.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"network": {"num_heads": 4}}, "the network of task tiny is"),
        (
            {"schedule": "flow", "prediction_type": "v"},
            "the schedule of task tiny is flow, but {} has vp",
        ),
        ({"prediction_type": "v"}, "the prediction_type of task tiny is v, but {} has eps"),
        ({"version": 2}, "task is tiny, version 2, but {} is a student of tiny, version 1"),
        ({"name": "other"}, "task is other, version 1, but"),
    ],
)
def test_another_network_or_version_is_refused(
    change: dict[str, Any], complaint: str, tiny_folder: Path, tmp_path: Path
) -> None:
    path, task = file_of(tmp_path, history_layers=2), tiny_folder / "tiny.yaml"
    content = yaml.safe_load(task.read_text())
    network = content["network"] | change.get("network", {})
    task.write_text(yaml.safe_dump({**content, **change, "network": network}))
    with pytest.raises(UsageError) as refused:
        student_config(path, {})
    assert complaint.format(path) in str(refused.value)


def test_a_file_that_says_no_schedule_is_taken(tiny: Task, tmp_path: Path) -> None:
    path = file_of(tmp_path, history_layers=2)
    facts = read_facts(path)
    assert facts is not None
    assert (facts.schedule, facts.prediction_type) == ("vp", "eps")
    older = facts.model_dump(exclude={"schedule", "prediction_type"})
    write_tensors(path, read_tensors(path), {"run_id": facts.run_id, STUDENT: json.dumps(older)})
    assert student_config(path, {}).num_steps == 2


def test_one_student_for_many_steps_takes_any(tiny: Task, tmp_path: Path) -> None:
    path = file_of(tmp_path, "consistency-distillation")
    assert student_config(path, {"num_steps": 4}).num_steps == 4


def test_a_file_without_metadata_needs_a_method_or_its_record(tiny: Task, tmp_path: Path) -> None:
    path, record = file_of(tmp_path / "run", history_layers=2), written_record(num_steps=2)
    bare, tensors = tmp_path / "bare.safetensors", read_tensors(path)
    write_tensors(path, tensors, {"run_id": record.run_id})  # as older versions wrote it
    write_record(path.parent / "record.json", record)
    assert student_config(path, {}).options == {"history_layers": 6}
    write_tensors(bare, tensors)
    with pytest.raises(UsageError, match="does not say how it is sampled: --student needs"):
        student_config(bare, {})
    assert student_config(bare, {"method": "ard"}).num_steps == 1
    bare.write_bytes(b"no such file")
    with pytest.raises(UsageError, match="is not a readable safetensors file"):
        student_config(bare, {})


@pytest.mark.parametrize("method", ["step-distillation", "consistency-distillation", "reflow"])
@pytest.mark.parametrize(
    ("prediction_type", "schedule", "convention"),
    [("eps", "vp", "dit"), ("v", "flow", "dit"), ("x_0", "vp", "dit"), ("v", "flow", "sit")],
)
def test_the_pipeline_of_diffusers_equals_our_sampler(
    method: str,
    prediction_type: str,
    schedule: str,
    convention: str,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    from diffusers import DiffusionPipeline

    task = tiny_folder / "tiny.yaml"
    content = yaml.safe_load(task.read_text())
    content |= {"prediction_type": prediction_type, "schedule": schedule}
    if convention == "sit":
        content["network"]["convention"] = convention
    task.write_text(yaml.safe_dump(content))
    (resolved, built), out = student(method), tmp_path / "out"
    write_folder(built, resolved, out)
    assert {path.name for path in out.iterdir()} == {
        "model_index.json",
        "pipeline.py",
        "transformer",
    }
    pipeline = DiffusionPipeline.from_pretrained(
        out, custom_pipeline=str(out), trust_remote_code=True
    )
    x_T, cond = resolved.task.evaluation_inputs(0)
    noise = resolved.task.evaluation_noise(0, slice(0, 5))
    with torch.no_grad():
        ours = sample(built.solver, built.student, x_T[:5], built.levels, cond[:5], noise)
    theirs = pipeline(cond.classes[:5], noise=torch.stack([x_T[:5], noise("step 1")]))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    drawn = [
        pipeline(cond.classes[:2], generator=torch.Generator().manual_seed(n)) for n in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_trained_network_in_half_precision_keeps_its_rounded_positions(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    resolved, built = student("reflow", task="digits")
    write_folder(built, resolved, tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["positions"] == "float16"
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True
    )
    x_T, cond = (part[:4] for part in resolved.task.evaluation_inputs(0))
    with torch.no_grad():
        ours = sample(built.solver, built.student, x_T, built.levels, cond)
    torch.testing.assert_close(pipeline(cond.classes, noise=x_T[None]), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        ("ard", {"history_layers": 2}, "gives other samples than this student"),
        ("shortcut", {}, "the student has scalar_embedders."),
        ("step-distillation", {"heads": "per_step"}, "the student has final_layer2."),
        ("step-distillation", {"parametrization": "direct"}, "gives the next noisy state, but"),
    ],
)
def test_what_a_plain_dit_cannot_hold_is_refused(
    method: str, options: dict[str, Any], complaint: str, tiny: Task, tmp_path: Path
) -> None:
    resolved, built = student(method, **options)
    with pytest.raises(UsageError, match=complaint):
        write_folder(built, resolved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_diffusers_one_sentence_names_the_extra(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "harness.runs.pipeline", raising=False)
    resolved, built = student("reflow")
    with pytest.raises(UsageError, match=r"pip install 'distillation-harness\[diffusers\]'"):
        write_folder(built, resolved, tmp_path)


@pytest.mark.parametrize(
    ("method", "words", "complaint"),
    [
        ("ard", ["nothing"], "there is no run nothing in"),
        ("ard", ["--format", "lora"], "was trained in all its weights"),
        ("ard", ["--task", "tiny"], "is of tiny, version 7, but the task here is tiny, version 1"),
        ("teacher", [], "has no student: teacher trains none"),
    ],
)
def test_what_cannot_be_exported(
    method: str, words: list[str], complaint: str, tiny: Task, tmp_path: Path
) -> None:
    record = written_record(method, task_version=7, options={"history_layers": 2})
    folder = tmp_path / "runs" / record.run_id
    write_record(folder / "record.json", record)
    if method == "ard":
        file_of(folder, history_layers=2)
    run = [] if words == ["nothing"] else [record.run_id]
    done = call("student", "export", *run, *words, "--results", tmp_path)
    assert complaint in sentence(done, 2)


def test_push_uploads_the_folder_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    words = ["student", "push", tmp_path, "me/student"]
    assert "has no README.md" in sentence(call(*words), 2)
    (tmp_path / "README.md").write_text("# a student")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in sentence(call(*words), 2)
    asked: list[Any] = []
    api = huggingface_hub.HfApi

    def lost(self: Any, *repo: str, **more: Any) -> None:
        raise type("ConnectError", (type("TransportError", (Exception,), {}),), {})("no route")

    monkeypatch.setattr(api, "create_repo", lost)
    assert "the hub cannot be reached (no route)" in sentence(call(*words), 2)
    monkeypatch.setattr(api, "create_repo", lambda self, *repo, **more: asked.append((repo, more)))
    monkeypatch.setattr(api, "upload_folder", lambda self, **more: asked.append(more))
    done = call(*words, "--private")
    assert (done.code, done.out) == (0, "https://huggingface.co/me/student\n")
    assert asked == [
        (("me/student",), {"private": True, "exist_ok": True}),
        {"repo_id": "me/student", "folder_path": tmp_path},
    ]
