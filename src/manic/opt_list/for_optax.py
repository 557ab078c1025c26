"""The list for JAX, as an optax transformation; needs optax, which is imported only by this module."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from manic.opt_list.configs import Config, check_training_steps, config_for_idx


class NAdamWState(NamedTuple):
    """State of the transformation.

    Attributes:
        count: steps taken, a 0-d int32 array.
        mu: average of the gradient, of the parameters' shapes; of the wider dtype where the gradients' is another.
        nu: average of its square, likewise.
    """

    count: Any
    mu: Any
    nu: Any


def optimizer_for_idx(idx: int, training_steps: int) -> optax.GradientTransformation:
    """The list's optimizer of that place, its schedule laid out over the training.

    The same updates as `manic.opt_list.optimizer_for_idx` makes, to the precision of the arrays. After
    ``training_steps`` the last rate stays. ``update`` needs the parameters.

    Args:
        idx: place in the list, 0 … 99; 0 is the first to try.
        training_steps: number of updates of the whole training.

    Raises:
        TypeError: ``idx`` is not a whole number.
        ValueError: the list has no such place, or ``training_steps`` is not a whole number ≥ 1; from ``update``:
            no parameters were given.

    Source:
        arXiv:2002.11887, and the list published with it.

    Example:
        >>> optimizer = optimizer_for_idx(idx=0, training_steps=100)
        >>> params = {"weight": jnp.array([3.0, -2.0])}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(params, state, params)  # the gradient of ½ x² is x
        >>> params = optax.apply_updates(params, updates)
    """
    config = config_for_idx(idx)
    check_training_steps(training_steps)
    beta1, beta2 = config.betas

    def init(params: Any) -> NAdamWState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return NAdamWState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, NAdamWState]:
        if params is None:
            raise ValueError(
                "update was given no parameters, which weight decay needs; call update(gradients, state, params)."
            )
        t = state.count + 1
        # 1 - β^t by expm1: in float32, 1 - 0.99998 itself would be off by 0.2 %.
        correction = jnp.sqrt(-jnp.expm1(t * math.log(beta2))) / -jnp.expm1(t * math.log(beta1))
        rate = config.lr * _lr_factor(config, state.count, training_steps) * correction

        gradients = jax.tree.map(lambda g, x: g - config.l2_weight_decay * x, updates, params)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, gradients)
        ahead = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, mu, gradients) if config.nesterov else mu
        updates = jax.tree.map(
            lambda n, v, x: (
                -rate.astype(x.dtype) * (n / (jnp.sqrt(v) + config.eps) + config.decoupled_weight_decay * x)
            ),
            ahead,
            nu,
            params,
        )
        return updates, NAdamWState(t, mu, nu)

    return optax.GradientTransformation(init, update)


def _lr_factor(config: Config, step: Any, training_steps: int) -> Any:
    """`Config.lr_factor` for a traced step."""
    step = jnp.minimum(step, training_steps)
    constant_steps = config.constant_fraction * training_steps
    decayed = jnp.maximum(step - constant_steps, 0.0) / (training_steps - constant_steps)
    factor = config.final_lr_fraction + (1 - config.final_lr_fraction) * (1 + jnp.cos(math.pi * decayed)) / 2
    if config.warmup_fraction > 0:
        warmup_steps = max(config.warmup_fraction, config.constant_fraction) * training_steps
        factor = jnp.where(step < warmup_steps, step / warmup_steps, factor)
    return factor
