"""Wrong usage: one sentence on stderr, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import ARD, Harness, sentence

from harness.tasks import Task


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["run", "--method", "ardd"], "unknown method 'ardd'; did you mean ard"),
        (["run"], "no method is named; give --method, one of: "),
        ([*ARD, "--task", "tinny"], "unknown task 'tinny'; did you mean tiny?"),
        ([*ARD, "--set", "histroy_layers=2"], "unknown option 'histroy_layers' in options of ard; did you mean history_layers"),
        ([*ARD, "--set", "lr"], "--set lr has no '='; give KEY=VALUE"),
        ([*ARD, "--history-layers", "9"], "history_layers is 9, but the teacher has 3 layers: give 0 to 3"),
        ([*ARD, "--history-layers", "many"], "options of ard: history_layers is 'many', but it should be a valid integer"),
        ([*ARD, "--history-layers", "2", "--num-steps", "3"], "num_steps is 3, but must divide the 4 evaluations"),
        ([*ARD, "--seed", "-1"], "run config: seed is '-1', but it should be greater than or equal to 0"),
        ([*ARD, "--history-layers", "2", "--budget", "much"], "budget is 'much', but must be one of: quick, table, steps=NUMBER"),
        ([*ARD, "--gan-lag", "2"], "options of ard: gan_lag is '2', but it should be less than or equal to 1"),
        ([*ARD, "--history-layers", "2", "--gan-from", "0.5", "--gan-lag", "0", "--micro-batch-size", "4"], "micro_batch_size is 4"),
        ([*ARD, "--device", "abacus"], "device 'abacus' is not available here; give cpu"),
        ([*ARD, "--device", "meta"], "device 'meta' is not available here; give cpu"),
        ([*ARD, "--config", "/nowhere.yaml"], "cannot read /nowhere.yaml: No such file or directory"),
        (["run", "--task", "tiny", "--method", "teacher", "--solver", "ddimm"], "unknown solver 'ddimm'; did you mean ddim?"),
        (["describe", "ad"], "unknown name 'ad'; did you mean ard"),
        (["teacher", "verify", "--task", "tinny"], "unknown task 'tinny'; did you mean tiny?"),
        (["report", "/nowhere"], "there is no record below /nowhere; `harness run` makes one"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_sentence(args: list[str], error: str, tiny: Task, harness: Harness) -> None:
    assert sentence(harness(*args), 2).startswith(error)


@pytest.mark.parametrize(
    ("args", "near"),
    [
        ([*ARD, "--histroy-layers", "2"], "--history-layers"),
        (["run", "--task", "tiny", "--method", "teacher", "--sovler", "ddim"], "--solver"),
        (["reprot"], "report"),
        (["list", "method"], "methods"),
        (["report", "--format", "word"], "markdown"),
        (["run", "--method"], "--method"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_errors_of_click_exit_with_2_too(args: list[str], near: str, tiny: Task, harness: Harness) -> None:
    done = harness(*args)
    assert (done.code, done.out) == (2, "")
    assert near in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: b: c", "is not YAML"),
        ("method: ard\nseed: 1\nseed: 2", "key 'seed' stands there twice"),
        ("method: ard\noptions: {lr: 1, lr: 2}", "key 'lr' stands there twice"),
        ("- ard", "must hold a mapping from names to values"),
        ("", "must hold a mapping from names to values"),
        ("method: ard\nnum_step: 2", "unknown option 'num_step' in run config; did you mean num_steps"),
        ("method: ard\noptions: {layers: 2}", "unknown option 'layers' in options of ard"),
        ("method: ardd", "unknown method 'ardd'"),
        ("method: ard\nnum_steps: [2]", "num_steps is [2], but it should be a valid integer"),
        ("method: 5", "method"),
        ("method: [ard]", "method"),
        ("method: ard\noptions: [1, 2]", "options"),
        ("method: ard\noptions: none", "options"),
    ],
)
def test_a_broken_config_is_one_sentence(text: str, error: str, tiny: Task, harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert error in sentence(harness("run", "--task", "tiny", "--config", path), 2)


def test_bytes_that_are_no_text_are_refused(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in sentence(harness("run", "--config", path), 2)
