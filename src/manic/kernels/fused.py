"""The base optimizer's step and the move in one pass, where the base is exactly torch's Adam, AdamW or SGD.

The update u is added to Δ where it is computed: it is neither rounded to x's digits nor written down, and x is not
read. The base keeps its state, in its own layout, and what it sets up it sets up itself: a step with parameters that
have none yet is left to it.

Sources: Kingma, Ba, arXiv:1412.6980, Algorithm 1; Loshchilov, Hutter, arXiv:1711.05101, Algorithm 2; and for SGD's
momentum the documentation of ``torch.optim.SGD``.
"""
# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from manic.distributed import local
from manic.kernels.triton import (
    TYPES,
    Column,
    Table,
    _address,
    _chunk,
    _divide,
    _finish_block,
    _load,
    _load_some,
    _on,
    _put_sum,
    _store_some,
    _weights,
    upload,
)

ADAM_ROW = ("lr", "betas", "eps", "weight_decay")
SGD_ROW = ("lr", "momentum", "dampening", "weight_decay")
WIDTH = tl.constexpr(5)  # numbers in a row of settings


class Rule(NamedTuple):
    """What is the same for all groups, and so compiled in."""

    adam: bool
    counts_on_device: bool  # where Adam counts its steps
    decoupled: bool  # AdamW's weight decay
    momentum: bool
    nesterov: bool

    @property
    def state(self) -> tuple[str, ...]:
        """The names of the state tensors that are as large as the parameter."""
        return ("exp_avg", "exp_avg_sq") if self.adam else ("momentum_buffer",) * self.momentum


def rule_of(optimizer: Any) -> Rule | None:
    """The rule of an optimizer whose step is covered here; ``None`` if it, or one of its options, is not."""
    kind = getattr(optimizer, "covered_class", type(optimizer))
    if kind not in (Adam, AdamW, SGD) or _is_replaced(optimizer):
        return None
    rules = set()
    for group in optimizer.param_groups:
        if group.get("amsgrad"):  # `Updater` refuses maximize and differentiable
            return None
        numbers = [group["lr"], group["weight_decay"]]
        if kind is SGD:
            numbers += [group["momentum"], group["dampening"]]
            rules.add(Rule(False, True, False, bool(group["momentum"]), group["nesterov"]))
        else:
            numbers += [*group["betas"], group["eps"]]
            on_device = bool(group["fused"] or group["capturable"])
            rules.add(Rule(True, on_device, group.get("decoupled_weight_decay", kind is AdamW), False, False))
        if any(isinstance(number, Tensor) for number in numbers[1:]):
            return None
    return rules.pop() if len(rules) == 1 else None


def _is_replaced(optimizer: Any) -> bool:
    """Whether somebody relies on ``optimizer.step`` being called; schedulers only want to know that it was."""
    step = vars(optimizer).get("step")
    return step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step


class OnePass:
    """The base's step for the parameters of a table.

    Args:
        table: of the parameters.
        parameters: in the table's order.
    """

    def __init__(self, table: Table, parameters: list[Tensor]) -> None:
        device = table.sizes.device
        self._table = table
        self._parameters = parameters
        self._group_sizes: list[int] = []
        self._group_of: list[int] = []
        self._numbers: list[list[float]] = []
        nothing: list[Tensor | None] = [None] * table.count
        self._first, self._second, self._steps = (Column(device, nothing) for _ in range(3))
        self._corrections = torch.ones(table.count, 2, dtype=torch.float64, device=device)
        self._step_tensors: list[Tensor | None] = nothing
        self._state_fits = self._steps_fit = True
        self._state_dtype = table.dtype

    def prepare(self, optimizer: Any, rule: Rule, gradients: list[Tensor | None]) -> bool:
        """Find the state of the coming step.

        Args:
            optimizer: the base.
            rule: its rule.
            gradients: as `Table.take_gradients` takes them.

        Returns:
            Whether all of it is there, dense, and of one dtype.
        """
        names = rule.state
        state = [optimizer.state.get(parameter) or {} for parameter in self._parameters]
        columns = [[_tensor(entry.get(name)) for entry in state] for name in names]
        for column in columns:
            if any(s is None and g is not None for s, g in zip(column, gradients, strict=True)):
                return False
        changed = [c.point_to(tensors) for c, tensors in zip((self._first, self._second), columns, strict=False)]
        if any(changed):
            held = [(s, p) for column in columns for s, p in zip(column, self._parameters, strict=True)]
            dtypes = {s.dtype for s, _ in held if s is not None}
            here = self._table.sizes.device
            dense = all(s is None or (s.stride() == local(p).stride() and s.device == here) for s, p in held)
            self._state_fits = len(dtypes) <= 1 and dtypes <= TYPES.keys() and dense
            self._state_dtype = dtypes.pop() if dtypes else self._table.dtype
        if rule.adam:
            pairs = zip(state, gradients, strict=True)
            self._step_tensors = [None if g is None else entry["step"] for entry, g in pairs]
            if self._steps.point_to(self._step_tensors):
                device = self._table.sizes.device if rule.counts_on_device else torch.device("cpu")
                self._steps_fit = all(step is None or step.device == device for step in self._step_tensors)
        return self._state_fits and self._steps_fit

    def run(
        self,
        optimizer: Any,
        rule: Rule,
        gradients: list[Tensor | None],
        weights: Tensor,
        finite: Tensor,
        restart: bool | Tensor,
    ) -> None:
        """Take the base's step and move x.

        Args:
            optimizer, rule, gradients: as for `prepare`.
            weights, restart: as for `plain.move`.
            finite: 0-d bool; where it is ``False`` nothing changes.
        """
        table = self._table
        dtype = table.take_gradients(gradients)
        rows = self._settings(optimizer, rule)
        finite = table.flag(finite)
        if rule.adam:
            self._advance(rule, rows, finite)
        columns = (table.x, table.gradient, table.reference, table.delta, self._first, self._second)
        others = (self._corrections, rows, self._rows_of, weights, finite, table.flag(restart))
        types = {"X": TYPES[table.dtype], "G": dtype, "S": TYPES[self._state_dtype]}
        flags = {name.upper(): value for name, value in rule._asdict().items() if name != "counts_on_device"}
        table.launch(_step, *columns, *others, **types, **flags)
        table.carried = table.stored

    def _settings(self, optimizer: Any, rule: Rule) -> Tensor:
        """A row of numbers per group, on the device; its learning rate may be there already."""
        names = ADAM_ROW if rule.adam else SGD_ROW
        rows, rates = [], {}
        for i, group in enumerate(optimizer.param_groups):
            row: list[float] = []
            for name in names:
                value = group[name]
                if isinstance(value, Tensor) and value.device == self._corrections.device:
                    rates[i] = value
                    value = -1.0  # none of a person's
                elif isinstance(value, Tensor):
                    value = float(value)
                row += value if isinstance(value, tuple | list) else [value]
            rows.append(row + [0.0] * (WIDTH.value - len(row)))
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != self._group_sizes:
            self._group_sizes = sizes
            groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
            self._group_of = [groups[id(parameter)] for parameter in self._parameters]
            self._rows_of = upload(self._group_of, torch.int64, self._corrections.device)[1]
        if rows != self._numbers:
            if len(rows) != len(self._numbers):
                self._rows = torch.empty(len(rows), WIDTH.value, dtype=torch.float64, device=self._corrections.device)
            self._numbers = rows
            self._rows.copy_(upload(rows, torch.float64, self._rows.device)[1])  # in place, for graphs that read it
        for i, rate in rates.items():
            self._rows[i, 0].copy_(rate.squeeze())
        return self._rows

    def _advance(self, rule: Rule, rows: Tensor, finite: Tensor) -> None:
        """Count the step, where the base keeps the count, and put the bias corrections on the device."""
        count, device = self._table.count, self._corrections.device
        held = [(i, step) for i, step in enumerate(self._step_tensors) if step is not None]
        if rule.counts_on_device:
            dtype = TYPES[held[0][1].dtype] if held else tl.float32
            with _on(rows):
                _count[(triton.cdiv(count, 1024),)](
                    self._corrections, self._steps.addresses, rows, self._rows_of, finite, count, T=dtype, BLOCK=1024
                )
            return
        if not held:
            return
        torch._foreach_add_([step for _, step in held], 1)  # type: ignore
        steps = torch.stack([step for _, step in held]).double()
        betas = steps.new_tensor([self._numbers[self._group_of[i]][1:3] for i, _ in held])
        corrections = steps.new_ones(count, 2)
        corrections[[i for i, _ in held]] = 1 - betas ** steps.unsqueeze(1)
        if device.type == "cuda":
            corrections = corrections.pin_memory()
        self._corrections.copy_(corrections, non_blocking=True)


def _tensor(value: Any) -> Tensor | None:
    return local(value) if isinstance(value, Tensor) else None


@triton.jit
def _count(corrections, steps, rows, rows_of, finite, count, T: tl.constexpr, BLOCK: tl.constexpr):
    """Step ← step + 1, and 1 - β^step for both β, of every tensor that takes part."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(steps + i, mask=i < count, other=0)
    mask = address != 0
    address = address.to(tl.pointer_type(T))
    step = tl.load(address, mask=mask, other=1.0) + (tl.load(finite) != 0).to(T)
    tl.store(address, step, mask=mask)
    row = rows + WIDTH * tl.load(rows_of + i, mask=mask, other=0)
    for k in tl.static_range(2):
        beta = tl.load(row + 1 + k, mask=mask, other=0.5)
        tl.store(corrections + 2 * i + k, 1.0 - tl.exp(step.to(tl.float64) * tl.log(beta)), mask=mask)


@triton.jit
def _step_block(
    at, count, gradients, taken, x, g, reference, delta, first, second, old, new, final, finite, restart, dx, xx,
    rate, decay, a, b, c, d,
    ADAM: tl.constexpr, DECOUPLED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    WIDE: tl.constexpr, STORED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    start = _load(reference, at, count, WIDE, TAIL)
    if STORED:
        moved = _load(delta, at, count, WIDE, TAIL)
        point = (moved * old + start).to(x.dtype.element_ty).to(WIDE)
    else:
        point = _load(x, at, count, WIDE, TAIL)
        moved = _divide(point - start, old)
    gradient = _load_some(g, at, gradients, 0.0, WIDE, TAIL)
    if not DECOUPLED:
        gradient += decay * point
    if ADAM:  # a, b = 1 - β1, 1 - β2; c = sqrt(1 - β2^step); d = ε
        m = _load_some(first, at, gradients, 0.0, WIDE, TAIL)
        v = _load_some(second, at, gradients, 1.0, WIDE, TAIL)
        m += (gradient - m) * a
        v += (gradient * gradient - v) * b
        _store_some(first, at, taken, m, TAIL)
        _store_some(second, at, taken, v, TAIL)
        u = -rate * (m / (tl.sqrt(v) / c + d))
    else:  # a = momentum, b = 1 - dampening
        if MOMENTUM:
            m = a * _load_some(first, at, gradients, 0.0, WIDE, TAIL) + b * gradient
            _store_some(first, at, taken, m, TAIL)
            gradient = gradient + a * m if NESTEROV else m
        u = -rate * gradient
    if DECOUPLED:
        u -= decay * point
    u = tl.where(taken > 0, u, 0.0)
    return _finish_block(
        at, count, x, point, reference, delta, start + u * final, moved + u, new, finite, restart, dx, xx, STORED, TAIL
    )


@triton.jit
def _step(
    partial, chunks, sizes, x, g, reference, delta, first, second, corrections, rows, rows_of,
    weights, finite, restart,
    ADAM: tl.constexpr, DECOUPLED: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    X: tl.constexpr, G: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
    STORED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The base's update of every chunk, u, then Δ ← Δ + u and x ← x_ref + new · Δ."""
    i, start, count = _chunk(chunks, sizes, CHUNK)
    finite = tl.load(finite) != 0
    gradients = tl.where(tl.load(g + i) != 0, count, 0)
    taken = tl.where(finite, gradients, 0)
    x = _address(x, i, start, X, ALIGNED)
    g = _address(g, i, start, G, ALIGNED)
    reference = _address(reference, i, start, WIDE, ALIGNED)
    delta = _address(delta, i, start, WIDE, ALIGNED)
    first = _address(first, i, start, S, ALIGNED)
    second = _address(second, i, start, S, ALIGNED)
    old, new, final = _weights(weights, WIDE)
    restart = tl.load(restart) != 0
    row = rows + WIDTH * tl.load(rows_of + i)
    rate = tl.load(row)
    if ADAM:
        a = (1.0 - tl.load(row + 1)).to(WIDE)
        b = (1.0 - tl.load(row + 2)).to(WIDE)
        c = tl.sqrt(tl.load(corrections + 2 * i + 1)).to(WIDE)
        d = tl.load(row + 3).to(WIDE)
        decay = tl.load(row + 4)
    else:
        a = tl.load(row + 1).to(WIDE)
        b = (1.0 - tl.load(row + 2)).to(WIDE)
        c, d = b, b
        decay = tl.load(row + 3)
    if DECOUPLED:
        decay *= rate
    if ADAM:
        rate /= tl.load(corrections + 2 * i)
    rate, decay = rate.to(WIDE), decay.to(WIDE)
    dx = tl.zeros((BLOCK,), WIDE)
    xx = dx
    full = count // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for block in range(0, full, BLOCK):
        dx, xx = _step_block(
            block + lane, count, gradients, taken, x, g, reference, delta, first, second, old, new, final,
            finite, restart, dx, xx, rate, decay, a, b, c, d, ADAM, DECOUPLED, MOMENTUM, NESTEROV, WIDE, STORED, False,
        )  # fmt: skip
    if full < count:
        dx, xx = _step_block(
            full + lane, count, gradients, taken, x, g, reference, delta, first, second, old, new, final,
            finite, restart, dx, xx, rate, decay, a, b, c, d, ADAM, DECOUPLED, MOMENTUM, NESTEROV, WIDE, STORED, True,
        )  # fmt: skip
    if STORED:
        _put_sum(partial, 1, dx)
        _put_sum(partial, 3, xx)
