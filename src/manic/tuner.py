"""The tuner: Algorithm 1 of *Mechanic: A Learning Rate Tuner*, from the gradient's sums to the scale.

Source: Cutkosky, Defazio, Mehta, NeurIPS 2023, arXiv:2306.00144, Algorithm 1, for step t and every β_i::

    h_t = <Δ_t, g_t + λ (Σ_i s_{t,i}) ‖g_t‖ x_t/‖x_t‖>      (1)  in `inner_product`
    m_t = max(β m_{t-1}, h_t)                               (2)  from here on in `update`
    v_t = β² v_{t-1} + h_t²                                 (3)
    r_t = max(0, β r_{t-1} - s_t h_t)                       (4)
    W_t = s_init m_t / n + r_t                              (5)
    s_{t+1} = W_t / (sqrt(v_t) + ε)                         (6)
    x_{t+1} = x_ref + (Σ_i s_{t+1,i}) Δ_{t+1}               (7)  in `displacement.py`

The rule ``manic``, the default, finds where to start from the data, and learns the logarithm of s for T steps::

    s_init  = min ρ max(‖x_t‖, 1e-3 √N) / ‖u_t / min(f_t, 1)‖  over t = 1, …, 8         (8)  in `begin`
    s_2     = 3 s_init,  s_{t+1} = min(3 s_t, κ s_init)  until an h is not 0           (8')
    h_t     = <Δ_t, g_t + λ ‖g_t‖ x_t/‖x_t‖>                                           (1') for (1)
    b_t     = h_t, but within ±sqrt(v_{t-1}) once that is not 0                        (2') for (2)
    v_t     = v_{t-1} + b_t²                                                           (3') for (3)
    r_t     = r_{t-1} - b_t                                                            (4') for (4)
    φ(r_t/sqrt(v_t)) ≤ log(max(81, 1/(f_t - F_{t-1})) / κ)   while f_t < 1 rises       (5') for a warmup
    s_{t+1} = κ s_init exp φ(r_t/sqrt(v_t)),  φ(z) = z up to z = 3, and z²/3 above     (6') for (6)
    x_{t+1} = x_t + s_{t+1} u_t + α (s_{t+1} - s_t) Δ_t                                (7') for (7); there α is 1
    Δ_{t+1} ← 0   after t = 1, 2, 4, 8, 27, T, and then every 9 steps                 (9)  in `restarts`

Then it settles. In place of (4) to (6), with k_t = h_t / F_t, a_t = q_t / p_t, γ = 1 - 1/81, c_t = 81/(81 + z_t) and
w_t = sqrt(v_{t-1}) F_t/F_{t-1}, which (2') and (3') have in place of sqrt(v_{t-1}), too;
where w_t is 0, d_t is 1::

    q_t = γ q_{t-1} + h_t²,  p_t = γ p_{t-1} + f_t²         (10)
    z_t = max(0, z_{t-1} + e_t (k_t² - 2 k_t k_{t-1})/a_t)  (11)
    π_t = min(G_t/f_t, 9)^c_t                               (12)
    F_t s_{t+1}/π_t = d_t F_{t-1} s_t/π_{t-1} sqrt(c_t/c_{t-1}),
    d_t = w_t / max(w_t, min(h_t, F_t |k_{t-1}|))           (13)

Before a step in which a quarter or more of the elements that take part are new, it starts to learn again: s_init is
s_t / κ, r and v are forgotten, F is f_t, Δ is 0, and the steps of T and of (9) to (12) count from here::

    s_t ← sqrt(min(1, N'/N)) s_t/π_{t-1}                    (14) in `widen`

======  ===============  =========  =============================================================
letter  name             shape      meaning
======  ===============  =========  =============================================================
s       ``scales``       (..., n)   one scale per β; their sum is the scale in force
r       ``reward``       (..., n)   what betting s against h has earned; of ``manic``: minus the sum of b
m       ``max_product``  (..., n)   decayed maximum of abs h
v       ``sum_squares``  (..., n)   decayed sum of h²; of ``manic``: sum of b²; w is its root, for rates as high as now
q       ``power``        (..., n)   decayed sum of h² since T; a is what h² usually is where f is 1
p       ``level``        (..., n)   decayed sum of f² since T
F       ``peak``         (..., n)   the highest f so far
G       ``top``          (..., n)   the highest f from step T on
z       ``noise``        (..., n)   steps since T that were noise, less those that were not; a step counts e (f/F)²
π       ``premium``      (..., n)   how much of the schedule's decay s makes up for
h       ``h``            (...)      inner product of the displacement Δ with the decayed gradient
β       ``betas``        (n,)       decay rates, each in [0, 1); ``manic`` forgets nothing, n is 1
λ       ``s_decay``      number     weight of the decay term inside h
s_init  ``start``        (..., n)   where s starts from, an underestimate; kept as s_init / n
u       –                as x       the update: what a step of the base optimizer adds to x; Δ_{t+1} = Δ_t + u_t
α       ``rescaled``     number     the share of past updates that follows when the scale changes
e       ``seen``         (...)      how often the rows of a step were seen before, about: t/E - 1, or 0; 1 if not
                                    known, and no more than that where k_{t-1} is 0, which says nothing of noise
f       factor           (...)      the schedule's factor: the learning rate over its nominal, that is initial, value
N       count            number     how many elements x has, in (8) those that count; in (14) those that take part,
                                    each times the square of its group's rate, and N' is that of those that are not new
T       learning_steps   number     the steps that the tuner learns for: 108; if E is known 8E, from 81 to 243
ε       ``eps``          number     keeps the divisions finite
======  ===============  =========  =============================================================

Leading dimensions are free, so one call can tune many models. The numbers are float32 or wider whatever the
parameters are; q to π are the same for every β. Nothing here knows of parameters, devices or optimizers.

What each rule does that the paper as printed does not:

- ``paper``: nothing, but that the λ term is 0 where ‖x‖ = 0, where the paper divides by zero.
- ``mechanic_pytorch`` (the package of that name, 0.0.1): m takes abs h, so that a first h ≤ 0 does not
  leave s at 0 for ever, and starts at 1e-6, so that s leaves 0 before the first bet is won; ‖x‖ + ε.
  The package reads x in the λ term *after* the base step; here it is x_t, as in the paper, so the two
  agree exactly at λ = 0 only.
- ``optax`` (``optax.contrib.mechanize``): m takes abs h + ε; the h that is bet on is clipped to ±m of the
  step before; r stays signed and is clamped only inside the wealth; s_init is 1e-6, and s starts there; ‖x‖ + ε.
- ``manic``: the equations from (8) on; no β, no m and no ε.

Why ``manic`` does so, in the order of a run. Each point is for a measured fault of the published rule, or of ``manic``
without it (``docs/tried.md``):

- *No units.* (6') has h beside its own size, and with λ = 0, or else no scale in its term (1'), and an s that follows
  (8') until the first h that is not 0, a run is the same whatever unit the learning rate or the loss is in.
- *The start* comes from the data (8): a step of s_init moves x by ρ = 1e-3 of its norm, or less. A fixed s_init is too
  small for most models and too large for some. The first update is not always like those after it: momentum makes them
  longer, and of RAdam the first five are as long as gradients. So the longest of eight counts; s is lowered with
  s_init, and what h has said stays. The factor f_t keeps a warmup's updates from counting as small ones. Weights of
  zero count as having a root mean square of 1e-3, as in Adafactor (Shazeer and Stern 2018, section 8). Elements that
  have no gradient yet, or are not moved, do not count, neither in x nor in u nor in N: of a large embedding, a batch
  has few rows. But those of a tensor without any gradient do: a last layer of zeros hides them for a step. The first h
  that says something is that of step 4, as Δ starts again after steps 1 and 2; up to there s triples, to κ = 9 times
  s_init.
- *What h says is weighed by how sure it is.* r / sqrt(v) is the standard score of all h so far: near 0 if they are
  noise, whatever their size and number, and as large as the root of their number if they agree. (3') to (6') are dual
  averaging (Nesterov 2009, Xiao 2010) of log s with the steps of AdaGrad-Norm. So noise leaves s within a factor of
  about e of where it started, and signal multiplies it without bound. The bets of (2) to (6) stake all there is on the
  first h, and lose it to noise in half of all runs: then s falls to s_init and, as 1/√t, below. What is given up is the
  paper's bound on regret, which is linear in s; h s is not convex in log s where h < 0.
- *The surer, the faster.* Steps that are a hundred thousand times too short, as where targets are in dollars, have to
  grow for too long with φ(z) = z. From three standard deviations on, z²/3 is two thirds of what the best constant bet
  on h would have earned by now (the logarithm of its wealth, which parameter-free methods are built on: McMahan and
  Orabona 2014). All of it, from two on, makes s leap, and some nets do not come back from a step that is too long.
- *No h counts for more than all before it* (2'), so that one outlier cannot decide.
- *Δ starts again* every now and then (9); r and v go on. Summed from the start of the run, <Δ, g> < 0 only says that
  the way from there is still downhill. It is so long after steps have become too large, and s overshoots by 2 to 3
  times. Summed from a recent step, it says that the steps since then were too short. A long Δ sees further through
  noise; a short one sees sooner that the first scale was too large. From step 27 to T it is long: at good rates a net
  bounces along some directions while it descends along others, and a short Δ has mostly the former.
- *A warmup stays one*, (5'). Schedules begin low where a net cannot stand more yet, which low rates do not show: s
  would make up for it, rise by as much as f is low, and be too high when f is not. So until then s is at most as many
  s_init as a warmup of this slope has steps, or 81. What is above it is forgotten, else s would leap in the end.
- *Past updates follow by half* when the scale changes (7'). In the paper they follow in full, so that s is a point on
  the line along Δ, which losses pull to the best point of that line and not to the best rate: on a noisy one, or in a
  valley, s stays too low. With α = 0 nothing holds s back where it is too high. The bound of the paper is for α = 1,
  and between two restarts of Δ.
- *It stops learning* after T steps. By then s has found its order of magnitude, and what h goes on to say is less about
  the rate than about the data: a net that learns its rows by heart is told to go faster at every step, and a noisy one
  to go slower. So T is eight epochs if E is given, within bounds: with many more the rate of nets that overfit gets too
  high, with fewer that of nets that go on learning is too low. If E is not given, T is nearer to what few rows need.
- *Then s falls with noise*, (10), (11) and (13). On smooth losses a rate should fall as 1/√t where gradients are noise,
  and stay where they are not (AdaGrad-Norm does both: Ward, Wu and Bottou 2019). The noise of a batch is not that of
  the next, so that the mean of h_t h_{t-1} is that of h² less its noise. Where noise is the larger half, z grows and s
  falls as 1/√t; elsewhere s stays. Δ starts again every 9 steps, since of a longer one h is mostly signal, whatever it
  is that the net learns. What h² usually is, a, is that of some 81 steps (10), so that z is a number of steps even if
  gradients grow or vanish over a run; one outlier counts as 81 e at most.
- *A loss that explodes* takes s down with it, d_t in (13). Where no noise bounds it before T, as with all rows in each
  batch, s grows until steps are too long, and after T it would stay there. An h above the norm of all before it is
  unheard of, and if the one before was, too, it is no outlier: then s falls by as much. (That one may be below 0, as
  steps that explode change sign.) Gradients that grow otherwise raise v.
- *Rows that come again* count more, if E is given. Noise of rows that are new averages out; that of rows which it has
  seen many times a net learns by heart. So a step counts in z about as often as its rows were seen before: s does not
  fall in the first epoch, and as 1/t in many. If E is not given, every step counts once.
- *Schedules that decay* do so later (12). The best rates under them are mostly 3 times those that are best without:
  steps that bounce are no loss if they are short in the end. That higher ones would pay is not to be seen while they
  do not. So from T on the rate follows min(G, 9 f) in place of f: it stays until it is 9 times what the schedule has,
  and falls with it from there. The more noise has lowered it by then, the less it gains by that.
- *Schedules that rise* above where s was learned are held at that rate: s falls by as much as F rises (13). So do s and
  s_init before T where F rises above 1, which is no warmup.
- *New parameters* lower s, which is learned again (14). A scale that was learned of some, such as a head trained alone,
  can be ten times too high for others that join. Updates of normalized optimizers are the longer, the more elements
  they have, as √N: so s falls to where steps are about as long as before.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

RULES = ("manic", "paper", "mechanic_pytorch", "optax")
BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
SHARE = 1e-3  # ρ: the share of its norm by which an update of s_init moves x
STAKE = 9  # κ: the scale that what h says multiplies, in s_init
SURE = 3  # standard deviations from which on φ is z²/3
TRIPLES = 3  # times s, at most, in each step before h says something
WATCHED = 8  # steps of which (8) takes the longest u
WARMUP = 81  # steps that a warmup counts as, at least, for the ceiling of s in it
LEAST_SIZE = 1e-3  # root mean square of x that (8) takes smaller ones for
RESCALED = 0.5  # α
LEARNS = 81, 108, 243  # T: at least, if E is not known, at most
EPOCHS = 8  # T, if E is known
USUAL = 81  # steps that q and p look back on; as many of noise take 1/√2 of s
TURNS = 1, 2, 4, 8, 27  # steps before T after which Δ starts again
SHORT = 9  # steps that Δ sums up from T on
PREMIUM = 9  # times what the schedule has: the most that a rate is
MANY = 1 / 4  # the share of the elements that have to be new for (14)
HINTS = {
    "s_init": " The scale grows from s_init, so it has to start above zero. Leave it out for the rule's own.",
    "steps_per_epoch": " It is how many steps an epoch takes, as in len(loader); math.inf if no row comes twice.",
}


@dataclass(frozen=True, kw_only=True)
class TunerConfig:
    """The tuner's constants, checked once.

    Args:
        rule: one of ``RULES``; which published form to follow (see the module's list).
        betas: β, the decay rates of the memories of the published rules, each in [0, 1); ``None`` takes ``BETAS``.
            The rule ``manic`` has none: it keeps (1.0,) here.
        s_decay: λ ≥ 0, the weight of the decay term inside h; ``None`` takes the rule's own, 0 (published ones: 1e-2).
        s_init: s_init > 0; ``None`` takes the rule's own: (8), ``optax`` 1e-6, the other published ones 1e-8.
        eps: ε > 0, of the published rules.
        max_scale: the largest scale allowed, or ``None``.
        steps_per_epoch: E > 0, the steps that an epoch takes, for the rule ``manic``; infinite if no row comes twice,
            ``None`` if it is not known.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: an argument is not a number.

    Example:
        >>> TunerConfig(rule="optax").s_init
        1e-06
    """

    rule: str = "manic"
    betas: Sequence[float] | None = None
    s_decay: float | None = None
    s_init: float | None = None
    eps: float = 1e-8
    max_scale: float | None = None
    steps_per_epoch: float | None = None

    @property
    def rescaled(self) -> float:
        """α."""
        return RESCALED if self.rule == "manic" else 1.0

    @property
    def learning_steps(self) -> int:
        """T; ``sys.maxsize`` for the published rules, which learn for as long as a run takes.

        Example:
            >>> [TunerConfig(steps_per_epoch=steps).learning_steps for steps in (None, 1, 20, 100)]
            [108, 81, 160, 243]
        """
        if self.rule != "manic":
            return sys.maxsize
        least, unknown, most = LEARNS
        return unknown if self.steps_per_epoch is None else round(min(max(EPOCHS * self.steps_per_epoch, least), most))

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}; expected one of {', '.join(RULES)}.")
        own = (1.0,) if self.rule == "manic" else BETAS
        given = self.betas.tolist() if isinstance(self.betas, Tensor) else own if self.betas is None else self.betas
        several = isinstance(given, Iterable) and not isinstance(given, str)
        betas = [b.item() if isinstance(b, Tensor) and b.numel() == 1 else b for b in given] if several else []
        if not several or not all(isinstance(beta, numbers.Real) for beta in betas):
            raise TypeError(f"betas is {self.betas!r}; expected several numbers in [0, 1), as in betas=(0.9, 0.99).")
        object.__setattr__(self, "betas", tuple(float(beta) for beta in betas))
        if self.betas != own:
            if not self.betas or not all(0 <= beta < 1 for beta in self.betas):
                raise ValueError(f"betas is {self.betas}; expected at least one number, each in [0, 1).")
            if self.rule == "manic":
                raise ValueError(
                    f"betas is {self.betas} with rule='manic'; expected None, for only the published rules have them. "
                    "Leave it out."
                )
        if self.s_decay is None:
            object.__setattr__(self, "s_decay", 0.0 if self.rule == "manic" else 1e-2)
        if self.s_init is None and self.rule != "manic":
            object.__setattr__(self, "s_init", 1e-6 if self.rule == "optax" else 1e-8)
        ranges = {"s_init": "> 0", "eps": "> 0", "s_decay": ">= 0", "max_scale": "> 0", "steps_per_epoch": "> 0"}
        for name, low in ranges.items():
            value = getattr(self, name)
            if value is None:
                continue
            endless = name == "steps_per_epoch"
            expected = f"expected a {'' if endless else 'finite '}number {low}.{HINTS.get(name, '')}"
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} is {value!r}; {expected}")
            in_reach = math.isfinite(value) or (endless and value == math.inf)
            if not in_reach or value < 0 or (value == 0 and low == "> 0"):
                raise ValueError(f"{name} is {value!r}; {expected}")
            object.__setattr__(self, name, float(value))
        if self.steps_per_epoch is not None and self.rule != "manic":
            raise ValueError(
                f"steps_per_epoch is {self.steps_per_epoch:g} with rule={self.rule!r}; expected None, for only the "
                "rule 'manic' reads it. Leave it out."
            )


class TunerState(NamedTuple):
    """What the tuner remembers: tensors of shape (..., n), see the module's table; `last` is k_{t-1} once t > T."""

    scales: Tensor
    reward: Tensor
    max_product: Tensor
    sum_squares: Tensor
    start: Tensor
    power: Tensor
    level: Tensor
    peak: Tensor
    top: Tensor
    noise: Tensor
    premium: Tensor
    last: Tensor


class Sums(NamedTuple):
    """The four sums over all elements of the model that h is made of, each of shape (...)."""

    delta_grad: Tensor  # <Δ, g>
    delta_param: Tensor  # <Δ, x>
    grad_square: Tensor  # ‖g‖²
    param_square: Tensor  # ‖x‖²


def init(config: TunerConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> TunerState:
    """The state before the first step.

    Example:
        >>> init(TunerConfig(rule="paper", betas=(0.9, 0.99))).scales
        tensor([0., 0.], dtype=torch.float64)
    """
    n = len(config.betas or ())
    zero = torch.zeros(n, device=device, dtype=dtype)
    s, m, start = zero.clone(), zero.clone(), torch.full_like(zero, (config.s_init or 0) / n)
    if config.rule == "optax":
        s = start * n
    elif config.rule == "manic":
        s = start.clone()
    elif config.rule == "mechanic_pytorch":
        m.fill_(1e-6)
    state = TunerState(*(zero.clone() for _ in TunerState._fields))
    return state._replace(scales=s, max_product=m, start=start, premium=torch.ones_like(zero))


def begin(
    state: TunerState,
    grad_square: Tensor,
    param_norm: Tensor,
    update_norm: Tensor,
    count: Tensor,
    config: TunerConfig,
) -> TunerState:
    """Find s_init, or lower it and s, if there is an update to find it from, (8).

    x, u and N are of the elements that count, see `manic.kernels.plain.counted`.

    Args:
        state: just after `update`, of a step up to `WATCHED`, or, as long as there is nothing to find it from, later.
        grad_square: ‖g_t‖², of shape (...). Where it is 0, u_t is weight decay alone, and its size says nothing of s.
        param_norm: ‖x_t‖, of the same shape.
        update_norm: ‖u_t / min(f_t, 1)‖, of the same shape.
        count: N.
        config: gives the cap.

    Example:
        >>> config = TunerConfig()
        >>> sizes = torch.tensor(1.0), torch.tensor(5.0), torch.tensor(2.0), torch.tensor(25)
        >>> round(float(begin(init(config), *sizes, config).start.sum()), 6)  # ρ · 5 / 2
        0.0025
    """
    size = torch.maximum(param_norm, LEAST_SIZE * count.sqrt())
    found = (SHARE * size / update_norm).to(state.start).unsqueeze(-1)
    unknown, usable = state.start == 0, found.isfinite() & (grad_square > 0).unsqueeze(-1)
    start = torch.where(usable & (unknown | (found < state.start)), found, state.start)
    s = torch.where(unknown, TRIPLES * start, state.scales * (start / state.start))
    return state._replace(scales=_capped(s, config), start=start)


def widen(state: TunerState, ratio: float, factor: Tensor) -> TunerState:
    """What is learned from on when parameters join, (14).

    Args:
        state: of step t - 1.
        ratio: N'/N.
        factor: f_t, of shape (...).

    Example:
        >>> state = init(TunerConfig(s_init=1e-3))
        >>> round(float(widen(state, 0.25, torch.tensor(1.0)).scales.sum()), 6)
        0.0005
    """
    s, lowered = state.scales, math.sqrt(ratio) / state.premium
    nothing, one = torch.zeros_like(s), torch.ones_like(s)
    return state._replace(
        scales=lowered * s,
        reward=nothing,
        sum_squares=nothing,
        start=lowered * torch.where(state.sum_squares > 0, s / STAKE, state.start),
        power=nothing,
        level=nothing,
        peak=one * factor.unsqueeze(-1),
        noise=nothing,
        premium=one,
    )


def restarts(step: Any, config: TunerConfig) -> Any:
    """Whether (9) applies after a step, counted from 1; of a number, or element by element of an int64 tensor.

    Example:
        >>> [step for step in range(1, 130) if restarts(step, TunerConfig())]
        [1, 2, 4, 8, 27, 108, 117, 126]
    """
    since = step - config.learning_steps
    early = sum(step == turn for turn in TURNS) > 0
    return config.rule == "manic" and (early & (since < 0)) | ((since >= 0) & (since % SHORT == 0))


def is_learning(step: Any, config: TunerConfig) -> Any:
    """Whether a step, counted from 1, does (2) to (6), and not (10) to (13); of numbers and tensors as `restarts`.

    Example:
        >>> [is_learning(step, TunerConfig()) for step in (108, 109)]
        [True, False]
    """
    return config.rule != "manic" or step <= config.learning_steps


def seen(step: Any, steps_per_epoch: float | None) -> Tensor | None:
    """e: how often the rows of a step, counted from 1, were seen before, about; ``None`` if E is not known.

    Example:
        >>> seen(torch.tensor([50.0, 100.0, 250.0]), 100)
        tensor([0.0000, 0.0000, 1.5000])
    """
    return None if steps_per_epoch is None else (step / steps_per_epoch - 1).clamp(min=0)


def hope(state: TunerState, config: TunerConfig) -> Tensor:
    """Above 0 unless a step gave no reason to take longer ones, of shape (..., n); see `manic.diagnosis`.

    A published rule has lost all its bets, and `manic` is told by two standard deviations that steps are too long.

    Example:
        >>> config = TunerConfig()
        >>> told = [init(config)._replace(reward=r, sum_squares=r**2 / 4) for r in torch.tensor([-1.0, 1.0])]
        >>> [float(hope(state, config)) for state in told]
        [0.0, 2.0]
    """
    return state.reward + 2 * state.sum_squares.sqrt() if config.rule == "manic" else state.reward


def inner_product(sums: Sums, scale: Tensor, config: TunerConfig) -> Tensor:
    """h_t, equation (1), or (1').

    Args:
        sums: the four sums at x_t, each of shape (...).
        scale: Σ_i s_{t,i}, of the same shape.
        config: gives λ, ε and the rule.

    Returns:
        h_t, of shape (...).
    """
    assert config.s_decay is not None
    if config.s_decay == 0:
        return sums.delta_grad
    norm_x = sums.param_square.sqrt()
    if config.rule in ("paper", "manic"):
        norm_x = torch.where(norm_x > 0, norm_x, torch.inf)
    else:
        norm_x = norm_x + config.eps
    weight = config.s_decay if config.rule == "manic" else config.s_decay * scale
    return sums.delta_grad + weight * sums.grad_square.sqrt() * sums.delta_param / norm_x


def update(
    state: TunerState,
    h: Tensor,
    betas: Tensor,
    config: TunerConfig,
    learning: bool | Tensor = True,
    factor: float | Tensor = 1.0,
    seen: Tensor | None = None,
) -> TunerState:
    """One step of the tuner, equations (2) to (6), or (10) to (13) after T. Pure: the arguments are not written.

    Args:
        state: s_t and all else of step t - 1, each of shape (..., n).
        h: h_t, of shape (...): one number per model.
        betas: ``config.betas`` as a tensor beside the state, of shape (n,).
        config: gives ε, the rule and the cap.
        learning: from `is_learning`; a tensor is of shape (...).
        factor: f_t, a number or of shape (...).
        seen: e_t, of shape (...), or ``None`` where E is not given.

    Returns:
        s_{t+1} and all else of step t.

    Example:
        >>> config = TunerConfig(s_init=1e-6)
        >>> betas = torch.tensor(config.betas)
        >>> state = init(config)
        >>> for h in (0.0, -1.0, -1.0):  # h < 0: the displacement points downhill
        ...     state = update(state, torch.tensor(h), betas, config)
        >>> float(state.scales.sum()) > config.s_init
        True
    """
    h = h.to(state.scales.dtype).unsqueeze(-1)
    if config.rule != "manic":
        return _bet(state, h, betas, config)
    f = torch.as_tensor(factor, dtype=h.dtype, device=h.device).unsqueeze(-1)
    e = None if seen is None else seen.to(h.dtype).unsqueeze(-1)
    if not isinstance(learning, Tensor):
        return _learn(state, h, f, config) if learning else _settle(state, h, f, e, config)
    both = zip(_learn(state, h, f, config), _settle(state, h, f, e, config), strict=True)
    return TunerState(*(torch.where(learning.unsqueeze(-1), learned, settled) for learned, settled in both))


def _bet(state: TunerState, h: Tensor, betas: Tensor, config: TunerConfig) -> TunerState:
    """(2) to (6), as published."""
    s, r, m, v, start, *_ = state
    bet = torch.clamp(h, -m, m) if config.rule == "optax" else h
    if config.rule == "paper":
        m = torch.maximum(betas * m, h)  # (2)
    elif config.rule == "optax":
        m = torch.maximum(betas * m, h.abs() + config.eps)  # (2)
    else:
        m = torch.maximum(betas * m, h.abs())  # (2)
    v = betas**2 * v + h**2  # (3)
    r = betas * r - s * bet  # (4), but for the clamp, which optax leaves to (5)
    won = r.clamp(min=0)
    if config.rule != "optax":
        r = won  # (4)
    s = (start * m + won) / (v.sqrt() + config.eps)  # (5), (6)
    return state._replace(scales=_capped(s, config), reward=r, max_product=m, sum_squares=v)


def _learn(state: TunerState, h: Tensor, f: Tensor, config: TunerConfig) -> TunerState:
    """(2') to (6'), F and G."""
    v, peak = state.sum_squares, torch.maximum(state.peak, f)
    held = state.peak.clamp(min=1) / peak.clamp(min=1)
    s, start = held * state.scales, held * state.start
    most = torch.where(v > 0, v.sqrt(), torch.inf)
    b = torch.clamp(h, -most, most)  # (2')
    v = v + b**2  # (3')
    r, root = state.reward - b, v.sqrt()  # (4')
    steps = (1 / (f - state.peak)).clamp(min=WARMUP)
    most = (steps / STAKE).log()
    highest = root * torch.minimum(most, (SURE * most).sqrt())
    r = torch.where((f < 1) & (f > state.peak), torch.minimum(r, highest), r)  # (5')
    z = r / root
    rising = torch.minimum(TRIPLES * s, STAKE * start)  # (8')
    s = torch.where(v > 0, STAKE * start * torch.where(z > SURE, z**2 / SURE, z).exp(), rising)  # (6')
    return state._replace(
        scales=_capped(s, config), reward=r, sum_squares=v, start=start, peak=peak, top=f.expand_as(peak)
    )


def _settle(state: TunerState, h: Tensor, f: Tensor, e: Tensor | None, config: TunerConfig) -> TunerState:
    """(2'), (3') and (10) to (13)."""
    memory = 1 - 1 / USUAL
    q, p = memory * state.power + h**2, memory * state.level + f**2  # (10)
    peak, top = torch.maximum(state.peak, f), torch.maximum(state.top, f)
    k = torch.where(peak > 0, h / peak, h)
    usual = q / p
    weight = 1.0 if e is None else torch.where(state.last == 0, e.clamp(max=1), e)
    noise = weight * (k**2 - 2 * k * state.last) / usual
    z = (state.noise + torch.where(q > 0, noise, 0)).clamp(min=0)  # (11)
    before, c = USUAL / (USUAL + state.noise), USUAL / (USUAL + z)
    premium = torch.where(top > 0, (top / f).clamp(max=PREMIUM), 1) ** c  # (12)
    held = torch.where(state.peak > 0, state.peak / peak, 1)
    root = state.sum_squares.sqrt() / held
    v = root**2 + torch.clamp(h, -root, root) ** 2
    rescue = torch.where(root > 0, root / torch.maximum(root, peak * torch.minimum(k, state.last.abs())), 1)
    s = state.scales * (held * (c / before).sqrt() * rescue / state.premium)  # (13), but for π
    if config.max_scale is not None:
        premium = torch.minimum(premium, config.max_scale / s.sum(-1, keepdim=True))
    s = s * premium
    return state._replace(
        scales=s, sum_squares=v, power=q, level=p, peak=peak, top=top, noise=z, premium=premium, last=k
    )


def _capped(scales: Tensor, config: TunerConfig) -> Tensor:
    if config.max_scale is None:
        return scales
    return scales * (config.max_scale / scales.sum(-1, keepdim=True)).clamp(max=1)
