"""The two passes as one compiled loop each, where torch can compile: each element is read once per pass.

One kernel serves all sizes. The compiler keeps products and sums apart, so the bits of x are those of `plain`.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from manic.kernels import plain

F = TypeVar("F", bound=Callable[..., Any])
logger: logging.Logger = logging.getLogger("manic")
_works = True


def can_take(x: Tensor) -> bool:
    """Whether ``x`` is on the CPU, not of half precision, and there is a compiler."""
    return _works and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and _has_compiler()


def sums(x: Tensor | None, g: Tensor | None, reference: Tensor, delta: Tensor | None) -> Tensor:
    """As `plain.sums`."""
    return _run(_sums, plain.sums, x, g, reference, delta)


def move(
    x: Tensor, reference: Tensor, delta: Tensor | None, before: Tensor | None, old: Tensor, new: Tensor, eps: float
) -> None:
    """As `plain.move`."""
    _run(_move, plain.move, x, reference, delta, before, old, new, eps)


def _sums(x: Tensor | None, g: Tensor | None, reference: Tensor, delta: Tensor | None) -> Tensor:
    x = None if x is None else x.double()  # the loop waits for memory, so sums in float64 cost nothing
    if delta is None:
        assert x is not None
        delta = x - reference
    delta = delta.double()
    g = torch.zeros_like(delta) if g is None else g.double()
    zero = delta.new_zeros(())
    others = (zero, zero, zero) if x is None else ((delta * x).sum(), (g * g).sum(), (x * x).sum())
    return torch.stack([(delta * g).sum(), *others])


def _move(
    x: Tensor, reference: Tensor, delta: Tensor | None, before: Tensor | None, old: Tensor, new: Tensor, eps: float
) -> None:
    old, new = old.to(x.dtype), new.to(x.dtype)
    if delta is None:
        assert before is not None
        delta = (before - reference) / (old + eps) + (x - before)
    else:
        delta.add_(x - (delta * old + reference))
    x.copy_(delta * new + reference)


@functools.cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def outside_graphs(method: F) -> F:
    """Keep a method out of graphs that ``torch.compile`` makes of its callers, as torch does its optimizers' methods.

    It works on addresses and version counters, which a graph cannot hold; kernels of its own do the work.
    """
    return cast(F, _disable_dynamo(method))


@functools.cache
def one_launch(function: F) -> F:
    """A pure function compiled, for accelerators, where each of many small operations would be a launch."""
    compiled: Callable[..., Any] | None = torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(*arguments)
            except Exception as error:
                compiled = None
                logger.info("torch.compile does not work here (%s); going on without it.", error)
        return function(*arguments)

    return cast(F, run)


def _run(function: Callable[..., Any], otherwise: Callable[..., Any], *arguments: Any) -> Any:
    global _works  # noqa: PLW0603
    if _works:
        try:
            return _compile(function)(*arguments)
        except Exception as error:  # compilers fail in many ways, all of them before the first element is touched
            _works = False
            logger.info("torch.compile does not work here (%s); going on without it.", error)
    return otherwise(*arguments)
