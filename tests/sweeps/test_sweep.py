"""Sweeps: what a file expands to, which records are taken, and what a failure leaves."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from inprocess import Here, driver

from harness.cli.cmd_sweep import Place, estimate_text
from harness.cli.main import main
from harness.data.images import IMAGE_SETS, ImageSet, Split
from harness.data.trajectories import open_store
from harness.errors import UsageError
from harness.report.publish import publish
from harness.report.rows import load_records
from harness.runs.config import parse_config
from harness.runs.identity import key_of_record
from harness.runs.locks import held
from harness.runs.preview import estimate
from harness.runs.resolve import resolve
from harness.sweeps.engines import Job
from harness.sweeps.study import study_plans
from harness.sweeps.sweep import expand, plan, run_sweep
from harness.tasks import Task

CPU = torch.device("cpu")
BASE = {"task": "tiny", "num_steps": 2, "budget": "steps=1"}
ABLATIONS = Path(__file__).parents[2] / "ablations"


def content(**changes: Any) -> dict[str, Any]:
    return {"base": BASE, "cells": [{"method": "step-distillation"}], **changes}


def test_cells_axes_and_seeds_multiply() -> None:
    cells = [
        {
            "method": "ard",
            "options": {"heads": "shared"},
            "axes": {"options.history_layers": [1, 2]},
        },
        {"method": "teacher", "seeds": [7]},
    ]
    configs = expand(content(cells=cells, seeds=[0, 1], axes={"num_steps": [2, 4]}), "here")
    assert len(configs) == 2 * 2 * 2 + 2
    assert configs[0] == parse_config(
        {**BASE, "method": "ard", "options": {"heads": "shared", "history_layers": 1}, "seed": 0}
    )
    assert [config.seed for config in configs[-2:]] == [7, 7]
    assert {config.num_steps for config in configs} == {2, 4}


def test_a_cell_counts_more_than_the_base_and_options_are_merged() -> None:
    base = {**BASE, "options": {"lr": 0.1, "heads": "shared"}}
    (config,) = expand(
        content(base=base, cells=[{"method": "ard", "num_steps": 4, "options": {"lr": 0.2}}]),
        "here",
    )
    assert (config.num_steps, config.options) == (4, {"lr": 0.2, "heads": "shared"})


def test_what_a_cell_says_counts_more_than_an_axis_of_the_file() -> None:
    cells = [{"method": "ard", "num_steps": 8}, {"method": "ard", "options": {"heads": "shared"}}]
    configs = expand(
        content(cells=cells, axes={"num_steps": [1, 2], "options.heads": ["per_step"]}), "here"
    )
    assert [(c.num_steps, c.options["heads"]) for c in configs] == [
        (8, "per_step"),
        (1, "shared"),
        (2, "shared"),
    ]


def test_repeated_runs_are_one() -> None:
    assert (
        len(expand(content(cells=[{"method": "ard"}, {"method": "ard"}], seeds=[0, 0]), "here"))
        == 1
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"cell": []}, "unknown option 'cell' in here; did you mean cells"),
        ({"seeds": "many"}, "here: seeds is 'many'"),
        (
            {"cells": [{"method": "ard", "num_step": 4}]},
            "unknown option 'num_step' in run config; did you mean num_steps",
        ),
        ({"cells": [{}]}, "method is missing"),
        ({"cells": [{"method": "ard", "seeds": 3}]}, "seeds is 3"),
        ({"cells": [{"method": "ard", "axes": {"options.heads": "shared"}}]}, "heads is 'shared'"),
        ({"base": {**BASE, "seed": 5}}, "list the seeds under seeds"),
        ({"axes": {"seed": [1, 2]}}, "list the seeds under seeds"),
    ],
)
def test_what_a_file_may_not_say(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        expand(content(**changes), "here")


def test_a_space_needs_a_search() -> None:
    with pytest.raises(UsageError, match="a cell has a space, but the file has no search"):
        expand({"base": {"method": "ard"}, "cells": [{"space": {"options.lr": [1e-3]}}]}, "here")


def test_every_cell_is_checked_before_anything_runs(tiny: Task, tmp_path: Path) -> None:
    configs = expand(
        content(
            cells=[
                {"method": "step-distillation"},
                {"method": "ard", "options": {"history_layers": 99}},
            ]
        ),
        "here",
    )
    with pytest.raises(UsageError, match="history_layers is 99"):
        plan(configs, tmp_path, CPU)
    assert not list(tmp_path.glob("runs/*"))


def test_equal_models_are_one_cell(tiny: Task, tmp_path: Path) -> None:
    cells = [{"method": "step-distillation"}, {"method": "ard", "options": {"history_layers": 0}}]
    assert len(plan(expand(content(cells=cells), "here"), tmp_path, CPU)) == 1


def test_finished_runs_are_not_made_again(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = expand(content(seeds=[0, 1]), "here")
    records = run_sweep(plan(configs, tmp_path, CPU), tmp_path, CPU, driver())
    assert [record.config["seed"] for record in records] == [0, 1]
    monkeypatch.setattr(Here, "run", lambda self, job: pytest.fail("made again"))
    cells = plan(configs, tmp_path, CPU)
    assert all(cell.record for cell in cells)
    assert run_sweep(cells, tmp_path, CPU, driver()) == records


def test_published_records_of_other_code_count_when_asked(tiny: Task, tmp_path: Path) -> None:
    """A fresh checkout has no runs/, and an older record another id; its settings identify it."""
    configs = expand(content(), "here")
    (record,) = run_sweep(plan(configs, tmp_path / "first", CPU), tmp_path / "first", CPU, driver())
    options = {name: value for name, value in record.options.items() if not name.startswith("gan_")}
    other_code = record.environment.model_copy(update={"code": "another"})
    old = record.model_copy(
        update={"run_id": "an-old-name", "options": options, "environment": other_code}
    )
    assert key_of_record(old) == key_of_record(record) == resolve(configs[0]).key
    publish([old], tmp_path / "second")
    assert [(cell.record, cell.published) for cell in plan(configs, tmp_path / "second", CPU)] == [
        (None, True)
    ]
    (cell,) = plan(configs, tmp_path / "second", CPU, reuse=True)
    assert cell.record == old
    assert load_records(tmp_path / "second" / "tiny") == [old]
    assert [cell.published for cell in plan(configs, tmp_path / "third", CPU)] == [False]


@pytest.mark.slow
def test_published_records_of_this_code_always_count(tiny: Task, tmp_path: Path) -> None:
    configs = expand(content(), "here")
    (record,) = run_sweep(plan(configs, tmp_path / "first", CPU), tmp_path / "first", CPU, driver())
    publish([record], tmp_path / "second")
    other_code = record.environment.model_copy(update={"code": "another"})
    for name in ("z-a-later-name", "0-an-earlier-name"):
        publish(
            [record.model_copy(update={"run_id": name, "environment": other_code})],
            tmp_path / "second",
        )
    assert [cell.record for cell in plan(configs, tmp_path / "second", CPU)] == [record]


def test_what_another_process_makes_comes_last_and_is_waited_for(
    tiny: Task, tmp_path: Path
) -> None:
    """That process leaves no record, as if it had died."""
    cells = plan(expand(content(seeds=[0, 1]), "here"), tmp_path, CPU)
    lock, lines = held(tmp_path, cells[0].resolved.run_id), list[str]()
    lock.__enter__()

    def follow(text: str) -> None:
        lines.append(text)
        if text.startswith("1/2") and text.endswith("starts"):
            Timer(0.5, lock.__exit__, (None, None, None)).start()

    records = run_sweep(cells, tmp_path, CPU, driver(), say=follow)
    assert [line[:3] for line in lines] == ["2/2", "2/2", "1/2", "1/2"]
    assert [(record.config["seed"], record.status) for record in records] == [
        (0, "finished"),
        (1, "finished"),
    ]


def test_runs_in_flight_do_not_share_a_student(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second number of steps of one student waits for the first; another seed does not."""
    order, run = list[str](), Here.run

    def follow(self: Here, job: Job) -> int:
        order.append("starts")
        code = run(self, job)
        order.append("ends")
        return code

    monkeypatch.setattr(Here, "run", follow)
    given = content(cells=[{"method": "consistency-distillation", "axes": {"num_steps": [1, 2]}}])
    records = run_sweep(plan(expand(given, "here"), tmp_path, CPU), tmp_path, CPU, driver(2))
    assert order == ["starts", "ends", "starts", "ends"]
    assert records[1].trained_in == records[0].run_id


def test_a_run_that_is_refused_ends_the_sweep(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "harness.sweeps.child.code_digest", lambda digests=iter(["driver", "child"]): next(digests)
    )
    with pytest.raises(UsageError, match="a run was refused; its message is above"):
        run_sweep(plan(expand(content(), "here"), tmp_path, CPU), tmp_path, CPU, driver())


def test_a_process_that_dies_thrice_leaves_a_failed_record(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter([-9, 1, -9, 0])
    monkeypatch.setattr(Here, "run", lambda self, job: next(tries))
    (record,) = run_sweep(plan(expand(content(), "here"), tmp_path, CPU), tmp_path, CPU, driver())
    assert (record.status, record.reason) == (
        "failed",
        "its process died 3 times, at last by SIGKILL",
    )
    assert list(tries) == [0]


def test_a_process_that_dies_on_the_way_is_told(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run is started again and finishes; a sweep without a loss says nothing of the kind."""
    run, tries = Here.run, iter([-9, 0])
    monkeypatch.setattr(Here, "run", lambda self, job: next(tries) or run(self, job))
    monkeypatch.setattr("harness.cli.cmd_sweep.Local", lambda shares: Here())
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content(cells=[{"method": "teacher"}])))
    words = ["sweep", str(file), "--results", str(tmp_path / "results"), "--device", "cpu"]
    lost, again = CliRunner().invoke(main, words), CliRunner().invoke(main, words)
    assert "1/1 teacher-2-" in lost.output
    assert "its process died by SIGKILL; started again" in lost.output
    told = "1 of 1 runs finished, 0 failed, processes that died on the way: 1"
    assert (lost.exit_code, told in lost.output) == (0, True)
    assert "died" not in again.output


def test_a_process_that_dies_after_its_run_finished_is_no_failure(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Here.run
    monkeypatch.setattr(Here, "run", lambda self, job: run(self, job) - 9)
    cells = plan(expand(content(cells=[{"method": "teacher"}]), "here"), tmp_path, CPU)
    (record,) = run_sweep(cells, tmp_path, CPU, driver())
    assert record.status == "finished"


def test_a_failed_run_is_a_record_and_the_sweep_goes_on(tiny: Task, tmp_path: Path) -> None:
    cells = [
        {
            "method": "step-distillation",
            "options": {"lr": 1.0, "clip": 1e6, "warmup": 0.0},
            "budget": "steps=40",
        },
        {"method": "teacher"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "harness.methods.step_distillation.TrajectoryDistillation.loss",
            lambda self, batch: (
                sum(p.sum() for p in self.players["student"].module.parameters()) * float("nan"),
                {},
            ),
        )
        records = run_sweep(
            plan(expand(content(cells=cells), "here"), tmp_path, CPU), tmp_path, CPU, driver()
        )
    assert [record.status for record in records] == ["failed", "finished"]


def test_the_files_of_the_docs_are_valid(tmp_path: Path) -> None:
    grid, search = re.findall(
        r"```yaml\n(.*?)```", (ABLATIONS.parent / "docs" / "sweeps.md").read_text(), re.DOTALL
    )
    configs = expand(yaml.safe_load(grid), "docs")
    assert len(configs) == (3 + 1) * 2 * 3 + 2
    for config in configs:
        resolve(config, results=tmp_path)
    assert study_plans(yaml.safe_load(search), "docs", tmp_path, CPU)


def few_images() -> ImageSet:
    return ImageSet(torch.zeros(20, 1, 28, 28), torch.arange(20) % 10)


def without_search(content: dict[str, Any]) -> dict[str, Any]:
    """The grid of a sweep file."""
    cells = [
        {name: value for name, value in cell.items() if name != "space"}
        for cell in content.get("cells", [{}])
    ]
    return {**{name: value for name, value in content.items() if name != "search"}, "cells": cells}


def with_budget(content: dict[str, Any], budget: str) -> dict[str, Any]:
    """A sweep file in which every run has the same budget."""
    cells = [
        {name: value for name, value in cell.items() if name != "budget"}
        for cell in content.get("cells", [{}])
    ]
    return {**content, "base": {**content.get("base", {}), "budget": budget}, "cells": cells}


@pytest.mark.parametrize("file", sorted(ABLATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_files_are_valid(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All runs with one step; `tox -e slow` counts the FLOPs of one with each budget."""
    # The real images do not ship.
    monkeypatch.setitem(IMAGE_SETS, "fashion-mnist", lambda seed: Split(few_images(), few_images()))
    content = yaml.safe_load(file.read_text())
    if "search" in content:
        assert study_plans(with_budget(content, "steps=1"), file.name, tmp_path, CPU)
    else:
        cells = plan(expand(with_budget(content, "steps=1"), file.name), tmp_path, CPU)
        assert len(cells) > 3
        assert not any(cell.record for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(ABLATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_budgets_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMAGE_SETS, "fashion-mnist", lambda seed: Split(few_images(), few_images()))
    content = yaml.safe_load(file.read_text())
    for config in {
        config.budget: config for config in expand(without_search(content), file.name)
    }.values():
        resolve(config)


def test_an_estimate_counts_seeds_and_shares_what_is_shared(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(resolved: Any, results: Path, device: torch.device) -> Any:
        return SimpleNamespace(seconds={"trajectories": 10.0 * resolved.num_steps, "training": 3.0})

    monkeypatch.setattr("harness.runs.preview.preview", fake)
    cells = plan(
        expand(content(seeds=[0, 1, 2], axes={"num_steps": [2, 4]}), "here"), tmp_path, CPU
    )
    missing = [cell.resolved for cell in cells]
    # a store for each seed, which runs of other numbers of steps read too
    assert estimate(missing, tmp_path, CPU) == {"trajectories": 3 * 40.0, "training": 18.0}
    open_store(missing[0].recipe, tiny.teacher(CPU), CPU)
    assert estimate(missing, tmp_path, CPU) == {"trajectories": 2 * 40.0, "training": 18.0}


@pytest.mark.parametrize(
    ("workers", "engine", "shown"),
    [
        (1, "local", "about 10 minutes, one run at a time on 4 threads each"),
        (2, "local", "about 5 minutes, 2 runs at a time on 2 threads each"),
        (8, "local", "about 3 minutes, 3 runs at a time on 1 threads each"),
        (3, "slurm", "about 3 minutes, 3 runs at a time on 4 threads each"),
    ],
)
def test_an_estimate_is_divided_by_the_workers(
    workers: int, engine: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs, ten minutes in all, on four threads."""
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(
        "harness.cli.cmd_sweep.estimate", lambda *missing: {"training": 560.0, "metrics": 40.0}
    )
    place = Place(Path("results"), CPU, engine, workers, {}, False)
    assert estimate_text([resolve(parse_config({"method": "teacher"}))] * 3, place).startswith(
        shown
    )
    assert threads[-1] == 4


def test_the_command(tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cli.cmd_sweep.Local", lambda shares: Here())
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content(seeds=[0, 1])))
    results = ["--results", str(tmp_path / "results"), "--device", "cpu"]
    dry = CliRunner().invoke(main, ["sweep", str(file), "--dry-run", *results])
    assert "2 of 2 runs are missing" in dry.output
    timed = CliRunner().invoke(main, ["sweep", str(file), "--dry-run", "--estimate", *results])
    assert "0 minutes, one run at a time on 1 threads each" in timed.output
    alone = CliRunner().invoke(main, ["sweep", str(file), "--estimate", *results])
    assert alone.exit_code == 2
    assert "belongs to --dry-run" in alone.output
    assert "training" in timed.output
    assert not (tmp_path / "results").exists()
    done = CliRunner().invoke(main, ["sweep", str(file), *results])
    assert (done.exit_code, "2 of 2 runs finished, 0 failed" in done.output) == (0, True)
    again = CliRunner().invoke(main, ["sweep", str(file), "--dry-run", *results])
    assert "0 of 2 runs are missing" in again.output
