"""`mechanize`: the tuner as a drop-in optimizer class, made of an `Updater` and a `Mechanic`."""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any, cast
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.checkpoint import check_entries, check_rates, check_version, copied, dtypes, keep_dtypes, undone_on_error
from manic.checks import check_closure, check_kind, check_options
from manic.displacement import Slot
from manic.hooks import held_hooks
from manic.kernels.compiled import outside_graphs
from manic.mechanic import Mechanic, check_logging
from manic.tuner import TunerConfig, TunerState
from manic.updater import Updater

# What a mechanized optimizer adds to the state of a parameter, and to every parameter group, when it is saved.
STATE_KEYS = ("reference", "delta")
NAMES = ["version", "kind", "config", "tuner", "scale", "unit", "steps", "since", "skipped", "taken", "dtypes", "rates"]
GROUP_KEYS = tuple(f"mechanic_{name}" for name in NAMES)

_classes: WeakValueDictionary[Any, type] = WeakValueDictionary()


def mechanize(
    base: type[Optimizer],
    *,
    rule: str = "manic",
    betas: Sequence[float] | None = None,
    s_decay: float | None = None,
    s_init: float | None = None,
    eps: float = 1e-8,
    max_scale: float | None = None,
    steps_per_epoch: float | None = None,
    store_delta: bool = True,
    cpu_offload: bool = False,
    internal_lr: float | None = 1.0,
    nonfinite: str = "skip",
    process_group: Any = None,
    log_func: Callable[[dict[str, Any]], object] | None = None,
    log_every: int = 0,
) -> Any:
    """An optimizer class like ``base`` that learns the scale of its learning rate.

    Its objects are ``base`` optimizers in every respect: schedulers, hooks, ``GradScaler``, parameter groups,
    ``state_dict``. One ``step()`` is ``mechanic.step(); updater.step()``; the two are its attributes ``mechanic`` and
    ``updater``.

    Args:
        base: a subclass of ``torch.optim.Optimizer``.
        rule, betas, s_decay, s_init, eps, max_scale, steps_per_epoch, log_func, log_every: see `Mechanic`.
        store_delta, cpu_offload, internal_lr, nonfinite, process_group: see `Updater`.

    Returns:
        A subclass of ``base``, called with the arguments of ``base``.

    Raises:
        TypeError: ``base`` is not an optimizer class, or an option is of another type.
        ValueError: an option is out of range.

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
    if not (isinstance(base, type) and issubclass(base, Optimizer)) or issubclass(base, _Mechanized):
        given = base.__name__ if isinstance(base, type) else f"of type {type(base).__name__}"
        options = " The options of the optimizer go there as well." if isinstance(base, partial) else ""
        raise TypeError(
            f"base is {given}; expected a plain optimizer class, as in "
            f"mechanize(torch.optim.SGD)(model.parameters(), lr=1.0).{options}"
        )
    check_kind(base)
    check_options(store_delta, cpu_offload, internal_lr, nonfinite, process_group)
    check_logging(log_func, log_every)
    updater = {
        "store_delta": store_delta,
        "cpu_offload": cpu_offload,
        "internal_lr": internal_lr,
        "nonfinite": nonfinite,
        "process_group": process_group,
    }
    config = TunerConfig(
        rule=rule,
        betas=betas,
        s_decay=s_decay,
        s_init=s_init,
        eps=eps,
        max_scale=max_scale,
        steps_per_epoch=steps_per_epoch,
    )
    mechanic = {**asdict(config), "log_func": log_func, "log_every": log_every}
    key = (base, config, *updater.values(), id(log_func), log_every)
    made = _classes.get(key)
    if made is None:
        options = {"updater": updater, "mechanic": mechanic}
        made = type(f"Mechanized{base.__name__}", (_Mechanized, base), {"_base": base, "_options": options})
        _classes[key] = made
    return made


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
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            for name in (*self._options["updater"], *self._options["mechanic"]):
                if name in kwargs and f"unexpected keyword argument '{name}'" in str(error):
                    base = self._base.__name__
                    raise TypeError(
                        f"{name}={kwargs[name]!r:.60} was given to {base}; expected an option of {base}. Options of "
                        f"manic go to mechanize({base}, {name}=...)."
                    ) from error
            raise
        self.updater = Updater(cast(Any, _Base(self)), **self._options["updater"])
        self.mechanic = Mechanic(self.updater, **self._options["mechanic"])
        self._mirrored = 0  # the packing whose x_ref and Δ are shown
        self._unseen: dict[Tensor, Slot] = {}  # those of its parameters whose x_ref and Δ are not shown yet
        # A GradScaler then unscales before the step, as the tuner needs, and not inside a fused one.
        self._step_supports_amp_scaling = False
        # Tools that load optimizers look at these names for what to load.
        self._mark_groups()
        for state in self.state.values():
            if state and isinstance(state, dict):  # some keep a number under a name instead
                state.update(dict.fromkeys(STATE_KEYS if self.updater.displacement.store_delta else STATE_KEYS[:1]))

    def __repr__(self) -> str:
        lines = super().__repr__().splitlines()
        return "\n".join(line for line in lines if not line.strip().startswith(GROUP_KEYS))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get their x_ref when they first take part."""
        super().add_param_group(param_group)
        if hasattr(self, "mechanic"):
            self._mark_groups()

    def get_last_lr(self) -> list[float]:
        """The effective learning rate of each parameter group, scale × lr; reads the scale from its device."""
        return self.updater.get_last_lr()

    @outside_graphs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the tuner and the base optimizer.

        Args:
            closure: evaluates the model and returns the loss; called once, and again only if the base does.

        Returns:
            The loss, if a closure was given.

        Raises:
            TypeError: ``closure`` is not a function.
        """
        check_closure(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            closure = _first_known(closure, loss) if _evaluates_again(self._base) else None
        self.mechanic.step()
        self.updater.step(closure)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """In torch's own layout: x_ref and Δ under ``state[p]``, the tuner's numbers in every parameter group."""
        with held_hooks(self, "_optimizer_state_dict_post_hooks"):
            packed = super().state_dict()
        _, base_state = _divide(packed["state"])
        state_dict = copied({**packed, "state": base_state})
        for i, tensors in self.updater.displacement.state(self.updater._parameters(), self.updater._scale).items():
            state_dict["state"].setdefault(i, {}).update(tensors)
        mechanic = self.mechanic.state_dict()
        mechanic["tuner"] = torch.stack(tuple(mechanic["tuner"].values()))
        mechanic |= {"unit": self.updater._nominal.unit, "rates": self.updater._nominal.of(self.updater.param_groups)}
        mechanic |= {"taken": self.updater._count(), "dtypes": dtypes(self), "kind": self._base.__name__}
        for group in state_dict["param_groups"]:
            group.update({f"mechanic_{name}": copy.deepcopy(mechanic[name]) for name in NAMES})
        return self._hooked(self._optimizer_state_dict_post_hooks, state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, the tuner's options included; nothing is changed if it does not fit.

        Raises:
            ValueError: the state is of another model or kind, or of an optimizer that is not mechanized.
        """
        if isinstance(state_dict, dict):
            state_dict = self._hooked(self._optimizer_load_state_dict_pre_hooks, state_dict.copy())
        mechanic = self._saved_tuning(state_dict)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        places = {key: i for i, key in enumerate(keys)}
        ours, base_state = _divide(state_dict["state"])
        displacement = {places[key]: tensors for key, tensors in ours.items()}
        self.updater._check_displacement(displacement)

        base = {**state_dict, "state": copied(base_state)}  # torch steps with the tensors that it is given
        with undone_on_error(self), held_hooks(self, "_optimizer_load_state_dict_pre_hooks"):
            super().load_state_dict(base)
            keep_dtypes(self, base, mechanic["dtypes"])
            self.mechanic._load(mechanic)  # first warns of other options, which may be an error
        self.updater._load_tuning(
            mechanic["scale"], mechanic["unit"], mechanic["rates"], mechanic["taken"], displacement
        )
        self._mirrored = 0
        self._mark_groups()

    def _saved_tuning(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What a state dict has of the tuner, by name; or ValueError, unless `load_state_dict` can take it."""
        groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
        if not groups:
            raise ValueError(
                f"The state dict has no param_groups; expected the state dict of a mechanized {self._base.__name__}."
            )
        mechanic = {name: groups[0].get(f"mechanic_{name}") for name in NAMES}
        if mechanic["version"] is not None:
            check_version(mechanic, "optimizer's", ())
        missing = [f"mechanic_{name}" for name, value in mechanic.items() if value is None]
        if missing:
            raise ValueError(
                f"The state dict's parameter groups lack {', '.join(missing)}; expected the state dict of a mechanized "
                f"{self._base.__name__}. To go on from a plain one, load it into a plain {self._base.__name__}, give "
                "that to Updater, and start tuning anew."
            )
        if mechanic["kind"] != self._base.__name__:
            raise ValueError(
                f"The state dict is of a mechanized {mechanic['kind']}; expected that of a mechanized "
                f"{self._base.__name__}. Build the optimizer as it was when saved."
            )
        check_entries(mechanic, "optimizer", {"unit": numbers.Real, "rates": list, "taken": numbers.Integral})
        check_rates(mechanic["rates"], groups, "optimizer")
        tuner = mechanic["tuner"] if isinstance(mechanic["tuner"], Tensor) else ()
        mechanic["tuner"] = dict(zip(TunerState._fields, tuner, strict=False))
        self.mechanic._check_state(mechanic)
        return mechanic

    def _hooked(self, hooks: dict[int, Callable[..., Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
        """What hooks make of a state dict; torch's own calls of them would not show them x_ref and Δ."""
        for hook in hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def _mark_groups(self) -> None:
        for group in self.param_groups:
            group.update(dict.fromkeys(GROUP_KEYS))

    def _mirror(self) -> None:
        """Show x_ref and Δ under ``self.state[p]``, where tools that save optimizers look for what to save.

        Only after the base's step: base optimizers take a state that is not empty for one that they have set up.
        """
        displacement = self.updater.displacement
        if not self._is_mirrored():
            self._unseen, self._mirrored = dict(displacement.slots), displacement.packings
        for parameter in [x for x in self._unseen if self.state.get(x) or x.grad is not None]:
            self.state[parameter].update(self._unseen.pop(parameter).tensors())

    def _is_mirrored(self) -> bool:
        return self._mirrored == self.updater.displacement.packings

    def __getstate__(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("updater", "mechanic", "_step_supports_amp_scaling")}
        return {**super().__getstate__(), **ours, "_mirrored": 0, "_unseen": {}}

    def __reduce__(self) -> tuple[Any, ...]:
        made = type(self).__dict__.get("_options") is not None
        remake = (_remake, (self._base, self._options)) if made else (object.__new__, (type(self),))
        return *remake, self.__getstate__()


class _Base:
    """The base optimizer inside a mechanized one, as its `Updater` sees it: same groups, the step without hooks.

    It does not keep that optimizer alive: in a cycle, all its memory would wait for the garbage collector.
    """

    def __init__(self, outer: _Mechanized) -> None:
        self._weak = ref(outer)
        self.kind = outer._base.__name__
        self._step_supports_amp_scaling = getattr(outer, "_step_supports_amp_scaling", False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weak": self._outer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _weak=ref(state["_weak"]))

    @property
    def _outer(self) -> Any:
        outer = self._weak()
        if outer is None:
            raise RuntimeError(
                f"The mechanized {self.kind} that this updater is a part of is gone. Keep it, and not only its "
                "updater or mechanic; to copy or pickle it, take all of it."
            )
        return outer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._outer.param_groups

    @property
    def state(self) -> Any:
        return self._outer.state

    @property
    def covered_class(self) -> type | None:
        """The class whose step may be taken without calling it: not while x_ref and Δ wait for being mirrored."""
        return self._outer._base if self._outer._is_mirrored() else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._outer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        outer = self._outer
        step: Any = outer._base.step
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        outer.found_inf = getattr(self, "found_inf", None)
        takes_closure = closure is not None and len(inspect.signature(step).parameters) > 1
        result = step(outer, closure) if takes_closure else step(outer)
        outer._mirror()
        return result


def _remake(base: type[Optimizer], options: dict[str, dict[str, Any]]) -> _Mechanized:
    cls = mechanize(base, **options["updater"], **options["mechanic"])
    return cls.__new__(cls)


def _first_known(closure: Callable[[], Any], loss: Any) -> Callable[[], Any]:
    """``closure``, but for its first call, which was made already: its result is given, its gradients are there."""
    known = [loss]
    return lambda: known.pop() if known else closure()


def _evaluates_again(base: type[Optimizer]) -> bool:
    """Whether a base's step may call its closure more than once, or not before all else; of torch's only LBFGS does."""
    return base is torch.optim.LBFGS or not base.__module__.startswith("torch.optim.")


def _divide(state: dict[Any, dict[str, Any]]) -> tuple[dict[Any, dict[str, Any]], dict[Any, dict[str, Any]]]:
    """The part of a packed state that is ours, and the base optimizer's; what is empty is left out."""
    ours, base = {}, {}
    for key, entries in state.items():
        if not isinstance(entries, dict):
            base[key] = entries
            continue
        if mine := {name: entries[name] for name in STATE_KEYS if isinstance(entries.get(name), torch.Tensor)}:
            ours[key] = mine
        if rest := {name: value for name, value in entries.items() if name not in STATE_KEYS}:
            base[key] = rest
    return ours, base
