"""A text-conditioned task: prompts replace labels in training, guidance and evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from formulas import cross_attention_macs, dit_macs, history_extra_macs, text_macs
from torch import Tensor

from harness.data.trajectories import store_folder
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.errors import UsageError
from harness.files import read_tensors, write_tensors
from harness.metrics.sampling import sampling_cost
from harness.networks.backbones.dit import DiT
from harness.networks.history import with_history
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.runs.run import run
from harness.solvers import Noise, sample
from harness.tasks import Task, load_task
from harness.tasks.spec import PromptSpec
from harness.training.case import Case
from harness.training.tiny_task import LONGEST, TEXT_WIDTH, tiny_text_spec

CPU = torch.device("cpu")
WIDTH = 6


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return written(tmp_path / "one")


def written(folder: Path, prompts: int = 0) -> Task:
    """The tiny task with prompts, in a file of its own; `prompts` is their seed."""
    folder.mkdir()
    (folder / "text.yaml").write_text(yaml.safe_dump(tiny_text_spec(folder, prompts)))
    return load_task(str(folder / "text.yaml"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("step-distillation", {}),
        (
            "ard",
            {"history_layers": 2, "gan_from": 0.0, "gan_warmup_steps": 1, "gan_virtual_batch": 2},
        ),
        ("consistency-distillation", {}),
        ("meanflow", {}),
        ("dmd2", {}),
        ("teacher", {"reuse_every": 2, "reuse_below": 1}),
    ],
)
def test_methods_run_on_text_without_knowing(
    method: str, options: dict[str, Any], text: Task, tmp_path: Path
) -> None:
    config = RunConfig(
        method=method, options=options, task=str(tmp_path / "one" / "text.yaml"), num_steps=2
    )
    record, reference = run(
        resolve(config, results=tmp_path / "results"), tmp_path / "results", CPU
    )
    assert (record.status, reference.status) == ("finished", "finished")
    assert {"fid", "kid", "recall"} <= record.metrics.keys()
    assert not [name for name in record.metrics if "label" in name or name == "diversity"]
    assert record.hashes["conditions"] == text.spec.prompts.sha256  # type: ignore[union-attr]


def test_prompts_and_guidance_change_the_teachers_samples(text: Task) -> None:
    x_T, cond = text.evaluation_inputs(0)
    x_T, cond = x_T.double(), replace(cond, text=cond.text.double())
    teacher, t = text.teacher(CPU).double(), torch.tensor(1.0)
    with torch.no_grad():
        plain, guided, other = (
            model(x_T[:2], t, c).eps
            for model, c in (
                (teacher.denoiser, cond[:2]),
                (teacher, cond[:2]),
                (teacher.denoiser, cond[2:4]),
            )
        )
        null = teacher.denoiser(
            x_T[:2], t, replace(text.null, text=text.null.text.double()).repeat(2)
        ).eps
    torch.testing.assert_close(guided, null + 1.25 * (plain - null), rtol=1e-9, atol=1e-9)
    assert (plain - other).abs().max() > 1e-2
    assert (plain - null).abs().max() > 1e-2


def test_a_students_cost_has_each_text_once(text: Task, tmp_path: Path) -> None:
    """Keys, values and the mean's embedding count once, cross-attention in each of 4 steps."""
    case = Case("ard", text, tmp_path, {"history_layers": 2}, num_steps=4)
    method = case.build()

    def sampler(x_T: Tensor, cond: Condition, noise: Noise) -> Tensor:
        return sample(method.solver, method.student, x_T, method.levels, cond, noise)

    nfe, macs = sampling_cost(sampler, method.sampled_network, text, CPU)
    sizes = {name: value for name, value in text.network_options.items() if name != "text_width"}
    tokens, width, depth = 4, sizes["hidden_size"], sizes["depth"]
    assert nfe == 4
    assert macs == (
        4 * dit_macs(**sizes)
        + history_extra_macs(tokens, width, 2, [1, 2, 3, 4])
        + 4 * cross_attention_macs(tokens, LONGEST, width, depth)
        + text_macs(LONGEST, TEXT_WIDTH, width, depth)
    )


def test_other_prompts_are_other_trajectories_and_another_identity(
    text: Task, tmp_path: Path
) -> None:
    other = written(tmp_path / "two", prompts=1)
    assert text.hashes["teacher"] == other.hashes["teacher"]
    assert store_folder(text.recipe) != store_folder(other.recipe)
    ids = [
        resolve(
            RunConfig(
                method="step-distillation", task=str(tmp_path / part / "text.yaml"), num_steps=2
            )
        ).run_id
        for part in ("one", "two")
    ]
    assert ids[0] != ids[1]


def test_a_method_that_needs_labels_says_so(text: Task, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="imm needs class labels, but task tiny-text is conditioned on text"
    ):
        resolve(RunConfig(method="imm", task=str(tmp_path / "one" / "text.yaml")))


def test_text_starts_without_effect_on_tokens_and_serves_every_state() -> None:
    """Cross-attention is zero before training.

    A history network attends from all its states to one text.
    """
    options = {
        "image_size": 8,
        "patch_size": 4,
        "in_channels": 1,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "text_width": WIDTH,
    }
    with keyed_initialisation(0, "text"):
        history = with_history(DiT(**options), 2, 1)  # type: ignore[arg-type]
    assert not any(bool(p.any()) for name, p in history.named_parameters() if ".cross.proj" in name)
    with keyed_initialisation(1, "text"):
        for parameter in history.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    history, plain = history.double(), DiT(**options).double()  # type: ignore[arg-type]
    plain.load_state_dict(history.state_dict())
    keys = Keyed("test", 0)
    x, words = (
        keys.normal(name, torch.arange(3), shape).double()
        for name, shape in (("x", (2, 1, 8, 8)), ("text", (5, WIDTH)))
    )
    t = torch.tensor([[999.0, 499.0]]).expand(3, -1)
    cond = Condition(text=words)
    with torch.no_grad():
        both: Tensor = history(x, t, cond)[0]
        torch.testing.assert_close(both[:, 0], plain(x[:, 0], t[:, 0], cond), rtol=1e-9, atol=1e-9)
        changed = history(x, t, Condition(text=-words))[0]
    assert (changed - both).abs().amax((2, 3, 4)).min() > 1e-3
    with pytest.raises(ValueError, match="attends to text"):
        plain(x[:, 0], t[:, 0], Condition())


def test_words_of_prompts_are_those_in_the_header_of_their_table(text: Task) -> None:
    """GenEval's folders, CLIPScore and result lines need them; a table of others has none."""
    prompts = text.spec.prompts
    assert isinstance(prompts, PromptSpec)
    assert text.judged_prompts is None
    said = [{"text": f"a dog {i}", "about": {"tag": "dogs"}} for i in range(10)]
    path = text.path(prompts)
    write_tensors(path, read_tensors(path), {"prompts": json.dumps({"prompts": said})})
    known = Task(text.spec, text.folder).judged_prompts
    assert known is not None
    assert known[3] == {"tag": "dogs", "prompt": "a dog 3"}
