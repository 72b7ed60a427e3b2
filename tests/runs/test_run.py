"""A run from its config to its record: what it leaves behind, why it fails, what it is billed."""

from __future__ import annotations

import json
import math
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compiling import needs_compiler, run_graphs_eagerly
from PIL import Image
from tiny_runs import ARD, CPU, config, new_run

from harness import provenance
from harness.errors import Interrupted, RunFailed, UsageError
from harness.files import read_tensors
from harness.methods import METHODS
from harness.metrics.sampling import sample_set
from harness.networks.passes import count_passes
from harness.records import Record, TrainingBill, read_record
from harness.runs import evaluation, run
from harness.runs.build import Reference, build
from harness.runs.identity import run_settings
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.tasks import Task
from harness.tasks.spec import Guidance
from harness.training.trainer import Trainer


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# what a run is


def test_a_run_leaves_its_record_curve_grid_and_student(tiny: Task, tmp_path: Path) -> None:
    one = new_run(tmp_path)
    record = one.execute()
    assert files(one.folder) >= {
        "record.json",
        "curves.jsonl",
        "samples.png",
        "student.safetensors",
    }
    assert not (one.folder / "checkpoint").exists()
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    assert read_record(one.folder / "record.json") == record
    lines = [json.loads(line) for line in (one.folder / "curves.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3]
    assert [line["step"] for line in lines if "fid" in line] == [1, 2, 3]
    assert Image.open(one.folder / "samples.png").size == (20 * 44, 2 * 44)
    weights = read_tensors(one.folder / "student.safetensors")
    assert weights.keys() == build(one.resolved, tiny.teacher(CPU), CPU).student.state_dict().keys()


def test_the_log_tells_what_happened(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = new_run(tmp_path)
    one.execute()
    text = (one.folder / "run.log").read_text()
    for part in (
        "starts: code",
        "trajectories is done: 12",
        "training is done: 3",
        f"run {one.resolved.run_id} is finished",
    ):
        assert part in text
    broken = new_run(tmp_path, seed=1)
    monkeypatch.setattr(
        run, "sampler_of", lambda method, grad=False: lambda x_T, cond, noise: x_T * float("nan")
    )
    with pytest.raises(RunFailed):
        broken.execute()
    assert "Traceback" in (broken.folder / "run.log").read_text()


def test_fewer_noise_sets_than_the_budget_has(tiny: Task, tmp_path: Path) -> None:
    one = resolve(config(budget="steps=2", noise_sets=1))
    assert one.noise_sets == 1 < resolve(config(budget="steps=2")).noise_sets
    assert one.run_id != resolve(config(budget="steps=2")).run_id
    with pytest.raises(UsageError, match="noise_sets is 9, but task tiny has 2"):
        resolve(config(noise_sets=9))


def test_a_task_has_defaults_of_its_own(tiny_folder: Path) -> None:
    file, plain = tiny_folder / "tiny.yaml", resolve(config())
    spec = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(spec | {"defaults": {"ard": {"lr": 0.25, "history_layers": 2}}}))
    tuned = resolve(config())
    assert (tuned.config.lr, tuned.config.history_layers) == (0.25, ARD["history_layers"])  # type: ignore[attr-defined]
    explicit = resolve(config(options={**ARD, "lr": plain.config.lr}))
    assert explicit.run_id == plain.run_id  # the id depends on values, not on who set them
    file.write_text(yaml.safe_dump(spec | {"defaults": {"ard": {"learning": 1}}}))
    with pytest.raises(UsageError, match="unknown option 'learning' in task tiny, defaults of ard"):
        resolve(config())


def test_quality_along_the_budget(tiny: Task, tmp_path: Path) -> None:
    one = new_run(tmp_path, budget="steps=16")
    record = one.execute()
    assert [point.step for point in record.milestones] == [2, 4, 8, 16]
    assert [point.images for point in record.milestones] == [16, 32, 64, 128]
    assert (
        record.milestones[-1].flops == record.cost.training.flops == 2 * record.milestones[-2].flops
    )
    assert record.milestones[-1].quality["fid"] == record.metrics["fid"].values[0]
    assert len({point.quality["fid"] for point in record.milestones}) == 4
    short = new_run(tmp_path, budget="steps=1").execute()
    assert [point.step for point in short.milestones] == [1]


def test_milestones_may_see_the_first_samples_alone(tiny: Task, tmp_path: Path) -> None:
    """The last one too, so that a curve is of one N."""
    asked = config(seed=3, budget="steps=8")
    evaluation = tiny.spec.evaluation.model_copy(update={"milestone_samples": 25})
    part = Task(tiny.spec.model_copy(update={"evaluation": evaluation}), tiny.folder)
    whole, some = (
        Run(resolve(asked, task), tmp_path / str(n), CPU).execute()
        for n, task in enumerate((tiny, part))
    )
    assert [point.n for point in whole.milestones + some.milestones] == [None] * 4 + [25] * 4
    assert some.metrics["fid"].values == whole.metrics["fid"].values
    assert whole.milestones[-1].quality["fid"] == whole.metrics["fid"].values[0]
    x_T = tiny.evaluation_inputs(0)[0]
    assert sample_set(lambda x, cond, noise: x, part, 0, CPU, count=25).equal(x_T[:25])
    assert all(
        a.quality != b.quality for a, b in zip(whole.milestones, some.milestones, strict=True)
    )


def test_milestones_survive_an_interruption(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = new_run(tmp_path / "a", budget="steps=8").execute()
    step = Trainer.one_step

    def interrupted(self: Trainer) -> dict:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "one_step", interrupted)
    with pytest.raises(Interrupted):
        new_run(tmp_path / "b", budget="steps=8").execute()
    monkeypatch.setattr(Trainer, "one_step", step)
    resumed = new_run(tmp_path / "b", budget="steps=8").execute()
    assert resumed.milestones == straight.milestones


def test_an_evaluation_that_is_cut_off_is_taken_up_without_training_again(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = new_run(tmp_path / "a").execute()
    with monkeypatch.context() as patch:

        def cut_off(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("harness.metrics.evaluator.Evaluator.evaluate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            new_run(tmp_path / "b").execute()
    monkeypatch.setattr(Trainer, "one_step", lambda self: pytest.fail("trained again"))
    resumed = new_run(tmp_path / "b").execute()
    assert resumed.milestones == straight.milestones
    assert {name: metric.values for name, metric in resumed.metrics.items()} == {
        n: m.values for n, m in straight.metrics.items()
    }


def test_a_signal_in_the_middle_of_accumulation_waits_for_the_step(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(folder: str) -> Run:
        return new_run(tmp_path / folder, budget="steps=6", micro_batch_size=2)

    straight, calls = asked("a").execute(), []
    loss = METHODS["ard"].loss

    def interrupted(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if (
            len(calls) == 11
        ):  # the second of four micro-batches of a step; some calls only count FLOPs
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(METHODS["ard"], "loss", interrupted)
        with pytest.raises(Interrupted):
            asked("b").execute()
    assert len(calls) % 4 == 0  # one step's calls to count, whole steps after it
    resumed = asked("b").execute()
    assert {name: metric.values for name, metric in resumed.metrics.items()} == {
        n: m.values for n, m in straight.metrics.items()
    }
    assert (tmp_path / "b" / "runs" / resumed.run_id / "curves.jsonl").read_bytes() == (
        tmp_path / "a" / "runs" / straight.run_id / "curves.jsonl"
    ).read_bytes()


def test_the_untrained_student_is_a_row(tiny: Task, tmp_path: Path) -> None:
    record = new_run(
        tmp_path, method="step-distillation", options={}, num_steps=4, budget="steps=0"
    ).execute()
    assert (
        record.status,
        record.config["total_steps"],
        record.cost.training,
        record.milestones,
    ) == ("finished", 0, None, [])
    assert any("untrained" in flag for flag in record.flags)
    unguided = Task(tiny.spec.model_copy(update={"guidance": Guidance(scale=1.0)}))
    teacher = Run(
        resolve(config(method="teacher", options={}, num_steps=4), unguided),
        tmp_path / "teacher",
        CPU,
    ).execute()
    assert (
        record.metrics["label_agreement"].values[0] == teacher.metrics["label_agreement"].values[0]
    )
    assert record.metrics["fid"].values[0] == pytest.approx(
        teacher.metrics["fid"].values[0], rel=1e-3
    )


def test_a_run_starts_from_another_ones_student(tiny: Task, tmp_path: Path) -> None:
    first = new_run(tmp_path, budget="steps=4")
    record = first.execute()
    again = config(budget="steps=0", init_from=record.run_id)
    second = Run(resolve(again, results=tmp_path), tmp_path, CPU)
    untouched = second.execute()
    assert untouched.run_id != record.run_id
    assert untouched.metrics["fid"].values == record.metrics["fid"].values
    third = Run(
        resolve(config(budget="steps=2", init_from=record.run_id), results=tmp_path), tmp_path, CPU
    ).execute()
    assert (
        third.cost.training.inherited_flops
        == untouched.cost.training.inherited_flops
        == record.cost.training.flops
    )
    assert (untouched.cost.training.flops, untouched.cost.training.inherited_images) == (0, 32)
    assert not any("untrained" in flag for flag in untouched.flags)
    grandchild = Run(
        resolve(config(budget="steps=1", init_from=third.run_id), results=tmp_path), tmp_path, CPU
    ).execute()
    assert (
        grandchild.cost.training.inherited_flops
        == record.cost.training.flops + third.cost.training.flops
    )
    assert third.config["init_from"]["run_id"] == record.run_id
    other_seed = new_run(tmp_path, budget="steps=4", seed=1).execute()
    fourth = resolve(
        config(budget="steps=2", seed=1, init_from=other_seed.run_id), results=tmp_path
    )
    assert run_settings(fourth)["init_from"]["setting"] == third.config["init_from"]["setting"]


def test_a_gan_stage_goes_on_with_a_students_optimizer(tiny: Task, tmp_path: Path) -> None:
    """The last step of the parent and the first of the stage are neighbours for AdamW."""
    parent = new_run(tmp_path, budget="steps=4").execute()
    file = tmp_path / "runs" / parent.run_id / "optimizer.safetensors"
    kept = read_tensors(file)
    options = {**ARD, "gan_from": 0.0, "gan_virtual_batch": 2}
    stage = resolve(
        config(budget="steps=2", options=options, init_from=parent.run_id), results=tmp_path
    )
    method = build(stage, tiny.teacher(CPU), CPU)
    found = method.student_player.optimizer_state()
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert {float(value) for name, value in kept.items() if name.startswith("step ")} == {4.0}
    assert {name.partition(" ")[0] for name in kept} == {"step", "exp_avg", "exp_avg_sq"}
    assert method.student_player.rate(0.5) == pytest.approx(
        stage.config.gan_student_lr / stage.config.lr  # type: ignore[attr-defined]
    )
    regression = resolve(config(budget="steps=2", init_from=parent.run_id), results=tmp_path)
    assert not build(regression, tiny.teacher(CPU), CPU).student_player.optimizer_state()
    record = Run(stage, tmp_path, CPU).execute()
    after = read_tensors(tmp_path / "runs" / record.run_id / "optimizer.safetensors")
    assert {float(value) for name, value in after.items() if name.startswith("step ")} == {6.0}
    file.unlink()
    again = config(budget="steps=1", options=options, init_from=parent.run_id)
    with pytest.raises(UsageError, match=r"continues the optimizer .* that run has kept none"):
        Run(resolve(again, results=tmp_path), tmp_path, CPU).execute()


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"init_from": "nothing-4-0"}, "holds no finished run"),
    ({"init_from": "parent", "method": "teacher", "options": {}, "num_steps": 4}, "trains nothing"),
])  # fmt: skip
def test_what_cannot_be_started_from(
    changes: dict, complaint: str, tiny: Task, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=complaint):
        resolve(config(**changes), results=tmp_path)


def test_a_student_of_another_shape_is_refused(tiny: Task, tmp_path: Path) -> None:
    parent = new_run(tmp_path, budget="steps=1", options={**ARD, "heads": "per_step"}).execute()
    with pytest.raises(UsageError, match="another network"):
        Run(
            resolve(config(budget="steps=2", init_from=parent.run_id), results=tmp_path),
            tmp_path,
            CPU,
        ).execute()


@pytest.mark.parametrize(
    ("method", "parents", "childs"),
    [
        (
            "step-distillation",
            {"parametrization": "direct"},
            {"parametrization": "teacher"},
        ),
        (
            "step-distillation",
            {"parametrization": "direct"},
            {"trajectory": "predictions"},
        ),
        ("ect", {"init": "random"}, {"init": "teacher"}),
    ],
)
def test_a_student_whose_output_means_something_else_is_refused(
    method: str, parents: dict, childs: dict, tiny: Task, tmp_path: Path
) -> None:
    """Its weights would fit."""
    parent = new_run(tmp_path, method=method, budget="steps=1", options=parents).execute()
    with pytest.raises(UsageError, match=r"whose network gives .*, but this one gives"):
        resolve(
            config(
                method=method,
                budget="steps=2",
                options={**parents, **childs},
                init_from=parent.run_id,
            ),
            results=tmp_path,
        )
    assert resolve(
        config(method=method, budget="steps=2", options=parents, init_from=parent.run_id),
        results=tmp_path,
    ).parent


def test_what_a_record_says(tiny: Task, tmp_path: Path) -> None:
    record = new_run(tmp_path).execute()
    assert (record.status, record.method, record.task, record.task_version) == (
        "finished",
        "ard",
        "tiny",
        1,
    )
    assert record.options["history_layers"] == 2
    assert record.config == {
        "num_steps": 2,
        "seed": 0,
        "total_steps": 3,
        "batch_size": 8,
        "micro_batch_size": None,
        "precision": "fp32",
        "compile": False,
        "noise_sets": 1,
        "init_from": None,
        "extra_features": "",
    }
    assert record.levels == pytest.approx([999, 499], abs=1e-3)
    assert record.hashes == tiny.hashes
    assert record.target == "guided teacher"
    assert record.metrics["fid"].values.keys() == {0}
    assert record.cost.nfe == 2
    assert record.cost.latency.ratio > 0
    assert record.environment.code == provenance.code_digest()


def test_a_training_free_run_has_no_student_and_no_bill(tiny: Task, tmp_path: Path) -> None:
    one = new_run(tmp_path, method="teacher", options={}, num_steps=4)
    record = one.execute()
    assert files(one.folder) == {"record.json", "run.log", "samples.png"}
    assert record.cost.training is None
    assert record.cost.nfe == 8
    assert record.metrics["distance_to_teacher"].mean == 0  # it is the task's reference


def test_run_returns_the_references_record_beside_it(tiny: Task, tmp_path: Path) -> None:
    record, reference = run.run(resolve(config(budget="table")), tmp_path, CPU)
    assert (reference.method, reference.config["num_steps"]) == ("teacher", 4)
    assert reference.metrics["fid"].values.keys() == record.metrics["fid"].values.keys() == {0, 1}
    folders = sorted(path.name for path in (tmp_path / "runs").glob("[!.]*"))
    assert folders == sorted([record.run_id, reference.run_id])


def test_a_teacher_that_asks_for_nothing_new_is_the_reference(tiny: Task, tmp_path: Path) -> None:
    record, reference = run.run(
        resolve(config(method="teacher", options={}, num_steps=4)), tmp_path, CPU
    )
    assert record.run_id == reference.run_id


def test_two_runs_of_one_config_give_the_same_numbers(tiny: Task, tmp_path: Path) -> None:
    first, second = (new_run(tmp_path / name).execute() for name in "ab")
    assert first.metrics == second.metrics
    assert (
        new_run(tmp_path / "c", seed=1).execute().metrics["fid"].values
        != first.metrics["fid"].values
    )


def test_a_short_average_of_the_weights_is_flagged(tiny: Task, tmp_path: Path) -> None:
    (few,) = new_run(tmp_path).execute().flags
    assert few.startswith("fid has 64 features but 40 samples and 40 held-out images: ")
    flag, last = new_run(tmp_path, options={**ARD, "ema_half_life": 0.5}).execute().flags
    assert "25.0% of the initial weights" in flag
    assert last == few


# failures


def test_a_collapsed_student_is_flagged_in_its_record(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"method": "step-distillation", "options": {}, "budget": "steps=1", "noise_sets": 1}
    sound = new_run(tmp_path / "sound", **changes).execute()
    assert not any(flag.startswith("collapsed") for flag in sound.flags)
    monkeypatch.setattr("harness.runs.run.samples_of", lambda *args: torch.full((40, 1, 8, 8), 0.5))
    found = new_run(tmp_path / "collapsed", **changes).execute()
    assert "collapsed: samples of one condition differ 0 times as much as the teacher's" in (
        found.flags
    )


def test_a_gan_that_diverges_is_flagged_or_fails(tiny: Task, tmp_path: Path) -> None:
    """Either way its record says so, and holds no number that is not finite."""
    changes = {"method": "ladd", "num_steps": 1, "budget": "steps=8", "noise_sets": 1}
    one = new_run(tmp_path, **changes, options={"lr": 1.0})
    with suppress(RunFailed):
        one.execute()
    found = read_record(one.folder / "record.json")
    said = found.reason if found.status == "failed" else " ".join(found.flags)
    assert "not finite" in said or "outgrown: samples are" in said
    assert all(math.isfinite(metric.mean) for metric in found.metrics.values())


def test_a_failed_run_writes_its_reason(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: Any, **kwargs: Any) -> None:
        raise RunFailed("student: loss nan at step 2: not finite")

    with monkeypatch.context() as patch:
        patch.setattr(run.Trainer, "train", diverge)
        with pytest.raises(RunFailed, match=r"run ard-2-\w+ failed: student: loss nan at step 2"):
            new_run(tmp_path).execute()
    failed = read_record(new_run(tmp_path).folder / "record.json")
    assert (failed.status, failed.reason) == ("failed", "student: loss nan at step 2: not finite")
    assert not failed.metrics
    assert new_run(tmp_path).execute().status == "finished"


def test_samples_that_are_not_finite_fail_the_run(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        run, "sampler_of", lambda method, grad=False: lambda x_T, cond, noise: x_T * float("nan")
    )
    with pytest.raises(RunFailed, match="samples of noise set 0 are not finite"):
        new_run(tmp_path).execute()
    assert (
        read_record(new_run(tmp_path).folder / "record.json").reason
        == "samples of noise set 0 are not finite"
    )


def test_a_wrong_option_leaves_nothing_behind(tiny: Task, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="history_layers is 9"):
        run.run(resolve(config(options={"history_layers": 9})), tmp_path / "results", CPU)
    assert not (tmp_path / "results").exists()


# the bill


def test_the_bill_of_training(tiny: Task, tmp_path: Path) -> None:
    bill = new_run(tmp_path, budget="steps=5").execute().cost.training
    assert (bill.steps, bill.images) == (5, 40)
    # 12 trajectories of 4 evaluations, each two passes under guidance.
    assert bill.teacher_evaluations == 12 * 4 * 2
    assert bill.ema_initial_weight == pytest.approx(0.5**20)
    half = new_run(tmp_path, budget="steps=10").execute().cost.training
    assert half.flops == 2 * bill.flops > 0


def test_trajectories_are_billed_by_the_passes_that_made_them(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    teacher_of = Task.teacher

    def watched(self: Task, device: torch.device) -> Any:
        teacher = teacher_of(self, device)
        teacher.denoiser.network.register_forward_pre_hook(
            lambda module, args: passes.append(len(args[0]))
        )
        return teacher

    monkeypatch.setattr(Task, "teacher", watched)
    built: list[int] = []
    opened = run.open_store

    def store(*args: Any, **kwargs: Any) -> Any:
        before = sum(passes)
        found = opened(*args, **kwargs)
        built.append(sum(passes) - before)
        return found

    monkeypatch.setattr(run, "open_store", store)
    bill = new_run(tmp_path).execute().cost.training
    assert built == [bill.teacher_evaluations] == [96]
    again = new_run(tmp_path, budget="steps=1").execute().cost.training
    assert built[1] == 0  # the store is shared, yet charged in full
    assert (again.teacher_evaluations, again.trajectory_flops) == (96, bill.trajectory_flops)
    other = new_run(tmp_path, seed=1).execute().cost.training
    assert built[2] == other.teacher_evaluations == 96  # another seed has a store of its own
    four = {**ARD, "grid": "released"}
    released = new_run(tmp_path, num_steps=4, options=four).execute().cost.training
    assert built[3] == released.teacher_evaluations == 12 * 25 * 2


def test_the_bill_of_a_chain_counts_each_store_once(tiny: Task, tmp_path: Path) -> None:
    first = new_run(tmp_path, budget="steps=1").execute()

    def bill(seed: int) -> TrainingBill:
        again = config(budget="steps=1", init_from=first.run_id, seed=seed)
        return Run(resolve(again, results=tmp_path), tmp_path, CPU).execute().cost.training

    alone = first.cost.training.trajectory_flops
    assert [bill(seed).trajectory_flops for seed in (0, 1)] == [alone, 2 * alone]


def test_exposure_is_measured_on_the_same_trajectories_for_every_seed(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    measure = evaluation.exposure_bias
    monkeypatch.setattr(
        evaluation,
        "exposure_bias",
        lambda solver, model, points, *rest: (
            seen.append(points),
            measure(solver, model, points, *rest),
        )[1],
    )
    for seed in (0, 1):
        assert new_run(tmp_path, seed=seed).execute().exposure
    assert torch.equal(*seen)


def test_without_guidance_an_evaluation_is_one_pass(tiny: Task, tmp_path: Path) -> None:
    plain = Task(
        tiny.spec.model_copy(
            update={"guidance": tiny.spec.guidance.model_copy(update={"scale": 1.0})}
        )
    )
    assert (
        Run(resolve(config(), plain), tmp_path, CPU).execute().cost.training.teacher_evaluations
        == 12 * 4
    )


# the reference and its cache


def test_the_references_samples_are_made_once(tiny: Task, tmp_path: Path) -> None:
    teacher = tiny.teacher(CPU)
    reference = Reference(tiny, CPU, teacher=teacher)
    first = reference.samples(0)
    with count_passes(teacher.denoiser.network) as passes:
        assert torch.equal(reference.samples(0), first)
        assert passes.total == 0
        assert not torch.equal(reference.samples(1), first)
        assert passes.total == 40 * 8


def test_cached_samples_know_the_guidance_they_were_made_under(tiny: Task, tmp_path: Path) -> None:
    def samples(scale: float) -> torch.Tensor:
        task = Task(
            tiny.spec.model_copy(
                update={"guidance": tiny.spec.guidance.model_copy(update={"scale": scale})}
            )
        )
        return Reference(task, CPU).samples(0)

    assert not torch.equal(samples(1.25), samples(4.0))


def test_initial_weights_depend_on_the_seed_alone(tiny: Task, tmp_path: Path) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        one = new_run(tmp_path, method="denoising", options={}, seed=seed)
        built = build(one.resolved, tiny.teacher(CPU), CPU)
        return list(built.players["student"].module.parameters())

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(1), strict=True))


def test_bf16_and_micro_batches_run_through(tiny: Task, tmp_path: Path) -> None:
    record = new_run(tmp_path, precision="bf16", micro_batch_size=4).execute()
    assert record.status == "finished"
    assert record.config["precision"] == "bf16"


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]
)
def test_a_compiled_run_has_the_same_numbers(
    backend: str, tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys and values of earlier states, and the number of passes."""
    if backend == "eager":
        run_graphs_eagerly(monkeypatch)
    eager, compiled = (new_run(tmp_path, compile=compile).execute() for compile in (False, True))
    assert compiled.run_id != eager.run_id
    assert compiled.config["compile"]
    assert compiled.first_losses == pytest.approx(eager.first_losses, rel=1e-3)
    assert compiled.metrics["fid"].mean == pytest.approx(eager.metrics["fid"].mean, rel=1e-3)
    assert compiled.cost.training.flops == eager.cost.training.flops
    assert (compiled.cost.nfe, compiled.cost.macs_per_sample) == (
        eager.cost.nfe,
        eager.cost.macs_per_sample,
    )


def test_every_record_and_student_can_be_read_back(tiny: Task, tmp_path: Path) -> None:
    for method, options in (
        ("ard", ARD),
        ("step-distillation", {}),
        ("teacher", {}),
        ("denoising", {}),
    ):
        one = new_run(tmp_path, method=method, options=options)
        assert isinstance(one.execute(), Record)
        assert read_record(one.folder / "record.json").status == "finished"
        if method != "teacher":
            build(one.resolved, tiny.teacher(CPU), CPU).start_from(
                read_tensors(one.folder / "student.safetensors")
            )
