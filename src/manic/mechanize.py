"""`mechanize`: the tuner as a drop-in optimizer class, made of an `Updater` and a `Mechanic`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch.optim import Optimizer

from manic.mechanic import Mechanic
from manic.tuner import BETAS, TunerState
from manic.updater import STATE_VERSION, Updater, keep_dtypes

# What a mechanized optimizer adds to the state of a parameter, and to every parameter group.
STATE_KEYS = ("reference", "delta")
GROUP_KEYS = ("mechanic_version", "mechanic_tuner", "mechanic_unit", "mechanic_steps", "mechanic_skipped")


def mechanize(
    base: type[Optimizer],
    *,
    rule: str = "manic",
    betas: Sequence[float] = BETAS,
    s_decay: float = 1e-2,
    s_init: float | None = None,
    eps: float = 1e-8,
    max_scale: float | None = None,
    store_delta: bool = True,
    internal_lr: float | None = 1.0,
    nonfinite: str = "skip",
    log_func: Callable[[dict[str, Any]], object] | None = None,
    log_every: int = 0,
) -> Any:
    """An optimizer class like ``base`` that learns the scale of its learning rate.

    Its objects are ``base`` optimizers in every respect: schedulers, hooks, ``GradScaler``, parameter groups,
    ``state_dict``. One ``step()`` is ``mechanic.step(); updater.step()``.

    Args:
        base: a subclass of ``torch.optim.Optimizer``.
        rule, betas, s_decay, s_init, eps, max_scale, log_func, log_every: see `Mechanic`.
        store_delta, internal_lr, nonfinite: see `Updater`.

    Returns:
        A subclass of ``base``, called with the arguments of ``base``.

    Raises:
        TypeError: ``base`` is not an optimizer class.

    Example:
        >>> import torch
        >>> from manic import mechanize
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> isinstance(optimizer, torch.optim.SGD)
        True
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(
            f"base is {base!r}; expected an optimizer class, as in "
            "mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)."
        )
    options = {
        "updater": {"store_delta": store_delta, "internal_lr": internal_lr, "nonfinite": nonfinite},
        "mechanic": {
            "rule": rule,
            "betas": tuple(betas),
            "s_decay": s_decay,
            "s_init": s_init,
            "eps": eps,
            "max_scale": max_scale,
            "log_func": log_func,
            "log_every": log_every,
        },
    }
    return type(f"Mechanized{base.__name__}", (_Mechanized, base), {"_base": base, "_options": options})


def is_mechanized(optimizer: object) -> bool:
    """Whether an optimizer was made by a class from `mechanize`.

    Example:
        >>> import torch
        >>> is_mechanized(torch.optim.SGD([torch.ones(1)], lr=1.0))
        False
    """
    return isinstance(optimizer, _Mechanized)


class _Mechanized(Optimizer):
    """The part of a mechanized optimizer that is not its base."""

    _base: type[Optimizer]
    _options: dict[str, dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._updater = Updater(cast(Any, _Base(self)), **self._options["updater"])
        self._mechanic = Mechanic(self._updater, **self._options["mechanic"])
        self._mirrored = 0
        # A GradScaler then unscales before the step, as the tuner needs, and not inside a fused one.
        self._step_supports_amp_scaling = False

    @property
    def scale(self) -> torch.Tensor:
        """The scale, 0-d, on the parameters' device: scale × a group's lr is the group's effective learning rate."""
        return self._updater.scale

    def get_last_lr(self) -> list[float]:
        """The effective learning rate of each parameter group, scale × lr; reads the scale from its device."""
        return self._updater.get_last_lr()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the tuner and the base optimizer.

        Args:
            closure: evaluates the model and returns the loss; called once, and again only if the base does.

        Returns:
            The loss, if a closure was given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            closure = _first_known(closure, loss)
        self._mechanic.step()
        self._updater.step(closure)
        self._mirror()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """In torch's own layout: x_ref and Δ under ``state[p]``, the tuner's numbers in every parameter group."""
        state_dict = copy.deepcopy(super().state_dict())
        for i, tensors in self._updater.displacement.state(self._updater.parameters()).items():
            state_dict["state"].setdefault(i, {}).update(tensors)
        for group in state_dict["param_groups"]:
            group.update(self._group_state())
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state that `state_dict` gave; nothing is changed if it does not fit.

        Raises:
            ValueError: the state is of another model, or of an optimizer that is not mechanized.
        """
        saved = state_dict["param_groups"][0]
        missing = [key for key in GROUP_KEYS if key not in saved]
        if missing:
            raise ValueError(
                f"The state dict's parameter groups lack {', '.join(missing)}; expected the state dict of a mechanized "
                f"{self._base.__name__}. To go on from a plain one, load it before mechanizing, and start tuning anew."
            )
        if saved["mechanic_version"] != STATE_VERSION:
            raise ValueError(
                f"The state dict is of version {saved['mechanic_version']}; this release reads version {STATE_VERSION}."
            )
        displacement, base_state = {}, {}
        places = {key: i for i, key in enumerate(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))}
        for key, tensors in state_dict["state"].items():
            if ours := {name: tensors[name] for name in STATE_KEYS if name in tensors}:
                displacement[places[key]] = ours
            if rest := {name: value for name, value in tensors.items() if name not in STATE_KEYS}:
                base_state[key] = rest
        self._updater.check_displacement(displacement)
        tuner = TunerState(*saved["mechanic_tuner"])
        mechanic_state = {**self._mechanic.state_dict(), "tuner": tuner._asdict()}
        mechanic_state |= {"steps": saved["mechanic_steps"], "skipped": saved["mechanic_skipped"]}
        self._mechanic.check_state(mechanic_state)

        base = {**state_dict, "state": base_state}
        super().load_state_dict(base)
        keep_dtypes(self, base, displacement)
        self._mechanic.load_state_dict(mechanic_state)
        self._updater.load_tuning(tuner.scales.sum(), saved["mechanic_unit"], displacement)
        self._mirrored = 0

    def _group_state(self) -> dict[str, Any]:
        state = self._mechanic.state_dict()
        tuner = torch.stack(tuple(state["tuner"].values()))
        return dict(
            zip(GROUP_KEYS, (STATE_VERSION, tuner, self._updater.unit, state["steps"], state["skipped"]), strict=True)
        )

    def _mirror(self) -> None:
        """Show x_ref and Δ under ``self.state[p]``, where tools that save optimizers look for what to save.

        Only now, after the base's step: base optimizers take a state that is not empty for one they have set up.
        """
        slots = self._updater.displacement.slots
        if len(slots) == self._mirrored:
            return
        self._mirrored = len(slots)
        for parameter, slot in slots.items():
            if parameter.grad is not None:
                self.state[parameter].update(slot.tensors(parameter))
        for group in self.param_groups:
            group.update(self._group_state())

    def __getstate__(self) -> dict[str, Any]:
        ours = ("_updater", "_mechanic", "_mirrored", "_step_supports_amp_scaling")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}}

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._base, self._options), self.__getstate__()


class _Base:
    """The base optimizer inside a mechanized one, as its `Updater` sees it: same groups, the step without hooks."""

    def __init__(self, outer: _Mechanized) -> None:
        self._outer = outer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._outer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        step = self._outer._base.step
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        return step(self._outer) if closure is None else step(self._outer, closure)


def _remake(base: type[Optimizer], options: dict[str, dict[str, Any]]) -> _Mechanized:
    cls = mechanize(base, **options["updater"], **options["mechanic"])
    return cls.__new__(cls)


def _first_known(closure: Callable[[], Any], loss: Any) -> Callable[[], Any]:
    """``closure``, but for the first call, whose result is known and whose gradients are there."""
    known = [loss]
    return lambda: known.pop() if known else closure()
