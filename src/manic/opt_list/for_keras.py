"""The list for Keras 3, on its torch and JAX backends; needs keras, which is imported only by this module."""

# pyright: reportMissingImports=false

# pyright: reportOptionalOperand=false, reportOperatorIssue=false
# Keras gives its operations no types that pyright could follow.

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import keras
from keras import ops

from manic.opt_list.configs import check_training_steps, config_for_idx


@keras.saving.register_keras_serializable("manic.opt_list")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """The list's schedule: warmup, constant, cosine.

    Args:
        lr, warmup_fraction, constant_fraction, final_lr_fraction: see `manic.opt_list.Config`.
        training_steps: how many steps it is laid out over; after them the last rate stays.

    Raises:
        ValueError: ``training_steps`` is not a whole number ≥ 1.
    """

    def __init__(
        self,
        lr: float,
        training_steps: int,
        warmup_fraction: float = 0.0,
        constant_fraction: float = 0.0,
        final_lr_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.training_steps = check_training_steps(training_steps)
        self.warmup_fraction = warmup_fraction
        self.constant_fraction = constant_fraction
        self.final_lr_fraction = final_lr_fraction

    def __call__(self, step: Any) -> Any:
        """The rate of a step, 0 the first: a 0-d tensor of the backend."""
        step = ops.cast(ops.minimum(step, self.training_steps), keras.config.floatx())
        constant_steps = self.constant_fraction * self.training_steps
        decayed = ops.relu(step - constant_steps) / (self.training_steps - constant_steps)
        factor = self.final_lr_fraction + (1 - self.final_lr_fraction) * (1 + ops.cos(math.pi * decayed)) / 2
        if self.warmup_fraction > 0:
            warmup_steps = max(self.warmup_fraction, self.constant_fraction) * self.training_steps
            factor = ops.where(step < warmup_steps, step / warmup_steps, factor)
        return self.lr * factor

    def get_config(self) -> dict[str, Any]:
        """The arguments, for saving."""
        names = ("lr", "training_steps", "warmup_fraction", "constant_fraction", "final_lr_fraction")
        return {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable("manic.opt_list")
class NAdamW(keras.optimizers.Optimizer):
    """The list's optimizer: the update of `manic.opt_list.NAdamW`.

    Args:
        learning_rate: a number or a schedule, such as `Schedule`.
        betas, eps, decoupled_weight_decay, l2_weight_decay, nesterov: see `manic.opt_list.NAdamW`.
        kwargs: those of every Keras optimizer, for example ``clipnorm``.
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        decoupled_weight_decay: float = 0.0,
        l2_weight_decay: float = 0.0,
        nesterov: bool = False,
        name: str = "nadamw",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.betas = tuple(betas)
        self.eps = eps
        self.decoupled_weight_decay = decoupled_weight_decay
        self.l2_weight_decay = l2_weight_decay
        self.nesterov = nesterov

    def build(self, variables: list[Any]) -> None:
        """Make the averages of the variables' gradients and of their squares."""
        if self.built:
            return
        super().build(variables)
        self._averages, self._square_averages = self.add_optimizer_variables(variables, ["average", "square_average"])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Step one variable; Keras calls this."""
        m = self._averages[self._get_variable_index(variable)]
        v = self._square_averages[self._get_variable_index(variable)]
        beta1, beta2 = self.betas
        x = ops.convert_to_tensor(variable)
        t = ops.cast(self.iterations + 1, variable.dtype)
        # 1 - β^t by expm1: in float32, 1 - 0.99998 itself would be off by 0.2 %.
        correction = ops.sqrt(-ops.expm1(t * math.log(beta2))) / -ops.expm1(t * math.log(beta1))
        rate = ops.cast(learning_rate, variable.dtype) * correction

        g = ops.cast(gradient, variable.dtype) - self.l2_weight_decay * x
        self.assign(m, beta1 * m + (1 - beta1) * g)
        self.assign(v, beta2 * v + (1 - beta2) * g * g)
        ahead = beta1 * m + (1 - beta1) * g if self.nesterov else m
        self.assign_sub(variable, rate * (ahead / (ops.sqrt(v) + self.eps) + self.decoupled_weight_decay * x))

    def get_config(self) -> dict[str, Any]:
        """The arguments, for saving."""
        names = ("betas", "eps", "decoupled_weight_decay", "l2_weight_decay", "nesterov")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def optimizer_for_idx(idx: int, training_steps: int, **kwargs: Any) -> NAdamW:
    """The list's optimizer of that place, its schedule laid out over the training.

    Args:
        idx: place in the list, 0 … 99; 0 is the first to try.
        training_steps: number of batches of the whole training.
        kwargs: those of every Keras optimizer, for example ``clipnorm``.

    Raises:
        TypeError: ``idx`` is not a whole number.
        ValueError: the list has no such place, or ``training_steps`` is not a whole number ≥ 1.

    Source:
        arXiv:2002.11887, and the list published with it.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse", optimizer=optimizer_for_idx(idx=0, training_steps=100))
    """
    entry = asdict(config_for_idx(idx))
    names = ("lr", "warmup_fraction", "constant_fraction", "final_lr_fraction")
    schedule = Schedule(training_steps=training_steps, **{name: entry.pop(name) for name in names})
    return NAdamW(schedule, **entry, **kwargs)
