"""Handwritten digits: a tuned learning rate, the same optimizer at wrong ones, and manic at those wrong ones.

Prints a table, and writes a picture of loss and scale to ``figures/``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, RandomSampler
from tqdm import tqdm

from manic import History, Mechanic, Updater
from manic.plotting import plot_histories

GRID = [10 ** (k / 2) for k in range(-8, 1)]  # half-decades from 1e-4 to 1
WRONG = [1e-6, 10.0]
FIGURE = Path(__file__).parent / "figures" / "lr_scale_demo.png"


@dataclass
class Result:
    """How one run ended, and its course. ``rate`` is the peak of the schedule as it was in use at the end."""

    loss: float
    accuracy: float
    rate: float
    seconds: float
    history: dict[str, list[float]]


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1,797 digits of scikit-learn as (train x, train y, test x, test y); a quarter is for testing."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    return x[train], y[train], x[test], y[test]


class Net(nn.Sequential):
    """A fully connected network for images of 8 × 8."""

    def __init__(self, width: int = 128, dropout: float = 0.2) -> None:
        layers = [nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU()]
        super().__init__(*layers, nn.Dropout(dropout), nn.Linear(width, 10))


def train(data: tuple[Tensor, ...], lr: float, *, manic: bool, steps: int, seed: int) -> Result:
    """Train one network with AdamW and a cosine schedule, with or without manic."""
    x, y, test_x, test_y = data
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = CosineAnnealingLR(optimizer, steps)
    history, losses = History(), []
    updater = Updater(optimizer, schedule) if manic else None
    epoch = BatchSampler(RandomSampler(range(len(x))), 64, drop_last=True)  # shuffled anew at every pass
    mechanic = Mechanic(updater, log_func=history) if updater else None

    start = time.perf_counter()
    batches = islice(chain.from_iterable(repeat(epoch)), steps)
    title = f"{'manic' if manic else 'AdamW'}, lr {lr:.2g}, seed {seed}"
    for picked in tqdm(batches, desc=title, total=steps, leave=False):
        loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if updater and mechanic:
            mechanic.step()
            updater.step()
        else:
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start

    model.eval()
    with torch.no_grad():
        logits = model(test_x)
    smooth = torch.stack(losses).unfold(0, min(25, steps), 1).mean(-1).tolist()
    return Result(
        loss=float(nn.functional.cross_entropy(logits, test_y)),
        accuracy=float((logits.argmax(-1) == test_y).float().mean()),
        rate=lr * float(updater.scale) if updater else lr,
        seconds=seconds,
        history={**(history.columns if manic else {}), "step": list(range(1, steps + 1)), "loss": smooth},
    )


def mean(results: list[Result]) -> Result:
    """The mean of runs that differ in their seed; the course is the first one's."""
    names = ("loss", "accuracy", "rate", "seconds")
    means = {name: sum(getattr(result, name) for result in results) / len(results) for name in names}
    return Result(**means, history=results[0].history)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would wait for each other: the network is small
    data = load_data()

    def run(lr: float, *, manic: bool) -> Result:
        seeds = range(options.seeds)
        return mean([train(data, lr, manic=manic, steps=options.steps, seed=seed) for seed in seeds])

    grid = {lr: run(lr, manic=False) for lr in GRID}
    tuned = min(grid, key=lambda lr: grid[lr].loss)
    results = {f"AdamW, lr {tuned:.2g}, the best of {len(GRID)}": grid[tuned]}
    for lr in WRONG:
        for manic in (False, True):
            results[f"{'manic' if manic else 'AdamW'}, lr {lr:g}"] = run(lr, manic=manic)

    print(f"\nDigits, {options.steps} steps of 64 images, cosine schedule, mean of {options.seeds} seeds\n")
    print(f"{'':36}{'peak lr in use':>16}{'test loss':>12}{'test accuracy':>15}{'seconds':>9}")
    for name, result in results.items():
        print(f"{name:36}{result.rate:16.2g}{result.loss:12.4f}{result.accuracy:15.2%}{result.seconds:9.1f}")
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    plot_histories({name: result.history for name, result in results.items()}, options.figure)
    print(f"\nPicture: {options.figure}")


if __name__ == "__main__":
    main()
