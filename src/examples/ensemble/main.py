"""Train 64 small nets at once on scikit-learn's digits, each with its own seed and learning rate, all tuned by manic.

Run ``python src/examples/ensemble/main.py``. One call of a ``torch.func.vmap`` takes a step of all 64; it is timed
against 64 loops of the same step, one net after the other. Plain AdamW, with the same seeds and rates, shows what
the tuning is worth. Writes figures/scales.png.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._pytree import tree_map

from manic.functional import AdamConfig, adam_init, adamw_step, mechanize, schedules

STEPS, BATCH = 200, 64
LEARNING_RATES = [10.0**power for power in range(-4, 4)]
SEEDS = 8  # of each
CONFIG = AdamConfig(weight_decay=0.01)


def digits() -> tuple[torch.Tensor, ...]:
    """1,437 pictures to train on and 360 to test with, of shape (64,)."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def make_net(seed: int) -> nn.Module:
    """64 pixels in, 10 classes out."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def main() -> None:
    """Train, print the table and the times, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, default=64, help="how many of the 64 loops to run for the timing")
    parser.add_argument("--compile", action="store_true", help="compile the step of all 64 first, in half a minute")
    options = parser.parse_args()
    torch.set_num_threads(1)  # for tensors as small as these, more are slower

    x, y, x_test, y_test = digits()
    skeleton = make_net(0)
    seeds = [seed for _ in LEARNING_RATES for seed in range(SEEDS)]
    lrs = torch.tensor([lr for lr in LEARNING_RATES for _ in range(SEEDS)])
    batches = torch.stack(
        [torch.randint(len(y), (STEPS, BATCH), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )  # (64, STEPS, BATCH)
    stacked, _ = stack_module_state([make_net(seed) for seed in seeds])
    start = {name: p.detach() for name, p in stacked.items()}  # every tensor is (64, ...)

    def loss(params, batch):
        return nn.functional.cross_entropy(functional_call(skeleton, params, (x[batch],)), y[batch])

    def accuracy(params):
        return (functional_call(skeleton, params, (x_test,)).argmax(-1) == y_test).float().mean()

    init, tuned_step = mechanize(adamw_step)

    def begin(params, lr):
        return params, init(params, adam_init(params, CONFIG), lr)

    def train(params, state, lr, batch, factor):
        return tuned_step(params, grad(loss)(params, batch), state, replace(CONFIG, lr=lr * factor))

    def train_plain(params, state, lr, batch, factor):
        return adamw_step(params, grad(loss)(params, batch), state, replace(CONFIG, lr=lr * factor))

    factors = [schedules.cosine(t / STEPS) for t in range(STEPS)]
    in_dims = (0, 0, 0, 0, None)
    train_all = vmap(train, in_dims)
    params, state = tree_map(torch.clone, vmap(begin)(start, lrs))  # vmap only expands what is the same for all
    if options.compile:
        train_all = torch.compile(train_all, fullgraph=True)
        train_all(params, state, lrs, batches[:, 0], factors[0])

    clock = time.perf_counter()
    scales = []
    for t in range(STEPS):
        params, state = train_all(params, state, lrs, batches[:, t], factors[t])
        scales.append(state.scale)
    together = time.perf_counter() - clock

    clock = time.perf_counter()
    for i in range(options.loops):
        alone, alone_state = begin({name: p[i] for name, p in start.items()}, lrs[i])
        for t in range(STEPS):
            alone, alone_state = train(alone, alone_state, lrs[i], batches[i, t], factors[t])
    one_by_one = (time.perf_counter() - clock) * len(seeds) / options.loops

    plain, plain_state = start, vmap(lambda params: adam_init(params, CONFIG))(start)
    for t in range(STEPS):
        plain, plain_state = vmap(train_plain, in_dims)(plain, plain_state, lrs, batches[:, t], factors[t])

    accuracies, plain_accuracies = vmap(accuracy)(params), vmap(accuracy)(plain)
    print(f"medians of {SEEDS} seeds          test accuracy        manic's")
    print("      lr                  AdamW  AdamW + manic     scale   scale x lr")
    for lr in LEARNING_RATES:
        rows = lrs == lr
        median = [float(column[rows].median()) for column in (plain_accuracies, accuracies, state.scale)]
        print(f"{lr:8.0e}{median[0]:23.3f}{median[1]:15.3f}{median[2]:10.1e}{median[2] * lr:13.1e}")
    measured = "" if options.loops == len(seeds) else f" (from {options.loops} of them)"
    print(f"\n{len(seeds)} nets, {STEPS} steps, one CPU thread: {together:.1f} s at once, ", end="")
    print(f"{one_by_one:.1f} s in {len(seeds)} loops{measured}: {one_by_one / together:.1f} times as fast.")
    draw(torch.stack(scales), lrs, Path(__file__).parent / "figures" / "scales.png")


def draw(scales: torch.Tensor, lrs: torch.Tensor, path: Path) -> None:
    """A picture of all scales, of shape (STEPS, 64), and of the learning rates that they make."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, values, title in ((axes[0], scales, "scale"), (axes[1], scales * lrs, "scale × lr, before the schedule")):
        for i, lr in enumerate(lrs.tolist()):
            place = LEARNING_RATES.index(min(LEARNING_RATES, key=lambda known: abs(known - lr)))
            label = f"lr = {lr:.0e}" if i % SEEDS == 0 and axis is axes[0] else None
            axis.plot(values[:, i], color=f"C{place}", linewidth=0.7, alpha=0.8, label=label)
        axis.set(yscale="log", xlabel="step", title=title)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
