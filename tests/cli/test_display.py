"""What the display of a run shows: speed, remaining time, losses and the last quality."""

from __future__ import annotations

import io
from typing import Any

import pytest

from harness.cli.console import Display, Plain


def shown(terminal: bool, patch: pytest.MonkeyPatch) -> str:
    """A training of 20 steps, 2 steps a second, with a milestone after 5 steps."""
    now, out = [0.0], io.StringIO()
    patch.setattr("harness.cli.console.time.monotonic", lambda: now[0])
    console = Plain(file=out, force_terminal=terminal, width=160)
    display = Display(console, plain_every=4.0)
    display.progress.get_time = lambda: now[0]
    with display:
        sampling, training = display("samples"), display("training")
        for step in range(1, 21):
            now[0] += 0.5
            display.numbers("train", step, {"student/loss": 1 / step, "student/size": 4.0})
            if step == 5:
                display.numbers("quality", step, {"fid": 12.345, "kid": 0.5, "recall": 0.25})
            training(step, 20)
        sampling(1, 1)
        display.progress.refresh()
    return out.getvalue()


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(False, monkeypatch).splitlines()
    assert lines == [
        "training: 9/20 after 4 s, 2 a second, 6 s left, student/loss 0.111, "
        "fid 12.3, kid 0.5 at step 5",
        "training: 18/20 after 9 s, 2 a second, 1 s left, student/loss 0.0556, "
        "fid 12.3, kid 0.5 at step 5",
        "training: 20/20 after 10 s, 2 a second, student/loss 0.05, fid 12.3, kid 0.5 at step 5",
        "samples: 1/1 after 10 s",
    ]


def test_a_terminal_shows_the_same_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text: Any = shown(True, monkeypatch)
    assert "2 a second, student/loss 0.05, fid 12.3, kid 0.5 at step 5" in text
