"""Names of rows: the options that matter, and none that the task or another option sets."""

from __future__ import annotations

from typing import Any

from written import record

from harness.methods import METHODS
from harness.report.markdown import page
from harness.report.rows import rows_of
from harness.report.task_report import reports_of
from harness.tasks import load_task


def test_a_label_names_the_options_that_matter() -> None:
    def label(**changes: Any) -> str:
        return rows_of([record(**changes)])[0].label

    defaults = {**METHODS["ard"].Config().model_dump(), "history_layers": 6}
    assert label(options=defaults) == "ard, history_layers 6"
    assert (
        label(options={"history_layers": 2, "lr": 0.07, "heads": "per_step"})
        == "ard, history_layers 2, lr 0.07, heads per_step"
    )
    assert (
        label(config={**record().config, "precision": "bf16"})
        == "ard, history_layers 6, precision bf16"
    )
    assert label(method="somebody's", options={"knob": 3}) == "somebody's, knob 3"


def test_a_label_leaves_out_what_its_task_sets_and_a_note_says_it() -> None:
    tuned = load_task("digits").spec.defaults["ctm"]
    options = METHODS["ctm"].Config(**tuned).model_dump(mode="json")
    records = [record("ctm", task="digits", options=options)]
    assert rows_of(records)[0].label == "ctm"
    other = record("ctm", task="digits", options={**options, "lr": 0.07})
    assert rows_of([other])[0].label == "ctm, lr 0.07"
    stated = ", ".join(f"{name} {value}" for name, value in tuned.items())
    assert f"they are: ctm {stated}." in page(reports_of(records))


def test_a_label_leaves_out_what_its_task_sets_for_a_stage_that_is_off() -> None:
    tuned = load_task("digits-guided").spec.defaults["ard"]
    assert "gan_lr" in tuned

    def label(**given: Any) -> str:
        _, config = METHODS["ard"].canonical(METHODS["ard"].Config(**tuned, **given), 4)
        options = {**config.model_dump(mode="json"), "history_layers": 6}
        return rows_of([record(task="digits-guided", options=options)])[0].label

    assert label() == "ard, history_layers 6"
    assert label(gan_from=0.25) == "ard, history_layers 6, gan_from 0.25"


def test_a_label_names_no_option_that_another_one_sets() -> None:
    def label(**given: Any) -> str:
        options = METHODS["meanflow"].Config(**given).model_dump(mode="json")
        return rows_of([record("meanflow", options=options)])[0].label

    assert label(source="teacher") == "meanflow, source teacher"
    assert label(source="teacher", power=1) == "meanflow, power 1.0, source teacher"
    assert label(power=0.5) == "meanflow, power 0.5"


def test_a_label_has_the_name_of_what_several_options_are() -> None:
    def label(**given: Any) -> str:
        options = METHODS["ard"].Config(**given).model_dump(mode="json")
        return rows_of([record(options=options)])[0].label

    assert (
        label(protocol="released", lr=0.07) == "ard, history_layers 6, lr 0.07, protocol released"
    )
    assert label(heads="per_step", parametrization="direct") == label(protocol="states")
    assert label(protocol="states") == "ard, history_layers 6, protocol states"
    assert label(trajectory="predictions", parametrization="direct") == (
        "ard, history_layers 6, trajectory predictions, parametrization direct"
    )
