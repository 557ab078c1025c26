"""Hooks of the base optimizer: who calls them and when, and the one that refuses steps which are not `Updater`'s."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.optim.optimizer as every_optimizer
from torch.optim import Optimizer


@contextmanager
def held_hooks(optimizer: Any, kind: str) -> Iterator[None]:
    """Keep an optimizer's hooks of a kind, by the name that torch has for them, from being called."""
    hooks = getattr(optimizer, kind, None)
    if not hooks:
        yield
        return
    setattr(optimizer, kind, OrderedDict())
    try:
        yield
    finally:
        hooks.update(getattr(optimizer, kind))  # those that were registered meanwhile
        setattr(optimizer, kind, hooks)


@contextmanager
def held_step_hooks(optimizer: Optimizer) -> Iterator[None]:
    """Keep an optimizer's step from calling hooks; `Updater` does, before h is taken and after the step is scaled."""
    with (
        held_hooks(optimizer, "_optimizer_step_pre_hooks"),
        held_hooks(optimizer, "_optimizer_step_post_hooks"),
        held_hooks(every_optimizer, "_global_optimizer_pre_hooks"),
        held_hooks(every_optimizer, "_global_optimizer_post_hooks"),
    ):
        yield


def call_step_hooks(when: str, optimizer: Optimizer, *args: Any) -> None:
    """Call the hooks before (``"pre"``) or after a step, an optimizer's own and those of all; a drop-in calls its own.

    Args:
        when: ``"pre"`` or ``"post"``.
        optimizer: the base optimizer.
        args: of its step, but for itself.
    """
    own = getattr(optimizer, f"_optimizer_step_{when}_hooks", None)
    if own is None:
        return
    everyones = getattr(every_optimizer, f"_global_optimizer_{when}_hooks")
    first, then = (everyones, own) if when == "pre" else (own, everyones)  # torch's order
    for hook in [*first.values(), *then.values()]:
        if not isinstance(hook, Guard):
            hook(optimizer, (optimizer, *args), {})


class Guard:
    """A hook of an optimizer that refuses steps which its owner, an `Updater`, does not take."""

    def __init__(self, owner: object) -> None:
        self._owner = weakref.ref(owner)

    @classmethod
    def stand_before(cls, optimizer: Optimizer, owner: object) -> None:
        """Guard an optimizer, in place of a guard of before."""
        cls.leave(optimizer)
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):  # it is one of torch's
            optimizer.register_step_pre_hook(cls(owner))

    @classmethod
    def check(cls, optimizer: Optimizer, owner: object) -> None:
        """Raise RuntimeError if the guard is that of another owner, who is alive."""
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
        if any(isinstance(hook, cls) and hook._owner() not in (None, owner) for hook in hooks):
            raise RuntimeError(
                "Another Updater was built on this optimizer since. Of several Updaters on one optimizer only the last "
                "may step. Nothing was changed."
            )

    @classmethod
    def leave(cls, optimizer: Optimizer) -> None:
        """Guard an optimizer no more."""
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {})
        for key in [key for key, hook in hooks.items() if isinstance(hook, cls)]:
            del hooks[key]

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Refuse a step, unless all rates are 0: torch has the optimizer set up its state then."""
        if self._owner() is not None and any(float(group["lr"]) for group in optimizer.param_groups):
            raise RuntimeError(
                "optimizer.step() was called, but this optimizer's steps are taken by updater.step(): leave it out. "
                "To go on without manic, call mechanic.hand_off() first. Nothing was changed."
            )
