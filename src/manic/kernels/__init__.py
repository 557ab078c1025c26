"""Forms of the displacement's two passes over memory: same results, chosen by device.

`plain` is the readable form that the others are tested against; it and `compiled` are modules with ``sums`` and
``move`` over 1-d tensors. `triton` does both over all tensors of a device at once, and `fused` the base optimizer's
step with the move. The environment variable ``MANIC_KERNELS`` forces one: ``plain``, ``compiled``, ``triton`` (without
`fused`) or ``fused``.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from types import ModuleType

import torch

from manic.kernels import compiled, plain

COMPILE_FROM = 1 << 20  # elements: below, a run is over before compiling (some ten seconds) has paid
FORMS = ("plain", "compiled", "triton", "fused")


def choose(x: torch.Tensor, total: int) -> ModuleType:
    """The form for a tensor.

    Args:
        x: a parameter as a 1-d tensor.
        total: how many elements the model has on that device.
    """
    forced = _forced()
    wanted = forced == "compiled" or (forced != "plain" and total >= COMPILE_FROM)
    return compiled if wanted and compiled.can_take(x) else plain


def in_tables(x: torch.Tensor) -> bool:
    """Whether the form for a dense parameter is `triton`: on a CUDA device, or if forced under Triton's interpreter.

    torch brings Triton with its builds for CUDA; without it this is ``False``.
    """
    forced = _forced()
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and forced is not None
    if forced in ("plain", "compiled") or not (x.is_cuda or interpreted) or not _has_triton():
        return False
    from manic.kernels import triton

    return x.dtype in triton.TYPES and triton.works(x.device)


def one_pass() -> bool:
    """Whether the base optimizer's step and the move may be one pass where the parameters are in tables."""
    return _forced() in (None, "fused")


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _forced() -> str | None:
    forced = os.environ.get("MANIC_KERNELS")
    if forced not in (None, *FORMS):
        raise ValueError(f"MANIC_KERNELS is {forced!r}; expected {', '.join(FORMS)}, or not to be set.")
    return forced
