"""Find a learning rate with manic, then train without it; against a learning-rate range test and a grid.

Handwritten digits, 600 steps with a cosine schedule. Prints the table of ``docs/find_then_switch.md``; a minute and
a half on one CPU core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from statistics import mean
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, RandomSampler

from manic import Mechanic, Updater

STEPS, PROBE, SEEDS = 600, 250, 5
GRID = [10 ** (k / 2) for k in range(-8, 2)]  # half-decades from 1e-4 to 3
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}


class Task:
    """A network to train from a seed, and the batches to do it with."""

    def __init__(self, seed: int) -> None:
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        test, train = order[: len(x) // 4], order[len(x) // 4 :]
        self.x, self.y, self.test_x, self.test_y = x[train], y[train], x[test], y[test]
        torch.manual_seed(seed)
        self.batches = chain.from_iterable(repeat(BatchSampler(RandomSampler(self.x), 64, drop_last=True)))
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def backward(self) -> Tensor:
        """Gradients of the loss of a batch; rows are shuffled anew for every epoch."""
        rows = next(self.batches)
        self.model.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def test_loss(self) -> float:
        """The mean loss of the images kept apart; infinity is that of guessing, so that means can be taken."""
        loss = float(nn.functional.cross_entropy(self.model(self.test_x), self.test_y))
        return min(loss, math.log(10)) if math.isfinite(loss) else math.log(10)


def plain(base: str, lr: float, seed: int) -> float:
    """Train at a given rate: the test loss."""
    task = Task(seed)
    optimizer = BASES[base](task.model.parameters(), lr=lr)
    schedule = CosineAnnealingLR(optimizer, STEPS)
    finish(task, optimizer, schedule, STEPS)
    return task.test_loss()


def finish(task: Task, optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> None:
    """Train on without manic."""
    for _ in range(steps):
        task.backward()
        optimizer.step()
        schedule.step()


def tuned(base: str, seed: int, steps: int) -> tuple[Task, Mechanic]:
    """Train with manic."""
    task = Task(seed)
    optimizer = BASES[base](task.model.parameters(), lr=1.0)
    updater = Updater(optimizer, CosineAnnealingLR(optimizer, STEPS))
    mechanic = Mechanic(updater)
    for _ in range(steps):
        task.backward()
        mechanic.step()
        updater.step()
    return task, mechanic


def switched(base: str, seed: int) -> tuple[float, float]:
    """Probe with manic, and carry on with the plain optimizer: the test loss and the rate found."""
    task, mechanic = tuned(base, seed, PROBE)
    rate = float(mechanic.scale)
    finish(task, *mechanic.hand_off(), STEPS - PROBE)
    return task.test_loss(), rate


def range_test(base: str, seed: int, low: float = 1e-7, high: float = 10.0, steps: int = 100) -> tuple[float, float]:
    """The usual learning-rate finder: the rate grows geometrically, and the loss is smoothed.

    Returns:
        The rate where the smoothed loss falls fastest, and a tenth of the rate where it is least.
    """
    task = Task(seed)
    optimizer = BASES[base](task.model.parameters(), lr=low)
    rates, losses, average = [], [], 0.0
    for i in range(steps):
        rate = low * (high / low) ** (i / (steps - 1))
        optimizer.param_groups[0]["lr"] = rate
        average = 0.95 * average + 0.05 * float(task.backward())
        smooth = average / (1 - 0.95 ** (i + 1))
        if not smooth < 4 * min([smooth, *losses]):
            break
        optimizer.step()
        rates.append(rate)
        losses.append(smooth)
    steepest = min(range(1, len(losses) - 1), key=lambda i: losses[i + 1] - losses[i - 1])
    return rates[steepest], rates[losses.index(min(losses))] / 10


def spread(rates: Iterable[float]) -> str:
    """Least to largest."""
    rates = list(rates)
    return f"{min(rates):.1g} … {max(rates):.1g}"


def main() -> None:
    """Run everything."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    seeds = range(SEEDS)
    print("| | test loss | rate | extra steps |\n|---|---|---|---|")
    for base in BASES:
        grid = {lr: mean(plain(base, lr, seed) for seed in seeds) for lr in GRID}
        best = min(grid, key=lambda lr: grid[lr])
        near = sum(loss < 1.1 * grid[best] for loss in grid.values())
        probes = [switched(base, seed) for seed in seeds]
        finders = [range_test(base, seed) for seed in seeds]
        whole = [tuned(base, seed, STEPS) for seed in seeds]
        rows = {
            f"best of {len(GRID)} rates ({near} within 10 %)": (grid[best], f"{best:.1g}", (len(GRID) - 1) * STEPS),
            "manic to the end": (mean(task.test_loss() for task, _ in whole), "", 0),
            f"manic for {PROBE} steps, then `hand_off()`": (
                mean(loss for loss, _ in probes),
                spread(rate for _, rate in probes),
                0,
            ),
            f"manic for {PROBE} steps, then from the start at its rate": (
                mean(plain(base, rate, seed) for seed, (_, rate) in zip(seeds, probes, strict=True)),
                spread(rate for _, rate in probes),
                PROBE,
            ),
            "range test, steepest": (
                mean(plain(base, rate, seed) for seed, (rate, _) in zip(seeds, finders, strict=True)),
                spread(rate for rate, _ in finders),
                100,
            ),
            "range test, a tenth of the least": (
                mean(plain(base, rate, seed) for seed, (_, rate) in zip(seeds, finders, strict=True)),
                spread(rate for _, rate in finders),
                100,
            ),
        }
        for name, (loss, rate, extra) in rows.items():
            print(f"| {base}: {name} | {loss:.3f} | {rate} | {extra} |", flush=True)


if __name__ == "__main__":
    main()
