"""A loss scaler for float16 autocast, with the rules of ``torch.amp.GradScaler``, as pure functions.

>>> import torch
>>> from manic.functional import loss_scaler
>>> config = loss_scaler.LossScalerConfig(init_scale=4.0)
>>> state = loss_scaler.init(config)
>>> x = torch.tensor([3.0])
>>> scaled = torch.func.grad(lambda x: loss_scaler.scale(x.square().sum(), state))(x)
>>> loss_scaler.unscale(scaled, state)
(tensor([6.]), tensor(False))
>>> loss_scaler.update(state, torch.tensor(True), config).scale  # a gradient overflowed: back off
tensor(2.)
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from manic.functional.tree import Tree
from manic.kernels.plain import scale_dtype


@dataclass(frozen=True, kw_only=True)
class LossScalerConfig:
    """How the scale adapts; the names and defaults are those of ``torch.amp.GradScaler``.

    Args:
        init_scale: the first scale, > 0, in the range of float32.
        growth_factor: multiplies the scale after ``growth_interval`` steps in a row without an overflow, > 1.
        backoff_factor: multiplies the scale after an overflow, in (0, 1).
        growth_interval: a number of steps, ≥ 1.

    Raises:
        ValueError: an argument is outside its range.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        for name, low, high in (
            ("init_scale", 0, torch.finfo(torch.float32).max),
            ("growth_factor", 1, math.inf),
            ("backoff_factor", 0, 1),
            ("growth_interval", 0, math.inf),
        ):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not low < float(value) < high:
                raise ValueError(f"{name} is {value!r}; expected a number between {low} and {high}.")
        if not isinstance(self.growth_interval, numbers.Integral):
            raise ValueError(f"growth_interval is {self.growth_interval!r}; expected a whole number of steps.")


class LossScalerState(NamedTuple):
    """What the loss scaler remembers, both 0-d."""

    scale: Tensor  # float32
    growth_tracker: Tensor  # int32, steps without an overflow since the scale last changed


def init(config: LossScalerConfig, device: torch.device | str = "cpu") -> LossScalerState:
    """The state before the first step."""
    return LossScalerState(
        torch.full((), config.init_scale, dtype=torch.float32, device=device),
        torch.zeros((), dtype=torch.int32, device=device),
    )


def scale(loss: Tensor, state: LossScalerState) -> Tensor:
    """The loss to differentiate: loss × scale."""
    return loss * state.scale.to(loss.device)


def unscale(grads: Tree, state: LossScalerState) -> tuple[Tree, Tensor]:
    """The gradients of the loss, from those of the scaled loss.

    Args:
        grads: a tree of tensors of any shapes, in float32 or wider, or bfloat16.
        state: as it was when the loss was scaled.

    Returns:
        The gradients / scale, and found_inf: whether any element is not finite, 0-d bool. A step is then to be
        left out: a mechanized stepper does that by itself, of others choose the outcome with `tree_where`.

    Raises:
        TypeError: a gradient is not a tensor, or there is none.
        ValueError: a gradient is float16, in which the small numbers that the scale saved would be lost again.
    """
    leaves = tree_leaves(grads)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"grads is {grads!r:.60}; expected a tree of tensors. Pass zeros for unused parameters.")
    if any(leaf.dtype == torch.float16 for leaf in leaves):
        raise ValueError(
            "A gradient is float16; expected float32. Keep the parameters in float32 and run the model under "
            "torch.autocast, or convert the gradients first."
        )
    inverse = state.scale.reciprocal()
    found_inf = torch.stack([leaf.isfinite().all() for leaf in leaves]).all().logical_not()
    return tree_map(lambda leaf: (leaf * inverse.to(leaf.device)).to(leaf.dtype), grads), found_inf


def update(state: LossScalerState, found_inf: Tensor, config: LossScalerConfig) -> LossScalerState:
    """The state for the next step: back off after an overflow, grow after a long time without one.

    Args:
        state: before.
        found_inf: of this step, 0-d bool.
        config: gives the factors and the interval.

    Raises:
        TypeError: ``found_inf`` is not a tensor.
    """
    if not isinstance(found_inf, Tensor):
        raise TypeError(f"found_inf is {found_inf!r}; expected the 0-d tensor that unscale returned.")
    successes = state.growth_tracker + 1
    due = successes == config.growth_interval
    wide = state.scale.to(scale_dtype(state.scale.device))  # torch multiplies in double, too
    grown = (wide * config.growth_factor).float()
    grown = torch.where(due & grown.isfinite(), grown, state.scale)
    return LossScalerState(
        torch.where(found_inf, (wide * config.backoff_factor).float(), grown),
        torch.where(found_inf | due, 0, successes),
    )
