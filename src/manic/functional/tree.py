"""Trees of tensors: any nesting of containers that ``torch.utils._pytree`` knows, such as dicts and NamedTuples."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

Tree = Any  # a tensor, or a container of trees
Number = float | Tensor  # a number, or a 0-d tensor, whose value is not read and so not checked


def map_leaves(rule: Callable[..., tuple[Tensor, ...]], params: Tree, grads: Tree, *states: Tree) -> tuple[Tree, ...]:
    """Apply ``rule(x, g, *s) -> (x, *s)`` to every parameter, its gradient and its state.

    Args:
        rule: pure. What it returns is cast to the dtypes of the ``x`` and ``s`` that it got.
        params: a tree of real floating-point tensors.
        grads: a tree like ``params``, of the same shapes.
        states: more trees like ``params``.

    Returns:
        The new ``params`` and ``states``.

    Raises:
        TypeError: a leaf of ``params`` is not a real floating-point tensor, or one of ``grads`` not a tensor.
        ValueError: the trees are not alike.
    """
    leaves, spec = tree_flatten(params)
    gradients = _leaves("grads", grads, spec)
    columns = [_leaves("state", tree, spec) for tree in states]
    new: list[list[Tensor]] = [[] for _ in range(1 + len(states))]
    for i, (x, g, *s) in enumerate(zip(leaves, gradients, *columns, strict=True)):
        if not isinstance(g, Tensor) or g.shape != x.shape:
            raise _unfit_gradient(params, i, x, g)
        if not all(isinstance(tensor, Tensor) and tensor.shape == x.shape for tensor in s):
            raise _unfit_state(params, i, x, s)
        for column, after, before in zip(new, rule(x, g, *s), (x, *s), strict=True):
            column.append(after.to(before.dtype))
    return tuple(tree_unflatten(column, spec) for column in new)


def tree_where(condition: Tensor, tree: Tree, other: Tree) -> Tree:
    """``torch.where`` on every leaf, to choose between two outcomes of a step without waiting for the device.

    Args:
        condition: 0-d bool.
        tree: taken where it is true.
        other: taken where it is false; of the same structure and shapes.

    Example:
        >>> import torch
        >>> tree_where(torch.tensor(False), {"w": torch.ones(2)}, {"w": torch.zeros(2)})
        {'w': tensor([0., 0.])}
    """
    return tree_map(lambda yes, no: torch.where(condition, yes, no), tree, other)


def alike(tree: Tree, other: Tree) -> bool:
    """Whether two trees have the same structure, and at every place a tensor of the same shape."""
    (leaves, spec), (others, expected) = tree_flatten(tree), tree_flatten(other)
    pairs = zip(leaves, others, strict=True)
    return spec == expected and all(isinstance(leaf, Tensor) and leaf.shape == like.shape for leaf, like in pairs)


def check_params(params: Tree) -> torch.device:
    """The device of the first parameter.

    Raises:
        TypeError: a leaf is not a real floating-point tensor.
        ValueError: there are no leaves.
    """
    leaves = tree_flatten_with_path(params)[0]
    if not leaves:
        raise ValueError("params has no tensors; expected at least one, as in dict(model.named_parameters()).")
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(
                f"params{keystr(path)} is {_described(leaf)}; expected a real floating-point tensor. "
                "Leave out what is not trained, and pass complex parameters as torch.view_as_real(tensor)."
            )
    return leaves[0][1].device


def check_number(name: str, value: Number, expected: str, inside: Callable[[float], bool]) -> None:
    """Raise TypeError or ValueError unless the argument of that name is a number inside its range, or a 0-d tensor."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected a number or a 0-d tensor. "
                "To give each of many models its own, build the config inside a torch.func.vmap over it."
            )
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; expected {expected}.")
    elif not inside(value):
        raise ValueError(f"{name} is {value!r}; expected {expected}.")


def _leaves(name: str, tree: Tree, spec: TreeSpec) -> list[Any]:
    try:
        return spec.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"{name} is not a tree like params: {error}") from error


def _unfit_gradient(params: Tree, i: int, x: Tensor, g: Any) -> Exception:
    path = keystr(tree_flatten_with_path(params)[0][i][0])
    message = f"grads{path} is {_described(g)}; expected a tensor of shape {tuple(x.shape)}, as params{path}."
    if isinstance(g, Tensor):
        return ValueError(message)
    return TypeError(message + " Pass zeros for a parameter that the loss does not use.")


def _unfit_state(params: Tree, i: int, x: Tensor, s: list[Any]) -> ValueError:
    path = keystr(tree_flatten_with_path(params)[0][i][0])
    return ValueError(
        f"The state of params{path} is {', '.join(map(_described, s))}; expected tensors of shape {tuple(x.shape)}, as "
        f"params{path}. Is it of another model, or of other options?"
    )


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"a {leaf.dtype} tensor of shape {tuple(leaf.shape)}"
    return "None" if leaf is None else f"of type {type(leaf).__name__}"
