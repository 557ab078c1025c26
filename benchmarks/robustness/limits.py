"""Where manic gains little: optimizers whose update is not linear in the learning rate, and very short runs.

Each row trains three tasks with an optimizer at every rate of a grid, and with manic around it, under a cosine schedule
after 5 % of warmup; it says how far manic's final validation loss is above the best of the grid.

Last, a residual net whose branches are zero at first learns digits that are shifted and noisy, in 400 steps of SGD with
Nesterov's momentum: the training loss of the last 40.

    python benchmarks/robustness/limits.py
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytorch_optimizer
import torch
from sklearn.datasets import load_digits
from tasks import TASKS
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from train import batches, factor, mean, measured, model_of

from manic import Mechanic, Updater

CHOSEN = ("autoencoder", "lines", "new_digits")
SEEDS = (0, 1)
GRID = [10 ** (half / 2) for half in range(-10, 4)]
Build = Callable[[Iterable[nn.Parameter], float], Any]
ROWS: dict[str, tuple[Build, int]] = {
    "AdamW": (lambda p, lr: torch.optim.AdamW(p, lr=lr), 500),
    "AdamW, 150 steps": (lambda p, lr: torch.optim.AdamW(p, lr=lr), 150),
    "AdamW, 50 steps": (lambda p, lr: torch.optim.AdamW(p, lr=lr), 50),
    "AdamW, 20 steps": (lambda p, lr: torch.optim.AdamW(p, lr=lr), 20),
    "SGD, momentum 0.9, 50 steps": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), 50),
    "SGD without momentum": (lambda p, lr: torch.optim.SGD(p, lr=lr), 500),
    "SGD without momentum, 300 steps": (lambda p, lr: torch.optim.SGD(p, lr=lr), 300),
    "LARS (normalized by layer)": (lambda p, lr: pytorch_optimizer.LARS(p, lr=lr), 500),
    "LAMB (normalized by layer)": (lambda p, lr: pytorch_optimizer.Lamb(p, lr=lr), 500),
    "Prodigy (finds its own rate)": (lambda p, lr: pytorch_optimizer.Prodigy(p, lr=lr), 500),
    "Rprop (its step sizes are its own)": (lambda p, lr: torch.optim.Rprop(p, lr=lr), 500),
    "Adadelta": (lambda p, lr: torch.optim.Adadelta(p, lr=lr), 500),
    "RAdam": (lambda p, lr: torch.optim.RAdam(p, lr=lr), 500),
    "RAdam, a loss in thousandths": (lambda p, lr: torch.optim.RAdam(in_thousandths(p), lr=lr), 500),
    "Muon for matrices, AdamW for the rest": (lambda p, lr: pytorch_optimizer.Muon(muon_groups(p, lr)), 500),
}


def in_thousandths(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters whose gradients are a thousandth of what they were."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.register_hook(lambda gradient: gradient / 1000)
    return parameters


def muon_groups(parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Its two kinds of groups, with the ratio of rates that Muon has by default."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() == 2], "lr": lr, "use_muon": True},
        {"params": [p for p in parameters if p.dim() != 2], "lr": lr * 0.015, "use_muon": False},
    ]


class Block(nn.Module):
    """A residual block of 16 channels, of which the last gains are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*normalized(16), nn.ReLU(), *normalized(16))
        nn.init.zeros_(self.inner[-1].weight)  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 16, height, width), as x."""
        return torch.relu(x + self.inner(x))


def normalized(channels: int) -> list[nn.Module]:
    """A convolution and its normalization."""
    return [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]


def residual(seed: int, lr: float | None = None, **options: Any) -> float:
    """The training loss of the last 40 steps, at a rate or with manic."""
    torch.manual_seed(seed)
    blocks = [nn.ReLU(), Block(), nn.MaxPool2d(2), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*normalized(1), *blocks, nn.Linear(16, 10))
    base = torch.optim.SGD(model.parameters(), lr=lr or 1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    updater = Updater(base) if lr is None else None
    steppers = [base] if updater is None else [Mechanic(updater, **options), updater]
    data: Any = load_digits()
    images, shown = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(400):
        rows = torch.randint(len(images), (32,), generator=generator)
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        inputs = nn.functional.pad(images[rows], (1, 1, 1, 1)).roll((down, right), (2, 3))
        inputs = inputs + 0.2 * torch.randn(inputs.shape, generator=generator)
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), shown[rows])
        loss.backward()
        losses.append(loss.item())
        for stepper in steppers:
            stepper.step()
    return statistics.fmean(losses[-40:])


def loss(name: str, task_name: str, lr: float, tuned: bool) -> float:
    """The final validation loss, the mean over seeds."""
    build, steps = ROWS[name]
    task, found = TASKS[task_name](), []
    for seed in SEEDS:
        model = model_of(task, seed)
        optimizer = build(model.parameters(), lr)
        schedule = LambdaLR(optimizer, lambda step: factor("cosine", step, steps))
        updater = Updater(optimizer, schedule) if tuned else None
        steppers = [Mechanic(updater), updater] if updater is not None else [optimizer, schedule]
        for inputs, targets in batches(task, seed, steps):
            model.zero_grad()
            task.loss(model(inputs), targets).backward()
            for stepper in steppers:
                stepper.step()
        with torch.no_grad():
            inputs, targets = measured(task)[0]
            found.append(task.loss(model(inputs), targets).item())
    return mean(found)


def row(name: str) -> list[tuple[float, float, float]]:
    """For each task: manic's loss, that of the best rate, and how many times it is off at half a decade either side."""
    torch.set_num_threads(1)
    result = []
    for task in CHOSEN:
        grid = [loss(name, task, lr, tuned=False) for lr in GRID]
        best = min(range(len(grid)), key=grid.__getitem__)
        sides = [grid[i] for i in (best - 1, best + 1) if 0 <= i < len(grid)]
        result.append((loss(name, task, 1.0, tuned=True), grid[best], statistics.fmean(sides)))
    return result


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| | " + " | ".join(CHOSEN) + " | wrong by half a decade |")
    print("|---|" + "---|" * (len(CHOSEN) + 1))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name, found in zip(ROWS, pool.map(row, ROWS), strict=True):
            gaps = " | ".join(f"{ours / best - 1:+.0%}" for ours, best, _ in found)
            print(
                f"| {name} | {gaps} | {statistics.median(side / best - 1 for _, best, side in found):+.0%} |",
                flush=True,
            )
        print("\n| | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |")
        print("|---|" + "---|" * len(SEEDS))
        ways: dict[str, dict[str, Any]] = {f"SGD, lr = {lr:g}": {"lr": lr} for lr in (0.01, 0.03, 0.1, 0.3)}
        ways |= {"manic": {}, "manic, `steps_per_epoch=56`": {"steps_per_epoch": 56}}
        ways["manic, `steps_per_epoch=math.inf`"] = {"steps_per_epoch": math.inf}
        for name, options in ways.items():
            print(f"| {name} | " + " | ".join(f"{residual(seed, **options):.2f}" for seed in SEEDS) + " |", flush=True)


if __name__ == "__main__":
    main()
