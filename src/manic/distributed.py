"""Parameters that are spread over processes: their local shards, and the four sums over all of them.

Elementwise work is done on local shards. An element that several ranks hold counts once in the sums, so every rank's
part is weighted by its share; one all-reduce of four numbers then gives every rank the same sums, and the same scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's part of the gradient, laid out as the parameter is."""
    gradient: Any = parameter.grad
    if gradient is None or local(parameter) is parameter:
        return gradient
    like: Any = parameter
    if gradient.placements != like.placements:
        gradient = gradient.redistribute(placements=like.placements)
    return local(gradient)


def version(parameter: Tensor) -> int:
    """A number that grows with every in-place write: those to a ``DTensor`` count on it, ours on its local part."""
    return parameter._version + local(parameter)._version


def spread(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which ``part`` is this rank's part: a ``DTensor`` if the parameter is one."""
    if local(parameter) is parameter:
        return part
    from torch.distributed.tensor import DTensor

    like: Any = parameter
    if part.device.type != like.device_mesh.device_type:  # offloaded; from_local would move it to the mesh's devices
        spec = replace(like._spec, tensor_meta=like._spec.tensor_meta._replace(dtype=part.dtype))
        make: Any = DTensor
        return make(part, spec, requires_grad=False)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def local_part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `spread`: this rank's part of a saved tensor, which may be whole or laid out in another way."""
    if local(parameter) is parameter:
        return local(tensor)
    from torch.distributed.tensor import DTensor, distribute_tensor

    like: Any = parameter
    if not isinstance(tensor, DTensor):
        return local(distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements))
    return local(tensor.redistribute(like.device_mesh, like.placements))


class Reduction:
    """How this rank's sums become those of the model.

    Args:
        parameters: of the base optimizer.
        process_group: the ranks over which the model is spread, with plain parameters being shards, too, as in
            FSDP1. ``None``: if a parameter is a ``DTensor``, all ranks, with plain parameters whole on each; else none.
    """

    def __init__(self, parameters: list[Tensor], process_group: Any) -> None:
        self._plain_are_shards = process_group is not None
        if process_group is None and any(local(parameter) is not parameter for parameter in parameters):
            process_group = torch.distributed.group.WORLD
        self._group = process_group
        self._size = 1 if process_group is None else torch.distributed.get_world_size(process_group)

    def share(self, parameter: Tensor) -> float:
        """One over the number of ranks that hold the same elements as this one."""
        if self._group is None:
            return 1.0
        if local(parameter) is parameter:
            return 1.0 if self._plain_are_shards else 1.0 / self._size
        like: Any = parameter
        shards = 1
        for dim, placement in enumerate(like.placements):
            if not placement.is_replicate():
                shards *= like.device_mesh.size(dim)
        return shards / self._size

    def __call__(self, sums: Tensor) -> Tensor:
        """The sums over all ranks, in place; every rank must call this."""
        if self._group is not None:
            torch.distributed.all_reduce(sums, group=self._group)
        return sums
