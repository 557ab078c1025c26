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


def sums(x: Tensor, g: Tensor | None, reference: Tensor, delta: Tensor | None) -> Tensor:
    """<Δ, g>, <Δ, x>, <g, g> and <x, x>, in float64 (float32 where the device has no more).

    Args:
        x: parameters, 1-d.
        g: their gradient, or ``None`` for zero.
        reference: x_ref.
        delta: Δ, at least float32; ``None`` stands for x - x_ref.

    Returns:
        The four sums, shape (4,).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = []
    for x, g, reference, delta in _blocks(x, g, reference, delta):
        x = x.to(wide)
        delta = x - reference if delta is None else delta
        if g is None:
            dg = gg = x.new_zeros(())
        else:
            g = g.to(wide)
            dg, gg = torch.dot(delta, g), torch.dot(g, g)
        parts += [dg, torch.dot(delta, x), gg, torch.dot(x, x)]
    total = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.stack(parts).view(-1, 4).sum(0, dtype=total)


def move(
    x: Tensor, reference: Tensor, delta: Tensor | None, before: Tensor | None, old: Tensor, new: Tensor, eps: float
) -> None:
    """Δ ← Δ + u, x ← x_ref + new · Δ, where u is what a base step did to x; in place.

    Args:
        x: parameters after the base step, 1-d.
        reference: x_ref.
        delta: Δ, with which x was x_ref + old · Δ before the step; ``None`` if ``before`` is given.
        before: x before the step, from which Δ = (x - x_ref)/(old + eps) is recomputed.
        old: the scale before, 0-d.
        new: the scale from now on, 0-d.
        eps: ε.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scratch: Tensor | None = None
    for x, reference, delta, before in _blocks(x, reference, delta, before):
        scratch = torch.empty_like(x, dtype=wide) if scratch is None else scratch
        work = scratch[: x.numel()]
        if delta is None:
            assert before is not None
            delta = (before.to(wide) - reference).div_(old + eps)
            work.copy_(before)
        else:
            point(reference, delta, old, out=work)
            if x.dtype != wide:
                work.copy_(work.to(x.dtype))
        delta += torch.sub(x, work, out=work)
        if x.dtype == wide:
            point(reference, delta, new, out=x)
        else:
            x.copy_(point(reference, delta, new, out=work))


def point(reference: Tensor, delta: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x_ref + scale · Δ, equation (7), in Δ's dtype."""
    return torch.mul(delta, scale, out=out).add_(reference)


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same stretch of each 1-d tensor at a time; ``None`` stays ``None``."""
    first = next(tensor for tensor in tensors if tensor is not None)
    block = BLOCK if first.device.type == "cpu" else LAUNCH
    if first.numel() <= block:
        yield tensors
        return
    for start in range(0, first.numel(), block):
        yield tuple(None if tensor is None else tensor[start : start + block] for tensor in tensors)
