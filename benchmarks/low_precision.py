"""Parameters in bfloat16 and float16: does a character-level language model still train?

Trains the small GPT of src/examples/char_lm with AdamW (warmup, then cosine) from one seed with parameters of each
type, under manic with and without a stored displacement, and under mechanic-pytorch if installed; prints validation
losses.

    python benchmarks/low_precision.py [--steps 600] [--lr 1.0]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from manic import mechanize

sys.path.append(str(Path(__file__).parents[1] / "src" / "examples" / "char_lm"))
from model import GPT, load_text, loss_of, sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tuners() -> dict[str, Callable[[Any], Any]]:
    """What makes a tuned AdamW class, by name."""
    found: dict[str, Callable[[Any], Any]] = {
        "manic": mechanize,
        "manic, store_delta=False": lambda base: mechanize(base, store_delta=False),
    }
    try:
        published: Any = importlib.import_module("mechanic_pytorch")
    except ImportError:
        return found
    return {**found, "mechanic-pytorch": published.mechanize}


def final_loss(
    tuner: Callable[[Any], Any], dtype: torch.dtype, steps: int, *, lr: float = 1.0, label: str = ""
) -> float:
    """Validation loss in nats per byte after training."""
    text, validation = load_text()
    torch.manual_seed(0)
    model = GPT().to(dtype)
    optimizer = tuner(torch.optim.AdamW)(model.parameters(), lr=lr, eps=1e-6)
    warmup = max(1, steps // 20)
    schedules = [LinearLR(optimizer, 0.01, 1.0, warmup), CosineAnnealingLR(optimizer, steps - warmup)]
    schedule = SequentialLR(optimizer, schedules, [warmup])
    for step in tqdm(range(steps), desc=label, leave=False, disable=not label):
        loss = loss_of(model, sample(text, seed=step, batch=16, context=64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses = [loss_of(model, sample(validation, seed=-1 - i, batch=16, context=64)).float() for i in range(20)]
    return float(torch.stack(losses).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1.0)
    options = parser.parse_args()
    print(f"validation loss in nats per byte after {options.steps} steps at lr={options.lr:g} (5.5 before)\n")
    print(f"{'':28}" + "".join(f"{name:>10}" for name in DTYPES))
    for name, tuner in tuners().items():
        losses = [
            final_loss(tuner, dtype, options.steps, lr=options.lr, label=f"{name}, {key}")
            for key, dtype in DTYPES.items()
        ]
        print(f"{name:28}" + "".join(f"{loss:10.3f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
