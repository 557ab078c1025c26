"""Learning rates: the nominal ones of parameter groups, the schedule's factor, and what of a scheduler is a rate.

The nominal rate of a group is that at which the schedule's factor is 1. It is kept in the group, under a key of its
own, and so saved and loaded with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler, swa_utils

Groups = list[dict[str, Any]]

# Attributes that are learning rates, beside base_lrs, of the schedulers whose rates `hand_off` can rescale.
SCHEDULER_RATES: dict[type, tuple[str, ...]] = {
    lr_scheduler.LambdaLR: (),
    lr_scheduler.MultiplicativeLR: (),
    lr_scheduler.StepLR: (),
    lr_scheduler.MultiStepLR: (),
    lr_scheduler.ConstantLR: (),
    lr_scheduler.LinearLR: (),
    lr_scheduler.ExponentialLR: (),
    lr_scheduler.PolynomialLR: (),
    lr_scheduler.SequentialLR: (),
    lr_scheduler.ChainedScheduler: (),
    lr_scheduler.OneCycleLR: (),
    lr_scheduler.CosineAnnealingLR: ("eta_min",),
    lr_scheduler.CosineAnnealingWarmRestarts: ("eta_min",),
    lr_scheduler.CyclicLR: ("max_lrs",),
    lr_scheduler.ReduceLROnPlateau: ("min_lrs", "default_min_lr", "eps"),
    swa_utils.SWALR: (),
}
GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
NOMINAL = "mechanic_nominal_lr"  # the key of a parameter group's nominal learning rate


def nominal(group: dict[str, Any]) -> float:
    """The rate that a group is to have for its nominal one: the initial one, or the highest of ``OneCycleLR``."""
    return float(group.get("max_lr") or group.get("initial_lr") or group["lr"])


def note(groups: Groups) -> None:
    """Give groups their nominal rate.

    Example:
        >>> groups = [{"lr": 0.5, "initial_lr": 2.0}]
        >>> note(groups)
        >>> factor(groups, torch.zeros(()))
        tensor(0.2500)
    """
    for group in groups:
        group[NOMINAL] = nominal(group)


def factor(groups: Groups, like: Tensor) -> Tensor:
    """The schedule's factor f: the largest of the groups' rates over their nominal ones.

    Args:
        groups: those without a nominal rate, whose rate was 0 so far, do not count.
        like: 0-d; the factor is on its device, in its dtype. Rates on that device are not read.
    """
    shares = [group["lr"] / group[NOMINAL] for group in groups if group.get(NOMINAL)]
    device = [share for share in shares if isinstance(share, Tensor) and share.device == like.device]
    host = [float(share) for share in shares if not isinstance(share, Tensor) or share.device != like.device]
    largest = torch.full_like(like, max(host, default=0.0))
    for share in device:
        largest = torch.maximum(largest, share.to(like.dtype).reshape(()))
    return largest


def rescale(groups: Groups, scheduler: Any, scale: float) -> None:
    """Multiply all learning rates of groups and scheduler, and forget the nominal ones.

    Raises:
        ValueError: it is not known which of the scheduler's numbers are rates; nothing was changed.
    """
    owners = list(_scheduler_rates(scheduler))
    owners += [(group, name) for group in groups for name in GROUP_RATES if name in group]
    for owner, name in owners:
        rate = owner[name]
        owner[name] = [one * scale for one in rate] if isinstance(rate, list) else rate * scale
    for group in groups:
        group.pop(NOMINAL, None)


def _scheduler_rates(scheduler: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if scheduler is None:
        return
    if type(scheduler) not in SCHEDULER_RATES:
        raise ValueError(
            f"hand_off() cannot rescale a {type(scheduler).__name__}: which of its numbers are learning rates is not "
            "known. Multiply the optimizer's lr by float(mechanic.scale) yourself, and build a scheduler on it."
        )
    for name in ("base_lrs", "_last_lr", *SCHEDULER_RATES[type(scheduler)]):
        if vars(scheduler).get(name) is not None:
            yield vars(scheduler), name
    for child in vars(scheduler).get("_schedulers", ()):
        yield from _scheduler_rates(child)
