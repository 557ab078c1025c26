"""The two passes over all tensors of a device in one launch each: kernels in Triton that find the tensors in a table.

A table holds, for every tensor and every role (x, g, x_ref, Δ, …), an address, and a list of chunks: which tensor, and
where in it. One program works on one chunk. Sums are deterministic: float32 over a few elements, then float64, each
chunk's in a place of its own. Addresses go to the device again only when a tensor has moved, and nothing waits for it.

The point x_ref + scale · Δ keeps its product and its sum apart, as everywhere (``enable_fp_fusion=False``), so the bits
of x are those of `plain`. With ``TRITON_INTERPRET=1`` everything here runs on the CPU, for tests.
"""
# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manic.kernels.plain import wide

logger: logging.Logger = logging.getLogger("manic")

CHUNK = 1 << 14  # elements of a program
BLOCK = 1 << 11  # of which it takes so many at a time: eight a thread
LAUNCH: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
ALIGNMENT = 16  # bytes that a thread can load at once


@triton.jit
def _chunk(chunks, sizes, CHUNK: tl.constexpr):
    """The tensor of this program, where the chunk starts in it, and how many elements it has."""
    place = tl.program_id(0).to(tl.int64)
    i = tl.load(chunks + 2 * place)
    start = tl.multiple_of(tl.load(chunks + 2 * place + 1), 16)
    return i, start, tl.minimum(tl.load(sizes + i) - start, CHUNK).to(tl.int32)


@triton.jit
def _address(column, i, start, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Where tensor i's elements from ``start`` on lie."""
    address = tl.load(column + i).to(tl.pointer_type(T))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + start


@triton.jit
def _load(address, at, count, WIDE: tl.constexpr, TAIL: tl.constexpr):
    if TAIL:  # only the end of a tensor is masked, since masked loads are of single elements
        return tl.load(address + at, mask=at < count, other=0.0).to(WIDE)
    return tl.load(address + at).to(WIDE)


@triton.jit
def _store(address, at, count, values, TAIL: tl.constexpr):
    if TAIL:
        tl.store(address + at, values.to(address.dtype.element_ty), mask=at < count)
    else:
        tl.store(address + at, values.to(address.dtype.element_ty))


@triton.jit
def _some(at, count, TAIL: tl.constexpr):
    """The mask of a tensor that may be left out: ``count`` is 0 then."""
    if TAIL:
        return at < count
    return tl.zeros(at.shape, tl.int32) < count  # the same for all, so that loads stay whole


@triton.jit
def _load_some(address, at, count, other, WIDE: tl.constexpr, TAIL: tl.constexpr):
    return tl.load(address + at, mask=_some(at, count, TAIL), other=other).to(WIDE)


@triton.jit
def _store_some(address, at, count, values, TAIL: tl.constexpr):
    tl.store(address + at, values.to(address.dtype.element_ty), mask=_some(at, count, TAIL))


@triton.jit
def _put_sum(partial, row, values):
    tl.store(partial + row * tl.num_programs(0) + tl.program_id(0), tl.sum(values.to(tl.float64)))


@triton.jit
def _sums_of_block(
    at, count, gradients, x, g, reference, delta, dg, dx, gg, xx,
    WIDE: tl.constexpr, STORED: tl.constexpr, CARRIED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    here = _load_some(g, at, gradients, 0.0, WIDE, TAIL)
    if not CARRIED:
        point = _load(x, at, count, WIDE, TAIL)
    if STORED:
        moved = _load(delta, at, count, WIDE, TAIL)
    else:
        moved = point - _load(reference, at, count, WIDE, TAIL)
    dg += moved * here
    gg += here * here
    if not CARRIED:
        dx += moved * point
        xx += point * point
    return dg, dx, gg, xx


@triton.jit
def _sums(
    partial, chunks, sizes, x, g, reference, delta,
    X: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr,
    STORED: tl.constexpr, CARRIED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """<Δ, g>, <Δ, x>, <g, g>, <x, x> of every chunk; the second and the fourth are there already if CARRIED."""
    i, start, count = _chunk(chunks, sizes, CHUNK)
    gradients = tl.where(tl.load(g + i) != 0, count, 0)
    x = _address(x, i, start, X, ALIGNED)
    g = _address(g, i, start, G, ALIGNED)
    reference = _address(reference, i, start, WIDE, ALIGNED)
    delta = _address(delta, i, start, WIDE, ALIGNED)
    dg = tl.zeros((BLOCK,), WIDE)
    dx, gg, xx = dg, dg, dg
    full = count // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for block in range(0, full, BLOCK):
        dg, dx, gg, xx = _sums_of_block(
            block + lane, count, gradients, x, g, reference, delta, dg, dx, gg, xx, WIDE, STORED, CARRIED, False
        )
    if full < count:
        dg, dx, gg, xx = _sums_of_block(
            full + lane, count, gradients, x, g, reference, delta, dg, dx, gg, xx, WIDE, STORED, CARRIED, True
        )
    _put_sum(partial, 0, dg)
    _put_sum(partial, 2, gg)
    if not CARRIED:
        _put_sum(partial, 1, dx)
        _put_sum(partial, 3, xx)


@triton.jit
def _weights(weights, WIDE: tl.constexpr):
    """old, new and final of `plain.move`."""
    return tl.load(weights).to(WIDE), tl.load(weights + 1).to(WIDE), tl.load(weights + 2).to(WIDE)


@triton.jit
def _divide(a, b):
    """a / b, rounded to nearest."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def _finish_block(
    at, count, x, was, reference, delta, start, moved, new, finite, restart, dx, xx,
    STORED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """x ← x_ref + new · Δ, x_ref and Δ stored, and what the next sums need of x and Δ."""
    end = moved * new + start
    point = end.to(x.dtype.element_ty).to(moved.dtype)
    if not STORED:
        point = tl.where(finite, point, was)
        if x.dtype.element_ty != reference.dtype.element_ty:  # x_ref fits x as it is rounded
            end = point
            start = point - moved * new
    _store(reference, at, count, tl.where(restart, end, start), TAIL)
    if STORED:
        moved = tl.where(restart, 0.0, moved)
        _store(delta, at, count, moved, TAIL)
        dx += moved * point
        xx += point * point
    _store(x, at, count, point, TAIL)
    return dx, xx


@triton.jit
def _move_block(
    at, count, x, before, reference, delta, old, new, final, finite, restart, dx, xx,
    WIDE: tl.constexpr, STORED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    after = _load(x, at, count, WIDE, TAIL)
    start = _load(reference, at, count, WIDE, TAIL)
    if STORED:
        moved = _load(delta, at, count, WIDE, TAIL)
        was = (moved * old + start).to(x.dtype.element_ty).to(WIDE)
    else:
        was = _load(before, at, count, WIDE, TAIL)
        moved = _divide(was - start, old)
    u = after - was
    return _finish_block(
        at, count, x, was, reference, delta, start + u * final, moved + u, new, finite, restart, dx, xx, STORED, TAIL
    )


@triton.jit
def _move(
    partial, chunks, sizes, x, before, places, reference, delta, weights, finite, restart,
    X: tl.constexpr, WIDE: tl.constexpr,
    STORED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `plain.move`, on every chunk; the second and fourth sum of the coming step on the way, if Δ is stored."""
    i, start, count = _chunk(chunks, sizes, CHUNK)
    x = _address(x, i, start, X, ALIGNED)
    before += tl.multiple_of(tl.load(places + i), 16) + start
    reference = _address(reference, i, start, WIDE, ALIGNED)
    delta = _address(delta, i, start, WIDE, ALIGNED)
    old, new, final = _weights(weights, WIDE)
    finite = tl.load(finite) != 0
    restart = tl.load(restart) != 0
    dx = tl.zeros((BLOCK,), WIDE)
    xx = dx
    full = count // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for block in range(0, full, BLOCK):
        dx, xx = _move_block(
            block + lane, count, x, before, reference, delta, old, new, final, finite, restart, dx, xx,
            WIDE, STORED, False,
        )  # fmt: skip
    if full < count:
        dx, xx = _move_block(
            full + lane, count, x, before, reference, delta, old, new, final, finite, restart, dx, xx,
            WIDE, STORED, True,
        )  # fmt: skip
    if STORED:
        _put_sum(partial, 1, dx)
        _put_sum(partial, 3, xx)


@triton.jit
def _copy(
    partial, chunks, sizes, x, out, places,
    X: tl.constexpr, WIDE: tl.constexpr,
    STORED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tensors into one, each at its place."""
    i, start, count = _chunk(chunks, sizes, CHUNK)
    x = _address(x, i, start, X, ALIGNED)
    out += tl.multiple_of(tl.load(places + i), 16) + start
    full = count // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for block in range(0, full, BLOCK):
        _store(out, block + lane, count, _load(x, block + lane, count, X, False), False)
    if full < count:
        _store(out, full + lane, count, _load(x, full + lane, count, X, True), True)


class Column:
    """The addresses of one tensor per parameter, on the device.

    Attributes:
        addresses: the tensor of int64 that kernels read; 0 where there is no tensor.
        aligned: whether all of them are multiples of what a thread can load at once.
    """

    addresses: Tensor
    aligned: bool

    def __init__(self, device: torch.device, tensors: list[Tensor | None]) -> None:
        self._device = device
        self._known: list[int] = []
        self._captured: list[Tensor] = []
        self.point_to(tensors)

    def point_to(self, tensors: list[Tensor | None]) -> bool:
        """Take up where tensors are.

        Returns:
            Whether any has moved.
        """
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        moved = addresses != self._known
        if moved:
            self._known = addresses
            self._host, self.addresses = upload(addresses, torch.int64, self._device)
            self.aligned = not any(address % ALIGNMENT for address in addresses)
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured += [self._host, self.addresses]  # a graph reads them at every replay
        return moved


class Table:
    """Tensors that the passes treat in one launch: dense, of one device and one dtype.

    Args:
        x: parameters as 1-d tensors; any number, of any sizes.
        reference: x_ref of each.
        delta: Δ of each, or ``None`` for all.
    """

    def __init__(self, x: list[Tensor], reference: list[Tensor], delta: list[Tensor] | None) -> None:
        device = x[0].device
        self.count: int = len(x)
        self.stored: bool = delta is not None
        self.dtype: torch.dtype = x[0].dtype
        self.wide: torch.dtype = wide(self.dtype)
        self.x: Column = Column(device, [*x])
        self.reference: Column = Column(device, [*reference])
        self.delta: Column = Column(device, [*(reference if delta is None else delta)])
        sizes = [tensor.numel() for tensor in x]
        chunks = [number for i, size in enumerate(sizes) for start in range(0, size, CHUNK) for number in (i, start)]
        self.grid: tuple[int] = (len(chunks) // 2,)
        padded = [0]
        for size in sizes:
            padded.append(padded[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        self._room = padded[-1]
        self._stretches = [slice(place, place + size) for place, size in zip(padded, sizes, strict=False)]
        self.sizes: Tensor = upload(sizes, torch.int64, device)[1]
        self.chunks: Tensor = upload(chunks, torch.int64, device)[1]
        self.places: Tensor = upload(padded[:-1], torch.int64, device)[1]
        self.gradient: Column = Column(device, [None] * len(x))
        self._gradient_dtype = self.dtype
        self._converted: list[Tensor | None] = []
        # 16 bytes apart, or Triton compiles every kernel once more for a flag whose address is odd.
        self._flags = torch.arange(2, device=device).to(torch.bool).repeat_interleave(ALIGNMENT)
        self.partial: Tensor = torch.zeros(4, *self.grid, dtype=torch.float64, device=device)
        self.carried: bool = False  # whether the partial sums <Δ, x> and <x, x> are those of the present x

    def take_gradients(self, gradients: list[Tensor | None]) -> tl.dtype:
        """Note where the gradients are, and return their dtype.

        Args:
            gradients: 1-d in the order of the parameters' memory, or of the parameters' shape and strides. They have to
                stay where they are until the next launch is on its way.
        """
        if self.gradient.point_to(gradients):
            dtypes = {gradient.dtype for gradient in gradients if gradient is not None}
            self._gradient_dtype = dtypes.pop() if len(dtypes) == 1 else self.wide
            self._converted = []
            if dtypes:
                self._converted = [None if gradient is None else gradient.to(self.wide) for gradient in gradients]
                self.gradient.point_to(self._converted)
        return TYPES[self._gradient_dtype]

    def sums(self, gradients: list[Tensor | None]) -> Tensor:
        """The four sums of `plain.sums` over all tensors, shape (4,), float64, from one launch and a reduction."""
        dtype = self.take_gradients(gradients)
        columns = (self.x, self.gradient, self.reference, self.delta)
        self.launch(_sums, *columns, X=TYPES[self.dtype], G=dtype, CARRIED=self.carried and self.stored)
        return self.partial.sum(1)

    def copy(self) -> Tensor:
        """A copy of all parameters, as `move` takes it."""
        out = torch.empty(self._room, dtype=self.dtype, device=self.sizes.device)
        self.launch(_copy, self.x, out, self.places, X=TYPES[self.dtype])
        return out

    def parts(self, copy: Tensor) -> list[Tensor]:
        """The tensors in a `copy`, 1-d."""
        return [copy[stretch] for stretch in self._stretches]

    def flag(self, value: bool | Tensor) -> Tensor:
        """A bool as kernels read it; one that is on the device already stays there."""
        return (value if isinstance(value, Tensor) else self._flags[ALIGNMENT * int(value)]).view(torch.uint8)

    def move(
        self, before: Tensor | None, weights: Tensor, finite: bool | Tensor = True, restart: bool | Tensor = False
    ) -> None:
        """As `plain.move`, for all tensors in one launch.

        Args:
            before: from `copy`, before the base step; ``None`` if Δ is stored.
            weights: as there.
            finite: where it is ``False`` x stays, or goes back to ``before``.
            restart: as there.
        """
        room = self.partial if before is None else before
        columns = (self.x, room, self.places, self.reference, self.delta)
        self.launch(_move, *columns, weights, self.flag(finite), self.flag(restart), X=TYPES[self.dtype])
        self.carried = self.stored

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Run a kernel with one program per chunk."""
        if not self.grid[0]:
            return
        aligned = all(column.aligned for column in arguments if isinstance(column, Column))
        columns = [column.addresses if isinstance(column, Column) else column for column in arguments]
        constants |= {"WIDE": TYPES[self.wide], "STORED": self.stored, "ALIGNED": aligned}
        with _on(self.sizes):
            kernel[self.grid](
                self.partial, self.chunks, self.sizes, *columns, **constants, CHUNK=CHUNK, BLOCK=BLOCK, **LAUNCH
            )


def upload(values: list[Any], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers as a tensor in memory from which a copy need not be waited for, and that copy."""
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return host, host.to(device, non_blocking=True)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether Triton can compile for a device; where it cannot (no C compiler, an old release), a message says why."""
    try:
        x, g, delta = ([torch.zeros(1, device=device)] for _ in range(3))
        table = Table(x, x, delta)
        table.copy()
        table.sums([*g])
    except Exception as error:  # compilers fail in many ways
        logger.info("Triton does not work here (%s); going on without it.", error)
        return False
    return True


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
