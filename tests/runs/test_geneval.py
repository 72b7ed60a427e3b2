"""GenEval's files through the command line: a round trip, verdicts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from harness.cli.main import main
from harness.data import scenes as scenes_module
from harness.data.geneval import metadata_of, write_folders
from harness.data.images import to_uint8
from harness.data.scene_prompts import parse
from harness.data.scenes import Scenes
from harness.metrics.evaluator import Evaluator
from harness.runs.saving import save_sets
from harness.tasks import Task, load_task, prompts, task_files

CPU = torch.device("cpu")
JUDGED, SAMPLES = 40, 80


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files; the task `scenes` has 40 prompts, 80 samples and 200 real scenes."""
    sizes = {"TRAINING": 240, "REFERENCE": 200, "REAL": 200, "PROMPTS": 240, "JUDGED": JUDGED}
    for module in (scenes_module, prompts):
        for name in sizes.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, sizes[name])
    spec = yaml.safe_load((task_files.FOLDER / "scenes.yaml").read_text())
    sizes = {"samples": SAMPLES, "noise_sets": 1, "kid_subset_size": 20, "milestone_samples": 40}
    spec["evaluation"] |= {**sizes, "latency_batch": 2}
    spec["guidance_scan_samples"] = SAMPLES
    spec["reference"]["num_steps"] = 2
    spec["budgets"] = {"quick": {"steps": 2, "noise_sets": 1}}
    (tmp_path / "weights").symlink_to(task_files.FOLDER / "weights")
    (tmp_path / "scenes.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.setattr(task_files, "FOLDER", tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def record_of(folder: Path, *words: object) -> tuple[dict[str, Any], Path]:
    """The record that a command prints, and its folder."""
    done = call(*words, "--task", "scenes", "--results", folder, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    return record, folder / "runs" / record["run_id"]


def real_scenes(folder: Path, texts: list[str], each: int) -> Path:
    """A folder of real scenes of prompts, in GenEval's layout."""
    asked = tuple(parse(text) for text in texts)
    made = Scenes(asked, 9, each * len(texts), held_out=True)
    pictures = to_uint8(made.views(torch.arange(len(made)), False))
    write_folders(folder, [pictures], made.labels, [metadata_of(prompt) for prompt in asked])
    return folder


def test_a_folder_has_the_numbers_of_its_samples(small: Path) -> None:
    """Metrics and identities, where real scenes stand for a run's samples."""
    task = load_task("scenes")
    told = task.judged_prompts
    assert told is not None
    samples = Scenes(prompts.written(True), 9, SAMPLES, True).views(torch.arange(SAMPLES), False)
    samples[::5] = samples[::5].flip(3)  # some do not follow their prompts
    evaluator = Evaluator(task, lambda k: samples, CPU)
    words = evaluator.known(samples[:2], torch.tensor([3, 0]))["prompts"]
    assert words == [told[3]["prompt"], told[0]["prompt"]]
    direct = evaluator.evaluate({0: samples})
    save_sets(small, task, [0], lambda k: samples, "geneval", CPU)
    saved = small / "samples-0-geneval"
    found = [json.loads((saved / f"{k:05}/metadata.jsonl").read_text()) for k in range(JUDGED)]
    assert found == list(told)
    again, place = record_of(small / "e", "evaluate", "--samples", saved)
    both = again["metrics"].keys() & direct.keys()
    assert {"fid", "kid", "prompts_followed", "followed_seen", "prompt_diversity"} <= both
    for name in both:
        assert again["metrics"][name] == json.loads(direct[name].model_dump_json()), name
    assert 0.5 < direct["prompts_followed"].mean < 1
    # What GenEval's `summary_scores.py` does.
    lines = pd.read_json(place / "results.jsonl", orient="records", lines=True)
    assert len(lines) == SAMPLES
    assert len(lines.groupby("metadata")) == len({json.dumps(each) for each in told})
    assert lines["correct"].mean() == again["metrics"]["prompts_followed"]["values"]["0"]
    for tag, group in lines.groupby("tag"):
        share = again["metrics"][f"followed_{tag}"]["values"]["0"]
        assert group["correct"].mean() == pytest.approx(share, abs=1e-12)
    assert (lines["reason"] == "").equals(lines["correct"].astype(bool))


def test_verdicts_come_back_as_shares(small: Path) -> None:
    """The lines that the detector wrote, as if they were another judge's."""
    texts = ["three blue sevens", "a circle left of a four", "a red circle and a green four"]
    folder = real_scenes(small / "s", texts, 8)
    (folder / "00000/grid.png").write_text("no sample")
    record, place = record_of(small / "e", "evaluate", "--samples", folder, "--name", "real")
    mine = record["metrics"]
    assert mine["prompts_followed"]["values"]["0"] > 0.8
    assert mine["fid"]["identity"]["prompts"].startswith("others, ")
    lines = place / "results.jsonl"
    words = ("evaluate", "--geneval-results", lines, "--judge", "mask2former", "--name", "real")
    other, _ = record_of(small / "o", *words)
    assert other["metrics"].keys() == {
        "prompts_followed", "followed_counting", "followed_position", "followed_color_attr"
    }  # fmt: skip
    for name, metric in other["metrics"].items():
        assert metric["values"] == pytest.approx(mine[name]["values"])
        assert metric["n"] == (8 if name != "prompts_followed" else 24)
    assert other["metrics"]["prompts_followed"]["identity"]["judge"] == "mask2former"
    plain = call(*words, "--task", "scenes", "--results", small / "o", "--device", "cpu")
    assert "counting: 100.0% of 8" in plain.output
    report = call("report", small / "o")
    assert report.exit_code == 0, report.output
    assert "judged by mask2former" in report.output


def test_a_wrong_scene_has_its_reason(small: Path) -> None:
    folder = real_scenes(small / "s", ["two red fives", "a nine", "a circle left of a four"], 8)
    swapped = ["three red fives", "a blue eight", "a four left of a circle"]
    for number, text in enumerate(swapped):
        (folder / f"0000{number}/metadata.jsonl").write_text(json.dumps({"prompt": text}))
    _, place = record_of(small / "e", "evaluate", "--samples", folder)
    lines = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines[::8]] == swapped
    assert lines[0]["reason"] == "expected three red fives, found 2 red five (count)"
    assert lines[8]["reason"].startswith("expected a blue eight, found 1 ")
    assert lines[8]["reason"].endswith(" nine (object, count, color)")
    assert lines[16]["reason"] == "expected a four left of a circle, found another place (position)"
    assert json.loads(lines[0]["details"])["five"][0]["color"] == "red"


BROKEN = {
    "is not JSON": "{",
    "should be a mapping, but it is": "[]",
    "has no prompt": '{"tag": "counting"}',
    "its prompt is empty": '{"prompt": "  "}',
    "unknown word 'dog' in prompt": '{"prompt": "a dog"}',
    "is not understood: say it as in": '{"prompt": "red red red"}',
    "its prompt has 10000 characters": json.dumps({"prompt": "seven " * 1666 + "seve"}),
    "a prompt has 3,000 characters, but at most 1000": json.dumps({"prompt": "a seven " * 375}),
    "its prompt has the control character U+0007": '{"prompt": "a\\u0007 seven"}',
}


@pytest.mark.parametrize(("complaint", "content"), BROKEN.items(), ids=list(BROKEN))
def test_hostile_metadata_are_one_sentence(small: Path, complaint: str, content: str) -> None:
    folder = real_scenes(small / "s", ["a seven", "an eight"], 10)
    (folder / "00001/metadata.jsonl").write_text(content)
    refused(call("evaluate", "--task", "scenes", "--samples", folder), complaint)


def refused(done: Result, complaint: str) -> None:
    """One line on stderr and exit code 2."""
    assert done.exit_code == 2, done.output
    assert complaint in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_hostile_folders_are_one_sentence(small: Path) -> None:
    folder = real_scenes(small / "s", ["a seven", "an eight"], 10)
    words = ("evaluate", "--task", "scenes", "--samples", folder)
    sample = folder / "00001/samples/0003.png"
    Image.new("RGB", (64, 64)).save(sample)
    refused(call(*words), "0003.png is [3, 64, 64], but the first picture")
    sample.write_text("no picture")
    refused(call(*words), "0003.png is no readable picture")
    for file in folder.glob("*/samples/*.png"):
        Image.new("RGB", (16, 16)).save(file)
    refused(call(*words), "holds pictures of 16 x 16 with 3 channels, but task")
    for file in folder.glob("00001/samples/*.png"):
        file.unlink()
    refused(call(*words), "00001/samples has no samples")
    (folder / "00000/metadata.jsonl").unlink()
    refused(call(*words), "00000/metadata.jsonl: No such file")


LINE = {"filename": "a.png", "tag": "counting", "prompt": "two dogs", "correct": True}
WRONG = {
    "line 2 is not JSON": "nothing",
    "line 2: tag is None": json.dumps({**LINE, "tag": None}),
    "line 2: tag is 'a\\nb'": json.dumps({**LINE, "tag": "a\nb"}),
    "line 2: correct is 1, but it should be true or false": json.dumps({**LINE, "correct": 1}),
    "line 2 has no prompt": json.dumps({**LINE, "prompt": 3}),
    "line 2 judges 'a.png', as a line before it does": json.dumps(LINE),
}


@pytest.mark.parametrize(("complaint", "line"), WRONG.items(), ids=list(WRONG))
def test_hostile_result_lines_are_one_sentence(small: Path, complaint: str, line: str) -> None:
    (small / "lines.jsonl").write_text(f"{json.dumps(LINE)}\n{line}\n")
    words = ("evaluate", "--task", "scenes", "--geneval-results", small / "lines.jsonl")
    refused(call(*words), complaint)


def test_labels_are_no_prompts(tiny: Task, tmp_path: Path) -> None:
    words = ("evaluate", "--task", "tiny", "--geneval-results", tmp_path / "lines.jsonl")
    refused(call(*words), "task tiny has no prompts to follow")
    words = ("run", "--task", "tiny", "--method", "teacher", "--save-samples", "geneval")
    refused(call(*words), "task tiny has no prompts in words: give npz or png")


def test_what_does_not_go_together(small: Path) -> None:
    (small / "empty.jsonl").write_text("\n")
    lines = ("evaluate", "--geneval-results", small / "empty.jsonl", "--task")
    refused(call(*lines, "scenes"), "empty.jsonl has no result lines")
    refused(call(*lines, "scenes", "--save-samples", "png"), "result lines have no samples")
    refused(call("evaluate", "--judge", "me", "--samples", "a"), "--judge names who made")
    flat = small / "flat"
    flat.mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(flat / f"{number}.png")
    words = ("evaluate", "--task", "scenes", "--samples", flat, "--save-samples", "geneval")
    refused(call(*words), "the prompts of")
