"""Learning rates: the nominal ones of parameter groups, the schedule's factor, and what of a scheduler is a rate."""

from __future__ import annotations

import math
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
# Optimizers of which `hand_off` cannot rescale what they keep in their state, or that do not step in proportion to lr.
NAMES = (
    "AccSGD AdaFactor AdaMod AdamG Amos ApolloDQN ASGD FTRL Fromage MADGRAD Magma Nero Ranger Ranger21 RangerQH "
    "RangerVA RMSpropTF Rprop SRMM"
)
NOT_IN_PROPORTION = set(NAMES.split())
GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


class Nominal:
    """The rates of an optimizer's groups at which the schedule's factor is 1, and the unit of the scale.

    Args:
        internal_lr: the rate at which the base optimizer runs where a group's is the largest; ``None``: at its own.

    Attributes:
        unit: ``internal_lr`` over the largest rate: a scale in the user's units per scale in the tuner's.
    """

    def __init__(self, internal_lr: float | None) -> None:
        self.internal_lr = internal_lr
        self.unit = 1.0
        self._rates: dict[Tensor | None, float] = {}  # by the first parameter of a group
        self._is_settled = False

    def find(self, groups: Groups) -> None:
        """Note the rates of the groups, and the unit.

        Raises:
            ValueError: no rate is a finite number above 0.
        """
        if self.internal_lr is not None:
            largest = max(_nominal(group) for group in groups if group["params"])
            unit = self.internal_lr / largest if largest > 0 else math.inf
            if not (math.isfinite(unit) and unit > 0):
                raise ValueError(
                    f"The largest initial lr is {largest}; expected a finite number > 0. Any will do, say lr=1.0."
                )
            self.unit = unit
        self._rates = {_first(group): _nominal(group) for group in groups if group["params"]}

    def settle(self, groups: Groups) -> None:
        """Look again at the first step: a scheduler built since may have set other rates. Groups may join or leave."""
        if self._is_settled:
            pairs = zip(self.of(groups), groups, strict=True)
            self._rates = {_first(group): rate or _nominal(group) for rate, group in pairs if group["params"]}
        elif any(float(group["lr"]) for group in groups):  # else torch has an optimizer set up its state
            self.find(groups)
            self._is_settled = True

    def load(self, groups: Groups, unit: float, rates: list[float], settled: bool) -> None:
        """Take up nominal rates and a unit that were saved."""
        self._rates = dict(zip(map(_first, groups), rates, strict=True))
        self.unit, self._is_settled = unit, settled

    def of(self, groups: Groups) -> list[float]:
        """The rates of groups, as these are now; 0 while one is not known, and of a group without parameters."""
        return [self._rates.get(_first(group), 0.0) for group in groups]


def shares(groups: Groups, nominal_rates: list[float]) -> list[Any]:
    """The rates of groups over their nominal ones, where these are known and not 0; tensors where a rate is one."""
    return [group["lr"] / rate for group, rate in zip(groups, nominal_rates, strict=True) if rate]


def factor(groups: Groups, nominal_rates: list[float], like: Tensor) -> Tensor:
    """The schedule's factor f, from the groups' shares of their nominal rates: max(min(1, the largest), the least).

    A group that is slowed, or stopped, so does not count while others go on, nor one that is raised alone.

    Args:
        groups: those whose rate is 0, or was so far, do not count.
        nominal_rates: one for each group.
        like: 0-d; the factor is on its device, in its dtype. Rates on that device are not read.

    Example:
        >>> groups = [{"lr": 0.5}, {"lr": 0.0}]
        >>> factor(groups, [2.0, 1.0], torch.zeros(()))
        tensor(0.2500)
    """
    given = shares(groups, nominal_rates)
    device = [share for share in given if isinstance(share, Tensor) and share.device == like.device]
    host = [float(share) for share in given if not isinstance(share, Tensor) or share.device != like.device]
    host = [share for share in host if share > 0]
    if not device:
        return torch.full_like(like, max(min(1.0, max(host)), min(host)) if host else 0.0)
    largest = torch.full_like(like, max(host, default=0.0))
    least = torch.full_like(like, min(host, default=math.inf))
    for share in device:
        share = share.to(like.dtype).reshape(())
        largest = torch.maximum(largest, share)
        least = torch.where(share > 0, torch.minimum(least, share), least)
    return torch.where(largest > 1, least.clamp(min=1), largest)


def rescale(groups: Groups, scheduler: Any, scale: float) -> None:
    """Multiply all learning rates of groups and scheduler.

    Raises:
        ValueError: it is not known which of the scheduler's numbers are rates; nothing was changed.
    """
    owners = list(_scheduler_rates(scheduler))
    owners += [(group, name) for group in groups for name in GROUP_RATES if name in group]
    for owner, name in owners:
        rate = owner[name]
        owner[name] = [one * scale for one in rate] if isinstance(rate, list) else rate * scale


def _nominal(group: dict[str, Any]) -> float:
    """The initial rate, or the highest of ``OneCycleLR``."""
    return float(group.get("max_lr") or group.get("initial_lr") or group["lr"])


def _first(group: dict[str, Any]) -> Tensor | None:
    """What a group is known by: loading and copying make new dicts of groups, and groups may change places."""
    return next(iter(group["params"]), None)


def _scheduler_rates(scheduler: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if scheduler is None:
        return
    if type(scheduler) not in SCHEDULER_RATES:
        raise ValueError(
            f"hand_off() cannot rescale {type(scheduler).__name__}: which of its numbers are learning rates is not "
            "known. Note float(mechanic.scale), set updater.lr_scheduler = None, call hand_off(), and multiply them."
        )
    for name in ("base_lrs", "_last_lr", *SCHEDULER_RATES[type(scheduler)]):
        if vars(scheduler).get(name) is not None:
            yield vars(scheduler), name
    for child in vars(scheduler).get("_schedulers", ()):
        yield from _scheduler_rates(child)
