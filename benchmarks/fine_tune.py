"""Fine-tune in the usual ways with manic, against AdamW on a grid of learning rates with the same groups.

A network is trained on the handwritten digits 0 to 4 and then, with a new head, on 20 images each of 5 to 9. Prints the
table of ``docs/groups.md``; some minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, islice, repeat
from statistics import mean
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, RandomSampler

from manic import Mechanic, Updater

LENGTHS, SEEDS = (300, 1000), 8
GRID = [10 ** (k / 2) for k in range(-6, 1)]  # half-decades from 1e-3 to 1
Groups = list[dict[str, Any]]


class LoRA(nn.Module):
    """A frozen layer with an update of low rank beside it, as in arXiv:2106.09685."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the update's, of x of shape (batch, in_features)."""
        return self.layer(x) + x @ self.a.T @ self.b.T


def digits(classes: range, seed: int, each: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels (0 is the first class) to train on, ``each`` of a class or three quarters, and to test on."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train, test = [], []
    for label in classes:
        rows = torch.nonzero(y == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        n = each or 3 * len(rows) // 4
        train.append(rows[:n])
        test.append(rows[n:])
    rows, apart = torch.cat(train), torch.cat(test)
    return x[rows], y[rows] - classes.start, x[apart], y[apart] - classes.start


def everything(model: nn.Sequential) -> Groups:
    """All layers at one rate."""
    return [{"params": model.parameters()}]


def slow_body(model: nn.Sequential) -> Groups:
    """The pretrained layers at a tenth of the head's rate."""
    return [{"params": model[:4].parameters(), "lr": 0.1}, {"params": model[4].parameters(), "lr": 1.0}]


def head_only(model: nn.Sequential) -> Groups:
    """The pretrained layers frozen."""
    model[:4].requires_grad_(False)
    return everything(model)


def lora(model: nn.Sequential) -> Groups:
    """An update of rank 4 beside each pretrained layer, B at 16 times the rate of A, as in LoRA+ (arXiv:2402.12354)."""
    model[0], model[2] = LoRA(model[0]), LoRA(model[2])  # type: ignore
    fast = [p for name, p in model.named_parameters() if name.endswith(".b")]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".b")]
    return [{"params": rest, "lr": 1.0}, {"params": fast, "lr": 16.0}]


JOINING = "head, and the body from a third on"
WAYS: dict[str, Callable[[nn.Sequential], Groups]] = {
    "all layers": everything,
    "body at a tenth of the head's rate": slow_body,
    "head only": head_only,
    JOINING: head_only,
    "LoRA of rank 4, B at 16 times A's rate": lora,
}


def losses(model: nn.Sequential, x: Tensor, y: Tensor, steps: int) -> Iterator[int]:
    """Put the gradients of batches into the model; rows are shuffled anew for every epoch."""
    epoch = BatchSampler(RandomSampler(x), 32, drop_last=True)
    for step, rows in enumerate(islice(chain.from_iterable(repeat(epoch)), steps)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        yield step


class Trainer:
    """AdamW with a cosine schedule at a rate, or with manic around it."""

    def __init__(self, groups: Groups, steps: int, lr: float | None = None, s_init: float | None = None) -> None:
        self.optimizer = torch.optim.AdamW(groups, lr=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] *= 1.0 if lr is None else lr
        self.schedule = CosineAnnealingLR(self.optimizer, steps)
        self.mechanic = None if lr else Mechanic(Updater(self.optimizer, self.schedule), s_init=s_init)

    def step(self) -> None:
        """Take a step along the gradients that are there."""
        if self.mechanic is None:
            self.optimizer.step()
            self.schedule.step()
        else:
            self.mechanic.step()
            self.mechanic.updater.step()


def network(seed: int) -> nn.Sequential:
    """A body of four layers and a head, untrained."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))


@cache
def pretrained(seed: int) -> nn.Sequential:
    """A network that knows the digits 0 to 4, with a new head."""
    model = network(seed)
    x, y, _, _ = digits(range(5), seed)
    trainer = Trainer(everything(model), 600)
    for _ in losses(model, x, y, 600):
        trainer.step()
    model[4] = nn.Linear(128, 5)
    return model


def fine_tuned(way: str, fresh: bool, steps: int, lr: float | None = None, s_init: float | None = None) -> float:
    """Fine-tune at a rate, or with manic if there is none: the test accuracy in percent, mean over the seeds."""
    return mean(accuracy(way, fresh, steps, seed, lr, s_init) for seed in range(SEEDS))


def accuracy(way: str, fresh: bool, steps: int, seed: int, lr: float | None, s_init: float | None) -> float:
    """That of one run."""
    model = network(seed) if fresh else copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed)
    x, y, test_x, test_y = digits(range(5, 10), seed, each=20)
    trainer = Trainer(WAYS[way](model), steps, lr, s_init)
    for step in losses(model, x, y, steps):
        trainer.step()
        if way == JOINING and step + 1 == steps // 3:
            model.requires_grad_(True)
    with torch.no_grad():
        return 100 * float((model(test_x).argmax(1) == test_y).float().mean())


def main() -> None:
    """Run everything."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    columns = ("manic", "manic, s_init = 1e-6", "AdamW, lr = 1e-3", f"AdamW, best of {len(GRID)} rates")
    print(f"| | steps | {' | '.join(columns)} |\n|---|---|---|---|---|---|")
    for way, fresh in [*((way, False) for way in WAYS), ("all layers", True)]:
        for steps in LENGTHS:
            ours = (fine_tuned(way, fresh, steps), fine_tuned(way, fresh, steps, s_init=1e-6))
            found = {lr: fine_tuned(way, fresh, steps, lr) for lr in GRID}
            best = max(found, key=lambda lr: found[lr])
            cells = [f"{percent:.1f} %" for percent in (*ours, found[GRID[0]], found[best])]
            print(f"| {'not pretrained, ' * fresh}{way} | {steps} | {' | '.join(cells)} at {best:.1g} |", flush=True)


if __name__ == "__main__":
    main()
