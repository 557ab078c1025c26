"""State dicts: their version, copies, and loading what torch would change or leave half-loaded."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from manic.kernels.plain import wide

STATE_VERSION = 15
KINDS = {numbers.Integral: "whole number", numbers.Real: "number", Tensor: "0-d tensor"}


def check_version(state_dict: dict[str, Any], kind: str, keys: tuple[str, ...]) -> None:
    """Raise ValueError, or TypeError, unless a state dict is one of ours."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"The state dict is {state_dict!r:.60}; expected what {kind}.state_dict() returns.")
    missing = [key for key in ("version", *keys) if key not in state_dict]
    if missing:
        for name, part in state_dict.items():
            if keys and isinstance(part, Mapping) and {"version", *keys} <= part.keys():
                raise ValueError(f"This looks like a whole checkpoint; expected one part of it: load state[{name!r}].")
        raise ValueError(
            f"The state dict lacks {', '.join(missing)} (it has {', '.join(map(str, state_dict))}); "
            f"expected what {kind}.state_dict() returns."
        )
    if state_dict["version"] != STATE_VERSION:
        raise ValueError(
            f"The {kind} state dict is of version {state_dict['version']}; this release reads version {STATE_VERSION}. "
            "Load it with the release of manic that saved it, or load the model alone and start tuning anew."
        )


def check_entries(state_dict: dict[str, Any], kind: str, types: dict[str, Any]) -> None:
    """Raise ValueError unless entries are of these types, and the tensors among them 0-d."""
    for name, expected in types.items():
        value = state_dict[name]
        if not isinstance(value, expected) or (isinstance(value, Tensor) and value.dim()):
            word = KINDS.get(expected, expected.__name__)
            raise ValueError(
                f"The {kind} state dict has {name}={value!r:.60}; expected a {word}. Load what {kind}.state_dict() "
                "returned, as it was saved."
            )


def check_rates(rates: list[float], groups: list[Any], kind: str) -> None:
    """Raise ValueError unless there is a nominal rate for each group."""
    if len(rates) != len(groups) or not all(isinstance(rate, numbers.Real) for rate in rates):
        raise ValueError(
            f"The {kind} state dict has nominal_rates={rates!r:.60}; expected one number for each of the "
            f"{len(groups)} parameter groups. Load what {kind}.state_dict() returned, as it was saved."
        )


@contextmanager
def undone_on_error(optimizer: Any) -> Iterator[None]:
    """Have an optimizer's state and groups back if loading fails: torch replaces them, and does not write to them."""
    before = dict(vars(optimizer))
    try:
        yield
    except BaseException:
        vars(optimizer).update(before)
        raise


def copied(value: Any) -> Any:
    """A deep copy, also of tensors that torch cannot clone, such as torchao's quantized state."""
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    try:
        return copy.deepcopy(value)
    except NotImplementedError:
        names, context = value.__tensor_flatten__()
        parts = {name: getattr(value, name).clone() for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())


def dtypes(optimizer: Optimizer) -> list[str]:
    """The names of the parameters' dtypes, such as ``"torch.float32"``."""
    return [str(parameter.dtype) for group in optimizer.param_groups for parameter in group["params"]]


def keep_dtypes(optimizer: Optimizer, saved: dict[str, Any], saved_dtypes: list[str]) -> None:
    """Give back the dtype of state that was not of its parameter's dtype when it was saved.

    torch casts all but ``step`` to the parameter's dtype on loading: float32 state under bfloat16 parameters would
    lose its digits, and NAdam's ``mu_product`` does not resume bit for bit.
    """
    saved_keys = [key for group in saved["param_groups"] for key in group["params"]]
    if len(saved_keys) != len(saved_dtypes):  # a part of the model, of which torch loads the state
        saved_dtypes = dtypes(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, parameter, dtype in zip(saved_keys, parameters, saved_dtypes, strict=True):
        loaded = optimizer.state.get(parameter) or {}
        for name, value in saved["state"].get(key, {}).items():
            if not isinstance(value, Tensor) or dtype != str(parameter.dtype) or name == "step" or name not in loaded:
                continue
            if value.dtype == wide(value.dtype) != parameter.dtype:
                loaded[name] = value.to(loaded[name].device, copy=True)


def load_schedule(schedule: Any, state: dict[str, Any]) -> None:
    """Load a scheduler's state dict.

    Raises:
        ValueError: it does not fit; nothing was changed.
    """
    before = copy.deepcopy(schedule.state_dict())
    try:
        schedule.load_state_dict(copy.deepcopy(state))
    except Exception as error:
        schedule.load_state_dict(before)
        raise ValueError(
            f"The state of the {type(schedule).__name__} does not fit ({type(error).__name__}: {error}). "
            "Build it as it was when saved."
        ) from error
