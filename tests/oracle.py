"""Mechanic in plain Python floats, written from the paper and the published packages; imports nothing of ours.

Parameters, gradients and updates are flat lists of floats.
"""

from __future__ import annotations

import math


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


class Oracle:
    """One run of Algorithm 1 as printed (``paper``), or as mechanic-pytorch or optax have it."""

    def __init__(self, x: list[float], rule: str, *, betas: list[float], lam: float, s_init: float, eps: float) -> None:
        n = len(betas)
        self.rule, self.betas, self.lam, self.s_init, self.eps = rule, betas, lam, s_init, eps
        self.reference = list(x)
        self.delta = [0.0] * len(x)
        self.s = [s_init if rule == "optax" else 0.0] * n
        self.r = [0.0] * n
        self.m = [1e-6 if rule == "mechanic_pytorch" else 0.0] * n
        self.v = [0.0] * n
        self.h = 0.0

    def step(self, x: list[float], g: list[float], u: list[float]) -> list[float]:
        scale = sum(self.s)
        norm_g, norm_x = math.sqrt(dot(g, g)), math.sqrt(dot(x, x))
        if self.rule == "paper":
            direction = [xi / norm_x for xi in x] if norm_x > 0 else x
        else:
            direction = [xi / (norm_x + self.eps) for xi in x]
        h = dot(self.delta, [gi + self.lam * scale * norm_g * di for gi, di in zip(g, direction, strict=True)])
        for i, beta in enumerate(self.betas):
            if self.rule == "optax":
                bet = min(max(h, -self.m[i]), self.m[i])
                self.m[i] = max(beta * self.m[i], abs(h) + self.eps)
                self.r[i] = beta * self.r[i] - self.s[i] * bet
            else:
                self.m[i] = max(beta * self.m[i], h if self.rule == "paper" else abs(h))
                self.r[i] = max(0.0, beta * self.r[i] - self.s[i] * h)
            self.v[i] = beta**2 * self.v[i] + h**2
            wealth = self.s_init * self.m[i] / len(self.betas) + max(0.0, self.r[i])
            self.s[i] = wealth / (math.sqrt(self.v[i]) + self.eps)
        self.h = h
        self.delta = [d + ui for d, ui in zip(self.delta, u, strict=True)]
        return [a + sum(self.s) * d for a, d in zip(self.reference, self.delta, strict=True)]
