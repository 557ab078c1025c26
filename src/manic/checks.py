"""What `Updater` can be given, and clear errors for what it cannot."""

from __future__ import annotations

import inspect
import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from manic.warn import warn


def base_of(optimizer: Any, lr_scheduler: Any) -> Optimizer:
    """The optimizer that `Updater` keeps of the one it was given; or TypeError, if it cannot scale its steps."""
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
        raise _not_an_optimizer(optimizer, lr_scheduler)
    # Lightning's and Accelerate's wrappers have no groups of their own: step them, and keep what they wrap.
    base = optimizer if "param_groups" in vars(optimizer) else getattr(optimizer, "optimizer", optimizer)
    if hasattr(base, "displacement"):
        raise TypeError(
            "optimizer is an Updater already; expected a plain optimizer, as in "
            "Updater(torch.optim.SGD(model.parameters(), lr=1.0)). Give the Updater to Mechanic."
        )
    if hasattr(base, "mechanic"):
        raise TypeError(
            f"optimizer is of type {type(base).__name__}, which tunes itself; expected a plain optimizer. "
            "Call its step() and leave out Updater and Mechanic."
        )
    check_kind(type(base))
    return base


def _not_an_optimizer(optimizer: Any, lr_scheduler: Any) -> TypeError:
    kind, example = type(optimizer).__name__, "as in Updater(torch.optim.SGD(model.parameters(), lr=1.0))."
    if isinstance(optimizer, type):
        return TypeError(f"optimizer is the class {optimizer.__name__}; expected an object of it, {example}")
    if hasattr(lr_scheduler, "param_groups"):
        return TypeError(
            f"optimizer is of type {kind}, and lr_scheduler of type {type(lr_scheduler).__name__}; "
            "the two seem swapped: expected Updater(optimizer, lr_scheduler)."
        )
    return TypeError(f"optimizer is of type {kind}; expected a torch.optim.Optimizer, {example}")


def check_kind(kind: type) -> None:
    """Raise TypeError if objects of an optimizer class keep weights that the scale would not reach; warn of L-BFGS."""
    if hasattr(kind, "train") and hasattr(kind, "eval"):
        raise TypeError(
            f"The optimizer is of type {kind.__name__}, which keeps two sets of weights and switches between them with "
            "train() and eval(); the scale would reach one only. Expected an optimizer with one set, such as AdamW."
        )
    if issubclass(kind, torch.optim.LBFGS):
        warn(
            f"The optimizer is of type {kind.__name__}, which chooses its own step lengths: there is no rate to tune, "
            "and with manic it hardly trains as a rule. Use it alone."
        )


def check_groups(groups: list[dict[str, Any]], kind: str | None) -> None:
    """Raise TypeError or ValueError unless `Updater` can scale the steps of these; ``kind`` is the optimizer's."""
    for i, group in enumerate(groups):
        rate = group.get("lr")
        if not isinstance(rate, numbers.Real) and not (isinstance(rate, Tensor) and rate.numel() == 1):
            raise TypeError(
                f"Parameter group {i} of {kind} has lr={rate!r}, which cannot be scaled; expected a number. If the "
                "optimizer picks its own rate, give it an explicit lr."
            )
        if group.get("maximize"):
            raise ValueError(
                f"Parameter group {i} has maximize=True, which turns the sign of the update against the gradient; "
                "expected False. Minimize the negative of the objective instead."
            )
        if group.get("differentiable"):
            raise ValueError(
                f"Parameter group {i} has differentiable=True, but manic's part of a step has no derivative; "
                "expected False. To differentiate through steps, use those of manic.functional."
            )
    if not any(group["params"] for group in groups):
        raise ValueError("The optimizer has no parameters; expected at least one.")


def check_schedule(schedule: Any, base: Optimizer, optimizer: Optimizer) -> None:
    """Raise TypeError or ValueError unless it is ``None``, or a schedule of one of the two that `Updater` can step."""
    if schedule is not None and not isinstance(schedule, lr_scheduler.ReduceLROnPlateau):  # which the user steps
        _check_step(schedule)
    scheduled = getattr(schedule, "optimizer", base)
    if scheduled not in (base, optimizer):
        raise ValueError(
            f"lr_scheduler schedules another optimizer, of type {type(scheduled).__name__}; "
            "expected one built on the optimizer given."
        )


def _check_step(schedule: Any) -> None:
    step = getattr(schedule, "step", None)
    optimizes = hasattr(schedule, "param_groups")
    if isinstance(schedule, type) or not callable(step) or optimizes:
        given = f"of type {type(schedule).__name__}" if optimizes else repr(schedule)
        raise TypeError(
            f"lr_scheduler is {given}; expected a scheduler, as in "
            "Updater(optimizer, CosineAnnealingLR(optimizer, 1000)), or None."
        )
    try:
        inspect.signature(step).bind()
    except TypeError as error:
        raise TypeError(
            f"lr_scheduler is of type {type(schedule).__name__}, whose step() cannot be called without "
            f"arguments ({error}). Leave it out of Updater, and step it yourself after updater.step()."
        ) from None


def check_closure(closure: Any) -> None:
    """Raise TypeError unless a step can take this."""
    if closure is not None and not callable(closure):
        raise TypeError(
            f"closure is {closure!r:.60}; expected a function that computes the loss, or nothing. A loss goes to a "
            "ReduceLROnPlateau, which you step yourself."
        )


def check_options(
    store_delta: bool, cpu_offload: bool, internal_lr: float | None, nonfinite: str, process_group: Any
) -> None:
    """Raise TypeError or ValueError unless `Updater` can take these."""
    if nonfinite not in ("skip", "raise"):
        raise ValueError(f"nonfinite is {nonfinite!r}; expected 'skip' or 'raise'.")
    for name, value in {"store_delta": store_delta, "cpu_offload": cpu_offload}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected True or False.")
    if isinstance(internal_lr, bool) or not isinstance(internal_lr, numbers.Real | None):
        raise TypeError(f"internal_lr is {internal_lr!r}; expected a finite number > 0, or None.")
    if internal_lr is not None and not (math.isfinite(internal_lr) and internal_lr > 0):
        raise ValueError(f"internal_lr is {internal_lr!r}; expected a finite number > 0, or None.")
    if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group is {process_group!r:.60}; expected a torch.distributed.ProcessGroup, such as "
            "device_mesh.get_group(), or None."
        )
