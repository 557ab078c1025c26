"""Mechanic in plain Python floats, written from the paper and the published packages; imports nothing of ours.

Parameters, gradients and updates are flat lists of floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


class Oracle:
    """One run of Algorithm 1 as printed (``paper``), as mechanic-pytorch or optax have it, or with manic's changes."""

    def __init__(
        self,
        x: list[float],
        rule: str,
        *,
        betas: Sequence[float] = (),
        lam: float,
        s_init: float | None,
        eps: float,
        steps_per_epoch: float | None = None,
        held_out: bool = False,
    ) -> None:
        betas = (1.0,) if rule == "manic" else betas
        n = len(betas)
        self.rule, self.betas, self.lam, self.s_init, self.eps = rule, betas, lam, s_init, eps
        self.steps_per_epoch, self.held_out, self.watches = steps_per_epoch, held_out, s_init is None
        self.learns = 108 if steps_per_epoch is None else round(min(max(81, 8 * steps_per_epoch), 243))
        self.learns = 243 if held_out else self.learns
        self.reference = list(x)
        self.delta = [0.0] * len(x)
        self.s = [{"optax": s_init, "manic": s_init and s_init / n}.get(rule) or 0.0] * n
        self.steps = self.since = 0
        self.r = [0.0] * n
        self.m = [1e-6 if rule == "mechanic_pytorch" else 0.0] * n
        self.v = [0.0] * n
        self.peak = self.top = self.noise = self.last = 0.0
        self.premium = 1.0
        self.late: list[tuple[float, float]] = []

    def join(self, count: int, factor: float) -> None:
        """More elements take part from the coming step on; their values come with it."""
        ratio = len(self.delta) / (len(self.delta) + count)
        self.delta, self.since, self.late = [0.0] * (len(self.delta) + count), self.steps, []
        self.s = [math.sqrt(ratio) * s / self.premium for s in self.s]
        if self.v[0] > 0:
            self.s_init = self.s[0] / 9
        elif self.s_init:
            self.s_init *= math.sqrt(ratio)
        self.r, self.v = [0.0], [0.0]
        self.noise, self.premium, self.peak = 0.0, 1.0, factor

    def step(self, x: list[float], g: list[float] | None, u: list[float], factor: float = 1.0) -> list[float]:
        """Without a gradient the scale stays."""
        scale = sum(self.s)
        if g is not None:
            self._tune(x, g, factor)
        if self.s_init is None or (self.watches and self.steps < 8):
            counts = [(xi, ui) for xi, gi, ui in zip(x, g or x, u, strict=True) if gi != 0 and ui != 0]
            moved, step = ([pair[i] for pair in counts] for i in range(2))
            size = max(math.sqrt(dot(moved, moved)), 1e-3 * math.sqrt(len(counts)))
            found = 1e-3 * size / (math.sqrt(dot(step, step)) / min(factor, 1.0))
            if self.s_init is None:
                self.s_init, self.s = found, [3 * found]
            elif found < self.s_init:
                self.s_init, self.s = found, [s * found / self.s_init for s in self.s]
        before, self.delta = self.delta, [d + ui for d, ui in zip(self.delta, u, strict=True)]
        self.steps += 1
        if self.rule != "manic":
            return [a + sum(self.s) * d for a, d in zip(self.reference, self.delta, strict=True)]
        late = self.steps - self.since - self.learns
        if self.steps - self.since in (1, 2, 4, 8, 27) or (late >= 0 and late % 9 == 0):
            self.delta = [0.0] * len(x)
        change = (sum(self.s) - scale) / 2
        return [a + sum(self.s) * ui + change * d for a, ui, d in zip(x, u, before, strict=True)]

    def _tune(self, x: list[float], g: list[float], factor: float) -> None:
        norm_g, norm_x = math.sqrt(dot(g, g)), math.sqrt(dot(x, x))
        if self.rule in ("paper", "manic"):
            direction = [xi / norm_x for xi in x] if norm_x > 0 else x
        else:
            direction = [xi / (norm_x + self.eps) for xi in x]
        weight = self.lam * norm_g * (1 if self.rule == "manic" else sum(self.s))
        h = dot(self.delta, [gi + weight * di for gi, di in zip(g, direction, strict=True)])
        epochs = self.steps_per_epoch and (self.steps + 1) / self.steps_per_epoch  # `steps` are those before this one
        seen = None if epochs is None else max(0.0, epochs - 1)
        if self.rule == "manic" and self.steps - self.since >= self.learns:  # before this step
            before, self.peak, self.top = self.peak, max(self.peak, factor), max(self.top, factor)
            fall, last, self.last = before / self.peak, self.last, h / self.peak
            self.late.append((h, factor))
            weights = [(80 / 81) ** age for age in reversed(range(len(self.late)))]
            pairs = list(zip(weights, self.late, strict=True))
            usual = math.fsum(w * h * h for w, (h, _) in pairs) / math.fsum(w * f * f for w, (_, f) in pairs)
            if usual > 0:
                noise = (self.last**2 - 2 * self.last * last) / usual
                if seen is not None:
                    noise *= seen if last else min(1.0, seen)
                noise = max(0.0, self.noise + noise)
                fall *= math.sqrt((81 + self.noise) / (81 + noise))
                self.noise = noise
            root = math.sqrt(self.v[0]) * self.peak / before if before else 0.0
            self.v = [root**2 + min(abs(h), root) ** 2]
            fall *= root / max(root, min(self.last, abs(last)) * self.peak) if root else 1.0
            fall /= self.premium
            late = (min(9.0, self.top / factor) if factor else 9.0) if self.top else 1.0
            self.premium = late ** (81 / (81 + self.noise))
            self.s = [s * fall * self.premium for s in self.s]
            return
        if self.rule == "manic":
            before, self.peak, self.top = self.peak, max(self.peak, factor), factor
            held = max(before, 1.0) / max(self.peak, 1.0)
            self.s_init = self.s_init and held * self.s_init
            most = math.sqrt(self.v[0]) or math.inf
            bet = min(max(h, -most), most)
            self.v = [self.v[0] + bet * bet]
            self.r = [self.r[0] - bet]
            if before < factor < 1:
                ceiling = max(81, 1 / (factor - before))
                most = math.log(ceiling / 9)
                self.r = [min(self.r[0], math.sqrt(self.v[0]) * min(most, math.sqrt(3 * most)))]
            if self.v[0] > 0:
                z = self.r[0] / math.sqrt(self.v[0])
                self.s = [9 * (self.s_init or 0.0) * math.exp(z if z <= 3 else z * z / 3)]
            else:
                self.s = [min(3 * held * self.s[0], 9 * (self.s_init or 0.0))]
            return
        start = (self.s_init or 0.0) / len(self.betas)
        for i, beta in enumerate(self.betas):
            if self.rule == "optax":
                bet = min(max(h, -self.m[i]), self.m[i])
                self.m[i] = max(beta * self.m[i], abs(h) + self.eps)
                self.r[i] = beta * self.r[i] - self.s[i] * bet
            else:
                self.m[i] = max(beta * self.m[i], h if self.rule == "paper" else abs(h))
                self.r[i] = max(0.0, beta * self.r[i] - self.s[i] * h)
            self.v[i] = beta**2 * self.v[i] + h**2
            wealth = start * self.m[i] + max(0.0, self.r[i])
            self.s[i] = wealth / (math.sqrt(self.v[i]) + self.eps)
