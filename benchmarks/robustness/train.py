"""Training one model with one method, or at once copies of it for all learning rates of a grid.

Weights and batches depend on the seed alone, so all methods see the same.
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import torch
from tasks import TASKS, Data, Task
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.optim.lr_scheduler import LambdaLR

from manic import Mechanic, Updater

START, BASE = "start", "base"
HELD_OUT, VALIDATION = "manic, held-out rows", "manic, validation rows"
WEIGHT_DECAY = 0.01  # AdamW's, and that of the methods that are measured against it
HELD_OUT_SHARE = 0.2  # of the training rows, which the tuner learns from instead of the others
WIDENINGS = 4  # at most, of a grid by two rates
CHECKS = 10  # times that the validation loss is measured in a run


class Run(NamedTuple):
    """One training. With method `BASE` it is that of the plain base optimizer, with `START` no training at all."""

    task: str
    base: str
    schedule: str
    method: str
    lr: float
    steps: int
    seed: int


class Losses(NamedTuple):
    """Of a training, at its end: on the validation rows, and on 512 training rows that are always the same."""

    valid: float
    train: float
    best: float  # on the validation rows, the lowest of `CHECKS` at even distances, the last of which is the end


# --- what is compared ---------------------------------------------------------------------------------------------


def lr_of(half_decades: int) -> float:
    """10^(half_decades / 2), to three digits."""
    return float(f"{10 ** (half_decades / 2):.3g}")


# The ends of the base optimizers' grids, in half decades.
GRIDS = {"adamw": (-10, 0), "sgd": (-8, 2), "adam": (-10, 0), "rmsprop": (-11, -1), "lion": (-12, -2)}
PLAIN = "plain sgd"  # without momentum, for ideas
SCHEDULES = ("constant", "cosine", "linear")
LONG_WARMUP, RESTARTS, STEPS = FOR_IDEAS = "long warmup", "warm restarts", "steps"
CYCLE = 330  # steps from one restart to the next; the tuner learns in the first half of the first


def grid(base: str) -> list[float]:
    """The eleven learning rates that are always tried."""
    low, high = (GRIDS | {PLAIN: (-6, 4)})[base]
    return [lr_of(i) for i in range(low, high + 1)]


def factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in a step, the first of which is number 0."""
    if schedule in ("constant", STEPS):
        return 0.1 ** ((step >= steps / 2) + (step >= 3 * steps / 4)) if schedule == STEPS else 1.0
    if schedule == "linear":
        return 1 - step / steps
    if schedule == LONG_WARMUP:
        return min(1.0, (step + 1) / (0.4 * steps))
    if schedule == RESTARTS:
        return 0.5 * (1 + math.cos(math.pi * (step % CYCLE) / CYCLE))
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def base_class(name: str) -> tuple[type[Any], dict[str, Any]]:
    """Class and options of a base optimizer."""
    if name == "lion":
        return import_module("pytorch_optimizer").Lion, {}
    return {
        "adamw": (torch.optim.AdamW, {"weight_decay": WEIGHT_DECAY}),
        "sgd": (torch.optim.SGD, {"momentum": 0.9}),
        "adam": (torch.optim.Adam, {}),
        "rmsprop": (torch.optim.RMSprop, {}),
    }[name]


# A method gives the objects to step, in order, of which an optimizer of its own comes first.
Steppers = list[Any]


def scheduled(optimizer: Any, run: Run) -> Any:
    """The run's schedule on an optimizer."""
    return LambdaLR(optimizer, lambda step: factor(run.schedule, step, run.steps))


def plain(parameters: Iterable[nn.Parameter], run: Run) -> Steppers:
    """The base optimizer."""
    cls, options = base_class(run.base)
    optimizer = cls(parameters, lr=run.lr, **options)
    return [optimizer, scheduled(optimizer, run)]


def manic(parameters: Iterable[nn.Parameter], run: Run, **options: Any) -> Steppers:
    """`Updater` and `Mechanic`."""
    updater = Updater(*plain(parameters, run))
    return [Mechanic(updater, **options), updater]


def manic_told(parameters: Iterable[nn.Parameter], run: Run) -> Steppers:
    """The same, which is told how many steps a pass over the data takes."""
    return manic(parameters, run, steps_per_epoch=TASKS[run.task]().steps_per_epoch)


def mechanic_pytorch(parameters: Iterable[nn.Parameter], run: Run) -> Steppers:
    """The published package."""
    cls, options = base_class(run.base)
    optimizer = import_module("mechanic_pytorch").mechanize(cls)(parameters, lr=run.lr, **options)
    return [optimizer, scheduled(optimizer, run)]


def prodigy(parameters: Iterable[nn.Parameter], run: Run) -> Steppers:
    """With the safeguard that its authors advise for warmups."""
    options = {"weight_decay": WEIGHT_DECAY, "safeguard_warmup": run.schedule == "cosine"}
    optimizer = import_module("prodigyopt").Prodigy(parameters, lr=run.lr, **options)
    return [optimizer, scheduled(optimizer, run)]


def d_adaptation(parameters: Iterable[nn.Parameter], run: Run) -> Steppers:
    """Its Adam, with AdamW's form of weight decay."""
    options = {"weight_decay": WEIGHT_DECAY, "decouple": True}
    optimizer = import_module("dadaptation").DAdaptAdam(parameters, lr=run.lr, **options)
    return [optimizer, scheduled(optimizer, run)]


def dog(parameters: Iterable[nn.Parameter], run: Run) -> Steppers:
    """Without averaging, which is no part of the others either; its authors advise the first distance."""
    normalized = run.task == "convolution"
    optimizer = import_module("dog").DoG(parameters, lr=run.lr, reps_rel=1e-4 if normalized else 1e-6)
    return [optimizer, scheduled(optimizer, run)]


def schedule_free(parameters: Iterable[nn.Parameter], run: Run) -> Steppers:
    """AdamW, which comes with an average in place of a schedule."""
    return [import_module("schedulefree").AdamWScheduleFree(parameters, lr=run.lr, weight_decay=WEIGHT_DECAY)]


class Method(NamedTuple):
    """How a method is built, what it needs, and where it takes part."""

    build: Callable[[Iterable[nn.Parameter], Run], Steppers]
    package: str
    bases: tuple[str, ...]  # that it is put around, or the one whose tuned runs it is measured against
    schedules: tuple[str, ...] = SCHEDULES
    lr: float = 1.0


METHODS = {
    "manic": Method(manic, "manic", tuple(GRIDS)),
    "manic, epoch given": Method(manic_told, "manic", tuple(GRIDS)),
    HELD_OUT: Method(manic_told, "manic", tuple(GRIDS)),
    VALIDATION: Method(manic_told, "manic", tuple(GRIDS)),
    "optax rule": Method(lambda parameters, run: manic(parameters, run, rule="optax"), "manic", tuple(GRIDS)),
    "mechanic-pytorch": Method(mechanic_pytorch, "mechanic_pytorch", tuple(GRIDS)),
    "Prodigy": Method(prodigy, "prodigyopt", ("adamw",)),
    "D-Adaptation": Method(d_adaptation, "dadaptation", ("adamw",)),
    "DoG": Method(dog, "dog", ("sgd",)),
    "schedule-free": Method(schedule_free, "schedulefree", ("adamw",), ("constant",), 0.0025),
}


def missing(package: str) -> bool:
    """Whether a package is not installed."""
    return find_spec(package) is None


# --- data ---------------------------------------------------------------------------------------------------------


def model_of(task: Task, seed: int) -> nn.Module:
    """A fresh model."""
    torch.manual_seed(seed)
    return task.make()


def batches(task: Task, seed: int, steps: int) -> Iterator[Data]:
    """Rows of the training data; a batch may be of the end of an epoch and the start of the next."""
    generator = torch.Generator().manual_seed(100 + seed)
    count, left = len(task.train[0]), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if task.replacement:
            left = torch.randint(count, (task.batch,), generator=generator)
        while len(left) < task.batch:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        rows, left = left[: task.batch], left[task.batch :]
        inputs = task.train[0][rows]
        yield task.augment(inputs, generator) if task.augment else inputs, task.train[1][rows]


def held_out(task: Task, share: float, seed: int) -> tuple[Task, Task]:
    """The task with the training rows that are left without a share of them, and with that share."""
    inputs, targets = task.train
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(200 + seed))
    cut = int(share * len(inputs))
    rows, rest = order[:cut], order[cut:]
    return replace(task, train=(inputs[rest], targets[rest])), replace(task, train=(inputs[rows], targets[rows]))


def is_check(step: int, steps: int) -> bool:
    """Whether the validation loss is measured after a step, counted from 1."""
    return step >= steps or step * CHECKS % steps < CHECKS


def measured(task: Task) -> tuple[Data, Data]:
    """The rows that losses are reported on: those for validation, and 512 of the training ones."""
    rows = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(1))[:512]
    return task.valid, (task.train[0][rows], task.train[1][rows])


# --- one model ----------------------------------------------------------------------------------------------------


def checkpoints(run: Run) -> Iterator[nn.Module]:
    """Train by a run's method; gives the model, ready to be measured, at each check."""
    task = TASKS[run.task]()
    model = model_of(task, run.seed)
    if run.method == START:
        yield model
        return
    build = plain if run.method == BASE else METHODS[run.method].build
    with contextlib.redirect_stdout(io.StringIO()):  # Prodigy announces its weight decay
        steppers = build(model.parameters(), run)
    switches = run.method == "schedule-free"

    def backward(inputs: Tensor, targets: Tensor) -> None:
        model.zero_grad()
        task.loss(model(inputs), targets).backward()

    until = 0  # the step from which on a method with held-out rows trains on them too
    rest = others = iter(())
    if run.method in (HELD_OUT, VALIDATION):
        steppers[0].held_out = lambda: backward(*next(others))
    if run.method == HELD_OUT:
        until = min(steppers[0].learning_steps, run.steps // 2)
        rest, others = (batches(part, run.seed, until) for part in held_out(task, HELD_OUT_SHARE, run.seed))
    elif run.method == VALIDATION:
        others = batches(replace(task, train=task.valid, augment=None), 50 + run.seed, run.steps)
    for step, rows in enumerate(chain(rest, batches(task, run.seed, run.steps - until))):
        if switches:
            steppers[0].train()
        if step == until > 0:
            steppers[0].held_out = None
        backward(*rows)
        for stepper in steppers:
            stepper.step()
        if is_check(step + 1, run.steps):
            if switches:
                steppers[0].eval()
            yield model


def losses(run: Run) -> Losses:
    """Train a model, and measure it."""
    task = TASKS[run.task]()
    valid, some_of_train = measured(task)

    @torch.no_grad()
    def loss(model: nn.Module, rows: Data) -> float:
        return task.loss(model(rows[0]), rows[1]).item()

    checks, models = zip(*((loss(model, valid), model) for model in checkpoints(run)), strict=True)
    return Losses(checks[-1], loss(models[-1], some_of_train), min(filter(math.isfinite, checks), default=math.inf))


# --- many models of a task at once --------------------------------------------------------------------------------


class Stack:
    """A task's model for several seeds and learning rates: parameters are a tensor (seeds, lrs, parameters)."""

    def __init__(self, task: Task, seeds: list[int]) -> None:
        self.task, self.seeds = task, seeds
        models = [model_of(task, seed) for seed in seeds]
        self.shapes = shapes = {name: parameter.shape for name, parameter in models[0].named_parameters()}
        self.start = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach() for model in models])

        def loss(flat: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            parts = flat.split([shape.numel() for shape in shapes.values()])
            parameters = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
            return task.loss(functional_call(models[0], parameters, (inputs,)), targets)

        same_batch = (0, None, None)
        self.gradient = vmap(vmap(grad_and_value(loss), in_dims=same_batch))
        self._loss = vmap(vmap(loss, in_dims=same_batch), in_dims=same_batch)

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of every step, those of the seeds stacked."""
        streams = [batches(self.task, seed, steps) for seed in self.seeds]
        for rows in zip(*streams, strict=True):
            inputs, targets = (torch.stack(parts) for parts in zip(*rows, strict=True))
            yield inputs, targets

    def train(self, base: str, schedule: str, lrs: list[float], steps: int) -> Iterator[Tensor]:
        """The parameters, which are trained on, at each check."""
        x = self.start[:, None].repeat(1, len(lrs), 1)
        lr = torch.tensor(lrs, dtype=x.dtype)[:, None]
        state = torch.zeros_like(x), torch.zeros_like(x)
        for step, (inputs, targets) in enumerate(self.batches(steps)):
            gradient, _ = self.gradient(x, inputs, targets)
            base_step(base, x, gradient, *state, lr * factor(schedule, step, steps), step + 1)
            if is_check(step + 1, steps):
                yield x

    def tuned(self, base: str, schedule: str, steps: int) -> tuple[float, Losses]:
        """The rate of the grid with the lowest validation loss at the end, and the lowest of each of the losses.

        All are means over seeds.
        """
        lrs = grid(base)
        found = self.losses(self.train(base, schedule, lrs, steps))
        means = [mean_losses(row[i] for row in found) for i in range(len(lrs))]
        return lrs[min(range(len(lrs)), key=lambda i: means[i].valid)], Losses(*map(min, zip(*means, strict=True)))

    def losses(self, checkpoints: Iterable[Tensor]) -> list[list[Losses]]:
        """Of every model, by seed and rate."""
        valid, some_of_train = measured(self.task)
        checks, stacks = zip(*((self._measure(x, valid), x) for x in checkpoints), strict=True)
        lowest = torch.stack(checks).nan_to_num(math.inf, math.inf).amin(0)
        columns = torch.stack([checks[-1], self._measure(stacks[-1], some_of_train), lowest], -1)
        return [[Losses(*found) for found in seed] for seed in columns.tolist()]

    @torch.no_grad()
    def _measure(self, x: Tensor, rows: Data) -> Tensor:
        """The loss of every model, a few at a time, for the sake of memory."""
        return torch.cat([self._loss(part, *rows) for part in x.split(4, 1)], 1)


def base_step(base: str, x: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor, t: int) -> None:
    """One step of a base optimizer, in place; m and v, zero at first, are its state, t counts from 1."""
    if base == PLAIN:
        update = g
    elif base == "sgd":
        update = m.mul_(0.9).add_(g)
    elif base == "lion":
        update = m.lerp(g, 0.1).sign_()
        m.lerp_(g, 0.01)
    elif base == "rmsprop":
        v.mul_(0.99).addcmul_(g, g, value=0.01)
        update = g / v.sqrt().add_(1e-8)
    else:
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        update = m / (v / (1 - 0.999**t)).sqrt_().add_(1e-8) / (1 - 0.9**t)
    if base == "adamw":
        x.mul_(1 - lr * WEIGHT_DECAY)
    x.sub_(lr * update)


# --- jobs ---------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """Runs that are done in one go: of base optimizers all rates and seeds of a pair, of anything else one."""

    runs: tuple[Run, ...]
    widen: bool = False  # the grid, until the best rates are well inside


def at_edge(by_lr: dict[float, float]) -> int:
    """-1 if the best rate is one of the two lowest, 1 if one of the two highest, else 0."""
    ranked = sorted(by_lr)
    place = ranked.index(min(ranked, key=lambda lr: by_lr[lr]))
    return -1 if place < 2 else 1 if place > len(ranked) - 3 else 0


def mean(values: Iterable[float]) -> float:
    """Infinite if a value is not finite, or there is none."""
    values = list(values)
    return statistics.fmean(values) if values and all(map(math.isfinite, values)) else math.inf


def mean_losses(losses: Iterable[Losses]) -> Losses:
    """Of each kind."""
    return Losses(*(mean(kind) for kind in zip(*losses, strict=True)))


def stacked_losses(job: Job) -> dict[Run, Losses]:
    """The runs of a job of base optimizers, and those that its grid is widened by."""
    first = job.runs[0]
    seeds = sorted({run.seed for run in job.runs})
    stack = Stack(TASKS[first.task](), seeds)
    lrs, done = sorted({run.lr for run in job.runs}), {}
    for widening in range(WIDENINGS + 1):
        table = stack.losses(stack.train(first.base, first.schedule, lrs, first.steps))
        for seed, row in zip(seeds, table, strict=True):
            done |= {first._replace(seed=seed, lr=lr): pair for lr, pair in zip(lrs, row, strict=True)}
        if not job.widen or widening == WIDENINGS:
            break
        tried = sorted({run.lr for run in done})
        sides = {
            at_edge({lr: mean(getattr(done[first._replace(seed=seed, lr=lr)], kind) for seed in seeds) for lr in tried})
            for kind in Losses._fields
        }
        low, high = (round(2 * math.log10(lr)) for lr in (tried[0], tried[-1]))
        lrs = [lr_of(low - i) for i in (1, 2) if -1 in sides] + [lr_of(high + i) for i in (1, 2) if 1 in sides]
        if not lrs:
            break
    return done


def train(job: Job) -> list[dict[str, Any]]:
    """Do a job in this process: a row for each run, with its losses (None if not finite) and seconds."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    stacked = job.runs[0].method == BASE
    done = stacked_losses(job) if stacked else {run: losses(run) for run in job.runs}
    seconds = round((time.perf_counter() - start) / len(done), 3)
    return [
        {
            **run._asdict(),
            **{kind: loss if math.isfinite(loss) else None for kind, loss in found._asdict().items()},
            "seconds": seconds,
        }
        for run, found in done.items()
    ]
