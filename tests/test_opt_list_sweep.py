"""`opt_list.sweep` and `opt_list.learn_list`."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from manic.opt_list import Sweep, Trial, learn_list, optimizer_for_idx, sweep

# Losses that the entries report, by idx.
CURVES = {
    0: [4.0, 3.0, 2.0, 1.5],
    1: [4.0, 2.0, 1.0, 0.5],
    2: [5.0, 4.0, 3.0, 2.0],
    3: [9.0, 8.0, 7.0, 0.1],  # hopeless, up to its third report
    4: [4.0, math.nan, 1.0, 0.2],
    5: [3.0, 2.0, 1.0, 0.4],
}


def canned(idx):
    yield from CURVES[idx]


def regression(idx):
    """A real training: a linear regression of 60 steps."""
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    model = torch.nn.Linear(3, 1)
    optimizer = optimizer_for_idx(model.parameters(), idx, training_steps=60)
    for step in range(60):
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - y).square().mean()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            yield loss


def broken(idx):
    raise RuntimeError(f"no more memory, in process {os.getpid()}")


def first_breaks(idx):
    if idx == 0:
        broken(idx)
    time.sleep(1.0)
    return 1.0


class OddError(Exception):
    """Pickles, but cannot be made again from its message."""

    def __init__(self, what, where):
        super().__init__(f"{what} in {where}")


def first_breaks_oddly(idx):
    if idx == 0:
        raise OddError("a hole", "the data")
    time.sleep(1.0)
    return 1.0


def outcomes(result):
    return [(trial.idx, trial.status, trial.losses) for trial in result.trials]


def test_every_trial_is_made_and_the_best_found():
    result = sweep(canned, 6, progress=False)
    assert [trial.idx for trial in result.trials] == list(range(6))
    assert [trial.status for trial in result.trials] == [
        "finished", "finished", "finished", "stopped", "diverged", "finished",
    ]  # fmt: skip
    assert result.best.idx == 5
    assert result.best.loss == 0.4
    assert all(trial.seconds >= 0 for trial in result.trials)


def test_a_hopeless_trial_is_stopped_after_its_first_third():
    stopped = sweep(canned, 4, progress=False).trials[3]
    assert (stopped.status, stopped.losses) == ("stopped", [9.0, 8.0])
    assert stopped.loss == 8.0


def test_a_trial_that_is_better_than_some_is_not_stopped():
    # Averages up to the second report of 0, 1, 2: 3.5, 3, 4.5; their median is 3.5.
    for second_report, status in ((3.5, "finished"), (3.6, "stopped")):
        curves = {**CURVES, 3: [4.0, second_report, 2.0, 9.0]}
        assert sweep(lambda idx, curves=curves: iter(curves[idx]), 4, progress=False).trials[3].status == status


def test_the_last_report_is_not_compared():
    curves = {0: [1.0], 1: [1.0], 2: [1.0], 3: [2.0]}
    assert sweep(lambda idx: iter(curves[idx]), 4, progress=False).trials[3].status == "finished"


def test_early_stopping_can_be_left_out_but_divergence_ends_a_trial():
    result = sweep(canned, 5, early_stopping=False, progress=False)
    assert result.best.idx == 3
    assert [len(trial.losses) for trial in result.trials] == [4, 4, 4, 4, 2]
    assert result.trials[4].loss == math.inf


def test_a_stopped_training_cleans_up():
    ended = []

    def train(idx):
        try:
            yield math.nan
        finally:
            ended.append(idx)

    sweep(train, 2, progress=False)
    assert ended == [0, 1]


def test_one_loss_may_be_returned():
    result = sweep(lambda idx: torch.tensor(5.0 - idx), 4, progress=False)
    assert [trial.losses for trial in result.trials] == [[5.0], [4.0], [3.0], [2.0]]
    assert result.best.idx == 3


def test_an_order_of_ones_own():
    result = sweep(canned, 3, order=[5, 1, 0, 2], progress=False)
    assert [trial.idx for trial in result.trials] == [5, 1, 0]


def test_an_order_may_be_an_array(tmp_path):
    result = sweep(canned, 2, order=torch.tensor([5, 1]).numpy(), path=tmp_path / "trials.jsonl", progress=False)
    assert sweep(canned, 2, order=[5, 1], path=tmp_path / "trials.jsonl", progress=False) == result


def test_a_sweep_goes_on_where_it_was(tmp_path):
    path = tmp_path / "trials.jsonl"
    made = []

    def train(idx):
        made.append(idx)
        if idx == 2 and made.count(2) == 1:
            raise KeyboardInterrupt
        yield from CURVES[idx]

    with pytest.raises(KeyboardInterrupt):
        sweep(train, 5, path=path, progress=False)
    assert made == [0, 1, 2]
    assert len(path.read_text().splitlines()) == 2
    resumed = sweep(train, 5, path=path, progress=False)
    assert made == [0, 1, 2, 2, 3, 4]
    assert outcomes(resumed)[:4] == outcomes(sweep(canned, 5, progress=False))[:4]
    assert math.isnan(resumed.trials[4].losses[1])

    again = sweep(train, 6, path=path, progress=False)
    assert made == [0, 1, 2, 2, 3, 4, 5]
    assert again.trials[:4] == resumed.trials[:4]
    assert again.best.idx == 5


def test_the_file_is_of_json_lines(tmp_path):
    path = tmp_path / "trials.jsonl"
    sweep(canned, 5, path=path, progress=False)

    def strict(constant):
        raise AssertionError(f"{constant} is not JSON")

    records = [json.loads(line, parse_constant=strict) for line in path.read_text().splitlines()]
    assert [record["idx"] for record in records] == [0, 1, 2, 3, 4]
    assert records[4]["losses"] == [4.0, None]


def test_a_line_that_was_cut_off_is_made_again(tmp_path):
    path = tmp_path / "trials.jsonl"
    sweep(canned, 3, path=path, progress=False)
    whole = path.read_text()
    path.write_text(whole[:-20])
    result = sweep(canned, 3, path=path, progress=False)
    assert [trial.idx for trial in result.trials] == [0, 1, 2]
    assert [json.loads(line)["idx"] for line in path.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    "line", ["not json", '{"idx": 0}', '{"idx": 0, "losses": [1.0], "seconds": 1, "status": "ok", "x": 1}']
)
def test_a_file_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "trials.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*trials.jsonl is not a trial"):
        sweep(canned, 1, path=path, progress=False)
    assert path.read_text() == line + "\n"


@pytest.mark.parametrize(
    "text", ['{"precious": [1, 2]}', "# notes", "# notes\nline two\nlast line", '{"idx": 0}\n', "\xff\n"]
)
def test_another_file_is_left_as_it_is(tmp_path, text):
    path = tmp_path / "notes.md"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"Line \d of .*notes.md is not a trial.*Nothing was changed"):
        sweep(canned, 1, path=path, progress=False)
    assert path.read_bytes() == text.encode("latin-1")


def test_the_folder_is_made(tmp_path):
    path = tmp_path / "new" / "trials.jsonl"
    sweep(canned, 1, path=path, progress=False)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "reported", [None, [1.0, 0.5], "low", torch.ones(2)], ids=lambda reported: type(reported).__name__
)
def test_a_report_that_is_no_number_is_refused(reported):
    with pytest.raises(ValueError, match=r"train\(0\) reported .*; expected a number"):
        sweep(lambda idx: reported, 1, progress=False)


def test_processes_find_what_one_process_finds(tmp_path):
    alone = sweep(regression, 4, early_stopping=False, progress=False)
    together = sweep(regression, 4, workers=2, path=tmp_path / "t.jsonl", early_stopping=False, progress=False)
    assert [trial.idx for trial in together.trials] == [0, 1, 2, 3]
    for one, other in zip(alone.trials, together.trials, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert alone.best.loss < 0.7 * alone.trials[0].losses[0]
    assert together.best.idx == alone.best.idx
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 4


def test_an_error_in_a_worker_comes_through():
    with pytest.raises(RuntimeError, match=f"no more memory, in process (?!{os.getpid()}$)"):
        sweep(broken, 1, workers=1, progress=False)


@pytest.mark.parametrize(
    ("train", "message"),
    [(first_breaks, "no more memory"), (first_breaks_oddly, r"train\(0\) raised OddError: a hole in the data")],
)
def test_trials_beside_one_that_fails_are_kept(train, message, tmp_path):
    path = tmp_path / "trials.jsonl"
    with pytest.raises(RuntimeError, match=message):
        sweep(train, 4, workers=2, path=path, progress=False)
    assert [json.loads(line)["idx"] for line in path.read_text().splitlines()] == [1]


def test_the_bar_shows_the_best(capsys):
    pytest.importorskip("tqdm")
    sweep(canned, 2)
    assert "best=0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; expected 1 to 100"),
        ({"k": 101}, "k is 101; expected 1 to 100"),
        ({"k": 2.5}, "k is 2.5; expected 1 to 100"),
        ({"k": 3, "order": [1, 2]}, "k is 3; expected 1 to 2"),
        ({"k": 2, "order": [1, 1]}, "expected every place once"),
        ({"k": 2, "order": [1, 100]}, "idx is 100; expected a place"),
        ({"k": 2, "order": torch.tensor([1, 1])}, "expected every place once"),
        ({"order": [3, 1]}, r"k is 10; expected 1 to 2, .*10 unless you give it"),
        ({"workers": -1}, "workers is -1; expected"),
        ({"workers": "2"}, "workers is '2'; expected"),
    ],
)
def test_places_that_are_not_there_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sweep(canned, **options, progress=False)


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (5, {}, "train is 5; expected a function of a place"),
        (iter([0.5]), {}, "train is .*; expected a function of a place"),
        (canned, {"order": 5}, "order is 5; expected places in the list"),
        (canned, {"order": learn_list([[0.1, 0.2]])}, r"order is LearnedList.*such as learn_list\(losses\).order"),
        (canned, {"order": [0.0, 1.0]}, r"order is \[0.0, 1.0\]; expected places in the list"),
    ],
)
def test_a_sweep_of_something_else_is_refused(train, options, message):
    with pytest.raises(TypeError, match=message):
        sweep(train, 2, **options, progress=False)


def test_a_training_without_a_loss_is_refused():
    with pytest.raises(ValueError, match=r"train\(0\) yielded no loss"):
        sweep(lambda idx: iter(()), 1, progress=False)


def test_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    result = sweep(canned, 5, progress=False)
    lines = result.table().splitlines()
    assert len(lines) == 7
    assert lines[3].startswith("| 1 | 0.5 | finished (best) | 4 |")
    assert lines[6].startswith("| 4 | inf | diverged | 2 |")
    result.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_a_best_that_is_not_there_is_an_error():
    result = Sweep([Trial(0, "diverged", [math.nan], 1.0)])
    with pytest.raises(ValueError, match="None of 1 trials has finished"):
        _ = result.best
    assert "diverged |" in result.table()


def test_the_example_goes_on(tmp_path):
    script = Path(__file__).parents[1] / "src" / "examples" / "opt_list" / "main.py"
    out = ""
    for trials in (2, 4):
        command = [sys.executable, str(script), "--trials", str(trials), "--out", str(tmp_path)]
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
        assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == trials
    assert "| 3 | 0." in out
    assert "Best: idx=3" in out
    assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")


# The list learner


def greedy(rows, initial):
    """The greedy order in plain floats, by trying every extension of the list."""
    normal = []
    for row, top in zip(rows, initial, strict=True):
        low = min(x for x in row if math.isfinite(x))
        normal.append([min(1.0, (x - low) / (top - low)) if math.isfinite(x) else 1.0 for x in row])
    order = []
    while len(order) < len(rows[0]):

        def cost(column):
            return sum(min(row[i] for i in (*order, column)) for row in normal)

        order.append(min((c for c in range(len(rows[0])) if c not in order), key=cost))
    return order, [sum(min(row[i] for i in order[: n + 1]) for row in normal) / len(rows) for n in range(len(order))]


def test_the_order_is_the_greedy_one():
    rng = random.Random(0)
    for tasks, settings in itertools.product((1, 3, 8), (1, 5, 9)):
        rows = [[rng.choice([rng.random() * 3, math.nan, math.inf]) for _ in range(settings)] for _ in range(tasks)]
        for row in rows:
            row[rng.randrange(settings)] = rng.random()
        initial = [2.0] * tasks
        order, means = greedy(rows, initial)
        learned = learn_list(rows, initial)
        assert sorted(learned.order) == list(range(settings))
        assert learned.mean_losses == pytest.approx(means, abs=1e-12)
        # Once every task has its best, all that is left is equally good.
        first_zero = next((i for i, mean in enumerate(means) if mean == 0), settings)
        assert learned.order[: first_zero + 1] == order[: first_zero + 1]


def test_the_second_of_a_list_makes_up_for_the_first():
    losses = torch.tensor([[0.0, 0.1, 1.0], [0.0, 0.1, 1.0], [1.0, 0.9, 0.0]])  # the third saves the third task
    assert learn_list(losses).order == [0, 2, 1]
    assert learn_list(losses).mean_losses == pytest.approx([1 / 3, 0, 0])
    assert learn_list(losses, k=2).order == [0, 2]


def test_a_task_that_no_setting_improves_does_not_order_them():
    learned = learn_list([[2.0, 2.1], [0.2, 0.1]], [1.0, 1.0])
    assert learned.order == [1, 0]
    assert learned.mean_losses == [0.5, 0.5]


def test_tasks_count_the_same_whatever_their_units():
    losses = [[0.1, 0.2, 0.9], [900.0, 300.0, 100.0]]
    assert learn_list(losses, [1.0, 1000.0]).order == [1, 2, 0]


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ([1.0, 2.0], {}, r"losses has shape \(2,\)"),
        ([[]], {}, r"losses has shape \(1, 0\)"),
        ([[1.0, 2.0], [math.nan, math.inf]], {}, "Task 1 has no finite loss"),
        ([[1.0, 2.0]], {"k": 3}, "k is 3; expected 1 to 2"),
        ([[1.0, 2.0]], {"k": 1.5}, r"k is 1\.5; expected 1 to 2"),
        ([[1.0, 2.0], [3.0]], {}, "losses is .*; expected numbers, tasks × settings"),
        ("losses", {}, "losses is 'losses'; expected numbers, tasks × settings"),
        ([[1.0, 2.0]], {"initial_losses": [1.0, 2.0]}, "a finite number for each of 1 tasks"),
        ([[1.0, 2.0]], {"initial_losses": [math.nan]}, "a finite number for each of 1 tasks"),
    ],
)
def test_tables_that_cannot_be_learned_from_are_refused(losses, options, message):
    with pytest.raises(ValueError, match=message):
        learn_list(losses, **options)
