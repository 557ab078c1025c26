"""Optimizers as pure functions.

An optimizer is three things, and ``OPTIMIZERS`` names them for each:

- a config, a frozen dataclass of hyperparameters, checked once. A number in it may be a 0-d tensor, so that
  ``torch.func.vmap`` can give every model its own, and a schedule does not make ``torch.compile`` compile again;
- ``init(params, config) -> state``, a NamedTuple of trees of tensors;
- ``step(params, grads, state, config) -> (params, state)``, which writes to none of its arguments.

``params`` is any tree (a dict, a list, a tensor, …) of real floating-point tensors on one device. The steps can be
differentiated; give them tensors that require no gradient (``tensor.detach()``) when you do not want that.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from manic.functional.tree import Number, Tree, check_number, check_params, map_leaves
from manic.kernels.plain import scale_dtype


@dataclass(frozen=True, kw_only=True)
class SGDConfig:
    """Stochastic gradient descent, as ``torch.optim.SGD``.

    Args:
        lr: learning rate, ≥ 0.
        momentum: share of the buffer that is kept each step, in [0, 1); with 0 there is no buffer.
        dampening: share of the gradient that does not enter the buffer, in [0, 1]; the first gradient enters whole.
        weight_decay: times x is added to the gradient, ≥ 0.
        nesterov: step along g + momentum · buffer; needs momentum > 0 and dampening 0.
        maximize: go up the gradient.

    Raises:
        ValueError: an argument is outside its range.
    """

    lr: Number
    momentum: Number = 0.0
    dampening: Number = 0.0
    weight_decay: Number = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        _check_at_least_0(lr=self.lr, weight_decay=self.weight_decay)
        _check_below_1(momentum=self.momentum)
        check_number("dampening", self.dampening, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        if self.nesterov and (not _on(self.momentum) or _on(self.dampening)):
            raise ValueError(
                f"nesterov=True with momentum={self.momentum} and dampening={self.dampening}; "
                "expected momentum > 0 and dampening 0."
            )


class SGDState(NamedTuple):
    """``step``, 0-d, the steps taken; ``momentum_buffer``, a tree like the parameters, or () without momentum."""

    step: Tensor
    momentum_buffer: Tree = ()


def sgd_init(params: Tree, config: SGDConfig) -> SGDState:
    """The state before the first step."""
    _check_config(config, SGDConfig)
    return SGDState(_no_steps(params), _zeros(params) if _on(config.momentum) else ())


def sgd_step(params: Tree, grads: Tree, state: SGDState, config: SGDConfig) -> tuple[Tree, SGDState]:
    """One step of SGD, Nesterov's included: Sutskever et al., ICML 2013, in the form of ``torch.optim.SGD``.

    Example:
        >>> import torch
        >>> config = SGDConfig(lr=0.25)
        >>> params = {"w": torch.tensor([1.0, -2.0])}
        >>> params, state = sgd_step(params, {"w": torch.tensor([2.0, 0.0])}, sgd_init(params, config), config)
        >>> params
        {'w': tensor([ 0.5000, -2.0000])}
    """
    _check_kinds(state, SGDState, config, SGDConfig)
    share = 1 - config.dampening * state.step.clamp(max=1) if _on(config.dampening) else 1.0

    def rule(x: Tensor, g: Tensor, *buffer: Tensor) -> tuple[Tensor, ...]:
        g = _signed(g, config.maximize)
        if _on(config.weight_decay):
            g = g + config.weight_decay * x
        if buffer:
            buffer = (config.momentum * buffer[0] + share * g,)
            g = g + config.momentum * buffer[0] if config.nesterov else buffer[0]
        return x - config.lr * g, *buffer

    buffer = (state.momentum_buffer,) if _on(config.momentum) else ()
    params, *buffer = map_leaves(rule, params, grads, *buffer)
    return params, SGDState(state.step + 1, *buffer)


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam in three forms, which differ in what their step does with ``weight_decay``.

    ==================  =========================================  ==============================================
    name                weight decay                               counterpart
    ==================  =========================================  ==============================================
    ``adam``            g ← g + weight_decay · x                   ``torch.optim.Adam``
    ``adamw``           x ← x - lr · weight_decay · x              ``torch.optim.AdamW``, whose default is 1e-2
    ``adam_decoupled``  x ← x - weight_decay · x, whatever the lr  Loshchilov & Hutter, Algorithm 2, at η_t = 1
    ==================  =========================================  ==============================================

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the averages of g and g², each in [0, 1).
        eps: added to the root of the average of g², ≥ 0.
        weight_decay: see above, ≥ 0. To have the third form follow a schedule, scale this with it as well as lr.
        amsgrad: divide by the root of the largest average of g² so far.
        maximize: go up the gradient.

    Raises:
        ValueError: an argument is outside its range.
    """

    lr: Number = 1e-3
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        _check_at_least_0(lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        _check_betas(self.betas)


class AdamState(NamedTuple):
    """``step``, 0-d, the steps taken; the others are trees like the parameters, the last () unless amsgrad is on."""

    step: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree = ()


def adam_init(params: Tree, config: AdamConfig) -> AdamState:
    """The state of any of the three forms before the first step."""
    _check_config(config, AdamConfig)
    return AdamState(_no_steps(params), _zeros(params), _zeros(params), _zeros(params) if config.amsgrad else ())


def adam_step(params: Tree, grads: Tree, state: AdamState, config: AdamConfig) -> tuple[Tree, AdamState]:
    """One step of Adam, with the decay in the gradient. Source: Kingma & Ba, arXiv:1412.6980, Algorithm 1.

    Example:
        >>> import torch
        >>> config = AdamConfig(lr=0.25)
        >>> params = [torch.tensor([1.0, -2.0])]
        >>> params, state = adam_step(params, [torch.tensor([4.0, 0.0])], adam_init(params, config), config)
        >>> params
        [tensor([ 0.7500, -2.0000])]
    """
    _check_kinds(state, AdamState, config, AdamConfig)
    return _adam(params, grads, state, config, l2=config.weight_decay, decay=0.0)


def adamw_step(params: Tree, grads: Tree, state: AdamState, config: AdamConfig) -> tuple[Tree, AdamState]:
    """One step of AdamW, with the decay apart. Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2.

    Example:
        >>> import torch
        >>> config = AdamConfig(lr=0.5, weight_decay=0.5)
        >>> params = torch.tensor([1.0, -2.0])
        >>> adamw_step(params, torch.zeros(2), adam_init(params, config), config)[0]
        tensor([ 0.7500, -1.5000])
    """
    _check_kinds(state, AdamState, config, AdamConfig)
    decay = config.lr * config.weight_decay if _on(config.weight_decay) else 0.0
    return _adam(params, grads, state, config, l2=0.0, decay=decay)


def adam_decoupled_step(params: Tree, grads: Tree, state: AdamState, config: AdamConfig) -> tuple[Tree, AdamState]:
    """One step of fully decoupled Adam: a decay that the learning rate does not change.

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2, whose decay is not multiplied by the learning rate α.

    Example:
        >>> import torch
        >>> config = AdamConfig(lr=0.5, weight_decay=0.5)
        >>> params = torch.tensor([1.0, -2.0])
        >>> adam_decoupled_step(params, torch.zeros(2), adam_init(params, config), config)[0]
        tensor([ 0.5000, -1.0000])
    """
    _check_kinds(state, AdamState, config, AdamConfig)
    return _adam(params, grads, state, config, l2=0.0, decay=config.weight_decay)


def _adam(
    params: Tree, grads: Tree, state: AdamState, config: AdamConfig, *, l2: Number, decay: Number
) -> tuple[Tree, AdamState]:
    beta1, beta2 = config.betas
    step = state.step + 1
    step_size = config.lr / (1 - beta1**step)
    root = (1 - beta2**step).sqrt()

    def rule(x: Tensor, g: Tensor, m: Tensor, v: Tensor, *largest: Tensor) -> tuple[Tensor, ...]:
        g = _signed(g, config.maximize)
        if _on(l2):
            g = g + l2 * x
        if _on(decay):
            x = x - decay * x
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        largest = tuple(torch.maximum(old, v) for old in largest)
        (square,) = largest or (v,)
        return x - step_size * m / (square.sqrt() / root + config.eps), m, v, *largest

    largest = (state.max_exp_avg_sq,) if config.amsgrad else ()
    params, *trees = map_leaves(rule, params, grads, state.exp_avg, state.exp_avg_sq, *largest)
    return params, AdamState(step, *trees)


@dataclass(frozen=True, kw_only=True)
class LARSConfig:
    """Layer-wise adaptive rate scaling: every tensor of the tree is a layer with a rate of its own.

    Args:
        lr: global learning rate γ, ≥ 0.
        momentum: m, in [0, 1).
        weight_decay: β, ≥ 0.
        trust_coefficient: η > 0, how far a layer may move in one step, relative to its norm.

    Raises:
        ValueError: an argument is outside its range.
    """

    lr: Number
    momentum: Number = 0.9
    weight_decay: Number = 0.0
    trust_coefficient: Number = 1e-3

    def __post_init__(self) -> None:
        _check_at_least_0(lr=self.lr, weight_decay=self.weight_decay)
        _check_below_1(momentum=self.momentum)
        check_number("trust_coefficient", self.trust_coefficient, "a number > 0", lambda x: x > 0)


class LARSState(NamedTuple):
    """``momentum_buffer``, a tree like the parameters; the learning rate is inside it, as in the paper."""

    momentum_buffer: Tree


def lars_init(params: Tree, config: LARSConfig) -> LARSState:
    """The state before the first step."""
    _check_config(config, LARSConfig)
    check_params(params)
    return LARSState(_zeros(params))


def lars_step(params: Tree, grads: Tree, state: LARSState, config: LARSConfig) -> tuple[Tree, LARSState]:
    """One step of LARS. Source: You, Gitman, Ginsburg, arXiv:1708.03888, Algorithm 1.

    For each layer, λ = η ‖x‖ / (‖g‖ + β ‖x‖), v ← m v + γ λ (g + β x), x ← x - v. The paper does not say what λ is
    where ‖x‖ = 0, as in a bias at its start, or where the divisor is 0: it is 1 here.

    Example:
        >>> import torch
        >>> config = LARSConfig(lr=1.0, trust_coefficient=0.5)
        >>> params = torch.tensor([3.0, 4.0])
        >>> lars_step(params, torch.tensor([0.0, 0.1]), lars_init(params, config), config)[0]  # moves by η‖x‖
        tensor([3.0000, 1.5000])
    """
    _check_kinds(state, LARSState, config, LARSConfig)

    def rule(x: Tensor, g: Tensor, buffer: Tensor) -> tuple[Tensor, ...]:
        norm = torch.linalg.vector_norm(x)
        divisor = torch.linalg.vector_norm(g) + config.weight_decay * norm
        known = (norm > 0) & (divisor > 0)
        ratio = norm / torch.where(known, divisor, 1.0)  # without a division by 0, whose derivative would be NaN
        layer_rate = torch.where(known, config.trust_coefficient * ratio, 1.0)
        buffer = config.momentum * buffer + config.lr * layer_rate * (g + config.weight_decay * x)
        return x - buffer, buffer

    params, buffer = map_leaves(rule, params, grads, state.momentum_buffer)
    return params, LARSState(buffer)


@dataclass(frozen=True, kw_only=True)
class NAdamWConfig:
    """Adam with Nesterov's momentum and two kinds of weight decay, as in the learned list of hyperparameters.

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the averages of g and g², each in [0, 1).
        eps: added to the root of the average of g², ≥ 0. The root is of the average as it is; its correction
            for the start is part of the rate.
        l2_weight_decay: times x is *subtracted* from the gradient, the sign with which the list was made; ≥ 0.
        decoupled_weight_decay: times the corrected rate times x is subtracted from x, ≥ 0.
        nesterov: step along β1 · m + (1 - β1) · g, not along m.

    Raises:
        ValueError: an argument is outside its range.
    """

    lr: Number = 1e-3
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    l2_weight_decay: Number = 0.0
    decoupled_weight_decay: Number = 0.0
    nesterov: bool = True

    def __post_init__(self) -> None:
        _check_at_least_0(
            lr=self.lr,
            eps=self.eps,
            l2_weight_decay=self.l2_weight_decay,
            decoupled_weight_decay=self.decoupled_weight_decay,
        )
        _check_betas(self.betas)


def nadamw_init(params: Tree, config: NAdamWConfig) -> AdamState:
    """The state before the first step."""
    _check_config(config, NAdamWConfig)
    return AdamState(_no_steps(params), _zeros(params), _zeros(params))


def nadamw_step(params: Tree, grads: Tree, state: AdamState, config: NAdamWConfig) -> tuple[Tree, AdamState]:
    """One step of NAdamW. Source: Metz et al., arXiv:2002.11887, and its published list; Dozat, ICLR workshop 2016.

    Example:
        >>> import torch
        >>> config = NAdamWConfig(lr=0.25, nesterov=False)
        >>> params = torch.tensor([1.0, -2.0])
        >>> nadamw_step(params, torch.tensor([4.0, 0.0]), nadamw_init(params, config), config)[0]
        tensor([ 0.7500, -2.0000])
    """
    _check_kinds(state, AdamState, config, NAdamWConfig)
    beta1, beta2 = config.betas
    step = state.step + 1
    step_size = config.lr * (1 - beta2**step).sqrt() / (1 - beta1**step)

    def rule(x: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if _on(config.l2_weight_decay):
            g = g - config.l2_weight_decay * x
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        direction = (beta1 * m + (1 - beta1) * g if config.nesterov else m) / (v.sqrt() + config.eps)
        if _on(config.decoupled_weight_decay):
            direction = direction + config.decoupled_weight_decay * x
        return x - step_size * direction, m, v

    params, exp_avg, exp_avg_sq = map_leaves(rule, params, grads, state.exp_avg, state.exp_avg_sq)
    return params, AdamState(step, exp_avg, exp_avg_sq)


class Optimizer(NamedTuple):
    """The three parts of a functional optimizer."""

    config: Callable[..., Any]  # the class of its config
    init: Callable[[Tree, Any], Any]  # (params, config) -> state
    step: Callable[[Tree, Tree, Any, Any], tuple[Tree, Any]]  # (params, grads, state, config) -> (params, state)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(SGDConfig, sgd_init, sgd_step),
    "adam": Optimizer(AdamConfig, adam_init, adam_step),
    "adamw": Optimizer(AdamConfig, adam_init, adamw_step),
    "adam_decoupled": Optimizer(AdamConfig, adam_init, adam_decoupled_step),
    "lars": Optimizer(LARSConfig, lars_init, lars_step),
    "nadamw": Optimizer(NAdamWConfig, nadamw_init, nadamw_step),
}


def _no_steps(params: Tree) -> Tensor:
    """A step count of 0: a float, wide enough that the powers of β are exact."""
    device = check_params(params)
    return torch.zeros((), device=device, dtype=scale_dtype(device))


def _zeros(params: Tree) -> Tree:
    return tree_map(torch.zeros_like, params)


def _signed(g: Tensor, maximize: bool) -> Tensor:
    return -g if maximize else g


def _on(value: Number) -> bool:
    """Whether an option takes part; that of a tensor always does, for its value is not read."""
    return isinstance(value, Tensor) or value != 0


def _check_config(config: Any, kind: type) -> None:
    if not isinstance(config, kind):
        given = f"the class {config.__name__}" if isinstance(config, type) else f"of type {type(config).__name__}"
        raise TypeError(f"config is {given}; expected an object of {kind.__name__}, as in {kind.__name__}(lr=1.0).")


def _check_kinds(state: Any, state_kind: type, config: Any, config_kind: type) -> None:
    _check_config(config, config_kind)
    if not isinstance(state, state_kind):
        raise TypeError(
            f"state is of type {type(state).__name__}; expected the {state_kind.__name__} that the init beside this "
            "step returned, or the last step."
        )


def _check_at_least_0(**values: Number) -> None:
    for name, value in values.items():
        check_number(name, value, "a finite number >= 0", lambda x: 0 <= x < float("inf"))


def _check_below_1(**values: Number) -> None:
    for name, value in values.items():
        check_number(name, value, "a number in [0, 1)", lambda x: 0 <= x < 1)


def _check_betas(betas: tuple[Number, Number]) -> None:
    if not isinstance(betas, Sized) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}; expected two numbers.")
    _check_below_1(**{"betas[0]": betas[0], "betas[1]": betas[1]})
