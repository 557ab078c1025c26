"""Learning-rate schedules: pure functions from progress to a factor of the learning rate, warmup included.

``progress`` is the share of the training that is done, step / total_steps, a number or a 0-d tensor; what is outside
[0, 1] counts as the nearer end. The factor is a 0-d tensor (float64 if progress is a number), so that a
compiled step that takes it as an argument is compiled once. During ``warmup``, a share of the training in [0, 1), the
factor rises linearly from 0 to 1; the schedule's own shape fills the rest.

Use one by putting its factor into the config of a step:

>>> from dataclasses import replace
>>> from manic.functional import SGDConfig
>>> config = SGDConfig(lr=0.5)
>>> replace(config, lr=config.lr * linear(3 / 4)).lr
tensor(0.1250, dtype=torch.float64)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manic.functional.tree import Number, check_number


def constant(progress: Number, *, warmup: float = 0.0) -> Tensor:
    """1 after the warmup.

    Example:
        >>> float(constant(0.05, warmup=0.1))
        0.5
    """
    return _warmup(progress, warmup)[0]


def linear(progress: Number, *, warmup: float = 0.0, final: float = 0.0) -> Tensor:
    """From 1 to ``final`` along a line.

    Example:
        >>> float(linear(0.75, final=0.5))
        0.625
    """
    check_number("final", final, "a finite number", math.isfinite)
    ramp, rest = _warmup(progress, warmup)
    return ramp * (1 - (1 - final) * rest)


def cosine(progress: Number, *, warmup: float = 0.0, final: float = 0.0) -> Tensor:
    """From 1 to ``final`` along half a cosine. Source: Loshchilov & Hutter, arXiv:1608.03983, equation 5, no restarts.

    Example:
        >>> round(float(cosine(0.5)), 12)
        0.5
    """
    check_number("final", final, "a finite number", math.isfinite)
    ramp, rest = _warmup(progress, warmup)
    return ramp * (final + (1 - final) * (1 + torch.cos(math.pi * rest)) / 2)


def inverse_sqrt(progress: Number, *, warmup: float) -> Tensor:
    """sqrt(warmup / progress) after the warmup, which has to be above 0. Source: Vaswani et al., arXiv:1706.03762, (3).

    Example:
        >>> float(inverse_sqrt(0.4, warmup=0.1))
        0.5
    """
    expected = "a number in (0, 1): the decay is relative to the warmup's end"
    check_number("warmup", warmup, expected, lambda x: 0 < x < 1)
    ramp, _ = _warmup(progress, warmup)
    return ramp * (warmup / torch.as_tensor(progress, dtype=ramp.dtype).clamp(warmup, 1)).sqrt()


def _warmup(progress: Number, warmup: float) -> tuple[Tensor, Tensor]:
    """The warmup's factor, and the share of the time after the warmup that has gone."""
    expected = "a share of the training, in [0, 1): steps / total_steps"
    check_number("warmup", warmup, expected, lambda x: 0 <= x < 1)
    if not isinstance(progress, Tensor):
        progress = torch.tensor(progress, dtype=torch.float64)
    progress = progress.clamp(0, 1)
    ramp = (progress / warmup).clamp(max=1) if warmup > 0 else torch.ones_like(progress)
    return ramp, ((progress - warmup) / (1 - warmup)).clamp(min=0)
