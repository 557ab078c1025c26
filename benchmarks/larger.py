"""Does what holds for the small nets of ``benchmarks/robustness`` hold for larger ones?

Nets that are large for a CPU, under AdamW with warmup and cosine: at each rate of a grid and, at lr = 1, with manic and
with mechanic-pytorch. A GPT of 0.9 million parameters on the text of Python's standard library, the same with the
weights that GPT-2 starts from, and a convolutional net with batch normalization that takes noise from crops of
scikit-learn's two photos, of which none comes twice. Prints the table of ``docs/quality.md``; an hour on two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from manic import Mechanic, Updater

sys.path.append(str(Path(__file__).parents[1] / "src" / "examples" / "char_lm"))
char_lm = import_module("model")

BATCH, CONTEXT = 8, 128  # sequences, bytes
CROPS, SIDE, NOISE = 16, 24, 0.2  # images of a batch, pixels, standard deviation where colours are from 0 to 1
CHECKED = 64  # batches that a loss is taken of, at the end
TOLD = "manic, epoch given"
METHODS = ("manic", TOLD, "mechanic-pytorch")


class Task(NamedTuple):
    """What is trained: `rows` gives the inputs and targets of a batch by its seed, of training or of held-out data."""

    make: Callable[[], nn.Module]
    rows: Callable[[int, bool], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
    steps_per_epoch: float
    half_decades: range  # of the rates


@cache
def gpt(*, as_gpt2: bool = False) -> Task:
    """The next byte of source code; with small first weights, and those of the output tied to the embedding, or not."""
    train, valid = char_lm.load_text()

    def rows(seed: int, held_out: bool) -> tuple[Tensor, Tensor]:
        return char_lm.sample(valid if held_out else train, seed=seed, batch=BATCH, context=CONTEXT)

    def make() -> nn.Module:
        model = char_lm.GPT(width=128, layers=4, context=CONTEXT)
        if as_gpt2:
            for parameter in [parameter for name, parameter in model.named_parameters() if "norm" not in name]:
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)
                else:
                    nn.init.zeros_(parameter)
            model.head.weight = model.token.weight
        return model

    return Task(make, rows, char_lm.loss_of, len(train) / (BATCH * CONTEXT), range(-8, -2))


@cache
def denoiser() -> Task:
    """The noise of crops, of which none comes twice; the right quarter of each photo is held out."""
    photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    cut = 3 * photos[0].shape[2] // 4

    def rows(seed: int, held_out: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        crops = []
        for _ in range(CROPS):
            photo = photos[int(torch.randint(len(photos), (), generator=generator))]
            photo = photo[:, :, cut:] if held_out else photo[:, :, :cut]
            top, left = (int(torch.randint(size - SIDE, (), generator=generator)) for size in photo.shape[1:])
            crops.append(photo[:, top : top + SIDE, left : left + SIDE])
        noise = NOISE * torch.randn(CROPS, 3, SIDE, SIDE, generator=generator)
        return torch.stack(crops) - 0.5 + noise, noise

    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, 48, 3, padding=1), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(48, 3, 3, padding=1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        noisy, noise = batch
        return (model(noisy) - noise).square().mean() / NOISE**2

    return Task(make, rows, loss, math.inf, range(-7, -1))


TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "gpt2": partial(gpt, as_gpt2=True), "denoiser": denoiser}


class Run(NamedTuple):
    """One training, by AdamW at a rate, or by a method around it."""

    task: str
    by: float | str
    steps: int
    seed: int


def train(run: Run) -> float:
    """Train in this process, on one thread: the held-out loss at the end."""
    torch.set_num_threads(1)
    task = TASKS[run.task]()
    torch.manual_seed(run.seed)
    model = task.make()
    make: Any = torch.optim.AdamW
    if run.by == "mechanic-pytorch":
        make = import_module("mechanic_pytorch").mechanize(make)
    optimizer = make(model.parameters(), lr=run.by if isinstance(run.by, float) else 1.0)
    warmup = max(1, run.steps // 20)
    parts = [LinearLR(optimizer, 1 / warmup, 1.0, warmup), CosineAnnealingLR(optimizer, run.steps - warmup)]
    schedule = SequentialLR(optimizer, parts, [warmup])
    steppers: list[Any] = [optimizer, schedule]
    if run.by in ("manic", TOLD):
        updater = Updater(optimizer, schedule)
        steppers = [Mechanic(updater, steps_per_epoch=task.steps_per_epoch if run.by == TOLD else None), updater]
    for step in range(run.steps):
        model.zero_grad()
        task.loss(model, task.rows(1_000_000 * run.seed + step, False)).backward()
        for stepper in steppers:
            stepper.step()
    model.eval()
    with torch.no_grad():
        loss = fmean(task.loss(model, task.rows(seed, True)).item() for seed in range(CHECKED))
    return loss if math.isfinite(loss) else math.inf


def main() -> None:
    """Run everything, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each")
    options = parser.parse_args()

    methods = [method for method in METHODS if method != "mechanic-pytorch" or find_spec("mechanic_pytorch")]
    rates = {task: [float(f"{10 ** (i / 2):.1g}") for i in TASKS[task]().half_decades] for task in options.tasks}
    seeds = range(options.seeds)
    runs = [
        Run(task, by, options.steps, seed)
        for task in options.tasks
        for by in [*methods, *rates[task]]
        for seed in seeds
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        found = dict(zip(runs, tqdm(pool.map(train, runs), total=len(runs)), strict=True))

    print(f"| | the rates: loss | {' | '.join(methods)} |")
    print(f"|---|---|{'---|' * len(methods)}")
    for task in options.tasks:
        fixed, ours = (
            {by: fmean(found[Run(task, by, options.steps, seed)] for seed in seeds) for by in ways}
            for ways in (rates[task], methods)
        )
        best = min(fixed.values())
        grid = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in fixed.items())
        cells = " | ".join(f"{loss:.4f} ({100 * (loss / best - 1):+.1f} %)" for loss in ours.values())
        print(f"| `{task}` | {grid} | {cells} |")


if __name__ == "__main__":
    main()
