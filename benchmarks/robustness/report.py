"""Scores of methods against tuned base optimizers: tables and pictures."""

from __future__ import annotations

import csv
import math
import platform
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tasks import CHOOSING, REPORTED
from train import BASE, METHODS, START, Losses, Run, grid, lr_of, mean, mean_losses

HALVES = {
    "Design tasks": [task.__name__ for task in CHOOSING],
    "Test tasks": [task.__name__ for task in REPORTED],
}
LEAST_LOSS = 1e-7  # losses below count as this: long runs on small data reach 0 in float32
LEVEL = 0.1  # a gap that counts as being as good
KINDS = range(len(Losses._fields))
GAPS = ("gap", "train_gap", "best_gap")  # of these, in a score
NAMES = {"adamw": "AdamW", "sgd": "SGD", "adam": "Adam", "rmsprop": "RMSprop", "lion": "Lion"}
STYLES: dict[str, dict[str, Any]] = {  # of the lines in the picture of indifference
    BASE: {"color": "0.5", "marker": "."},
    "mechanic-pytorch": {"color": "tab:orange", "marker": "."},
    "Prodigy": {"color": "tab:green", "marker": "."},
    "manic": {"color": "tab:blue", "linewidth": 3},
}
Found = Mapping[Run, Losses]


class Plan(NamedTuple):
    """Which tasks, base optimizers, schedules and seeds are run, and for how many steps."""

    tasks: tuple[str, ...]
    bases: tuple[str, ...]
    schedules: tuple[str, ...]
    steps: int
    seeds: tuple[int, ...]


class Score(NamedTuple):
    """Of a method on a pair; a gap is infinite if a seed diverged. Gaps are of the losses in the order of `Losses`."""

    task: str
    base: str
    schedule: str
    gap: float
    train_gap: float
    best_gap: float
    regret: float
    diverged: tuple[int, ...]  # seeds


class Pair:
    """A task, a base optimizer and a schedule: its tuned runs, and scores against them."""

    def __init__(self, plan: Plan, found: Found, task: str, base: str, schedule: str) -> None:
        self.seeds, self.found = plan.seeds, found
        self.run = Run(task, base, schedule, BASE, 0.0, plan.steps, 0)
        self.starts = [found[Run(task, "", "", START, 0.0, 0, seed)] for seed in plan.seeds]
        tried = {run.lr for run in found if run._replace(lr=0.0, seed=0) == self.run}
        self.means = {lr: mean_losses(self._losses(BASE, lr)) for lr in sorted(tried) if self.has(BASE, lr)}
        self.best_lr = _best_lr(self.means)
        self.oracle = Losses(*(self.means[lr][kind] for kind, lr in enumerate(self.best_lr)))

    def has(self, method: str, lr: float) -> bool:
        """Whether a method's runs are there, of all seeds."""
        return all(self.run._replace(method=method, lr=lr, seed=seed) in self.found for seed in self.seeds)

    def score(self, method: str, lr: float) -> Score:
        """Of a method at the learning rate given; with method `BASE`, of the base optimizer."""
        return self._score(self._losses(method, lr))

    def tuned_on_others(self) -> Score:
        """The base optimizer, every seed at the rate that is best for the others; each loss has its own."""
        rows = {lr: self._losses(BASE, lr) for lr in self.means}
        best = [
            _best_lr({lr: mean_losses(row[:i] + row[i + 1 :]) for lr, row in rows.items()})
            for i in range(len(self.seeds))
        ]
        return _each(self._score([rows[lr][i] for i, lr in enumerate(lrs)]) for lrs in zip(*best, strict=True))

    def _score(self, found: list[Losses]) -> Score:
        bad = [[not end[i] <= start[i] for i in KINDS] for end, start in zip(found, self.starts, strict=True)]
        loss = mean_losses(found)
        gaps = [math.inf if any(seed[i] for seed in bad) else _gap(loss[i], self.oracle[i]) for i in KINDS]
        start = mean_losses(self.starts)
        regret = min(1.0, (loss.valid - self.oracle.valid) / (start.valid - self.oracle.valid))
        diverged = tuple(seed for seed, (valid, *_) in zip(self.seeds, bad, strict=True) if valid)
        gap, train_gap, best_gap = gaps
        return Score(self.run.task, self.run.base, self.run.schedule, gap, train_gap, best_gap, regret, diverged)

    def wrong_by(self, half_decades: int) -> Score | None:
        """The base optimizer with too small and too large a rate, the mean of both; each loss has its own best rate."""
        sides = []
        for sign in (-1, 1):
            rates = [lr_of(round(2 * math.log10(best)) + sign * half_decades) for best in self.best_lr]
            if all(self.has(BASE, lr) for lr in rates):
                sides.append(_each(self.score(BASE, lr) for lr in rates))
        if not sides:
            return None
        return sides[0]._replace(
            **{name: statistics.fmean(getattr(side, name) for side in sides) for name in (*GAPS, "regret")},
            diverged=tuple(seed for side in sides for seed in side.diverged),
        )

    def _losses(self, method: str, lr: float) -> list[Losses]:
        return [self.found[self.run._replace(method=method, lr=lr, seed=seed)] for seed in self.seeds]


def _gap(loss: float, oracle: float) -> float:
    return max(loss, LEAST_LOSS) / max(oracle, LEAST_LOSS) - 1


def _best_lr(means: Mapping[float, Losses]) -> Losses:
    """The learning rate that is best for each of the losses."""
    return Losses(*(min(means, key=lambda lr: means[lr][kind]) for kind in KINDS))


def _each(scores: Iterable[Score]) -> Score:
    """The gap of each loss from a score of its own, the rest from the first."""
    first, *others = scores
    return first._replace(**{name: getattr(score, name) for name, score in zip(GAPS[1:], others, strict=True)})


def scores_of(plan: Plan, methods: Iterable[str], found: Found) -> dict[str, list[Score]]:
    """Of every method, and of base optimizers that are not tuned so well; pairs that are not done are left out."""
    pairs = []
    for task in plan.tasks:
        for base in plan.bases:
            for schedule in plan.schedules:
                run = Run(task, base, schedule, BASE, 0.0, plan.steps, 0)
                if all(run._replace(lr=lr, seed=seed) in found for lr in grid(base) for seed in plan.seeds):
                    pairs.append(Pair(plan, found, task, base, schedule))
    scores = {
        method: [pair.score(method, METHODS[method].lr) for pair in pairs if pair.has(method, METHODS[method].lr)]
        for method in methods
    }
    if len(plan.seeds) > 1:
        scores["lr tuned on other seeds"] = [pair.tuned_on_others() for pair in pairs]
    for name, half_decades in (("lr wrong by half a decade", 1), ("lr wrong by a decade", 2)):
        scores[name] = [score for pair in pairs if (score := pair.wrong_by(half_decades))]
    scores["one lr for all tasks"] = []
    for base in plan.bases:
        by_lr = {lr: [pair.score(BASE, lr) for pair in pairs if pair.run.base == base] for lr in grid(base)}
        scores["one lr for all tasks"] += min(
            by_lr.values(), key=lambda row: statistics.fmean(s.regret for s in row) if row else 0
        )
    return scores


# --- tables -------------------------------------------------------------------------------------------------------


def _percent(value: float) -> str:
    return "diverged" if math.isinf(value) else f"{100 * value:.1f} %"


def _share(gaps: list[float]) -> str:
    return f"{100 * sum(gap <= LEVEL for gap in gaps) / len(gaps):.0f} %"


def _short(gaps: list[float]) -> str:
    return f"{_percent(statistics.median(gaps))} ({_share(gaps)})" if gaps else "–"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _spread(gaps: list[float]) -> list[str]:
    return [_percent(statistics.median(gaps)), _share(gaps), _percent(max(gaps))]


def _summary(scores: Mapping[str, list[Score]]) -> str:
    head = ["", "pairs", "median gap", "within 10 %", "worst gap", "mean regret", "diverged runs"]
    rows = []
    for name, row in scores.items():
        cells = [f"{len(row)}", *_spread([score.gap for score in row])]
        cells += [f"{statistics.fmean(score.regret for score in row):.3f}", f"{sum(len(s.diverged) for s in row)}"]
        rows.append([name, *cells])
    return _table(head, rows)


def _other_losses(scores: Mapping[str, list[Score]]) -> str:
    """The gaps of the lowest validation loss on the way, and of the training loss."""
    columns = "median gap", "within 10 %", "worst"
    head = ["", *(f"{loss}: {column}" for loss in ("lowest", "training") for column in columns)]
    rows = []
    for name, row in scores.items():
        lowest, training = [score.best_gap for score in row], [score.train_gap for score in row]
        rows.append([name, *_spread(lowest), *_spread(training)])
    return _table(head, rows)


def _split(scores: Mapping[str, list[Score]], columns: Mapping[str, dict[str, str]], gap: str = "gap") -> str:
    """The gaps of every method in parts; a column says by which fields its scores are chosen."""

    def cell(row: list[Score], fields: dict[str, str]) -> str:
        return _short([getattr(score, gap) for score in row if fields.items() <= score._asdict().items()])

    rows = [[name, *(cell(row, fields) for fields in columns.values())] for name, row in scores.items()]
    return _table(["", *columns], rows)


def report(plan: Plan, methods: Iterable[str], found: Found) -> str:
    """The tables of a plan, in Markdown."""
    every = scores_of(plan, methods, found)
    text = [
        f"# {plan.steps} steps, {len(plan.seeds)} seeds\n",
        f"torch {torch.__version__}, Python {platform.python_version()}\n",
    ]
    for title, tasks in HALVES.items():
        scores = {
            name: chosen for name, row in every.items() if (chosen := [score for score in row if score.task in tasks])
        }
        if not scores:
            continue
        everywhere = {name: row for name, row in scores.items() if name not in METHODS or len(METHODS[name].bases) > 1}
        text += [f"## {title}\n", _summary(scores)]
        by_task = {task: {"task": task} for task in tasks if task in plan.tasks}
        by_schedule = {schedule: {"schedule": schedule} for schedule in plan.schedules}
        by_base = {base: {"base": base} for base in plan.bases}
        by_base["adamw, constant"] = {"base": "adamw", "schedule": "constant"}
        text += ["Median gap, and the share of pairs within 10 %, by task:\n", _split(scores, by_task)]
        text += ["The lowest validation loss on the way, and the training loss:\n", _other_losses(scores)]
        text += ["By task, the lowest validation loss on the way:\n", _split(scores, by_task, "best_gap")]
        text += ["By task, training loss:\n", _split(scores, by_task, "train_gap")]
        text += ["By schedule:\n", _split(everywhere, by_schedule)]
        text += ["By base optimizer, and on AdamW's with a constant rate:\n", _split(scores, by_base)]
        diverged = [
            f"- {name}: {score.task}, {score.base}, {score.schedule}, seeds {', '.join(map(str, score.diverged))}"
            for name, row in scores.items()
            if name in METHODS
            for score in row
            if score.diverged
        ]
        text += ["Diverged:\n", *(diverged or ["none"]), ""]
    return "\n".join(text)


def write_pairs(plan: Plan, methods: Iterable[str], found: Found, file: Path) -> None:
    """Every score, as CSV."""
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["method", *Score._fields])
        for name, row in scores_of(plan, methods, found).items():
            writer.writerows([name, *score] for score in row)


# --- pictures -----------------------------------------------------------------------------------------------------


def draw_profiles(plan: Plan, methods: Iterable[str], found: Found, file: Path) -> None:
    """The share of pairs whose gap is at most x, for every x: one panel for each half of the tasks."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(HALVES), figsize=(11, 4), sharey=True, layout="constrained")
    scores = scores_of(plan, methods, found)
    for axis, (title, tasks) in zip(axes, HALVES.items(), strict=True):
        for name, row in scores.items():
            gaps = sorted(score.gap for score in row if score.task in tasks)
            if gaps:
                shares = [(i + 1) / len(gaps) for i in range(len(gaps))]
                style = {"linewidth": 3} if name == "manic" else {"linestyle": "-" if name in METHODS else ":"}
                axis.step([max(gap, 1e-3) for gap in gaps], shares, where="post", label=name, **style)
        axis.axvline(LEVEL, color="0.8", zorder=0)
        axis.set(xscale="log", xlim=(1e-2, 10), xlabel="gap of the validation loss to the tuned run's", title=title)
    axes[0].set(ylabel="share of pairs", ylim=(0, 1))
    _legend(figure, 5)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_indifference(plan: Plan, found: Found, file: Path) -> None:
    """Final validation loss against the learning rate given, one panel for each base optimizer.

    Losses above the first are drawn at the first, which is the grey line. Nothing is drawn before that is known.
    """
    (task,), (schedule,) = plan.tasks, plan.schedules
    initial = {Run(task, "", "", START, 0.0, 0, seed) for seed in plan.seeds}
    if not found.keys() >= initial:
        return
    start = mean(found[run].valid for run in initial)
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(plan.bases), figsize=(5 * len(plan.bases), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, base in zip(axes[0], plan.bases, strict=True):
        for method, style in STYLES.items():
            run = Run(task, base, schedule, method, 0.0, plan.steps, 0)
            by_lr: dict[float, list[float]] = {}
            for other, losses in found.items():
                if other._replace(lr=0.0, seed=0) == run and other.seed in plan.seeds:
                    by_lr.setdefault(other.lr, []).append(losses.valid)
            points = {lr: min(start, mean(row)) for lr, row in sorted(by_lr.items()) if len(row) == len(plan.seeds)}
            if points:
                label = "base optimizer" if method == BASE else method
                axis.plot(list(points), list(points.values()), label=label, **style)
        axis.axhline(start, color="0.85", zorder=0)
        axis.set(xscale="log", yscale="log", xlabel="learning rate given", title=NAMES[base])
    axes[0][0].set_ylabel("final validation loss")
    _legend(figure, 4)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _legend(figure: Any, columns: int) -> None:
    """One legend for all panels, below them."""
    lines = {line.get_label(): line for axis in figure.axes for line in axis.lines if line.get_label()[0] != "_"}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
