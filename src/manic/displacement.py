"""The displacement: x_ref and Δ of every parameter, the four sums, and the move to x_ref + scale · Δ.

This and `kernels` are the only places that touch memory as large as the model; neither of the two passes needs a
temporary of that size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from manic.kernels import choose
from manic.kernels.plain import point
from manic.tuner import Sums

PACK = 1 << 14  # elements: smaller parameters share a bucket


class Slot:
    """What is kept of one parameter, as 1-d real tensors in the order of the parameter's memory.

    Attributes:
        reference: x_ref, in the parameter's dtype, so that it is exact.
        delta: Δ in at least float32, or ``None`` when it is recomputed from x.
        version: the parameter's version counter after our last write; ``None`` after a time away (frozen, saved,
            copied), so that the next look compares the parameter with x_ref and Δ.
        address: where its memory was then.
    """

    def __init__(self, parameter: Tensor, *, store_delta: bool) -> None:
        real = _real(parameter)
        self._order = sorted(range(real.dim()), key=real.stride, reverse=True)
        self._shape = real.permute(self._order).shape
        self.reference = self.flat(parameter).clone()
        self.delta = torch.zeros_like(self.reference, dtype=_wide(real.dtype)) if store_delta else None
        self.version: int | None = None
        self.address = 0
        self.stamp(parameter)

    def __getstate__(self) -> dict[str, Any]:
        # Views of a bucket's tensor would each be saved with all of it.
        own = {name: value.clone() for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        return {**self.__dict__, **own, "version": None}

    def stamp(self, parameter: Tensor) -> None:
        """Note that the parameter is as we left it."""
        self.version, self.address = parameter._version, parameter.data_ptr()

    def to(self, like: Tensor) -> None:
        """Follow the parameter to another device or dtype."""
        self.reference = self.reference.to(like)
        if self.delta is not None:
            self.delta = self.delta.to(like.device, _wide(like.dtype))

    def flat(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as 1-d, a view where its memory allows."""
        return _real(tensor).permute(self._order).reshape(-1)

    def tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """Views of x_ref and Δ in the parameter's shape, by the names they have in a state dict."""
        kept = {"reference": self.reference, "delta": self.delta}
        return {name: self.shaped(flat, parameter) for name, flat in kept.items() if flat is not None}

    def shaped(self, flat: Tensor, like: Tensor) -> Tensor:
        """The inverse of `flat`, always a view: ``like`` says whether the parameter is complex."""
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        real = flat.view(self._shape).permute(inverse)
        return torch.view_as_complex(real) if like.is_complex() else real


class Bucket:
    """Parameters that the passes treat as one 1-d tensor: one large parameter, or many small ones packed.

    Packing keeps the cost of a step with many small tensors near that of their elements. x_ref and Δ of packed
    parameters live in one tensor, of which their slots have views; x and g are gathered for a pass.

    Attributes:
        reference: x_ref, 1-d.
        delta: Δ, 1-d, or ``None``.
        kernels: the module with the passes for these tensors.
    """

    def __init__(self, members: list[tuple[Tensor, Slot]], total: int) -> None:
        self._members = members
        self._flat = [slot.flat(parameter) for parameter, slot in members]
        self._is_view = [flat.data_ptr() == p.data_ptr() for flat, (p, _) in zip(self._flat, members, strict=True)]
        self._sizes = [flat.numel() for flat in self._flat]
        self.reference, self.delta = members[0][1].reference, members[0][1].delta
        if len(members) > 1:
            self.reference = torch.cat([slot.reference for _, slot in members])
            deltas = [slot.delta for _, slot in members if slot.delta is not None]
            self.delta = torch.cat(deltas) if deltas else None
            for i, (_, slot) in enumerate(members):
                slot.reference = self.reference.split(self._sizes)[i]
                slot.delta = None if self.delta is None else self.delta.split(self._sizes)[i]
        self.kernels = choose(self.reference, total)

    def values(self, *, copy: bool = False) -> Tensor:
        """x as one 1-d tensor: the parameter's own memory where there is one dense parameter, else gathered."""
        if len(self._members) > 1:
            return torch.cat(self._current())
        (flat,) = self._current()
        return flat.clone() if copy else flat

    def gradients(self) -> Tensor | None:
        """g as one 1-d tensor, zero where there is none; ``None`` if there is none at all."""
        gradients = [parameter.grad for parameter, _ in self._members]
        for gradient in gradients:
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(
                    f"A gradient of shape {tuple(gradient.shape)} has layout {gradient.layout}; expected a dense one. "
                    "Build the layer with sparse=False, or set p.grad = p.grad.to_dense() before the step."
                )
        if all(gradient is None for gradient in gradients):
            return None
        flat = [
            torch.zeros_like(like) if gradient is None else slot.flat(gradient)
            for gradient, like, (_, slot) in zip(gradients, self._flat, self._members, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def put(self, x: Tensor) -> None:
        """Write x, as `values` gave it, to the parameters."""
        parts = x.split(self._sizes)
        own = [(flat, part) for flat, part, view in zip(self._flat, parts, self._is_view, strict=True) if view]
        if own and own[0][0] is not x:
            torch._foreach_copy_([flat for flat, _ in own], [part for _, part in own])  # type: ignore
        for part, view, (parameter, slot) in zip(parts, self._is_view, self._members, strict=True):
            if not view:
                parameter.copy_(slot.shaped(part, parameter))
            slot.stamp(parameter)

    def _current(self) -> list[Tensor]:
        pairs = zip(self._flat, self._is_view, self._members, strict=True)
        return [flat if view else slot.flat(parameter) for flat, view, (parameter, slot) in pairs]


class Displacement:
    """x_ref and Δ of a set of parameters.

    Args:
        store_delta: keep Δ (two copies of the model in all), or recompute it as (x - x_ref)/(scale + eps) (one).

    Attributes:
        slots: what is kept of each parameter, in the order in which they joined.
        joined: whether the last `refresh` saw a parameter for the first time.
        eps: ε of the recomputed Δ.
    """

    def __init__(self, *, store_delta: bool) -> None:
        self.store_delta = store_delta
        self.eps = 1e-8
        self.slots: dict[Tensor, Slot] = {}
        self.joined = False
        self._buckets: list[Bucket] = []
        self._key: list[int] = []  # identity and address of every parameter in the buckets

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buckets": [], "_key": []}

    def refresh(self, parameters: Iterable[Tensor], scale: Tensor, *, changed: bool = False) -> bool:
        """See who takes part in the coming step, and keep what others did to the parameters since the last.

        A parameter takes part while it requires or has a gradient; when it first does, it gets its x_ref. The x_ref of
        a parameter that was changed shifts by the change, and Δ stays.

        Args:
            parameters: those of the base optimizer.
            scale: the scale in force, 0-d.
            changed: take every parameter for changed; else its version counter and address tell.

        Returns:
            Whether a Δ had to be given up: without a stored one, it cannot be told from the change.
        """
        lost = self.joined = False
        active, key = [], []
        for parameter in parameters:
            slot = self.slots.get(parameter)
            if not parameter.requires_grad and parameter.grad is None:
                if slot is not None:
                    slot.version = None
                continue
            if slot is None:
                slot = self.slots[parameter] = Slot(parameter, store_delta=self.store_delta)
                self.joined = True
            elif changed or slot.version != parameter._version or slot.address != parameter.data_ptr():
                lost |= self._keep_change(parameter, slot, scale)
            active.append((parameter, slot))
            key += (id(parameter), slot.address)
        if key != self._key:
            self._buckets, self._key = _pack(active), key
        return lost

    def _keep_change(self, parameter: Tensor, slot: Slot, scale: Tensor) -> bool:
        """Shift x_ref by what was done to the parameter, element by element: what was not changed stays exact."""
        x = slot.flat(parameter)
        lost = slot.delta is None and slot.version is not None
        slot.to(x)
        if slot.delta is not None:
            scale = scale.to(x.device)
            same = x == point(slot.reference, slot.delta, scale).to(x.dtype)
            slot.reference.copy_(torch.where(same, slot.reference, (x - slot.delta * scale).to(x.dtype)))
            if slot.delta.dtype != x.dtype:  # x_ref alone is too coarse to hold the change: Δ takes the rest
                rest = (x.to(slot.delta.dtype) - slot.reference) / scale
                slot.delta.copy_(torch.where(same | (scale == 0), slot.delta, rest))
            parameter.copy_(slot.shaped(point(slot.reference, slot.delta, scale), parameter))
        elif lost:
            slot.reference.copy_(x)
        slot.stamp(parameter)
        return lost

    def sums(self, scale: Tensor) -> Sums:
        """The four sums over the parameters that take part.

        Args:
            scale: the scale in force, 0-d. The sums are on its device, in its dtype.

        Raises:
            ValueError: a gradient is sparse.
        """
        parts = [
            bucket.kernels.sums(bucket.values(), bucket.gradients(), bucket.reference, bucket.delta).to(scale)
            for bucket in self._buckets
        ]
        total = torch.stack(parts).sum(0) if parts else scale.new_zeros(4)
        delta_grad, delta_param, grad_square, param_square = total.unbind()
        if not self.store_delta:
            delta_grad, delta_param = delta_grad / (scale + self.eps), delta_param / (scale + self.eps)
        return Sums(delta_grad, delta_param, grad_square, param_square)

    def begin(self) -> list[Tensor] | None:
        """What must be kept of x over a base step: nothing if Δ is stored, else a copy of every parameter."""
        return None if self.store_delta else [bucket.values(copy=True) for bucket in self._buckets]

    def restore(self, before: list[Tensor] | None, scale: Tensor) -> None:
        """Undo what a base step that failed did to the parameters.

        Args:
            before: from `begin`.
            scale: the scale in force, 0-d.
        """
        for i, bucket in enumerate(self._buckets):
            if bucket.delta is not None:
                bucket.put(point(bucket.reference, bucket.delta, scale.to(bucket.reference.device)))
            elif before is not None:
                bucket.put(before[i])

    def move(self, before: list[Tensor] | None, old_scale: Tensor, scale: Tensor, finite: Tensor | None) -> None:
        """Make what a base step did to the parameters their update u: Δ ← Δ + u, x ← x_ref + scale · Δ.

        Args:
            before: from `begin`.
            old_scale: the scale in force before the step, 0-d.
            scale: the scale from now on, 0-d.
            finite: 0-d bool, ``False`` if the base step was skipped on the device, and x has to stay as it is.
        """
        for i, bucket in enumerate(self._buckets):
            x = bucket.values()
            old, new = old_scale.to(x.device), scale.to(x.device)
            start = None if before is None else before[i]
            bucket.kernels.move(x, bucket.reference, bucket.delta, start, old, new, self.eps)
            if start is not None and finite is not None:
                x.copy_(torch.where(finite.to(x.device), x, start))
            bucket.put(x)

    def state(self, parameters: Iterable[Tensor]) -> dict[int, dict[str, Tensor]]:
        """Copies of x_ref (``"reference"``) and Δ (``"delta"``), of each parameter's shape, by its place."""
        return {
            i: {name: tensor.clone() for name, tensor in self.slots[parameter].tensors(parameter).items()}
            for i, parameter in enumerate(parameters)
            if parameter in self.slots
        }

    def check_state(self, state: dict[int, dict[str, Tensor]], parameters: list[Tensor], names: list[Any]) -> None:
        """Raise ValueError unless `load_state` can take ``state``."""
        if state and max(state) >= len(parameters):
            raise ValueError(
                f"The state dict is of another model: it has {max(state) + 1} parameters or more, this one "
                f"{len(parameters)}."
            )
        for i, tensors in state.items():
            if ("delta" in tensors) != self.store_delta:
                raise ValueError(
                    f"The state was saved with store_delta={not self.store_delta}, and this one is built with "
                    f"store_delta={self.store_delta}. Build it as it was when saved."
                )
            for key, tensor in tensors.items():
                if tensor.shape != parameters[i].shape:
                    name = f" ({names[i]})" if isinstance(names[i], str) else ""
                    raise ValueError(
                        f"The state dict is of another model: its {key} of parameter {i}{name} has shape "
                        f"{tuple(tensor.shape)}, the parameter has {tuple(parameters[i].shape)}."
                    )

    def load_state(self, state: dict[int, dict[str, Tensor]], parameters: list[Tensor]) -> None:
        """Take up what `state` gave. The parameters themselves may be loaded before or after."""
        self.slots = {}
        self._buckets, self._key = [], []
        for i, tensors in state.items():
            slot = self.slots[parameters[i]] = Slot(parameters[i], store_delta=self.store_delta)
            slot.version = None
            slot.reference.copy_(slot.flat(tensors["reference"]))
            if slot.delta is not None:
                slot.delta.copy_(slot.flat(tensors["delta"]))


def _pack(active: list[tuple[Tensor, Slot]]) -> list[Bucket]:
    """Large parameters alone, small ones of a device and dtype together until they are large."""
    total: dict[torch.device, int] = {}
    groups: list[list[tuple[Tensor, Slot]]] = []
    open_groups: dict[tuple[torch.device, torch.dtype], tuple[list[tuple[Tensor, Slot]], list[int]]] = {}
    for member in active:
        reference = member[1].reference
        total[reference.device] = total.get(reference.device, 0) + reference.numel()
        if reference.numel() >= PACK:
            groups.append([member])
            continue
        kind = (reference.device, reference.dtype)
        group, sizes = open_groups.setdefault(kind, ([], []))
        group.append(member)
        sizes.append(reference.numel())
        if sum(sizes) >= 4 * PACK:
            groups.append(open_groups.pop(kind)[0])
    groups += [group for group, _ in open_groups.values()]
    return [Bucket(group, total[group[0][1].reference.device]) for group in groups]


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
