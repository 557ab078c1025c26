"""The two passes as compiled loops, where torch can compile: each element is read once per pass.

One kernel serves all sizes, and moves several tensors in a call, which costs as much as moving thousands of elements.
The compiler keeps products and sums apart, so the bits of x are those of `plain`.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from manic.kernels import plain

logger: logging.Logger = logging.getLogger("manic")
FEW = 8  # parts that are moved in one call
LEAST = 2  # elements of a part that a compiled loop takes; 0 and 1 would be compiled in
_failed: set[Callable[..., Any]] = set()  # functions that the compiler cannot compile
# Keeps a method out of graphs that torch.compile makes of its callers, as torch does its optimizers' methods: it works
# on addresses and version counters, which a graph cannot hold, and kernels of its own do the work.
outside_graphs = _disable_dynamo


def can_take(x: Tensor) -> bool:
    """Whether ``x`` is on the CPU, not of half precision, and there is a compiler."""
    works = _failed.isdisjoint((_sums, _move)) and _has_compiler()
    return works and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def sums(
    xs: Sequence[Tensor] | None,
    gs: Sequence[Tensor | None],
    references: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
) -> Tensor:
    """As `plain.sums`."""
    if xs is None:
        return plain.sums(xs, gs, references, deltas)  # one product, for which BLAS is as fast as memory
    total = torch.zeros(4, dtype=torch.float64, device="cpu")
    for x, g, *kept in plain.rows(xs, gs, references, deltas):
        if x.numel() < LEAST or g is None:
            total += _plain_sums(x, g, *kept)
        else:
            total += _run(_sums, _plain_sums, x, alias(g), *kept)
    return total


def move(
    xs: Sequence[Tensor],
    references: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
    befores: Sequence[Tensor] | None,
    weights: Tensor,
    restart: bool | Tensor = False,
) -> None:
    """As `plain.move`, of up to `FEW` parts."""
    restart = torch.as_tensor(restart, device="cpu")
    small, large = [], []
    for row in plain.rows(xs, references, deltas, befores):
        (small if row[0].numel() < LEAST else large).append(row)
    _plain_move(small, weights, restart)
    if large:
        spare = _spare(xs[0].dtype, deltas is not None)
        _run(_move, _plain_move, [*large, *spare[len(large) :]], weights, restart)


def one_launch(function: Callable[..., Any], *arguments: Any) -> Any:
    """A pure function compiled, for accelerators, where each of many small operations would be a launch."""
    return _run(function, function, *arguments, dynamic=False)


def alias(x: Tensor) -> Tensor:
    """The same memory, not as a view: compiled code is bound to the shape of what its arguments are views of."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class _NotCompiledError(Exception):
    """Raised where torch runs a function as it is that it was to compile."""


def _refuse_to_run_as_it_is() -> None:
    """Operations on their own would need temporaries as large as the model, and torch fails after them."""
    if not torch.compiler.is_compiling():
        raise _NotCompiledError


def _sums(x: Tensor, g: Tensor, reference: Tensor, delta: Tensor | None) -> Tensor:
    _refuse_to_run_as_it_is()
    delta = (x - reference if delta is None else delta).double()  # the loop waits for memory, so float64 costs nothing
    x, g = x.double(), g.double()
    return torch.stack([(delta * g).sum(), (delta * x).sum(), (g * g).sum(), (x * x).sum()])


def _plain_sums(*row: Any) -> Tensor:
    return plain.sums(*([tensor] for tensor in row))


def _move(rows: Any, weights: Tensor, restart: Tensor) -> None:
    _refuse_to_run_as_it_is()
    old, new, final = weights.to(rows[0][0].dtype).unbind()
    for x, reference, delta, before in rows:
        if delta is None:
            u = x - before
            moved = (before - reference) / old + u
        else:
            u = x - (delta * old + reference)
            moved = delta + u
            delta.copy_(torch.where(restart, 0, moved))
        start = u * final + reference
        point = moved * new + start
        reference.copy_(torch.where(restart, point, start))
        x.copy_(point)


def _plain_move(rows: Any, weights: Tensor, restart: Tensor) -> None:
    for x, reference, delta, before in rows:
        plain.move([x], [reference], [delta], [before], weights, restart)


@functools.cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


@functools.cache
def _spare(dtype: torch.dtype, stored: bool) -> list[Any]:
    """Parts that fill up a call of `_move`, once that is compiled for large parts of any sizes."""

    def rows(sizes: Iterable[int]) -> list[Any]:
        made = [[torch.zeros(size, dtype=dtype, device="cpu") for _ in range(3)] for size in sizes]
        return [(x, reference, other, None) if stored else (x, reference, None, other) for x, reference, other in made]

    weights, restart = torch.ones(3, dtype=torch.float64, device="cpu"), torch.tensor(False, device="cpu")
    sizes = range(1 << 16, (1 << 16) + FEW)  # equal ones would be compiled in
    _run(_move, _plain_move, rows(sizes), weights, restart)
    return rows([LEAST] * FEW)


@functools.cache
def _compile(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    return torch.compile(function, dynamic=dynamic, fullgraph=True)


def _run(function: Callable[..., Any], otherwise: Callable[..., Any], *arguments: Any, dynamic: bool = True) -> Any:
    if function not in _failed:
        try:
            return _compile(function, dynamic)(*arguments)
        except _NotCompiledError:
            pass  # torch.compile is switched off, or somebody watches operations, as a FlopCounterMode does
        except Exception as error:  # compilers fail in many ways, all of them before the first element is touched
            _failed.add(function)
            logger.info("torch.compile does not work here (%s); going on without it.", error)
    return otherwise(*arguments)
