"""Which needs fewer trials: the list with its learning rates, or the list whose rates are left to manic?

Trains small nets on scikit-learn's data sets with each of the list's first entries, once with the optimizer and
schedule of the list, once with manic choosing the scale of the rate; prints the best validation loss after
1, 2, 3, … trials as its regret: 0 is the best that either way found for the task, 1 the loss before training.

    python benchmarks/opt_list_trials.py [--trials 20] [--seeds 3] [--steps 300] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from sklearn import datasets
from torch import nn

from manic import Mechanic, Updater
from manic.opt_list import config_for_idx, optimizer_for_idx, sweep

BATCH = 64
WAYS = ("list", "manic")
SHOWN = (1, 2, 3, 5, 10, 20, 50)
LEVELS = (0.05, 0.01)


TASKS: dict[str, tuple[Callable[..., Any], Callable[[], nn.Module]]] = {
    "digits MLP": (
        datasets.load_digits,
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    ),
    "digits CNN": (
        datasets.load_digits,
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(256, 10)),
        ),
    ),
    "diabetes MLP": (
        datasets.load_diabetes,
        lambda: nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0)),
    ),
    "cancer MLP": (
        datasets.load_breast_cancer,
        lambda: nn.Sequential(nn.Linear(30, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2)),
    ),
}


def run(task: str, way: str, seed: int, steps: int, idx: int) -> Iterator[float]:
    """One training; yields validation losses, the first of them before the training."""
    load, build = TASKS[task]
    x, y = (torch.as_tensor(array) for array in load(return_X_y=True))
    x = ((x - x.mean(0)) / (x.std(0) + 1e-6)).float()
    if y.is_floating_point():
        y, loss_of = ((y - y.mean()) / y.std()).float(), nn.functional.mse_loss
    else:
        y, loss_of = y.long(), nn.functional.cross_entropy
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    held_out, rest = order[: len(x) // 4], order[len(x) // 4 :]
    model = build()

    if way == "list":
        optimizer = optimizer_for_idx(model.parameters(), idx, steps, fused=True)
        mechanic = None
    else:
        base = optimizer_for_idx(model.parameters(), idx, None, fused=True)
        factor = partial(config_for_idx(idx).lr_factor, training_steps=steps)
        optimizer = Updater(base, torch.optim.lr_scheduler.LambdaLR(base, factor))
        mechanic = Mechanic(optimizer)

    def validation_loss() -> float:
        with torch.no_grad():
            return loss_of(model(x[held_out]), y[held_out]).item()

    yield validation_loss()
    for _ in range(steps):
        batch = rest[torch.randint(len(rest), (BATCH,))]
        optimizer.zero_grad()
        loss_of(model(x[batch]), y[batch]).backward()
        if mechanic is not None:
            mechanic.step()
        optimizer.step()
    yield validation_loss()


def losses_of(task: str, way: str, seed: int, steps: int, trials: int) -> tuple[float, list[float]]:
    """Loss before training, and the final one of every entry."""
    torch.set_num_threads(1)
    result = sweep(partial(run, task, way, seed, steps), trials, early_stopping=False, progress=False)
    finals = [trial.loss if math.isfinite(trial.loss) else math.inf for trial in result.trials]
    return result.trials[0].losses[0], finals


def regret(loss: float, initial: float, oracle: float) -> float:
    """The share of the achievable progress that was missed, cut off at 1."""
    return min(1.0, (loss - oracle) / (initial - oracle))


def trials_to(curve: list[float], regret: float) -> float:
    """How many trials bring the regret to a level; infinity if none does."""
    return next((i for i, value in enumerate(curve, 1) if value <= regret), math.inf)


def main() -> None:
    """Train them all, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="entries of the list to try")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per task")
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="file for all losses")
    arguments = parser.parse_args()

    start = time.perf_counter()
    jobs = [(task, way, seed) for task in TASKS for seed in range(arguments.seeds) for way in WAYS]
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        futures = {job: pool.submit(losses_of, *job, arguments.steps, arguments.trials) for job in jobs}
        results = {job: future.result() for job, future in futures.items()}

    # Regret of every single trial, and of the best of the first n.
    single: dict[tuple[str, str, int], list[float]] = {}
    curves: dict[tuple[str, str, int], list[float]] = {}
    for task, way, seed in jobs:
        initial, finals = results[task, way, seed]
        oracle = min(min(results[task, each, seed][1]) for each in WAYS)
        single[task, way, seed] = [regret(loss, initial, oracle) for loss in finals]
        curves[task, way, seed] = list(accumulate(single[task, way, seed], min))

    shown = [n for n in SHOWN if n <= arguments.trials]
    print("| task | way | " + " | ".join(f"{n} trials" for n in shown) + "".join(f" | to {x:g}" for x in LEVELS) + " |")
    print("|---" * (2 + len(shown) + len(LEVELS)) + "|")
    for task in (*TASKS, "all"):
        for way in WAYS:
            best = [curve for job, curve in curves.items() if job[1] == way and task in (job[0], "all")]
            cells = [f"{statistics.fmean(curve[n - 1] for curve in best):.3f}" for n in shown]
            cells += [f"{statistics.median(trials_to(curve, level) for curve in best):g}" for level in LEVELS]
            print(f"| {task} | {way} | " + " | ".join(cells) + " |")
    for way in WAYS:
        every = [value for job, values in single.items() if job[1] == way for value in values]
        print(f"{way}: regret of one trial: mean {statistics.fmean(every):.3f}, median {statistics.median(every):.3f}")
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"/".join(map(str, job)): result for job, result in results.items()}))


if __name__ == "__main__":
    main()
