"""The displacement: x_ref and Δ of every parameter, the four sums, and the move to x_ref + scale · Δ.

This is the only place that touches memory as large as the model. Both passes go through a tensor in blocks that
fit in a processor's cache, so neither needs a temporary as large as the model.

The point x_ref + scale · Δ is computed as a rounded product and a rounded sum, never as a fused multiply-add:
every device and every path then gives the same bits, and the parameters before a base step can be recomputed
instead of kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from manic.tuner import Sums

BLOCK = 1 << 16  # elements; three float32 blocks and a temporary are 1 MiB, a core's second-level cache


class Slot:
    """What is kept of one parameter, as 1-d real tensors in the order of the parameter's memory.

    Attributes:
        reference: x_ref, in the parameter's dtype, so that it is exact.
        delta: Δ in at least float32, or ``None`` when it is recomputed from x.
        version: the parameter's version counter after our last write; ``None`` if it was written elsewhere since
            (loaded, or frozen while others moved), and so has to be compared.
    """

    def __init__(self, parameter: Tensor, *, store_delta: bool) -> None:
        real = _real(parameter)
        self._order = sorted(range(real.dim()), key=real.stride, reverse=True)
        self._shape = real.permute(self._order).shape
        self.reference = self.flat(parameter).clone()
        self.delta = torch.zeros_like(self.reference, dtype=_wide(real.dtype)) if store_delta else None
        self.version: int | None = parameter._version

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


class Displacement:
    """x_ref and Δ of a set of parameters.

    Args:
        store_delta: keep Δ (two copies of the model in all), or recompute it as (x - x_ref)/(scale + eps) (one).

    Attributes:
        slots: what is kept of each parameter, in the order in which they joined.
        eps: ε of the recomputed Δ.
    """

    def __init__(self, *, store_delta: bool) -> None:
        self.store_delta = store_delta
        self.eps = 1e-8
        self.slots: dict[Tensor, Slot] = {}
        self._active: list[tuple[Tensor, Slot]] = []

    def refresh(self, parameters: Iterable[Tensor], scale: Tensor, *, changed: bool = False) -> bool:
        """See who takes part in the coming step, and keep what others did to the parameters since the last.

        A parameter takes part while it requires a gradient; when it first does, it gets its x_ref. The x_ref of a
        parameter that was changed shifts by the change, and Δ stays.

        Args:
            parameters: those of the base optimizer.
            scale: the scale in force, 0-d.
            changed: take every parameter for changed; else its version counter tells.

        Returns:
            Whether a Δ had to be given up: without a stored one, it cannot be told from the change.
        """
        self._active = []
        lost = False
        for parameter in parameters:
            slot = self.slots.get(parameter)
            if not parameter.requires_grad:
                if slot is not None:
                    slot.version = None
                continue
            if slot is None:
                slot = self.slots[parameter] = Slot(parameter, store_delta=self.store_delta)
            elif changed or slot.version != parameter._version or not _alike(slot.reference, parameter):
                lost |= self._keep_change(parameter, slot, scale)
            self._active.append((parameter, slot))
        return lost

    def _keep_change(self, parameter: Tensor, slot: Slot, scale: Tensor) -> bool:
        """Shift x_ref by what was done to the parameter, element by element: what was not changed stays exact."""
        x = slot.flat(parameter)
        lost = slot.delta is None and slot.version is not None
        slot.to(x)
        if slot.delta is not None:
            scale = scale.to(x.device)
            same = x == _point(slot.reference, slot.delta, scale).to(x.dtype)
            slot.reference.copy_(torch.where(same, slot.reference, (x - slot.delta * scale).to(x.dtype)))
            parameter.copy_(slot.shaped(_point(slot.reference, slot.delta, scale), parameter))
        elif lost:
            slot.reference.copy_(x)
        slot.version = parameter._version
        return lost

    def sums(self, scale: Tensor) -> Sums:
        """The four sums over the parameters that take part.

        Args:
            scale: the scale in force, 0-d. The sums are on its device, in its dtype.

        Raises:
            ValueError: a gradient is sparse.
        """
        delta_grad, delta_param, grad_square, param_square = [], [], [], []
        for parameter, slot in self._active:
            gradient = parameter.grad
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(
                    f"The gradient of a parameter of shape {tuple(parameter.shape)} has layout {gradient.layout}; "
                    "expected a dense one. Build the layer with sparse=False, or set p.grad = p.grad.to_dense()."
                )
            flat_gradient = None if gradient is None else slot.flat(gradient)
            for x, g, reference, delta in _blocks(slot.flat(parameter), flat_gradient, slot.reference, slot.delta):
                x = x.to(_wide(x.dtype))
                delta = x - reference if delta is None else delta
                delta_param.append(torch.dot(delta, x))
                param_square.append(torch.dot(x, x))
                if g is not None:
                    g = g.to(delta.dtype)
                    delta_grad.append(torch.dot(delta, g))
                    grad_square.append(torch.dot(g, g))
        per_delta = 1.0 if self.store_delta else 1.0 / (scale + self.eps)
        return Sums(
            _total(delta_grad, scale) * per_delta,
            _total(delta_param, scale) * per_delta,
            _total(grad_square, scale),
            _total(param_square, scale),
        )

    def begin(self) -> list[Tensor] | None:
        """What must be kept of x over a base step: nothing if Δ is stored, else a copy of every parameter."""
        return None if self.store_delta else [slot.flat(parameter).clone() for parameter, slot in self._active]

    def restore(self, before: list[Tensor] | None, scale: Tensor) -> None:
        """Undo what a base step that failed did to the parameters.

        Args:
            before: from `begin`.
            scale: the scale in force, 0-d.
        """
        for i, (parameter, slot) in enumerate(self._active):
            if before is None:
                assert slot.delta is not None
                x = _point(slot.reference, slot.delta, scale.to(parameter.device))
            else:
                x = before[i]
            parameter.copy_(slot.shaped(x, parameter))
            slot.version = parameter._version

    def move(self, before: list[Tensor] | None, old_scale: Tensor, scale: Tensor) -> None:
        """Make what a base step did to the parameters their update u: Δ ← Δ + u, x ← x_ref + scale · Δ.

        Args:
            before: from `begin`.
            old_scale: the scale in force before the step, 0-d.
            scale: the scale from now on, 0-d.
        """
        for i, (parameter, slot) in enumerate(self._active):
            old, new = old_scale.to(parameter.device), scale.to(parameter.device)
            flat = slot.flat(parameter)
            for x, reference, delta, x0 in _blocks(flat, slot.reference, slot.delta, before[i] if before else None):
                wide = _wide(x.dtype)
                if delta is None:
                    delta = (x0.to(wide) - reference).div_(old + self.eps)
                else:
                    x0 = _point(reference, delta, old).to(x.dtype)
                delta += x.to(wide) - x0.to(wide)
                x.copy_(_point(reference, delta, new))
            if flat.data_ptr() != parameter.data_ptr():
                parameter.copy_(slot.shaped(flat, parameter))
            slot.version = parameter._version

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
        self._active = []
        for i, tensors in state.items():
            slot = self.slots[parameters[i]] = Slot(parameters[i], store_delta=self.store_delta)
            slot.version = None
            slot.reference.copy_(slot.flat(tensors["reference"]))
            if slot.delta is not None:
                slot.delta.copy_(slot.flat(tensors["delta"]))


def _point(reference: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    return (delta * scale).add_(reference)


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _alike(reference: Tensor, parameter: Tensor) -> bool:
    return reference.device == parameter.device and reference.dtype == parameter.dtype.to_real()


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same stretch of each 1-d tensor at a time; ``None`` stays ``None``."""
    numel = next(tensor.numel() for tensor in tensors if tensor is not None)
    if numel <= BLOCK:
        yield tensors
        return
    for start in range(0, numel, BLOCK):
        yield tuple(None if tensor is None else tensor[start : start + BLOCK] for tensor in tensors)


def _total(parts: list[Tensor], like: Tensor) -> Tensor:
    """The sum of 0-d tensors, in the dtype and on the device of ``like``."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for part in parts:
        by_device.setdefault(part.device, []).append(part)
    totals = [torch.stack(same).to(like.dtype).sum().to(like.device) for same in by_device.values()]
    return torch.stack(totals).sum() if totals else torch.zeros_like(like)
