"""`sweep`: try the list's first entries on your own training function."""

from __future__ import annotations

import json
import math
import numbers
import operator
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from manic.opt_list.configs import all_configs, config_for_idx
from manic.plotting import new_figure

Train = Callable[[int], Any]  # a number, or an iterator of numbers
MIN_FINISHED = 3  # trials that must have finished before one is stopped by comparison
BEGINNING = b'{"idx": '  # of a line of a file


@dataclass(frozen=True)
class Trial:
    """What became of one entry.

    Attributes:
        idx: the entry's place in the list.
        status: ``"finished"``, ``"stopped"`` (early, as hopeless) or ``"diverged"`` (a loss was not finite).
        losses: as the training function reported them; the last is the one that counts.
        seconds: how long it took.
    """

    idx: int
    status: str
    losses: list[float]
    seconds: float

    @property
    def loss(self) -> float:
        """The last loss reported; infinity if the trial diverged."""
        return math.inf if self.status == "diverged" else self.losses[-1]


@dataclass(frozen=True)
class Sweep:
    """What `sweep` found.

    Attributes:
        trials: those that were made, in the order of the list.
    """

    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The finished trial with the least loss.

        Raises:
            ValueError: none has finished.
        """
        finished = [trial for trial in self.trials if trial.status == "finished"]
        if not finished:
            raise ValueError(
                f"None of {len(self.trials)} trials has finished with a finite loss. Do the losses of the training "
                "function start finite? If so, try more entries of the list."
            )
        return min(finished, key=lambda trial: trial.loss)

    def table(self) -> str:
        """The trials as a Markdown table, one row each, the best one marked."""
        best = self.best.idx if any(trial.status == "finished" for trial in self.trials) else None
        rows = ["| idx | loss | status | reports | seconds |", "|---|---|---|---|---|"]
        for trial in self.trials:
            mark = " (best)" if trial.idx == best else ""
            rows.append(
                f"| {trial.idx} | {trial.loss:.6g} | {trial.status}{mark} | {len(trial.losses)} | {trial.seconds:.1f} |"
            )
        return "\n".join(rows)

    def plot(self, path: str | Path) -> None:
        """Write a picture: every trial's losses, and the best loss after so many trials.

        Args:
            path: the file to write; its ending decides the format, for example ``.png``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = new_figure(8.4, 3.2)
        curves, bests = figure.subplots(1, 2)
        for trial in self.trials:
            style = "-" if trial.status == "finished" else ":"
            curves.plot(range(1, len(trial.losses) + 1), trial.losses, style, marker=".", label=str(trial.idx))
        curves.set(xlabel="report", title="loss of every trial (dotted: stopped, diverged)")
        curves.legend(title="idx", fontsize="x-small", ncols=2)
        losses = [trial.loss if trial.status == "finished" else math.inf for trial in self.trials]
        bests.step(range(1, len(losses) + 1), [min(losses[:i]) for i in range(1, len(losses) + 1)], where="post")
        bests.set(xlabel="trials", title="best loss so far")
        for axis in (curves, bests):
            axis.title.set_fontsize("medium")
            axis.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


def sweep(
    train: Train,
    k: int = 10,
    *,
    order: Iterable[int] | None = None,
    path: str | Path | None = None,
    workers: int = 0,
    early_stopping: bool = True,
    progress: bool = True,
) -> Sweep:
    """Try the list's first k entries, and see which is best.

    ``train(idx)`` trains a fresh model with ``optimizer_for_idx(..., idx, training_steps)``. It is a generator that
    yields a loss (of validation data, as a rule) now and then, always after the same numbers of steps; the last one
    counts. Or it returns just one loss, and then cannot be stopped early.

    A trial is stopped when a loss is not finite; and, once three have finished and a third of it is over, when its
    least loss so far is above the median of the averages of the finished ones' losses up to the same report (the median
    stopping rule).

    Args:
        train: the training function. It decides about seeds: use the same one in every trial to compare like with like.
        k: how many entries to try, ≥ 1.
        order: the places to try, the first k of them: for example those of a `learn_list`. ``None``: 0, 1, 2, …
        path: a file of JSON lines, one a trial, written as they end. Trials that are in it are not made again, so an
            interrupted sweep goes on where it was, and a larger k adds to it.
        workers: how many trials run at the same time, each in a process of its own; 0: one after the other in this
            process. ``train`` must then be a function of a module (so that it can be pickled), and a script needs
            ``if __name__ == "__main__":``. Which trials are stopped early then depends on which finish first.
        early_stopping: whether to stop by comparison; a loss that is not finite stops a trial in any case.
        progress: show a progress bar, if tqdm is installed.

    Raises:
        TypeError: ``train`` is not a function, or ``order`` is not of whole numbers.
        ValueError: ``k``, ``order`` or ``workers`` is out of range, ``train`` reported no loss or something else, or
            the file is not one of a sweep. What ``train`` raises comes through, once the trials that run beside it have
            ended.

    Source:
        The median stopping rule: Golovin et al., *Google Vizier: A Service for Black-Box Optimization*, KDD 2017.

    Example:
        >>> from manic.opt_list import optimizer_for_idx, sweep
        >>> def train(idx):
        ...     weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        ...     optimizer = optimizer_for_idx([weight], idx, training_steps=100)
        ...     for step in range(100):
        ...         optimizer.zero_grad()
        ...         loss = weight.square().sum()
        ...         loss.backward()
        ...         optimizer.step()
        ...         if step % 25 == 24:
        ...             yield loss.item()
        >>> result = sweep(train, k=4, progress=False)
        >>> result.best.idx
        1
    """
    if not callable(train):
        raise TypeError(f"train is {train!r:.60}; expected a function of a place in the list, not what it returns.")
    if not isinstance(workers, numbers.Integral) or workers < 0:
        raise ValueError(f"workers is {workers!r}; expected a number of processes, or 0 for none.")
    idxs = _places(k, order)
    file = None if path is None else Path(path)
    known = {}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = _read(file)
    trials = {idx: known[idx] for idx in idxs if idx in known}
    with _progress_bar(len(idxs), len(trials), progress) as bar:
        for trial in _run(
            train, [idx for idx in idxs if idx not in trials], list(trials.values()), workers, early_stopping
        ):
            trials[trial.idx] = trial
            if file is not None:
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(_to_line(trial))
            if bar is not None:
                best = min((t.loss for t in trials.values() if t.status == "finished"), default=math.inf)
                bar.set_postfix(best=f"{best:.4g}", refresh=False)
                bar.update()
    return Sweep([trials[idx] for idx in idxs])


def _places(k: int, order: Iterable[int] | None) -> list[int]:
    try:
        available = [operator.index(idx) for idx in (range(len(all_configs())) if order is None else order)]
    except TypeError:
        raise TypeError(
            f"order is {order!r:.60}; expected places in the list, such as learn_list(losses).order."
        ) from None
    if not isinstance(k, numbers.Integral) or not 1 <= k <= len(available):
        raise ValueError(
            f"k is {k!r}; expected 1 to {len(available)}, the number of entries there are to try. "
            "It is 10 unless you give it."
        )
    idxs = available[:k]
    for idx in idxs:
        config_for_idx(idx)
    if len(set(idxs)) < k:
        raise ValueError(f"order is {order!r}; expected every place once.")
    return idxs


def _run(train: Train, idxs: list[int], finished: list[Trial], workers: int, early_stopping: bool) -> Iterator[Trial]:
    """Make the trials; yield each as it ends."""

    def curves() -> list[list[float]]:
        return [trial.losses for trial in finished if trial.status == "finished"] if early_stopping else []

    if workers == 0:
        for idx in idxs:
            finished.append(_try(train, idx, curves()))
            yield finished[-1]
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        running: set[Future[Trial]] = set()
        waiting = list(idxs)
        failure: BaseException | None = None  # of the first that failed; the others that are running still count
        while running or (waiting and failure is None):
            while waiting and failure is None and len(running) < workers:
                running.add(pool.submit(_try_in_worker, train, waiting.pop(0), curves()))
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                if future.exception() is not None:
                    failure = failure or future.exception()
                    continue
                finished.append(future.result())
                yield finished[-1]
        if failure is not None:
            raise failure


def _try(train: Train, idx: int, curves: list[list[float]]) -> Trial:
    start = time.perf_counter()
    reported = train(idx)
    status = "finished"
    losses: list[float] = []
    for loss in reported if isinstance(reported, Iterator) else [reported]:
        try:
            losses.append(float(loss.detach() if isinstance(loss, torch.Tensor) else loss))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"train({idx}) reported {loss!r:.60}; expected a number. Yield losses one by one, or return the last."
            ) from error
        if not math.isfinite(losses[-1]):
            status = "diverged"
        elif _is_hopeless(losses, curves):
            status = "stopped"
        if status != "finished":
            break
    if not losses:
        raise ValueError(f"train({idx}) yielded no loss; expected at least one, the last being the one that counts.")
    return Trial(idx, status, losses, time.perf_counter() - start)


def _try_in_worker(train: Train, idx: int, curves: list[list[float]]) -> Trial:
    """`_try`, with an error that can be sent: one that cannot breaks the pool, and with it the other trials."""
    try:
        return _try(train, idx, curves)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"train({idx}) raised {type(error).__name__}: {error}") from error
        raise


def _is_hopeless(losses: list[float], curves: list[list[float]]) -> bool:
    """The median stopping rule, but for the first third of a trial and its last report.

    Entries that warm up or learn slowly come from behind. Of 40 trials on scikit-learn's digits, judged from the first
    of six reports on, those of ranks 3 and 4 were stopped; from the third on, none within twice the best loss, and 28 %
    of the work was saved.
    """
    reports = len(losses)
    averages = [statistics.fmean(curve[:reports]) for curve in curves if reports < len(curve) < 3 * reports]
    return len(averages) >= MIN_FINISHED and min(losses) > statistics.median(averages)


def _to_line(trial: Trial) -> str:
    record = asdict(trial)
    record["losses"] = [loss if math.isfinite(loss) else None for loss in trial.losses]
    return json.dumps(record) + "\n"


def _read(path: Path) -> dict[int, Trial]:
    """The trials of a file. A last line without an end was cut off by an interruption, and is removed."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    *lines, rest = text.split(b"\n")
    trials = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["losses"] = [math.nan if loss is None else float(loss) for loss in record["losses"]]
            trial = Trial(**record)
            if not trial.losses or not isinstance(trial.idx, int):
                raise ValueError("no loss, or no place")
        except (ValueError, TypeError, KeyError) as error:
            raise _not_a_trial(path, number) from error
        trials[trial.idx] = trial
    if rest:
        if rest[: len(BEGINNING)] != BEGINNING[: len(rest)]:
            raise _not_a_trial(path, len(lines) + 1)
        os.truncate(path, len(text) - len(rest))
    return trials


def _not_a_trial(path: Path, number: int) -> ValueError:
    return ValueError(
        f"Line {number} of {path} is not a trial; expected a file that a sweep wrote. Give another path, or remove the "
        "line. Nothing was changed."
    )


def _progress_bar(total: int, initial: int, wanted: bool) -> AbstractContextManager[Any]:
    if not wanted:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    return tqdm(total=total, initial=initial, desc="trials")
