"""Forms of the displacement's two passes over memory: same results, chosen by device.

Each form is a module with ``sums`` and ``move`` over 1-d tensors; `plain` is the readable one that the others are
tested against. Setting the environment variable ``MANIC_KERNELS=plain`` forces it.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from manic.kernels import compiled, plain

COMPILE_FROM = 1 << 20  # elements: below, a run is over before compiling (some ten seconds) has paid


def choose(x: torch.Tensor, total: int) -> ModuleType:
    """The form for a tensor.

    Args:
        x: a parameter as a 1-d tensor.
        total: how many elements the model has on that device.
    """
    forced = os.environ.get("MANIC_KERNELS")
    if forced not in (None, "plain", "compiled"):
        raise ValueError(f"MANIC_KERNELS is {forced!r}; expected plain, compiled, or not to be set.")
    if forced == "plain" or not compiled.can_take(x):
        return plain
    return compiled if forced or total >= COMPILE_FROM else plain
