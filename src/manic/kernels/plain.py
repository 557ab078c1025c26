"""The two passes in eager torch, block by block, so that a block stays in cache while it is worked on.

Tensors are 1-d, and come in lists with one entry for each part of the model.

The point x_ref + scale · Δ is a rounded product and a rounded sum, never a fused multiply-add. Every form then gives
the same bits on every device, and parameters can be recomputed instead of kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements; on a core with 1 MiB of cache of its own, 2**16 … 2**20 are within 10 % of each other
LAUNCH = 1 << 26  # elsewhere, where a launch costs more than a cache miss
TRANSFER = 1 << 22  # of what is kept in host memory: 16 MiB in float32, long beside the start of a copy


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of x_ref and Δ for a parameter of a dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def scale_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: the tuner's numbers are few, so precision costs nothing."""
    return torch.float32 if device.type == "mps" else torch.float64


def sums(
    xs: Sequence[Tensor] | None,
    gs: Sequence[Tensor | None],
    references: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
) -> Tensor:
    """<Δ, g>, <Δ, x>, <g, g> and <x, x>, in float64 (float32 where the device has no more).

    Args:
        xs: parameters; ``None`` if Δ is given and only <Δ, g> is needed: the others are then 0.
        gs: their gradients, with ``None`` for zero.
        references: x_ref; it and Δ may be in host memory.
        deltas: Δ, at least float32; ``None`` stands for x - x_ref.

    Returns:
        The four sums, shape (4,).
    """
    here = next((tensor for tensor in (*(xs or ()), *gs) if tensor is not None), references[0])
    dtype = references[0].dtype
    zero = torch.zeros((), dtype=dtype, device=here.device)
    products: list[Tensor] = []
    complete = xs is not None
    for x, g, reference, delta in blocks(xs, gs, references, deltas):
        x = None if x is None else x.to(dtype)
        if delta is None:
            assert x is not None
            delta = x - fetch(reference, here)
        else:
            delta = fetch(delta, here)
        g = None if g is None else g.to(dtype)
        pairs = ((delta, g), (delta, x), (g, g), (x, x)) if complete else ((delta, g),)
        products += [zero if a is None or b is None else torch.dot(a, b) for a, b in pairs]
    summed = torch.stack(products).view(-1, 4 if complete else 1).sum(0, dtype=scale_dtype(here.device))
    return summed if complete else torch.nn.functional.pad(summed, (0, 3))


def move(
    xs: Sequence[Tensor],
    references: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
    befores: Sequence[Tensor] | None,
    weights: Tensor,
    restart: bool | Tensor = False,
) -> None:
    """Δ ← Δ + u, x_ref ← x_ref + final · u, x ← x_ref + new · Δ, where u is what a base step did to x; in place.

    Args:
        xs: parameters after the base step.
        references: x_ref, at least float32; it, Δ and ``befores`` may be in host memory.
        deltas: Δ, with which x was x_ref + old · Δ before the step; ``None`` if ``befores`` is given, and x_ref ends
            at the rounded x less new · Δ.
        befores: x before the step, from which Δ = (x - x_ref)/old is recomputed.
        weights: old, new and final, shape (3,).
        restart: whether x_ref ← x, Δ ← 0 at the end; 0-d bool where only the device knows.
    """
    old, new, final = weights.unbind()
    dtype = references[0].dtype
    scratch = torch.empty(0, dtype=dtype, device=xs[0].device)
    for x, reference, kept, before in blocks(xs, references, deltas, befores):
        if scratch.numel() < x.numel():
            scratch = torch.empty_like(x, dtype=dtype)
        work, start = scratch[: x.numel()], fetch(reference, x)
        if kept is None:
            work.copy_(fetch(before, x))
            delta = torch.sub(work, start).div_(old)
        else:
            delta = fetch(kept, x)
            point(start, delta, old, out=work)
            if x.dtype != dtype:
                work.copy_(work.to(x.dtype))
        delta += torch.sub(x, work, out=work)
        start += work.mul_(final)
        end = point(start, delta, new, out=x if x.dtype == dtype else work)
        if end is not x:
            x.copy_(end)
            if kept is None:  # x_ref fits x as it is rounded, else the next Δ would be what was rounded away
                end = work.copy_(x)
                torch.sub(end, torch.mul(delta, new, out=start), out=start)
        if restart is True:
            start, delta = end, delta.zero_()
        elif restart is not False:
            start, delta = torch.where(restart, end, start), delta.masked_fill_(restart, 0)
        for tensor, result in ((reference, start), (kept, delta)):
            if tensor is not None and tensor is not result:
                tensor.copy_(result, non_blocking=True)


def point(reference: Tensor, delta: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x_ref + scale · Δ, equation (7), in Δ's dtype."""
    return torch.mul(delta, scale, out=out).add_(reference)


def keep_change(x: Tensor, reference: Tensor, delta: Tensor, scale: Tensor, rescaled: float) -> None:
    """`kept`, in place, block by block."""
    for of_x, of_reference, of_delta in blocks([x], [reference], [delta]):
        after = kept(of_x, of_reference, of_delta, scale, rescaled)
        of_reference.copy_(after[0])
        of_delta.copy_(after[1])


def kept(x: Tensor, reference: Tensor, delta: Tensor, scale: Tensor, rescaled: float) -> tuple[Tensor, Tensor]:
    """x_ref and Δ such that `point` is x, which others may have changed, element by element.

    What takes back a part of Δ, as clipping weights does, is taken out of it; x_ref shifts by the rest. What was not
    changed stays exact.

    Args:
        x, reference, delta: of any shape.
        scale: as `point` takes it.
        rescaled: the α in it; with 0, Δ stays.
    """
    expected = point(reference, delta, scale)
    same = x == expected.to(x.dtype)
    updates = torch.where(same, 0, x - expected) * torch.where(scale > 0, rescaled / scale, 0)
    delta = torch.fmax(torch.fmin(delta + updates, delta.clamp(min=0)), delta.clamp(max=0))  # finite beside a nan
    return torch.where(same, reference, x - delta * scale), delta


def counted(u: Tensor, g: Tensor | None, reached: Tensor | None) -> Tensor:
    """Which elements count in equation (8) of `manic.tuner`: those that have a gradient, and that a step has moved.

    Of a tensor that has no gradient yet all do: a last layer of zeros hides those before it for a step.

    Args:
        u: of a tensor, or of a block of one.
        g: the gradient beside it, of u's shape; ``None`` if the base optimizer has taken it away.
        reached: whether the tensor has a gradient that is not 0 anywhere, 0-d bool; ``None`` without g.
    """
    return u != 0 if g is None or reached is None else ((u != 0) & (g != 0)) | ~reached


def fetch(kept: Tensor, x: Tensor) -> Tensor:
    """A tensor that may be kept in host memory, on the device of x: itself, or a copy."""
    return kept.to(x.device, non_blocking=True)


def rows(*columns: Sequence[Tensor | None] | None) -> Iterator[tuple[Any, ...]]:
    """What the lists have of each part; ``None`` where there is no list."""
    return zip(*(itertools.repeat(None) if column is None else column for column in columns), strict=False)


def blocks(*columns: Sequence[Tensor | None] | None) -> Iterator[tuple[Any, ...]]:
    """Part after part and block after block: the same stretch of every list's tensor; ``None`` stays ``None``."""
    for row in rows(*columns):
        given = [tensor for tensor in row if tensor is not None]
        if given[0].device.type == "cpu":
            block = BLOCK
        else:
            block = TRANSFER if any(tensor.device.type == "cpu" for tensor in given) else LAUNCH
        if given[0].numel() <= block:
            yield row
            continue
        for start in range(0, given[0].numel(), block):
            yield tuple(None if tensor is None else tensor[start : start + block] for tensor in row)
