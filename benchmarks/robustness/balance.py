"""At which learning rate does h balance, and would it with an older displacement?

Trains each task at fixed multiples of its tuned rate, with Δ restarting whenever the number of steps has tripled, and
prints the mean of h over its standard deviation within stretches of the run: below 0 the tuner would raise the scale,
above 0 lower it. A second and third line leave the last 4 and 16 updates out of Δ. The last is for a Δ that starts
again every 9 steps: the mean of h_t h_{t-1} over that of h², the share of h² that is signal. See docs/tried.md.

    python benchmarks/robustness/balance.py [--tasks NAME ...] [--bases NAME ...] [--schedules NAME ...]
"""

from __future__ import annotations

import argparse

import torch
from ideas import SEEDS, STEPS
from tasks import TASKS
from torch import Tensor
from train import GRIDS, SCHEDULES, Stack, base_step, factor

from manic.tuner import SHORT

MULTIPLES = (0.25, 0.5, 1.0, 2.0)
DELAYS = (0, 4, 16)
STRETCHES = ((64, 128), (128, 256), (256, 384), (384, 500))


def products(stack: Stack, base: str, schedule: str, lr: float) -> Tensor:
    """<Δ, g> at every step, (steps, delays + 1, seeds, multiples); the last is of the short Δ."""
    x = stack.start[:, None].repeat(1, len(MULTIPLES), 1)
    lrs = lr * torch.tensor(MULTIPLES, dtype=x.dtype)[:, None]
    state = torch.zeros_like(x), torch.zeros_like(x)
    delta, short, recent = torch.zeros_like(x), torch.zeros_like(x), list[Tensor]()
    found = []
    for step, (inputs, targets) in enumerate(stack.batches(STEPS)):
        g, _ = stack.gradient(x, inputs, targets)
        older = [delta - sum(recent[max(0, len(recent) - delay) :]) for delay in DELAYS]
        found.append(torch.stack([torch.linalg.vecdot(part, g) for part in (*older, short)]))
        before = x.clone()
        base_step(base, x, g, *state, lrs * factor(schedule, step, STEPS), step + 1)
        u = (x - before) / lrs
        delta, recent = delta + u, [*recent, u][-max(DELAYS) :]
        short = short + u if (step + 1) % SHORT else torch.zeros_like(x)
        if 3**9 % (step + 1) == 0:
            delta, recent = torch.zeros_like(x), []
    return torch.stack(found)


def main() -> None:
    """Print a block for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=("autoencoder", "lines", "new_digits", "diabetes"))
    parser.add_argument("--bases", nargs="+", choices=GRIDS, default=("adamw", "sgd"))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=("cosine",))
    options = parser.parse_args()
    for task in options.tasks:
        stack = Stack(TASKS[task](), SEEDS)
        for base in options.bases:
            for schedule in options.schedules:
                lr, _ = stack.tuned(base, schedule, STEPS)
                found = products(stack, base, schedule, lr)
                print(f"\n{task}, {base}, {schedule}: tuned rate {lr:.3g}; columns: {MULTIPLES} times that")
                for start, end in STRETCHES:
                    *older, short = found[start:end].unbind(1)
                    rows = {f"Δ {delay:2} old": h.mean(0) / h.std(0) for delay, h in zip(DELAYS, older, strict=True)}
                    rows["signal"] = (short[1:] * short[:-1]).mean(0) / short.square().mean(0)
                    for name, ratios in rows.items():
                        print(
                            f"  steps {start}-{end}, {name}: " + " ".join(f"{r:+.2f}" for r in ratios.mean(0).tolist())
                        )


if __name__ == "__main__":
    main()
