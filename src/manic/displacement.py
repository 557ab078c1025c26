"""The displacement: x_ref and Δ of every parameter, the four sums, and the move to x_ref + α · scale · Δ.

When the scale changes, past updates follow by a share α only: see `manic.tuner`, equation (7'). So Δ is multiplied by
α · scale, and the rest of an update u, (1 - α) · scale · u, goes to x_ref at once. In the classes before `Displacement`
an argument called ``scale`` is α · scale.

From one parameter to all: a `Slot` is one; a `Part` is a large one, or many small ones in one tensor; a `Bucket` is a
few parts that one call of a kernel treats; a `Batch` is all parameters of a device where Triton's kernels find them by
their addresses, in place of parts and buckets; `Displacement` has the buckets and batches.

This and `kernels` are the only places that touch memory as large as the model; neither of the two passes needs a
temporary of that size. Offloaded, x_ref and Δ are in host memory and cross the bus block by block, in order with the
device's work and without the host waiting for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from manic.distributed import Reduction, local, local_gradient, local_part, spread, version
from manic.kernels import choose, in_tables, one_pass, plain
from manic.kernels.compiled import FEW, alias
from manic.kernels.plain import counted, point, wide
from manic.tuner import Sums

PACK = 1 << 16  # elements: smaller parameters share a part, which costs less than passes of their own


class Slot:
    """What is kept of one parameter, as 1-d real tensors in the order of the parameter's memory.

    Attributes:
        parameter: the parameter; of one that is spread over ranks, everything here is this rank's part.
        reference: x_ref, in at least float32.
        delta: Δ, likewise, or ``None`` when it is recomputed from x.
        strides: those of a gradient that is laid out in memory as the parameter is; ``None`` if the parameter has gaps
            or is complex.
        offload: whether x_ref and Δ are in host memory, pinned if the parameter is on a CUDA device.
        away: whether the scale changes without the parameter, which stays where it is, as a frozen one does.
    """

    def __init__(self, parameter: Tensor, *, store_delta: bool, offload: bool) -> None:
        self.parameter = parameter
        self.offload = offload
        real = _real(local(parameter))
        self._order = sorted(range(real.dim()), key=real.stride, reverse=True)
        self._shape = real.permute(self._order).shape
        self.strides: tuple[int, ...] | None = real.stride() if self.is_dense() and not parameter.is_complex() else None
        self.reference: Tensor = self._empty(real.numel()).copy_(self.x())
        self.delta = self._empty(real.numel()).zero_() if store_delta else None
        self._version: int | None = None  # at `stamp`; not known after a load, or of a copy of one that was changed
        self.address: int = 0
        self.away: bool = False
        self.stamp()

    def __getstate__(self) -> dict[str, Any]:
        # Views of a bucket's tensor would each be saved with all of it.
        self.settle()
        known = self.give_up() or not self.is_changed()
        kept = {"reference": self.reference.clone(), "delta": None if self.delta is None else self.delta.clone()}
        return {**self.__dict__, **kept, "_version": self._version if known else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.offload and local(self.parameter).is_cuda:  # copies of pinned tensors are not
            self.reference = self.reference.pin_memory()
            self.delta = None if self.delta is None else self.delta.pin_memory()
        if self._version is not None:
            self.stamp()

    def leave(self) -> None:
        """Note that the parameter is `away` from now on."""
        if self._version is None:
            self.stamp()
        self.away = True

    def stamp(self) -> None:
        """Note that the parameter is as we left it."""
        self._version, self.address = version(self.parameter), local(self.parameter).data_ptr()

    def is_changed(self) -> bool:
        """Whether the parameter may have been written to by others since `stamp`, or moved to other memory."""
        return self._version != version(self.parameter) or self.is_moved()

    def is_moved(self) -> bool:
        """Whether the parameter is in other memory than at `stamp`."""
        return self.address != local(self.parameter).data_ptr()

    def keep_change(self, scale: Tensor, rescaled: float, *, changed: bool) -> bool:
        """Make x_ref and Δ fit the parameter as it is: others have changed it, or the scale has, while it was away.

        See `kernels.plain.kept`. Where it was away, only x_ref changes.

        Args:
            scale: the scale in force, 0-d.
            rescaled: the α in it.
            changed: take it for changed by others, even if its version counter and address are those of `stamp`.

        Returns:
            Whether Δ starts again from zero, as one does that is not stored, and so cannot be told from the change.
        """
        x = self.x().cpu() if self.offload else self.x()
        self.reference = self.reference.to(x.device, wide(x.dtype))
        lost = self.give_up(changed=changed)
        if self.delta is not None:
            scale = scale.to(x.device)
            self.delta = self.delta.to(self.reference)
            if x.device.type == "cpu" and torch.equal(x, point(self.reference, self.delta, scale).to(x.dtype)):
                self.stamp()  # without a write, which autograd would notice
                return False
            plain.keep_change(x, self.reference, self.delta, scale, 0.0 if self.away else rescaled)
            self.write(point(self.reference, self.delta, scale))
        self.stamp()
        return lost

    def give_up(self, *, changed: bool = False) -> bool:
        """Have a Δ that is not stored start again from zero if others have changed the parameter; whether it had to."""
        lost = self.delta is None and (changed or (self._version is not None and self.is_changed()))
        if lost:
            self.reference.copy_(self.x())
        return lost

    def follow(self, scale: Tensor) -> None:
        """Have x_ref fit the parameter, which is away, at the scale in force: whoever loads a state counts on it."""
        if self.delta is not None:
            x = self.x().to(self.reference.device)
            plain.keep_change(x, self.reference, self.delta, scale.to(x.device), 0.0)

    def restart(self) -> None:
        """Have Δ start again from zero, and the parameter stay where it is."""
        self.reference.copy_(self.x())
        if self.delta is not None:
            self.delta.zero_()

    def x(self) -> Tensor:
        """The parameter as 1-d: its own memory, or a copy where that has gaps."""
        return self._flat(local(self.parameter))

    def gradient(self) -> Tensor | None:
        """Its gradient as 1-d.

        Raises:
            ValueError: it is sparse.
        """
        gradient = local_gradient(self.parameter)
        if gradient is None:
            return None
        if gradient.layout != torch.strided:
            raise ValueError(
                f"A gradient of shape {tuple(gradient.shape)} has layout {gradient.layout}; expected a dense one. "
                "Build the layer with sparse=False, or set p.grad = p.grad.to_dense() before the step."
            )
        if gradient.stride() == self.strides:
            return gradient if gradient.dim() == 1 else gradient.as_strided((gradient.numel(),), (1,))  # quicker
        return self._flat(gradient)

    def first_sizes(self, start: Tensor | None, scale: Tensor) -> Tensor:
        """‖x‖² before a base step, ‖u‖² and the number of elements, shape (3,), of those that count, see `counted`.

        Args:
            start: x before the step; ``None`` if Δ is stored.
            scale: as `point` takes it.
        """
        gradient = self.gradient()
        reached = None if gradient is None else (gradient != 0).any()
        sizes = scale.new_zeros(3)
        columns = ([column] for column in (self.x(), gradient, self.reference, self.delta, start))
        for x, g, reference, delta, then in plain.blocks(*columns):
            if delta is None:
                before = plain.fetch(then, x)
            else:
                before = point(plain.fetch(reference, x), plain.fetch(delta, x), scale).to(x.dtype)
            before = before.to(reference.dtype)
            u = x - before
            counts = counted(u, g, reached)
            norms = [torch.linalg.vector_norm(part.where(counts, 0), dtype=sizes.dtype) for part in (before, u)]
            sizes += torch.stack([*(norm**2 for norm in norms), counts.sum()])
        return sizes

    def is_dense(self) -> bool:
        """Whether the parameter's elements lie side by side in memory."""
        x = self.x()
        return x.is_contiguous() and x.data_ptr() == local(self.parameter).data_ptr()

    def own(self) -> None:
        """Keep x_ref and Δ in memory of their own, and no longer as views of a part that other slots have left.

        It would be kept as a whole, and sums over memory that is not aligned may differ in the last digit.
        """
        kept = {"reference": self.reference, "delta": self.delta}
        for name, tensor in kept.items():
            if tensor is not None and tensor.untyped_storage().nbytes() > tensor.nbytes:
                self.settle()
                setattr(self, name, self._empty(tensor.numel()).copy_(tensor))

    def settle(self) -> None:
        """Wait for copies to host memory that the device has not finished yet."""
        if self.offload:
            local(self.parameter).new_zeros(()).item()

    def write(self, x: Tensor) -> None:
        """Set the parameter from a 1-d tensor."""
        local(self.parameter).copy_(self._shaped(x))

    def tensors(self) -> dict[str, Tensor]:
        """Views of x_ref and Δ in the parameter's shape, by the names they have in a state dict."""
        kept = {"reference": self.reference, "delta": self.delta}
        return {n: spread(self._shaped(flat), self.parameter) for n, flat in kept.items() if flat is not None}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        self.reference.copy_(self._flat(local_part(tensors["reference"], self.parameter)))
        if self.delta is not None:
            self.delta.copy_(self._flat(local_part(tensors["delta"], self.parameter)))
        self._version = None

    def _empty(self, numel: int) -> Tensor:
        x = _real(local(self.parameter))
        pin = self.offload and x.is_cuda
        return torch.empty(numel, dtype=wide(x.dtype), device="cpu" if self.offload else x.device, pin_memory=pin)

    def _flat(self, tensor: Tensor) -> Tensor:
        return _real(tensor).permute(self._order).reshape(-1)

    def _shaped(self, flat: Tensor) -> Tensor:
        """The inverse of `_flat`, always a view."""
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        real = flat.view(self._shape).permute(inverse)
        return torch.view_as_complex(real) if self.parameter.is_complex() else real


class Part:
    """One large parameter, or many small ones packed, as one 1-d tensor.

    Packing keeps the cost of a step with many small tensors near that of their elements. x_ref and Δ of packed
    parameters live in one tensor, of which their slots have views; x and g are gathered for a pass.

    Args:
        slots: of parameters on one device, of one dtype.

    Attributes:
        slots: these.
        reference: x_ref, 1-d.
        delta: Δ, 1-d, or ``None``.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self.slots: list[Slot] = slots
        self._flat = [alias(slot.x()) for slot in slots]  # stays valid while the parameters stay where they are
        self._is_view = [flat.data_ptr() == slot.address for flat, slot in zip(self._flat, slots, strict=True)]
        self._sizes = [flat.numel() for flat in self._flat]
        self._backup: Tensor | None = None  # in host memory, for every step: each would pin memory of its own
        if len(slots) == 1:
            slots[0].own()
            self.reference: Tensor = slots[0].reference
            self.delta = slots[0].delta
        else:
            slots[0].settle()
            self.reference = _joined([slot.reference for slot in slots])
            deltas = [slot.delta for slot in slots if slot.delta is not None]
            self.delta = _joined(deltas) if deltas else None
            for slot, reference in zip(slots, self.reference.split(self._sizes), strict=True):
                slot.reference = reference
            if self.delta is not None:
                for slot, delta in zip(slots, self.delta.split(self._sizes), strict=True):
                    slot.delta = delta

    def values(self) -> Tensor:
        """The parameters: the memory of the only one where it has no gaps, else gathered."""
        if len(self.slots) == 1:
            return self._flat[0] if self._is_view[0] else self.slots[0].x()
        parts = zip(self._flat, self._is_view, self.slots, strict=True)
        return torch.cat([part if view else slot.x() for part, view, slot in parts])

    def backup(self) -> Tensor:
        """A copy of the parameters, in the memory where x_ref is."""
        x = self.values()
        if x is not self._flat[0] and x.device == self.reference.device:
            return x  # gathered, and so a copy already
        copy = self._backup
        if copy is None:
            copy = torch.empty_like(self.reference, dtype=x.dtype, pin_memory=self.reference.is_pinned())
            self._backup = copy if copy.device != x.device else None
        return copy.copy_(x, non_blocking=True)

    def gradient(self) -> Tensor | None:
        """Their gradients, zero where there is none; ``None`` if there is none at all."""
        if len(self.slots) == 1:
            return self.slots[0].gradient()
        gradients = [slot.gradient() for slot in self.slots]
        if all(gradient is None for gradient in gradients):
            return None
        pairs = zip(gradients, self._flat, strict=True)
        return torch.cat([torch.zeros_like(x) if gradient is None else gradient for gradient, x in pairs])

    def put(self, x: Tensor) -> None:
        """Write x, as `values` gave it, to the parameters."""
        if x is not self._flat[0]:
            parts = x.split_with_sizes(self._sizes)
            torch._foreach_copy_(self._flat, parts)  # type: ignore
            for part, view, slot in zip(parts, self._is_view, self.slots, strict=True):
                if not view:
                    slot.write(part)

    def split(self, backup: Tensor) -> tuple[Tensor, ...]:
        """What a `backup` has of every slot."""
        return backup.split(self._sizes)


class Bucket:
    """A few parts that the passes treat in one call.

    Args:
        parts: at most `FEW`, of parameters on one device, of one dtype.
        device: that of the parameters.
        share: the weight of this rank's sums over them, see `Reduction`.
        total: how many elements there are on that device, for the choice of kernels.

    Attributes:
        slots: those of the parts.
        kernels: the module with the passes for these tensors.
    """

    def __init__(self, parts: list[Part], device: torch.device, share: float, total: int) -> None:
        self._parts = parts
        self.slots: list[Slot] = [slot for part in parts for slot in part.slots]
        self.device: torch.device = device
        self.share = share
        self._references = [part.reference for part in parts]
        self._deltas = [part.delta for part in parts if part.delta is not None] or None
        on_host = self._references[0].device != device
        self.kernels: ModuleType = plain if on_host else choose(parts[0].values(), total)

    def _values(self) -> list[Tensor]:
        return [part.values() for part in self._parts]

    def sums(self, *, complete: bool) -> Tensor:
        """The four sums over them, shape (4,); if not ``complete``, only <Δ, g> is needed, and the others may be 0."""
        x = self._values() if complete or self._deltas is None else None
        return self.kernels.sums(x, [part.gradient() for part in self._parts], self._references, self._deltas)

    def forget(self) -> None:
        """Note that others have changed parameters, which makes no difference here."""

    def backup(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [part.backup() for part in self._parts]

    def split(self, backup: list[Tensor]) -> list[Tensor]:
        """What a `backup` has of every slot."""
        return [x for part, whole in zip(self._parts, backup, strict=True) for x in part.split(whole)]

    def move(self, before: list[Tensor] | None, weights: Tensor, finite: Tensor | None, restart: bool | Tensor) -> None:
        """See `Displacement.move`, and `kernels.plain` for the weights."""
        x = self._values()
        self.kernels.move(x, self._references, self._deltas, before, weights, restart)
        if before is not None and finite is not None:
            for now, then in plain.blocks(x, before):
                now.copy_(torch.where(finite, now, plain.fetch(then, now)))
        for part, moved in zip(self._parts, x, strict=True):
            part.put(moved)


class Batch:
    """Parameters that the passes treat in one launch, where they are: see `kernels.triton`. Used as a `Bucket` is.

    Args:
        slots: of dense parameters on one device, of one dtype.
        share: the weight of this rank's sums over them, see `Reduction`.

    Attributes:
        slots: these.
        table: where the tensors are.
    """

    def __init__(self, slots: list[Slot], share: float) -> None:
        from manic.kernels.triton import Table

        self.slots: list[Slot] = slots
        self.device: torch.device = slots[0].reference.device
        self.share = share
        deltas = [slot.delta for slot in slots if slot.delta is not None]
        self.table: Table = Table([slot.x() for slot in slots], [slot.reference for slot in slots], deltas or None)
        self._one_pass: Any = None

    def gradients(self) -> list[Tensor | None]:
        """Their gradients, in memory of the order of the parameters'."""
        gradients: list[Tensor | None] = []
        for slot in self.slots:
            gradient = local_gradient(slot.parameter)
            if gradient is not None and (gradient.layout != torch.strided or gradient.stride() != slot.strides):
                gradient = slot.gradient()
                gradient = None if gradient is None else gradient.contiguous()
            gradients.append(gradient)
        return gradients

    def sums(self, *, complete: bool) -> Tensor:
        """The four sums over them, shape (4,); those with x come from the last move, at no cost."""
        return self.table.sums(self.gradients())

    def forget(self) -> None:
        """Note that others have changed parameters: the sums with x that the last move has left are out of date."""
        self.table.carried = False

    def backup(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [self.table.copy()]

    def split(self, backup: list[Tensor]) -> list[Tensor]:
        """What a `backup` has of every slot."""
        return self.table.parts(backup[0])

    def move(self, before: list[Tensor] | None, weights: Tensor, finite: Tensor | None, restart: bool | Tensor) -> None:
        """See `Displacement.move`, and `kernels.plain` for the weights."""
        copy = None if before is None else before[0]
        self.table.move(copy, weights, True if finite is None else finite, restart)

    def plan(self, optimizer: Any) -> Callable[[Tensor, Tensor, bool | Tensor], None] | None:
        """The base step and the move of these parameters in one pass, if it is covered: see `kernels.fused`."""
        from manic.kernels.fused import OnePass, rule_of

        rule = rule_of(optimizer)
        if rule is None:
            return None
        if self._one_pass is None:
            self._one_pass = OnePass(self.table, [slot.parameter for slot in self.slots])
        one_pass, gradients = self._one_pass, self.gradients()
        if not one_pass.prepare(optimizer, rule, gradients):
            return None
        return partial(one_pass.run, optimizer, rule, gradients)


class Displacement:
    """x_ref and Δ of a set of parameters.

    Args:
        store_delta: keep Δ (two copies of the model in all), or recompute it from x - x_ref (one).
        offload: keep them in host memory.
        process_group: see `Reduction`.

    Attributes:
        slots: what is kept of each parameter.
        joined: whether a parameter has come since the last move: the base optimizer may have no state for it yet.
        newcomers: the parameters that have come since `Updater` last counted how many are new.
        packings: how often the parameters that take part, or their places in memory, were others than before.
        rescaled: α.
        eps: ε, added to the scale that a recomputed Δ is divided by.
    """

    def __init__(self, *, store_delta: bool, offload: bool = False, process_group: Any = None) -> None:
        self.store_delta = store_delta
        self.offload = offload
        self.process_group = process_group
        self.rescaled: float = 1.0
        self.eps: float = 1e-8
        self.slots: dict[Tensor, Slot] = {}
        self.joined: bool = False
        self.newcomers: set[Tensor] = set()
        self.packings: int = 0
        self._reduction: Reduction | None = None
        self._active: list[Slot] = []  # of the parameters that take part
        self._buckets: list[Bucket | Batch] = []  # of these
        self._key: list[int] = []  # identity and address of each

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_active": [], "_buckets": [], "_key": [], "_reduction": None}

    def refresh(self, parameters: list[Tensor], scale: Tensor, *, changed: bool = False) -> bool:
        """See who takes part in the coming step, and keep what others did to the parameters since the last.

        A parameter takes part while it requires or has a gradient; when it first does, it gets its x_ref. See
        `Slot.keep_change` for those that were changed.

        Args:
            parameters: those of the base optimizer.
            scale: the scale in force, 0-d.
            changed: take every parameter for changed; else its version counter and address tell.

        Returns:
            Whether a Δ starts again from zero, see `Slot.keep_change`.

        Raises:
            ValueError: two parameters share memory.
        """
        lost, touched = False, False
        active, key = [], []
        for parameter in parameters:
            slot = self.slots.get(parameter)
            if not parameter.requires_grad and parameter.grad is None:
                if slot is not None:
                    slot.leave()
                continue
            if slot is None:
                slot = self.slots[parameter] = self._slot(parameter)
                self.joined = True
                self.newcomers.add(parameter)
            elif changed or slot.away or slot.is_changed():
                lost |= slot.keep_change(self.rescaled * scale, self.rescaled, changed=changed)
                slot.away = False
                touched = True
            active.append(slot)
            key += (id(parameter), slot.address)
        if key != self._key or self._reduction is None:
            _check_apart(active)
            self._reduction = Reduction(parameters, self.process_group)
            self.slots = {parameter: self.slots[parameter] for parameter in parameters if parameter in self.slots}
            self._active, self._buckets, self._key = active, _pack(active, self._reduction), key
            self.packings += 1
        if touched:
            for bucket in self._buckets:
                bucket.forget()
        return lost

    def stay(self) -> None:
        """Note that the scale is replaced: parameters stay where they are, and the next `refresh` fits x_ref to it."""
        for slot in self.slots.values():
            slot.away = True

    def keep_changes(self, parameters: list[Tensor], scale: Tensor) -> bool:
        """Call `refresh` again if others have changed a parameter since the last call."""
        return any(slot.is_changed() for slot in self._active) and self.refresh(parameters, scale)

    def sums(self, scale: Tensor, *, complete: bool = True) -> Sums:
        """The four sums over the parameters that take part, on all ranks that they are spread over.

        Args:
            scale: the scale in force, 0-d. The sums are on its device, in its dtype.
            complete: whether all are needed; else all but <Δ, g> may be 0, and x need not be read.

        Raises:
            ValueError: a gradient is sparse.
        """
        assert self._reduction is not None
        parts = [(bucket.sums(complete=complete).to(scale), bucket.share) for bucket in self._buckets]
        weighted = [part if share == 1 else part * share for part, share in parts]
        total = weighted[0] if len(weighted) == 1 else torch.stack([scale.new_zeros(4), *weighted]).sum(0)
        delta_grad, delta_param, grad_square, param_square = self._reduction(total).unbind()
        if not self.store_delta:
            divisor = self.rescaled * scale + self.eps
            delta_grad, delta_param = delta_grad / divisor, delta_param / divisor
        return Sums(delta_grad, delta_param, grad_square, param_square)

    def backup(self) -> list[list[Tensor]] | None:
        """What must be kept of x over a base step: nothing if Δ is stored, else a copy of every parameter."""
        return None if self.store_delta else [bucket.backup() for bucket in self._buckets]

    def restore(self, before: list[list[Tensor]] | None, scale: Tensor) -> None:
        """Undo what a base step that failed did to the parameters.

        Args:
            before: from `backup`.
            scale: the scale in force, 0-d.
        """
        for slot in self._active:
            if slot.delta is not None:
                slot.settle()
                slot.write(point(slot.reference, slot.delta, (self.rescaled * scale).to(slot.reference.device)))
        for i, bucket in enumerate(self._buckets):
            if before is not None:
                for slot, x in zip(bucket.slots, bucket.split(before[i]), strict=True):
                    slot.write(x)
            bucket.forget()
        self._stamp()

    def check_memory(self) -> None:
        """Raise TypeError if a base step has put a parameter into other memory, where the move does not reach it."""
        if any(slot.is_moved() for slot in self._active):
            raise TypeError(
                "The optimizer's step put a parameter into new memory, as p.data = p.data - lr * p.grad does; expected "
                "one that writes in place. Have it do p.data.copy_(p.data - lr * p.grad). Nothing was changed."
            )

    def restart(self) -> None:
        """Have Δ start again from zero for all parameters, which stay where they are."""
        for slot in self.slots.values():
            slot.restart()
        for bucket in self._buckets:
            bucket.forget()

    def restart_away(self) -> None:
        """Have Δ start again from zero for the parameters that do not take part."""
        if len(self._active) < len(self.slots):
            for slot in self.slots.values():
                if slot.away:
                    slot.restart()

    def move(
        self,
        before: list[list[Tensor]] | None,
        old_scale: Tensor,
        scale: Tensor,
        finite: Tensor | None,
        restart: bool | Tensor,
    ) -> None:
        """Make what a base step did to the parameters their update u, and move them as (7') says.

        Args:
            before: from `backup`.
            old_scale: the scale in force before the step, 0-d.
            scale: the scale from now on, 0-d.
            finite: 0-d bool, ``False`` if the base step was skipped on the device, and x has to stay as it is.
            restart: whether Δ starts again from 0 after that; a 0-d bool where only the device knows.
        """
        weights = self._weights(old_scale, scale)
        for i, bucket in enumerate(self._buckets):
            start = None if before is None else before[i]
            bucket.move(start, *(_placed(value, bucket.device) for value in (weights, finite, restart)))
        self.joined = False
        self._stamp()

    def _stamp(self) -> None:
        """Note that we have written to all that take part, and have autograd refuse graphs of what they were before."""
        for slot in self._active:
            torch.autograd.graph.increment_version(local(slot.parameter))
        for slot in self._active:  # once none has a version to come: parts of one tensor share it
            slot.stamp()

    def _weights(self, old_scale: Tensor, scale: Tensor) -> Tensor:
        """As `kernels.plain.move` takes them."""
        old = self.rescaled * old_scale
        if not self.store_delta:
            old = old + self.eps
        return torch.stack([old, self.rescaled * scale, (1 - self.rescaled) * scale])

    def plan(self, optimizer: Any) -> Callable[[Tensor, Tensor, Tensor, bool | Tensor], None] | None:
        """The base optimizer's step and the move in one pass.

        Returns:
            A function of the scale in force, the scale from now on, whether the step is finite (0-d tensors; if
            not, nothing changes), and whether Δ restarts, as for `move`; or ``None`` if the base is not one that is
            covered, or has to set up state first.
        """
        plans = []
        for bucket in self._buckets:
            plan = bucket.plan(optimizer) if isinstance(bucket, Batch) and not self.joined and one_pass() else None
            if plan is None:
                return None
            plans.append((bucket.device, plan))

        def step(old_scale: Tensor, scale: Tensor, finite: Tensor, restart: bool | Tensor) -> None:
            weights = self._weights(old_scale, scale)
            for device, plan in plans:
                plan(*(_placed(value, device) for value in (weights, finite, restart)))
            self._stamp()

        return step if plans else None

    def first_sizes(self, before: list[list[Tensor]] | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """‖x‖² before a base step, ‖u‖² and the number of elements, over all ranks, 0-d; for the first steps of a run.

        Args:
            before: from `backup`.
            scale: the scale in force, 0-d.
        """
        assert self._reduction is not None
        total = scale.new_zeros(3)
        for i, bucket in enumerate(self._buckets):
            old = (self.rescaled * scale).to(bucket.device)
            starts = itertools.repeat(None) if before is None else bucket.split(before[i])
            for slot, start in zip(bucket.slots, starts, strict=False):
                total.add_(slot.first_sizes(start, old).to(total), alpha=bucket.share)
        return self._reduction(total).unbind()  # type: ignore

    def state(self, parameters: list[Tensor], scale: Tensor) -> dict[int, dict[str, Tensor]]:
        """Copies of x_ref (``"reference"``) and Δ (``"delta"``), of each parameter's shape, by its place.

        Args:
            parameters: those of the base optimizer.
            scale: the scale in force, 0-d.
        """
        for slot in self.slots.values():
            slot.settle()
            slot.give_up()
            if slot.away:
                slot.follow(self.rescaled * scale)
        return {
            i: {name: tensor.clone() for name, tensor in self.slots[parameter].tensors().items()}
            for i, parameter in enumerate(parameters)
            if parameter in self.slots and parameter not in self.newcomers  # who are to be new when it is loaded
        }

    def check_state(self, state: dict[int, dict[str, Tensor]], parameters: list[Tensor], names: list[Any]) -> None:
        """Raise ValueError unless `load_state` can take ``state``."""
        if state and max(state) >= len(parameters):
            raise ValueError(
                f"The state dict is of another model: it has {max(state) + 1} parameters or more, this one "
                f"{len(parameters)}."
            )
        expected = ["delta", "reference"] if self.store_delta else ["reference"]
        for i, tensors in state.items():
            if sorted(tensors) != expected:
                raise ValueError(
                    f"The state dict has {' and '.join(sorted(tensors)) or 'nothing'} of parameter {i}; expected "
                    f"{' and '.join(expected)} with store_delta={self.store_delta}. Build it as it was when saved, and "
                    "load all that was saved."
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
        self.slots, self.newcomers = {}, set()
        self._active, self._buckets, self._key = [], [], []
        for i, tensors in state.items():
            slot = self.slots[parameters[i]] = self._slot(parameters[i])
            slot.load(tensors)

    def _slot(self, parameter: Tensor) -> Slot:
        return Slot(parameter, store_delta=self.store_delta, offload=self.offload)


def _check_apart(active: list[Slot]) -> None:
    """Raise ValueError if two parameters share memory, which would be moved twice."""
    dense = [(slot.address, slot) for slot in active if slot.reference.numel() and slot.is_dense()]
    dense.sort(key=lambda pair: pair[0])
    for (address, slot), (following, other) in itertools.pairwise(dense):
        if following < address + slot.x().nbytes:
            if slot is other:
                raise ValueError(
                    f"A parameter of shape {tuple(slot.parameter.shape)} is in the optimizer twice; expected "
                    "once, as in AdamW(dict.fromkeys(parameters)). Nothing was changed."
                )
            shapes = " and ".join(str(tuple(one.parameter.shape)) for one in (slot, other))
            raise ValueError(
                f"Two parameters, of shapes {shapes}, share memory, as after out.weight.data = embedding.weight.data; "
                "expected one parameter in both places: out.weight = embedding.weight. Nothing was changed."
            )


def _pack(active: list[Slot], reduction: Reduction) -> list[Bucket | Batch]:
    """Group the parameters that take part, by device, dtype and share.

    Those of a group are one batch if the kernels of Triton take them. Else a large one is a part of its own, small ones
    share a part until it is large, and every few parts are a bucket.
    """
    batches: dict[Any, list[Slot]] = {}
    others: dict[Any, list[Slot]] = {}
    total: dict[torch.device, int] = {}  # of others
    for slot in active:
        x = local(slot.parameter)
        kind = (x.device, x.dtype, reduction.share(slot.parameter))
        if not slot.offload and in_tables(x) and slot.is_dense():
            batches.setdefault(kind, []).append(slot)
        else:
            others.setdefault(kind, []).append(slot)
            total[x.device] = total.get(x.device, 0) + slot.reference.numel()
    buckets: list[Bucket | Batch] = [Batch(slots, share) for (_, _, share), slots in batches.items()]
    for (device, _, share), slots in others.items():
        parts: list[list[Slot]] = []
        pack: list[Slot] = []
        packed = 0
        for slot in slots:
            if slot.reference.numel() >= PACK:
                parts.append([slot])
                continue
            if not pack:
                parts.append(pack)
            pack.append(slot)
            packed += slot.reference.numel()
            if packed >= 4 * PACK:
                pack, packed = [], 0
        made = [Part(some) for some in parts]
        buckets += [Bucket(made[i : i + FEW], device, share, total[device]) for i in range(0, len(made), FEW)]
    return buckets


def _joined(parts: list[Tensor]) -> Tensor:
    whole = torch.cat(parts)
    return whole.pin_memory() if any(part.is_pinned() for part in parts) else whole


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _placed(value: Any, device: torch.device) -> Any:
    """A tensor on a device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value
