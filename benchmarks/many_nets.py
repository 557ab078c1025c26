"""Does manic get nets of many kinds going? Twenty-two of them, under five optimizers.

All learn digits in 150 steps at a constant rate: perceptrons, convolutional, residual and recurrent nets and
transformers, with and without normalization, on scaled and unscaled inputs and targets. At each rate of a grid and, at
lr = 1, with manic and with mechanic-pytorch. Prints the table of ``docs/quality.md``; ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from manic import Mechanic, Updater

BATCH = 32
LAST = 20  # steps whose mean loss is compared
MANIC, PUBLISHED = METHODS = ("manic", "mechanic-pytorch")
# The class and options of an optimizer, and its grid of rates in half decades.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], range]] = {
    "SGD": (torch.optim.SGD, {}, range(-8, 5)),
    "SGD, momentum 0.9": (torch.optim.SGD, {"momentum": 0.9}, range(-8, 3)),
    "SGD, Nesterov 0.95": (torch.optim.SGD, {"momentum": 0.95, "nesterov": True}, range(-8, 3)),
    "AdamW": (torch.optim.AdamW, {}, range(-10, 1)),
    "RMSprop": (torch.optim.RMSprop, {}, range(-11, 0)),
}


def perceptron(
    depth: int, act: type[nn.Module] = nn.ReLU, norm: Any = nn.Identity, outputs: int = 10, width: int = 64
) -> nn.Module:
    """Hidden layers, each with a normalization if there is one."""
    layers, before = [], 64
    for _ in range(depth):
        layers += [nn.Linear(before, width), norm(width), act()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, outputs))


def convolutional(depth: int, norm: Any = nn.Identity) -> nn.Module:
    """Layers of 16 channels."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for i in range(depth):
        layers += [nn.Conv2d(16 if i else 1, 16, 3, padding=1), norm(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


class Block(nn.Module):
    """A residual block of 16 channels."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), norm(16)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 16, height, width), as x."""
        return torch.relu(x + self.inner(x))


def residual(norm: Any) -> nn.Module:
    """Four blocks."""
    stem = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        *stem, *(Block(norm) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cells, self.out = kind(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 64) -> (batch, 10)."""
        return self.out(self.cells(x.view(-1, 8, 8))[0][:, -1])


class Transformer(nn.Module):
    """Two layers over the rows of an image."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.embed, self.places = nn.Linear(8, 32), nn.Parameter(0.02 * torch.randn(8, 32))
        self.layers, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 64) -> (batch, 10)."""
        return self.out(self.layers(self.embed(x.view(-1, 8, 8)) + self.places).mean(1))


class Net(NamedTuple):
    """What learns, from which pixels, and what: classes by cross entropy, or numbers by their squared error."""

    make: Callable[[], nn.Module]
    brightest: float = 1.0
    targets: str = "classes"  # or "one-hot", "pixels", "number"
    unit: float = 1.0  # of the numbers


NETS = {
    "no hidden layer": Net(partial(perceptron, 0)),
    "no hidden layer, pixels to 255": Net(partial(perceptron, 0), brightest=255.0),
    "two layers": Net(partial(perceptron, 2)),
    "two layers, pixels to 255": Net(partial(perceptron, 2), brightest=255.0),
    "six layers": Net(partial(perceptron, 6)),
    "four tanh layers": Net(partial(perceptron, 4, nn.Tanh)),
    "three layers, BatchNorm": Net(partial(perceptron, 3, norm=nn.BatchNorm1d)),
    "three layers, LayerNorm": Net(partial(perceptron, 3, norm=nn.LayerNorm)),
    "autoencoder": Net(partial(perceptron, 3, outputs=64), targets="pixels"),
    "regression, targets to 900": Net(partial(perceptron, 2, outputs=1), targets="number", unit=100.0),
    "regression, four wide layers, BatchNorm": Net(
        partial(perceptron, 4, norm=nn.BatchNorm1d, outputs=1, width=128), targets="number", unit=0.1
    ),
    "convolutional": Net(partial(convolutional, 3)),
    "convolutional, BatchNorm": Net(partial(convolutional, 3, nn.BatchNorm2d)),
    "convolutional, squared error": Net(partial(convolutional, 3), targets="one-hot"),
    "convolutional, squared error, targets to 100": Net(partial(convolutional, 3), targets="one-hot", unit=100.0),
    "convolutional, BatchNorm, squared error": Net(partial(convolutional, 3, nn.BatchNorm2d), targets="one-hot"),
    "residual": Net(partial(residual, nn.Identity)),
    "residual, BatchNorm": Net(partial(residual, nn.BatchNorm2d)),
    "recurrent": Net(partial(Recurrent, nn.RNN)),
    "LSTM": Net(partial(Recurrent, nn.LSTM)),
    "transformer, pre-norm": Net(partial(Transformer, norm_first=True)),
    "transformer, post-norm": Net(partial(Transformer, norm_first=False)),
}


class Run(NamedTuple):
    """One training at a rate, or by a method."""

    net: str
    optimizer: str
    by: float | str
    steps: int
    seed: int


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1, and what they show."""
    data: Any = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def loss_of(net: Net, model: nn.Module, rows: Tensor) -> Tensor:
    """On some rows, a scalar."""
    pixels, shown = (part[rows] for part in digits())
    outputs = model(net.brightest * pixels)
    if net.targets == "classes":
        return functional.cross_entropy(outputs, shown)
    numbers = {"one-hot": functional.one_hot(shown, 10).float(), "pixels": pixels, "number": shown[:, None].float()}
    return functional.mse_loss(outputs, net.unit * numbers[net.targets])


def train(run: Run) -> float:
    """Train in this process, on one thread: the mean training loss of the last steps, infinite if one is not finite."""
    torch.set_num_threads(1)
    net, (make, settings, _) = NETS[run.net], OPTIMIZERS[run.optimizer]
    torch.manual_seed(run.seed)
    model = net.make()
    if run.by == PUBLISHED:
        make = import_module("mechanic_pytorch").mechanize(make)
    optimizer = make(model.parameters(), lr=run.by if isinstance(run.by, float) else 1.0, **settings)
    steppers: list[Any] = [optimizer]
    if run.by == MANIC:
        updater = Updater(optimizer)
        steppers = [Mechanic(updater), updater]
    generator, losses = torch.Generator().manual_seed(100 + run.seed), []
    for _ in range(run.steps):
        model.zero_grad()
        loss = loss_of(net, model, torch.randint(len(digits()[0]), (BATCH,), generator=generator))
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
        for stepper in steppers:
            stepper.step()
    return fmean(losses[-LAST:])


def hush() -> None:
    """Have manic not tell of skipped steps."""
    logging.getLogger("manic").setLevel(logging.ERROR)


def main() -> None:
    """Run everything, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each")
    parser.add_argument("--each", action="store_true", help="print every net's losses too")
    options = parser.parse_args()

    methods = [method for method in METHODS if method == MANIC or find_spec("mechanic_pytorch")]
    rates = {
        name: [float(f"{10 ** (i / 2):.3g}") for i in half_decades] for name, (*_, half_decades) in OPTIMIZERS.items()
    }
    seeds = range(options.seeds)
    runs = [
        Run(net, optimizer, by, options.steps, seed)
        for net in options.nets
        for optimizer in options.optimizers
        for by in [*methods, *rates[optimizer]]
        for seed in seeds
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.processes, get_context("spawn"), hush) as pool:
        found = dict(zip(runs, tqdm(pool.map(train, runs, chunksize=4), total=len(runs)), strict=True))

    def loss(net: str, optimizer: str, by: float | str) -> float:
        return fmean(found[Run(net, optimizer, by, options.steps, seed)] for seed in seeds)

    pairs = list(product(options.optimizers, options.nets))
    best = {(optimizer, net): min(loss(net, optimizer, rate) for rate in rates[optimizer]) for optimizer, net in pairs}
    if options.each:
        for (optimizer, net), method in product(pairs, methods):
            lowest = best[optimizer, net]
            print(f"{optimizer}, {method}, {net}: {lowest:.3g}, times {loss(net, optimizer, method) / lowest:.3g}")
    print("| | nets | " + " | ".join(f"{method}: median | within 10 % | worst | diverged" for method in methods) + " |")
    print("|---|---|" + "---|---|---|---|" * len(methods))
    for name, chosen in [*((one, [one]) for one in options.optimizers), ("all", options.optimizers)]:
        rows, cells = [pair for pair in pairs if pair[0] in chosen], []
        for method in methods:
            ratios = [loss(net, optimizer, method) / best[optimizer, net] for optimizer, net in rows]
            within = sum(ratio <= 1.1 for ratio in ratios) / len(rows)
            diverged = sum(
                math.isinf(found[Run(net, optimizer, method, options.steps, seed)])
                for (optimizer, net), seed in product(rows, seeds)
            )
            cells.append(f"{median(ratios):.2f} | {within:.0%} | {max(ratios):.3g} | {diverged}")
        print(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
