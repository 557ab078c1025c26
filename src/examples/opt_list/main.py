"""Try the first entries of the learned list on handwritten digits, and see which is best.

    python src/examples/opt_list/main.py        # needs manic[examples]; some 10 s on a laptop

Writes the trials, a table and a picture under ``runs/opt_list``. Interrupt it and start it again: it goes on.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from manic.opt_list import optimizer_for_idx, sweep

OUT = Path("runs/opt_list")
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
    OUT.mkdir(parents=True, exist_ok=True)
    result = sweep(train, k=10, path=OUT / "trials.jsonl")
    print(result.table())
    result.plot(OUT / "trials.png")
    print(f"Best: idx={result.best.idx}, loss {result.best.loss:.4f}. Picture: {OUT / 'trials.png'}")


if __name__ == "__main__":
    main()
