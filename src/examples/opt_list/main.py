"""Try the first entries of the learned list on handwritten digits, and see which is best.

Writes the trials and a picture under ``runs/opt_list``. Interrupt it and start it again, or ask for more trials:
it goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from manic.opt_list import optimizer_for_idx, sweep

STEPS = 300


def train(idx: int) -> Iterator[float]:
    """Train with one entry of the list; yield the validation loss every 50 steps."""
    torch.manual_seed(0)  # the same net and batches in every trial
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    order = torch.randperm(len(x))
    train_x, train_y = x[order[:1200]], y[order[:1200]]
    valid_x, valid_y = x[order[1200:]], y[order[1200:]]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = optimizer_for_idx(model.parameters(), idx, training_steps=STEPS)
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(train_x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
        if step % 50 == 0:
            with torch.no_grad():
                yield nn.functional.cross_entropy(model(valid_x), valid_y).item()


def main() -> None:
    """Sweep, then show what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10, help="how many entries to try")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 tries one after the other in this one")
    parser.add_argument("--out", type=Path, default=Path("runs/opt_list"), help="directory to write to")
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    result = sweep(train, arguments.trials, path=arguments.out / "trials.jsonl", workers=arguments.workers)
    print(result.table())
    result.plot(arguments.out / "trials.png")
    print(f"Best: idx={result.best.idx}, loss {result.best.loss:.4f}. Picture: {arguments.out / 'trials.png'}")


if __name__ == "__main__":
    main()
