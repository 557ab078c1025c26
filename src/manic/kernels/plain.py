"""The two passes in eager torch, block by block, so that a block stays in cache while it is worked on.

The point x_ref + scale · Δ is a rounded product and a rounded sum, never a fused multiply-add. Every form then gives
the same bits on every device, and parameters can be recomputed instead of kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements; on a core with 1 MiB of cache of its own, 2**16 … 2**20 are within 10 % of each other
LAUNCH = 1 << 26  # elsewhere, where a launch costs more than a cache miss
TRANSFER = 1 << 22  # of what is kept in host memory: 16 MiB in float32, long beside the start of a copy


def sums(x: Tensor | None, g: Tensor | None, reference: Tensor, delta: Tensor | None) -> Tensor:
    """<Δ, g>, <Δ, x>, <g, g> and <x, x>, in float64 (float32 where the device has no more).

    Args:
        x: parameters, 1-d; ``None`` if Δ is given and only <Δ, g> is needed: the others are then 0.
        g: their gradient, or ``None`` for zero.
        reference: x_ref; it and Δ may be in host memory.
        delta: Δ, at least float32; ``None`` stands for x - x_ref.

    Returns:
        The four sums, shape (4,).
    """
    here = next(tensor for tensor in (x, g, reference) if tensor is not None)
    wide = torch.promote_types(reference.dtype, torch.float32)
    zero = torch.zeros((), dtype=wide, device=here.device)
    parts = []
    complete = x is not None
    for x, g, reference, delta in blocks(x, g, reference, delta):
        x = None if x is None else x.to(wide)
        if delta is None:
            assert x is not None
            delta = x - fetch(reference, here)
        else:
            delta = fetch(delta, here)
        g = None if g is None else g.to(wide)
        parts += [
            zero if a is None or b is None else torch.dot(a, b)
            for a, b in ((delta, g), (delta, x), (g if complete else None, g), (x, x))
        ]
    total = torch.float32 if here.device.type == "mps" else torch.float64
    return torch.stack(parts).view(-1, 4).sum(0, dtype=total)


def move(
    x: Tensor, reference: Tensor, delta: Tensor | None, before: Tensor | None, old: Tensor, new: Tensor, eps: float
) -> None:
    """Δ ← Δ + u, x ← x_ref + new · Δ, where u is what a base step did to x; in place.

    Args:
        x: parameters after the base step, 1-d.
        reference: x_ref; it, Δ and ``before`` may be in host memory.
        delta: Δ, with which x was x_ref + old · Δ before the step; ``None`` if ``before`` is given.
        before: x before the step, from which Δ = (x - x_ref)/(old + eps) is recomputed.
        old: the scale before, 0-d.
        new: the scale from now on, 0-d.
        eps: ε.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scratch: Tensor | None = None
    for x, reference, kept, before in blocks(x, reference, delta, before):
        scratch = torch.empty_like(x, dtype=wide) if scratch is None else scratch
        work, reference = scratch[: x.numel()], fetch(reference, x)
        if kept is None:
            assert before is not None
            before = fetch(before, x)
            delta = (before.to(wide) - reference).div_(old + eps)
            work.copy_(before)
        else:
            delta = fetch(kept, x)
            point(reference, delta, old, out=work)
            if x.dtype != wide:
                work.copy_(work.to(x.dtype))
        delta += torch.sub(x, work, out=work)
        if kept is not None and kept is not delta:
            kept.copy_(delta, non_blocking=True)
        if x.dtype == wide:
            point(reference, delta, new, out=x)
        else:
            x.copy_(point(reference, delta, new, out=work))


def point(reference: Tensor, delta: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x_ref + scale · Δ, equation (7), in Δ's dtype."""
    return torch.mul(delta, scale, out=out).add_(reference)


def fetch(kept: Tensor, x: Tensor) -> Tensor:
    """What is kept in host memory, on the parameters' device; itself if it is there already."""
    return kept.to(x.device, non_blocking=True)


def blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same stretch of each 1-d tensor at a time; ``None`` stays ``None``."""
    first = next(tensor for tensor in tensors if tensor is not None)
    if first.device.type == "cpu":
        block = BLOCK
    else:
        block = TRANSFER if any(tensor is not None and tensor.device.type == "cpu" for tensor in tensors) else LAUNCH
    if first.numel() <= block:
        yield tensors
        return
    for start in range(0, first.numel(), block):
        yield tuple(None if tensor is None else tensor[start : start + block] for tensor in tensors)
