"""The benchmark of robustness: what it trains, how it scores, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "robustness"
sys.path.insert(0, str(FOLDER))  # as Python does when it runs the folder
pytest.importorskip("sklearn")

import report as reports  # noqa: E402
import tasks  # noqa: E402
import train as training  # noqa: E402
from train import BASE, METHODS, SCHEDULES, START, Losses, Run  # noqa: E402


@pytest.fixture(scope="module")
def main() -> dict[str, Any]:
    return run_path(str(FOLDER / "__main__.py"), run_name="robustness")


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task `tumours` in double precision."""
    task = tasks.tumours()
    (train, labels), (valid, valid_labels) = task.train, task.valid
    double = replace(
        task, make=lambda: task.make().double(), train=(train.double(), labels), valid=(valid.double(), valid_labels)
    )
    monkeypatch.setitem(tasks.TASKS, "tumours", lambda: double)


def trained(run: Run) -> torch.Tensor:
    """All parameters at the end."""
    *_, model = training.checkpoints(run)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("base", training.GRIDS)
def test_a_stack_ends_where_torch_ends(base: str, float64: None) -> None:
    if base == "lion":
        pytest.importorskip("pytorch_optimizer")
    lrs, steps = [3e-4, 1e-2], 40
    stack = training.Stack(tasks.TASKS["tumours"](), [0, 1])
    checks = [x.clone() for x in stack.train(base, "cosine", lrs, steps)]
    assert len(checks) == training.CHECKS
    measured, stacked = stack.losses(checks), checks[-1]
    for seed in (0, 1):
        for i, lr in enumerate(lrs):
            run = Run("tumours", base, "cosine", BASE, lr, steps, seed)
            alone = trained(run)
            assert (alone - stack.start[seed]).norm() > 1e-3  # it moved
            torch.testing.assert_close(stacked[seed, i], alone, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(measured[seed][i], training.losses(run), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name not in ("lines", "new_digits", "new_text")])
def test_every_task_stacks(name: str) -> None:
    """One step of plain torch and of a stack agree in float32, so the models run under the nested vmap."""
    if name == "picture":
        pytest.importorskip("PIL")
    stack = training.Stack(tasks.TASKS[name](), [3])
    (stacked,) = stack.train("sgd", "constant", [0.1], 1)
    stacked, alone = stacked[0, 0], trained(Run(name, "sgd", "constant", BASE, 0.1, 1, 3))
    step = alone - stack.start[0]
    assert step.norm() > 0
    assert (stacked - alone).norm() < 1e-4 * step.norm()


@pytest.mark.filterwarnings("ignore::manic.ScaleWarning")  # held-out rows may have no more to gain
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, schedule: str) -> None:
    pytest.importorskip(METHODS[method].package)
    if schedule not in METHODS[method].schedules:
        pytest.skip("has no schedule")
    run = Run("tumours", METHODS[method].bases[0], schedule, method, METHODS[method].lr, 200, 4)
    start, end = training.losses(run._replace(method=START)), training.losses(run)
    assert math.isfinite(end.train)
    if schedule == "constant":
        assert end.train < 0.9 * start.train
    else:  # D-Adaptation is hardly under way after so few steps
        assert end != start
        assert end != training.losses(run._replace(schedule="constant"))


def test_the_best_on_the_way() -> None:
    """A net that learns its rows by heart gets worse on others; what it had before counts."""
    assert [step for step in range(1, 101) if training.is_check(step, 100)] == list(range(10, 101, 10))
    assert [step for step in range(1, 5) if training.is_check(step, 4)] == [1, 2, 3, 4]
    found = training.losses(Run("diabetes", "adamw", "constant", BASE, 0.03, 200, 0))
    assert found.best < 0.9 * found.valid
    stack = training.Stack(tasks.diabetes(), [0])
    (stacked, gone) = stack.losses(stack.train("adamw", "constant", [0.03, 1e9], 200))[0]
    assert stacked.best == pytest.approx(found.best, rel=1e-3)
    assert not math.isfinite(gone.valid)


def test_an_epoch_has_every_row_once() -> None:
    """Anew in every epoch, but with replacement; a batch may be of two epochs."""
    task = replace(tasks.diabetes(), train=(torch.arange(50), torch.arange(50)), batch=8)
    rows = torch.cat([inputs for inputs, _ in training.batches(task, 0, 25)]).view(4, 50)
    assert all(epoch.sort().values.equal(torch.arange(50)) for epoch in rows)
    assert not rows[0].equal(rows[1])
    assert task.steps_per_epoch == 50 / 8
    (some, _), *_ = training.batches(replace(task, batch=50, replacement=True), 0, 1)
    assert len(some.unique()) < 50


def test_augmented_inputs_never_come_twice() -> None:
    task = tasks.augmented()
    assert math.isinf(task.steps_per_epoch)
    assert replace(task, recognized=True).steps_per_epoch == len(task.train[0]) / task.batch
    epochs = [list(training.batches(replace(task, batch=len(task.train[0])), seed, 2)) for seed in (0, 0, 1)]
    first, second = (torch.cat([task.train[0], *(inputs for inputs, _ in epoch)]) for epoch in (epochs[0], epochs[2]))
    assert len(first.unique(dim=0)) == len(first)
    assert not first.equal(second)
    assert all(torch.equal(*pair) for pair in zip(epochs[0][0], epochs[1][0], strict=True))
    images = torch.full((200, 64), 0.5)
    seen = tasks.shifted(images, torch.Generator().manual_seed(0)).view(-1, 8, 8)
    empty = seen.mean((0, 2)) < seen.mean() - 0.2  # a third of the images have no ink in the first row, or the last
    assert empty.tolist() == [True, *[False] * 6, True]


def test_schedules() -> None:
    factors = {name: [training.factor(name, step, 100) for step in range(100)] for name in SCHEDULES}
    assert factors["constant"] == [1.0] * 100
    assert factors["linear"][0] == 1
    assert factors["linear"][-1] == pytest.approx(0.01)
    assert factors["cosine"][:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors["cosine"][-1] < 0.001


@pytest.mark.parametrize(("fixture", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_manic_is_indifferent_to_lr(base: str, fixture: str, tolerance: float, request: pytest.FixtureRequest) -> None:
    """Over eighteen decades."""
    if fixture == "float64":
        request.getfixturevalue(fixture)
    run = Run("tumours", base, "cosine", "manic", 1.0, 60, 0)
    start, end = (trained(one) for one in (run._replace(method=START), run))
    for lr in (1e-12, 1e-5, 3.0, 1e6):
        other = trained(run._replace(lr=lr))
        assert (other - end).norm() < tolerance * (end - start).norm()


def test_a_grid_grows_until_the_best_is_inside() -> None:
    """SGD for few steps wants more than the rates that it is given."""
    run = Run("tumours", "sgd", "constant", BASE, 0.0, 10, 0)
    given = [training.lr_of(i) for i in range(-8, -2)]
    rows = training.train(training.Job(tuple(run._replace(lr=lr) for lr in given), widen=True))
    by_lr = {row["lr"]: row["valid"] for row in rows}
    assert len(by_lr) > len(given)
    assert set(given) < set(by_lr)
    assert training.at_edge({lr: math.inf if loss is None else loss for lr, loss in by_lr.items()}) == 0


# --- scores -------------------------------------------------------------------------------------------------------

PLAN = reports.Plan(("tumours",), ("sgd",), ("constant",), 20, (0, 1))
RUN = Run("tumours", "sgd", "constant", BASE, 0.0, 20, 0)


def invented() -> dict[Run, Losses]:
    """Validation loss 1 + 0.05 a half decade off 0.1, training loss the same off 1; from 2 at the start.

    The lowest validation loss on the way is 0.9 + 0.02 a half decade off 1.
    """
    found = {}
    for seed in (0, 1):
        found[Run("tumours", "", "", START, 0.0, 0, seed)] = Losses(2.0, 2.0, 2.0)
        for i in range(-8, 5):
            losses = Losses(1 + 0.05 * abs(i + 2), 1 + 0.05 * abs(i), 0.9 + 0.02 * abs(i))
            found[RUN._replace(lr=training.lr_of(i), seed=seed)] = losses
        found[RUN._replace(method="manic", lr=1.0, seed=seed)] = Losses(1.1 + 0.2 * seed, 1.5, 0.99)
    found[RUN._replace(method="mechanic-pytorch", lr=1.0, seed=0)] = Losses(math.inf, 1.0, 1.0)
    found[RUN._replace(method="mechanic-pytorch", lr=1.0, seed=1)] = Losses(1.0, 1.0, 0.8)
    return found


def test_scores() -> None:
    scores = reports.scores_of(PLAN, ["manic", "mechanic-pytorch", "DoG"], invented())
    (manic,) = scores["manic"]
    assert (manic.gap, manic.train_gap, manic.best_gap, manic.regret) == pytest.approx((0.2, 0.5, 0.1, 0.2))
    assert manic.diverged == ()
    (diverged,) = scores["mechanic-pytorch"]
    assert (diverged.gap, diverged.train_gap, diverged.regret, diverged.diverged) == (math.inf, 0, 1, (0,))
    assert diverged.best_gap == pytest.approx(0)  # before it did
    assert scores["DoG"] == []  # not run
    (tuned,), (half,), (whole,), (one,) = (list(scores[name]) for name in list(scores)[3:])
    assert (tuned.gap, tuned.train_gap, tuned.best_gap) == (0, 0, 0)  # both seeds are best at the same rate
    assert (half.gap, half.train_gap, half.best_gap) == pytest.approx((0.05, 0.05, 0.02 / 0.9))
    assert (whole.gap, whole.train_gap, whole.best_gap) == pytest.approx((0.1, 0.1, 0.04 / 0.9))
    # the rate is chosen by the validation loss at the end
    assert (one.gap, one.train_gap, one.best_gap) == pytest.approx((0, 0.1, 0.04 / 0.9))


def test_tuned_on_other_seeds() -> None:
    found = invented()
    for i in range(-8, 5):  # the second seed is best half a decade higher, where the first has 1.05
        found[RUN._replace(lr=training.lr_of(i), seed=1)] = Losses(1 + 0.05 * abs(i + 1), 1 + 0.05 * abs(i), 1.0)
    (score,) = reports.scores_of(PLAN, [], found)["lr tuned on other seeds"]
    assert score.gap == pytest.approx(1.05 / 1.025 - 1)
    assert score.train_gap == 0
    assert "lr tuned on other seeds" not in reports.scores_of(PLAN._replace(seeds=(0,)), [], found)


def test_above_the_start_is_diverged() -> None:
    found = invented()
    found[RUN._replace(method="manic", lr=1.0, seed=1)] = Losses(2.01, 1.5, 1.0)
    (score,) = reports.scores_of(PLAN, ["manic"], found)["manic"]
    assert score.gap == math.inf
    assert score.train_gap == pytest.approx(0.5)
    assert score.diverged == (1,)
    assert "- manic: tumours, sgd, constant, seeds 1" in reports.report(PLAN, ["manic"], found)


# --- the whole ----------------------------------------------------------------------------------------------------


def test_resumes_and_reports(main: dict[str, Any], tmp_path: Path) -> None:
    plan, file = PLAN._replace(seeds=(0,)), tmp_path / "results.jsonl"
    jobs = main["jobs_of"](plan, ["manic", "DoG"] if not training.missing("dog") else ["manic"])
    assert len(jobs) == (4 if not training.missing("dog") else 3)  # start, grid, methods
    assert main["work"](jobs[:-1], file, 1) == 0
    before = file.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert len(rows) >= 1 + 11 + len(jobs) - 3

    file.write_text(before + before.splitlines()[-1][:40])  # killed while it wrote
    assert main["work"](jobs, file, 1) == 0
    after = file.read_text()
    assert after.startswith(before)
    assert [json.loads(line)["method"] for line in after[len(before) :].splitlines()] == [jobs[-1].runs[0].method]
    assert main["work"](jobs, file, 1) == 0
    assert file.read_text() == after  # nothing was left to do
    assert main["work"](jobs, file, 1, ["manic"]) == 0
    anew = file.read_text()
    assert anew.startswith(after)
    assert [json.loads(line)["method"] for line in anew[len(after) :].splitlines()] == ["manic"]

    found = main["read"](file)
    (score,) = reports.scores_of(plan, ["manic"], found)["manic"]
    oracle = min(losses.valid for run, losses in found.items() if run.method == BASE)
    manic = next(losses.valid for run, losses in found.items() if run.method == "manic")
    if math.isfinite(score.gap):
        assert score.gap == pytest.approx(manic / oracle - 1)
    assert f"| manic | 1 | {'diverged' if math.isinf(score.gap) else f'{100 * score.gap:.1f} %'} |" in reports.report(
        plan, ["manic"], found
    )
    reports.draw_profiles(plan, ["manic"], found, tmp_path / "profiles.png")
    reports.draw_indifference(plan, found, tmp_path / "indifference.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_tasks_can_be_chosen(main: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are not cheap are left out of long runs."""
    options = ["--tasks", "tumours", "recurrent", "--only", "manic", "--processes", "0", "--out", str(tmp_path)]
    for more, expected in (([], {"tumours", "recurrent"}), (["--long"], {"tumours"})):
        plans = []
        monkeypatch.setitem(
            main["main"].__globals__, "jobs_of", lambda plan, methods, seen=plans: seen.append(plan) or []
        )
        monkeypatch.setattr(sys, "argv", ["robustness", "standard", *options, *more])
        with pytest.raises(SystemExit) as done:
            main["main"]()
        assert not done.value.code
        assert {task for plan in plans for task in plan.tasks} == expected


def test_a_failing_job_does_not_stop_the_others(main: dict[str, Any], tmp_path: Path) -> None:
    start = Run("tumours", "", "", START, 0.0, 0, 0)
    jobs = [training.Job((start._replace(task="none"),)), training.Job((start,))]
    assert main["work"](jobs, tmp_path / "results.jsonl", 1) == 1
    assert list(main["read"](tmp_path / "results.jsonl")) == [start]
