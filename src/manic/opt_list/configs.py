"""The list's figures, and the schedule that they describe."""

from __future__ import annotations

import csv
import math
import numbers
import operator
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class Config:
    """One setting of `NAdamW` and its schedule; the names are its arguments.

    Attributes:
        lr: the largest learning rate.
        betas: β1 and β2, decay rates of the averages of the gradient and of its square.
        eps: ε, added to the root of the average square.
        decoupled_weight_decay: weight decay in the step, times the learning rate (as in AdamW).
        l2_weight_decay: weight decay in the gradient, of the published sign: see `NAdamW`.
        nesterov: whether the step looks ahead.
        warmup_fraction: if > 0, the rate rises from 0 over ``max(warmup_fraction, constant_fraction)`` of the steps.
        constant_fraction: share of the steps before the rate decays, in [0, 1).
        final_lr_fraction: the last rate over the largest.

    Example:
        >>> from manic.opt_list import config_for_idx
        >>> config_for_idx(0).betas
        (0.9360043, 0.9989497)
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    decoupled_weight_decay: float = 0.0
    l2_weight_decay: float = 0.0
    nesterov: bool = False
    warmup_fraction: float = 0.0
    constant_fraction: float = 0.0
    final_lr_fraction: float = 0.0

    def lr_factor(self, step: int, training_steps: int) -> float:
        """The schedule, in [0, 1]: what ``lr`` is multiplied by.

        Args:
            step: steps taken before this one; the first is 0. From ``training_steps`` on, the last rate stays.
            training_steps: how long the training is, in steps, ≥ 1.

        Raises:
            ValueError: ``step`` is not a number ≥ 0, or ``training_steps`` not a whole number ≥ 1.

        Example:
            >>> config = config_for_idx(0)
            >>> [round(config.lr_factor(step, 100), 3) for step in (0, 70, 90, 100)]
            [1.0, 1.0, 0.339, 0.0]
        """
        if not isinstance(step, numbers.Real) or not step >= 0:
            raise ValueError(f"step is {step!r}; expected the number of steps taken before this one, 0 or more.")
        return lr_factor(
            step,
            check_training_steps(training_steps),
            self.warmup_fraction,
            self.constant_fraction,
            self.final_lr_fraction,
        )


def config_for_idx(idx: int) -> Config:
    """The list's entry of that place, 0 the first to try.

    Args:
        idx: 0 … 99.

    Raises:
        TypeError: ``idx`` is not a whole number.
        ValueError: the list has no such place.

    Source:
        arXiv:2002.11887 and the list published with it.

    Example:
        >>> config_for_idx(0).lr
        0.001194834
    """
    try:
        place = operator.index(idx)
    except TypeError:
        raise TypeError(f"idx is {idx!r}; expected a place in the list, a whole number such as 0.") from None
    configs = all_configs()
    if not 0 <= place < len(configs):
        raise ValueError(f"idx is {idx}; expected a place in the list, 0 (to be tried first) to {len(configs) - 1}.")
    return configs[place]


@cache
def all_configs() -> tuple[Config, ...]:
    """The whole list, in the order in which to try it."""
    with resources.files("manic.opt_list").joinpath("nadamw.csv").open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if name != "idx"} for row in csv.DictReader(file)]
    return tuple(
        Config(betas=(row.pop("beta1"), row.pop("beta2")), nesterov=bool(row.pop("nesterov")), **row) for row in rows
    )


def lr_factor(
    step: int, training_steps: int, warmup_fraction: float, constant_fraction: float, final_lr_fraction: float
) -> float:
    """See `Config.lr_factor`."""
    step = min(step, training_steps)
    warmup_steps = max(warmup_fraction, constant_fraction) * training_steps if warmup_fraction > 0 else 0.0
    if step < warmup_steps:
        return step / warmup_steps
    constant_steps = constant_fraction * training_steps
    decayed = max(step - constant_steps, 0.0) / (training_steps - constant_steps)
    return final_lr_fraction + (1 - final_lr_fraction) * (1 + math.cos(math.pi * decayed)) / 2


def check_training_steps(training_steps: int) -> int:
    """The argument as an int; raise ValueError unless it is a whole number ≥ 1."""
    try:
        steps = operator.index(training_steps)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ValueError(
            f"training_steps is {training_steps!r}; expected the number of optimizer steps of the whole training, "
            "1 or more (epochs × batches per epoch): the schedule is laid out over them."
        )
    return steps
