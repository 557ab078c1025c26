"""The list learner: from losses of many settings on many tasks to the order in which to try them."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LearnedList(NamedTuple):
    """An order in which to try settings.

    Attributes:
        order: columns of the table of losses, the one to be tried first at the front.
        mean_losses: of the same length; after so many trials, the best normalized loss so far, averaged over the tasks.
    """

    order: list[int]
    mean_losses: list[float]


def learn_list(losses: Any, initial_losses: Any = None, k: int | None = None) -> LearnedList:
    """Order settings greedily, so that the best of the first few is good on as many tasks as possible.

    The first is the setting with the least mean loss; each next one is that which, tried after those before it,
    lowers the mean of the best loss so far the most. Losses are normalized per task: 0 is the best of the table,
    1 the loss before training, and everything worse, or not finite, counts as 1.

    Args:
        losses: final losses, tasks × settings: nested lists, an array or a tensor. NaN and infinity mean that the
            training failed.
        initial_losses: loss of every task before training; ``None`` takes the worst finite one of the task's row.
        k: how many settings to order, the rest being left out; ``None`` for all.

    Raises:
        ValueError: the losses are no table of numbers, a task has no finite one, or ``k`` is out of range.

    Source:
        arXiv:2002.11887, which learned the list of this package in this way.

    Example:
        >>> losses = [[0.1, 0.2, 0.9], [0.9, 0.3, 0.1]]  # 2 tasks, 3 settings: the second is never bad
        >>> learn_list(losses, initial_losses=[1.0, 1.0]).order
        [1, 2, 0]
    """
    try:
        table = torch.as_tensor(losses, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"losses is {losses!r:.60}; expected numbers, tasks × settings ({error}).") from error
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"losses has shape {tuple(table.shape)}; expected tasks × settings, at least one of each.")
    k = table.shape[1] if k is None else k
    if not isinstance(k, numbers.Integral) or not 1 <= k <= table.shape[1]:
        raise ValueError(f"k is {k!r}; expected 1 to {table.shape[1]}, the number of settings in losses.")
    table = _normalized(table, initial_losses)
    best = torch.ones(table.shape[0], 1, dtype=table.dtype)
    order, mean_losses = [], []
    for _ in range(k):
        means = torch.minimum(best, table).mean(0)
        means[order] = torch.inf
        chosen = int(means.argmin())
        best = torch.minimum(best, table[:, chosen : chosen + 1])
        order.append(chosen)
        mean_losses.append(float(best.mean()))
    return LearnedList(order, mean_losses)


def _normalized(table: Tensor, initial_losses: Any) -> Tensor:
    """Every row mapped so that its least loss is 0 and the initial one 1; all that is worse is 1."""
    finite = table.isfinite()
    if not finite.any(1).all():
        task = int((~finite.any(1)).nonzero()[0])
        raise ValueError(f"Task {task} has no finite loss; expected at least one. Leave the task out.")
    least = table.where(finite, torch.inf).amin(1, keepdim=True)
    if initial_losses is None:
        top = table.where(finite, -torch.inf).amax(1, keepdim=True)
    else:
        top = torch.as_tensor(initial_losses, dtype=table.dtype)
        if top.shape != table.shape[:1] or not top.isfinite().all():
            raise ValueError(
                f"initial_losses is {initial_losses!r}; expected a finite number for each of {table.shape[0]} tasks."
            )
        top = top.unsqueeze(1)
    spread = (top - least).clamp(min=torch.finfo(table.dtype).tiny)
    return ((table - least) / spread).where(finite & (table <= top), 1.0)
