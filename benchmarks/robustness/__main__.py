"""How close does a run without tuning come to one whose learning rate was tuned?

Trains small nets on real data with the base optimizers at every rate of a grid, and with methods that need no rate;
prints tables and draws pictures of what the latter lose. See docs/quality.md.

    python benchmarks/robustness quick|picture|standard|full [--only METHOD ...] [--tasks TASK ...] [--long] [--seeds N]

Each training's losses are kept in a file as they come: a second call does what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from report import STYLES, Plan, draw_indifference, draw_profiles, report, write_pairs
from tasks import CHEAP, CHOOSING, REPORTED
from tqdm import tqdm
from train import BASE, GRIDS, METHODS, SCHEDULES, START, Job, Losses, Run, grid, missing, train

QUICK = ("diabetes", "autoencoder", "new_digits", "tumours", "factors", "picture")
ALL = tuple(task.__name__ for task in CHOOSING + REPORTED)
DECADES = range(-12, 7)  # of the learning rates in the picture of indifference
STANDARD = Plan(ALL, tuple(GRIDS), SCHEDULES, 500, (0, 1))
SPREAD = Plan(("residual",), ("adamw", "sgd"), ("cosine",), 500, (0, 1))
FIVE = tuple(range(5))
SIZES: dict[str, tuple[list[Plan], Plan]] = {  # what is scored, and the runs in the picture of indifference
    "quick": (
        [Plan(QUICK, ("adamw", "sgd"), SCHEDULES, 200, (0, 1))],
        Plan(("diabetes",), ("adamw",), ("cosine",), 200, (0,)),
    ),
    "picture": ([], SPREAD),
    "standard": ([STANDARD], SPREAD),
    "full": (
        [STANDARD._replace(seeds=FIVE), STANDARD._replace(tasks=CHEAP, steps=5000, seeds=FIVE)],
        SPREAD._replace(seeds=FIVE),
    ),
}


def starts(plan: Plan) -> list[Job]:
    """The losses before training."""
    return [Job((Run(task, "", "", START, 0.0, 0, seed),)) for task in plan.tasks for seed in plan.seeds]


def jobs_of(plan: Plan, methods: Iterable[str]) -> list[Job]:
    """What a plan needs, cheap tasks first: the start, the tuned runs and manic's; after them the other methods."""
    jobs, after = starts(plan), []
    for task in sorted(plan.tasks, key=lambda task: task not in CHEAP):
        for base in plan.bases:
            for schedule in plan.schedules:
                run = Run(task, base, schedule, BASE, 0.0, plan.steps, 0)
                runs = tuple(run._replace(lr=lr, seed=seed) for lr in grid(base) for seed in plan.seeds)
                jobs.append(Job(runs, widen=True))
        for name in methods:
            method = METHODS[name]
            (jobs if name == "manic" else after).extend(
                Job((Run(task, base, schedule, name, method.lr, plan.steps, seed),))
                for base in method.bases
                for schedule in method.schedules
                for seed in plan.seeds
                if base in plan.bases and schedule in plan.schedules
            )
    jobs += after
    return jobs


def jobs_of_indifference(plan: Plan, methods: Iterable[str]) -> list[Job]:
    """Runs at learning rates eighteen decades apart."""
    jobs, lrs = starts(plan), [float(f"1e{decade}") for decade in DECADES]
    for task in plan.tasks:
        for base in plan.bases:
            run = Run(task, base, plan.schedules[0], BASE, 0.0, plan.steps, 0)
            jobs.append(Job(tuple(run._replace(lr=lr, seed=seed) for lr in lrs for seed in plan.seeds)))
            jobs += [
                Job((run._replace(method=method, lr=lr, seed=seed),))
                for method in methods
                if base in METHODS[method].bases
                for lr in lrs
                for seed in plan.seeds
            ]
    return jobs


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """What is in a file; a line that was being written when the process was killed is left out."""
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def read(file: Path) -> dict[Run, Losses]:
    """What was found before; of two rows for a run the later."""
    return {
        Run(*(row[name] for name in Run._fields)): Losses(
            *(math.inf if row[kind] is None else row[kind] for kind in Losses._fields)
        )
        for row in rows_of(file)
    }


def repair(file: Path) -> None:
    """Take what is no row out of a file."""
    lines = map(json.dumps, rows_of(file))
    new = file.with_suffix(".new")
    new.write_text("".join(f"{line}\n" for line in lines))
    new.replace(file)


def work(jobs: list[Job], file: Path, processes: int, again: Iterable[str] = ()) -> int:
    """Do what is not in the file yet, or of some methods, and write it there; returns how many jobs failed."""
    repair(file)
    found = read(file)
    todo = [job for job in dict.fromkeys(jobs) if job.runs[0].method in again or not found.keys() >= set(job.runs)]
    failed = 0
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(processes, get_context("spawn"))
    try:
        futures = {pool.submit(train, job): job for job in todo}
        with file.open("a") as out, tqdm(total=sum(len(job.runs) for job in todo), unit="run", smoothing=0) as bar:
            for future in as_completed(futures):
                job = futures[future]
                try:
                    out.write("".join(f"{json.dumps(row)}\n" for row in future.result()))
                    out.flush()
                except BrokenProcessPool:
                    raise
                except Exception:
                    failed += 1
                    tqdm.write(f"{job.runs[0]} failed:\n{traceback.format_exc()}", sys.stderr)
                bar.update(len(job.runs))
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def main() -> None:
    """Do what is missing, then print the tables and draw the pictures."""
    parser = argparse.ArgumentParser(
        "python benchmarks/robustness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods to run and report")
    parser.add_argument("--tasks", nargs="+", choices=ALL, default=ALL, help="tasks to run and report")
    parser.add_argument("--again", nargs="+", choices=METHODS, default=[], help="methods to run anew")
    parser.add_argument("--long", action="store_true", help="ten times the steps, on the tasks that are cheap")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many, instead of the size's own")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each; 0: report only")
    parser.add_argument("--out", type=Path, default=Path("runs/robustness"), help="folder for results and pictures")
    arguments = parser.parse_args()

    methods = []
    for name in arguments.only:
        if missing(METHODS[name].package):
            print(f"{name} is left out: {METHODS[name].package} is not installed", file=sys.stderr)
        else:
            methods.append(name)
    plans, spread = SIZES[arguments.size]
    if missing("pytorch_optimizer"):
        print("The base optimizer lion is left out: pytorch_optimizer is not installed", file=sys.stderr)
        plans = [plan._replace(bases=tuple(base for base in plan.bases if base != "lion")) for plan in plans]
    if arguments.long:
        plans = [plan._replace(steps=10 * plan.steps) for plan in plans[:1]]
    if arguments.seeds:
        plans = [plan._replace(seeds=tuple(range(arguments.seeds))) for plan in plans]
    asked = [task for task in arguments.tasks if task in CHEAP or not arguments.long]
    plans = [plan._replace(tasks=tuple(task for task in plan.tasks if task in asked)) for plan in plans]
    pictured = not arguments.long and set(spread.tasks) <= set(asked)

    file = arguments.out / "results.jsonl"
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [job for plan in plans for job in jobs_of(plan, methods)]
    if pictured:
        jobs += jobs_of_indifference(spread, [method for method in methods if method in STYLES])
    failed = work(jobs, file, arguments.processes, arguments.again) if arguments.processes else 0

    found = read(file)
    text = "\n".join(report(plan, methods, found) for plan in plans)
    (arguments.out / "report.md").write_text(text)
    print(text)
    for plan in plans:
        write_pairs(plan, methods, found, arguments.out / f"pairs_{plan.steps}.csv")
        draw_profiles(plan, methods, found, arguments.out / f"profiles_{plan.steps}.png")
    if pictured:
        draw_indifference(spread, found, arguments.out / "indifference.png")
    sys.exit(f"{failed} jobs failed; the same command tries them again." if failed else 0)


if __name__ == "__main__":
    main()
