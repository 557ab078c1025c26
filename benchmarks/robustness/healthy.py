"""How far runs that go well are from what a `ScaleWarning` is given for: its thresholds are from here.

Every task is trained under every base optimizer and schedule by manic. The table has the most, and of the gradient's
norm the least, that was seen at any check of a run, and the threshold; then come the runs that were warned.

    python benchmarks/robustness/healthy.py [--tasks NAME ...] [--bases NAME ...] [--schedules NAME ...] [--steps N]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import torch
from tasks import TASKS
from tqdm import tqdm
from train import GRIDS, SCHEDULES, Run, losses

from manic import diagnosis
from manic.diagnosis import Diagnosis, ScaleWarning, Signs


class Seen(NamedTuple):
    """Of a run: the extremes over its checks, and the warnings."""

    signs: Signs
    warned: tuple[str, ...]


TITLES = {
    "idle": (f"share of a window's learning steps without hope, if it has more than {diagnosis.WINDOW // 4}", "1"),
    "growth": ("growth of the norm beyond its largest at the checks before", f"{diagnosis.GROWTH:g}"),
    "turns": ("turns in a window", ""),
    "turns_in_two": ("turns in each of two windows in a row", f"{diagnosis.TURNS}"),
    "spread": ("variation of the gradient's norm in a window, at least", f"{diagnosis.SPREAD:g}"),
}


def seen(run: Run) -> Seen:
    """Train, and note what every check sees."""
    torch.set_num_threads(1)
    checks: list[Signs] = []
    read = Diagnosis._signs

    def noting(self: Diagnosis, rows: list[tuple[float, ...]], largest: float) -> Signs:
        checks.append(read(self, rows, largest))
        return checks[-1]

    with warnings.catch_warnings(record=True) as caught, mock.patch.object(Diagnosis, "_signs", noting):
        warnings.simplefilter("always", ScaleWarning)
        losses(run)
    return Seen(extremes(checks), tuple(str(one.message) for one in caught if one.category is ScaleWarning))


def extremes(all_signs: Iterable[Signs]) -> Signs:
    """The most of each, and the least of the last."""
    idle, growth, turns, turns_in_two, spread = zip(*all_signs, strict=True)
    return Signs(max(idle), max(growth), max(turns), max(turns_in_two), min(spread))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--bases", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--steps", type=int, default=1024)
    options = parser.parse_args()
    places = product(options.tasks, options.bases, options.schedules)
    runs = [Run(*place, method="manic", lr=1.0, steps=options.steps, seed=0) for place in places]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = dict(zip(runs, tqdm(pool.map(seen, runs), total=len(runs), unit="run"), strict=True))

    whole = extremes(one.signs for one in found.values())
    print(f"| {len(runs)} runs of {options.steps} steps | at most | in the run | threshold |\n|---|---|---|---|")
    for name, (title, threshold) in TITLES.items():
        run = next(run for run, one in found.items() if getattr(one.signs, name) == getattr(whole, name))
        print(f"| {title} | {getattr(whole, name):.3g} | {run.task}, {run.base}, {run.schedule} | {threshold} |")
    warned = {run: one.warned for run, one in found.items() if one.warned}
    print(f"\n{len(warned)} runs were warned.")
    for run, messages in warned.items():
        print(f"{run.task}, {run.base}, {run.schedule}: {' '.join(messages)}")


if __name__ == "__main__":
    main()
