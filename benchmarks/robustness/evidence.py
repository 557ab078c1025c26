"""Does the gradient of all training rows say when to stop?

That gradient is of the rows at hand and not of all there could be: the gradient of a batch varies by some V, its mean
over an epoch of E batches by V / E. Below that, there is no evidence that other rows want the step: R = E ‖ḡ‖² / V < 1
(Mahsereci, Balles, Lassner and Hennig 2017, "Early stopping without a validation set", here for all parameters at
once). Trains each task at multiples of its tuned rate, constant, and prints how far the validation loss is above its
lowest on the way: where R is first below 1, and at the end. See docs/tried.md.

    python benchmarks/robustness/evidence.py [--tasks NAME ...] [--bases NAME ...] [--steps N]
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from multiprocessing import get_context

import torch
from tasks import TASKS, Data, Task
from torch import Tensor, nn
from train import GRIDS, Stack, base_class, batches, model_of

EVERY, MULTIPLES = 25, (1.0, 4.0)
FEW = ("usage", "few_lines", "parities", "diabetes", "new_digits", "convolution", "autoencoder")


def evidence(task: Task, model: nn.Module, seed: int) -> float:
    """R, by one pass over the training rows."""
    order = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(seed))
    parameters = tuple(model.parameters())

    def gradient(rows: Tensor) -> Tensor:
        loss = task.loss(model(task.train[0][rows]), task.train[1][rows])
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))

    each = torch.stack([gradient(rows) for rows in order.split(task.batch) if len(rows) == task.batch])
    return len(each) * float(each.mean(0).square().sum() / each.var(0).sum())


def course(task: Task, base: str, lr: float, steps: int) -> tuple[float, float]:
    """How far above the lowest loss on the way those are where R is first below 1, and at the end."""
    model = model_of(task, seed=0)
    cls, options = base_class(base)
    optimizer = cls(model.parameters(), lr=lr, **options)

    def loss(rows: Data) -> Tensor:
        return task.loss(model(rows[0]), rows[1])

    losses, stopped = [], None
    for step, rows in enumerate(batches(task, 0, steps), 1):
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
        if step % EVERY == 0:
            losses.append(loss(task.valid).item())
            if stopped is None and evidence(task, model, step) < 1:
                stopped = losses[-1]
    return (losses[-1] if stopped is None else stopped) / min(losses) - 1, losses[-1] / min(losses) - 1


def courses(name: str, base: str, steps: int) -> list[tuple[float, float]]:
    """At each of the multiples of the tuned rate."""
    torch.set_num_threads(1)
    task = TASKS[name]()
    rate, _ = Stack(task, [0]).tuned(base, "constant", steps)
    return [course(task, base, times * rate, steps) for times in MULTIPLES]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=FEW)
    parser.add_argument("--bases", nargs="+", choices=GRIDS, default=("adamw", "sgd"))
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    columns = product(options.bases, MULTIPLES)
    print(f"| | {' | '.join(f'{base}, {times:g} times the rate' for base, times in columns)} |")
    print("|---|" + "---|" * len(options.bases) * len(MULTIPLES))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = {place: pool.submit(courses, *place, options.steps) for place in product(options.tasks, options.bases)}
        for task in options.tasks:
            cells = chain.from_iterable(jobs[task, base].result() for base in options.bases)
            print(f"| `{task}` | {' | '.join(f'{stopped:.0%}, {end:.0%}' for stopped, end in cells)} |")


if __name__ == "__main__":
    main()
