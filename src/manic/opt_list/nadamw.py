"""`NAdamW`: the optimizer of the list, with its schedule inside."""

# pyright: reportPrivateImportUsage=false
# torch's own optimizers are made of the _foreach and _fused operations; torch has no public names for them.

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.opt_list.configs import check_training_steps, config_for_idx, lr_factor
from manic.warn import warn

Tensors = list[Tensor]
Bucket = tuple[Tensors, Tensors, Tensors, Tensors]  # x, g, m and v of parameters that are stepped together


class NAdamW(Optimizer):
    """Adam with Nesterov's look-ahead, both kinds of weight decay and a schedule, as the list uses it.

    With x the parameters, g their gradient, t = 1, 2, … the step of a parameter, and lr(t) the scheduled rate::

        g ← g - l2 · x                                      # the sign as published
        m ← β1 m + (1 - β1) g
        v ← β2 v + (1 - β2) g²
        lr_t = lr(t) · sqrt(1 - β2^t) / (1 - β1^t)
        x ← x - lr_t · (β1 m + (1 - β1) g  if nesterov else m) / (sqrt(v) + ε) - lr_t · decay · x

    It differs from ``torch.optim.NAdam`` and ``AdamW`` in ε, which is added before the bias correction, in the decay,
    which is multiplied by the corrected rate, and in the look-ahead, which has no momentum schedule.
    It differs from the published implementation in one thing: the schedule is at the step of the parameter group,
    not at the one of each parameter, so that a parameter that joins late or misses steps decays with the others.

    The schedule multiplies ``lr``, so that one of ``torch.optim.lr_scheduler`` may come on top. After
    ``training_steps`` the last rate stays, and a warning is given once. `manic.Updater` may take this optimizer for its
    base; it cannot see this schedule: give it a ``LambdaLR`` of `Config.lr_factor`, and here ``training_steps=None``.

    Args:
        params: parameters or groups of them; a group may have its own value of every argument but the last two.
        lr: the largest learning rate, ≥ 0.
        betas: β1 and β2, each in [0, 1).
        eps: ε > 0.
        decoupled_weight_decay: decay of the last line above, ≥ 0.
        l2_weight_decay: l2 of the first line above, ≥ 0. The sign is the published one, which the list was learned
            with: it lets weights grow.
        nesterov: whether the step looks ahead.
        training_steps: how many steps the schedule is laid out over; ``None`` for no schedule, lr(t) = lr.
        warmup_fraction, constant_fraction, final_lr_fraction: the schedule, see `Config`.
        maximize: ascend instead.
        foreach: a few operations on all tensors at a time, else tensor by tensor; the same up to rounding. It needs
            temporaries as large as the model.
        fused: let torch's fused AdamW kernel do the pass, on devices that have one. With ``nesterov`` it takes a
            pass more, as the kernel has no look-ahead of this kind.

    The averages have the parameters' dtype, as torch's own optimizers'.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv:2002.11887, and the implementation published with it.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = NAdamW([weight], lr=0.1, nesterov=True, training_steps=100)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> bool(weight.abs().max() < 0.1)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        decoupled_weight_decay: float = 0.0,
        l2_weight_decay: float = 0.0,
        nesterov: bool = False,
        training_steps: int | None = None,
        warmup_fraction: float = 0.0,
        constant_fraction: float = 0.0,
        final_lr_fraction: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        fused: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l2_weight_decay": l2_weight_decay,
            "nesterov": nesterov,
            "training_steps": None if training_steps is None else check_training_steps(training_steps),
            "warmup_fraction": warmup_fraction,
            "constant_fraction": constant_fraction,
            "final_lr_fraction": final_lr_fraction,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its schedule starts where that of the first group stands.

        Raises:
            ValueError: one of its options is out of range.
        """
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("step", self.param_groups[0].get("step", 0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model and returns the loss.

        Returns:
            The loss, if a closure was given.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise RuntimeError(
                    f"The gradient of a parameter of shape {tuple(parameter.shape)} is sparse; expected a dense one. "
                    "Build the layer with sparse=False. Nothing was changed."
                )
        for group in self.param_groups:
            lr = group["lr"] * self._lr_factor(group)
            group["step"] += 1
            beta1, beta2 = group["betas"]
            for t, fused, bucket in self._buckets(group):
                update = _fused if fused else _foreach if group["foreach"] else _single_tensor
                update(bucket, lr * math.sqrt(1 - beta2**t) / (1 - beta1**t), group)
        return loss

    def _lr_factor(self, group: dict[str, Any]) -> float:
        if group["training_steps"] is None:
            return 1.0
        if group["step"] == group["training_steps"]:
            warn(
                f"This is step {group['step'] + 1} of a schedule of training_steps={group['training_steps']}: the "
                f"learning rate stays at its end, {group['final_lr_fraction']:g} × lr. Give the number of steps of the "
                "whole training when you build the optimizer."
            )
        schedule = (group[name] for name in ("warmup_fraction", "constant_fraction", "final_lr_fraction"))
        return lr_factor(group["step"], group["training_steps"], *schedule)

    def _buckets(self, group: dict[str, Any]) -> list[tuple[int, bool, Bucket]]:
        """The parameters that have a gradient, by those that can be stepped together.

        With their t, and whether torch's fused kernel may step them: it reads tensors in the order of their memory.
        """
        buckets: dict[tuple[torch.device, torch.dtype, int, bool], Bucket] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] += 1
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            fused = group["fused"] and all(tensor.stride() == parameter.stride() for tensor in tensors)
            bucket = buckets.setdefault((parameter.device, parameter.dtype, state["step"], fused), ([], [], [], []))
            for column, tensor in zip(bucket, tensors, strict=True):
                column.append(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
        return [(t, fused, bucket) for (_, _, t, fused), bucket in buckets.items()]


def optimizer_for_idx(
    params: Iterable[Any], idx: int, training_steps: int | None, *, foreach: bool = True, fused: bool = False
) -> NAdamW:
    """The list's optimizer of that place, its schedule laid out over the training.

    Args:
        params: parameters or groups of them, as for `NAdamW`.
        idx: place in the list, 0 … 99; 0 is the first to try.
        training_steps: number of ``step()`` calls of the whole training; ``None`` for no schedule.
        foreach, fused: see `NAdamW`.

    Raises:
        TypeError: ``idx`` is not a whole number.
        ValueError: the list has no such place, or ``training_steps`` is not a whole number ≥ 1.

    Source:
        arXiv:2002.11887, and the list published with it.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = optimizer_for_idx(model.parameters(), idx=0, training_steps=2)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     optimizer.step()
    """
    return NAdamW(params, **asdict(config_for_idx(idx)), training_steps=training_steps, foreach=foreach, fused=fused)


# One pass over the tensors of a bucket, three times: the plain one to read, and two that are fast.
# lr_t is the rate of the step, bias correction included.


def _single_tensor(bucket: Bucket, lr_t: float, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for x, g, m, v in zip(*bucket, strict=True):
        g = -g if group["maximize"] else g
        g = g - group["l2_weight_decay"] * x
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        direction = beta1 * m + (1 - beta1) * g if group["nesterov"] else m
        x.sub_(lr_t * (direction / (v.sqrt() + group["eps"]) + group["decoupled_weight_decay"] * x))


def _foreach(bucket: Bucket, lr_t: float, group: dict[str, Any]) -> None:
    xs, gs, ms, vs = bucket
    beta1, beta2 = group["betas"]
    gs = _gradients(xs, gs, group)
    torch._foreach_lerp_(ms, gs, 1 - beta1)
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)
    directions = torch._foreach_lerp(gs, ms, beta1) if group["nesterov"] else ms
    denominators = torch._foreach_sqrt(vs)
    torch._foreach_add_(denominators, group["eps"])
    if group["decoupled_weight_decay"]:
        torch._foreach_mul_(xs, 1 - lr_t * group["decoupled_weight_decay"])
    torch._foreach_addcdiv_(xs, directions, denominators, -lr_t)


def _fused(bucket: Bucket, lr_t: float, group: dict[str, Any]) -> None:
    """Torch's kernel, told that the step is its first: its own bias correction is then constant, and divided out.

    For the look-ahead it is given m after its update, and so averages g in once more.
    """
    xs, gs, ms, vs = bucket
    beta1, beta2 = group["betas"]
    root = math.sqrt(1 - beta2)
    gs = _gradients(xs, gs, group)
    if group["nesterov"]:
        torch._foreach_lerp_(ms, gs, 1 - beta1)
        ms = [m.clone() for m in ms]
    torch._fused_adamw_(
        xs,
        gs,
        ms,
        vs,
        [],
        [torch.ones((), device=xs[0].device)] * len(xs),
        lr=lr_t * (1 - beta1) / root,
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["decoupled_weight_decay"] * root / (1 - beta1),
        eps=group["eps"] / root,
        amsgrad=False,
        maximize=False,
    )


def _gradients(xs: Tensors, gs: Tensors, group: dict[str, Any]) -> Tensors:
    """The gradients with maximize and l2 taken in; those given are not written."""
    if group["maximize"]:
        gs = list(torch._foreach_neg(gs))
    if group["l2_weight_decay"]:
        gs = list(torch._foreach_add(gs, xs, alpha=-group["l2_weight_decay"]))
    return gs


def _check(group: dict[str, Any]) -> None:
    """Raise ValueError unless every option of a group is in its range."""
    if not isinstance(group["betas"], Sequence) or len(group["betas"]) != 2:
        raise ValueError(f"betas is {group['betas']!r}; expected a pair of numbers in [0, 1).")
    options = {**group, "betas[0]": group["betas"][0], "betas[1]": group["betas"][1]}
    for names, fits, expected in (
        (("lr", "decoupled_weight_decay", "l2_weight_decay"), lambda x: 0 <= x < math.inf, "a finite number ≥ 0"),
        (("eps",), lambda x: 0 < x < math.inf, "a finite number > 0"),
        (("betas[0]", "betas[1]", "constant_fraction"), lambda x: 0 <= x < 1, "a number in [0, 1)"),
        (("warmup_fraction", "final_lr_fraction"), lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    ):
        for name in names:
            value = options[name]
            if not isinstance(value, numbers.Real) or not fits(value):
                raise ValueError(f"{name} is {value!r}; expected {expected}.")
    if group["training_steps"] is not None:
        check_training_steps(group["training_steps"])
