"""What was tried on the way to the default rule, on four of the tasks that it was chosen on.

Every idea trains the same nets, stacked, under AdamW, SGD with momentum and Lion, each with three schedules; the tables
say how far the validation loss, at the end and at its lowest on the way, is above that of the best rate of the grid.
See docs/tried.md.

    python benchmarks/robustness/ideas.py [--ideas NAME ...] [--tasks NAME ...] [--bases NAME ...]
                                          [--schedules NAME ...] [--seeds N] [--smaller N] [--steps N]
                                          [--replacement] [--recognized] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

import torch
from tasks import TASKS
from torch import Tensor
from tqdm import tqdm
from train import FOR_IDEAS, PLAIN, SCHEDULES, Stack, base_step, factor, held_out, is_check, mean

from manic import tuner
from manic.kernels.plain import counted
from manic.mechanic import ALWAYS
from manic.tuner import BETAS, TURNS

BASES = ("adamw", "sgd", "lion")
CHOSEN_ON = ("diabetes", "lines", "autoencoder", "new_digits")
SEEDS, STEPS = [0, 1, 2], 500
SCORED = {"valid": "the validation loss at the end", "best": "the lowest validation loss on the way"}


LEAST, UNKNOWN, MOST = tuner.LEARNS
EARLY = (1, 2, 4, 8, 16, 32, 81)
AGAIN = (*TURNS, 81)
OF_PASSES: dict[str, Callable[[float], float]] = {
    "once": lambda e: 1.0,
    "a third": lambda e: 1 / 3,
    "never": lambda e: 0.0,
    "before": lambda e: max(0.0, e - 1),
    "so far": lambda e: e,
    "root": math.sqrt,
    "root of before": lambda e: math.sqrt(max(0.0, e - 1)),
    "to one": lambda e: min(e, 1.0),
    "to one in five": lambda e: min(e / 5, 1.0),
    "to one in nine": lambda e: min(e / 9, 1.0),
    "to ten": lambda e: min(e, 10.0),
    "to thirty": lambda e: min(e, 30.0),
    "e/(1 + e)": lambda e: e / (1 + e),
    "1 - 1/e": lambda e: 1 - 1 / max(1.0, e),
    "half at first": lambda e: max(1.0, e) / (1 + max(1.0, e)),
    "half at first, at once more": lambda e: (1 + e) / (2 + e),
    "half until the sixth": lambda e: min(1.0, max(0.5, e / 12)),
}


@dataclass(frozen=True)
class Idea:
    """A rule that is put together from options.

    Attributes:
        learner: ``"score"`` for (2') to (6') of `manic.tuner`, ``"walk"`` for a log s that each h moves by h/√v from
            where it is, or ``"bets"`` for (2) to (6).
        pace: times what the logarithm of s moves by.
        quadratic: it moves by half of the square of that throughout.
        sure: the standard score from where on it moves by the square of that, over this; infinite: by that throughout.
        bound: b in a step is at most so many √v; 0: as `clip` says.
        losses_bound: where h > 0, too.
        s_init: a fixed s_init, or ``None`` for (8) of `manic.tuner` with `share` for ρ.
        watched: of so many steps the longest u counts for (8).
        latest: the last of them does.
        stake: the scale that what h says multiplies, or of the first bet, in s_init; the published rule has about 100.
        ramp: it is no more than the first of these, or the second times the number of steps, whichever is more.
        triples: times the scale, at most, in each step before it; infinite: it is the first scale.
        warmup: while the schedule's factor rises below 1, the scale stays below this, or the warmup's steps, in s_init.
        by_factor: divide the first update by the schedule's factor.
        counted: (8) leaves out elements that have no gradient, or do not move.
        recentre: when x_ref moves: until T after the steps of `turns` (``"listed"``), ``"never"``, ``"growing"`` from
            step `first` on, or ``"every"`` `first` steps.
        turns: the steps that are listed.
        lasting: but for the last of them, if an epoch takes more than T steps.
        left: the share of Δ that is left after the steps of `left_at`; after others nothing is.
        left_at: these steps; only the last of those that are listed, if not said otherwise.
        growth: of the number of steps between two such steps, if it is growing.
        kept: the share of r, m and √v that is kept then.
        restart: the scale becomes s_init then.
        least: until T the scale is at least so many s_init, to the power of 1 - 2 z, which is between 0 and 1: z is the
            sum of h over the root of that of h², so that noise leaves it there, and only what h says lowers it.
        clip: bets are clipped to ±m.
        losses: what bets that are lost count for, beside those that are won.
        lost: and that times this, a key of `OF_PASSES`: by the number of passes over the data so far.
        lost_epoch: the steps of a pass that it goes by; 0: those of the task.
        lost_until: bets that are lost count in full after so many steps.
        wins: bets that are won count half once the rows have been seen so many times before, and less and less.
        forgiving: and that times the schedule's factor, beside its highest, to this power.
        bounces: and that less this much of the share of h² that was signal in some ten steps.
        settle: the scale does not rise once the schedule's factor is below this share of its highest.
        settles: the scale does not rise after so many passes, and 81 steps.
        ceiling: once x_ref has moved after step 81, the scale stays below so many times its largest between the last
            two moves; 0: there is none.
        forget: move by x + s u, and measure h with a displacement that decays by this factor.
        s_decay: λ.
        charged: a key of `OF_PASSES`: what λ is times, by the number of passes over the data so far; it is 0 after T.
        published_decay: the λ term has the scale in it.
        midway: until T, h is <Δ, g> and this times <u, g> of the step before; with 1/2 it says, in a bowl, how far the
            loss has fallen.
        along: until T, h is of what the base optimizer adds, over the schedule's factor, in place of minus g.
        delay: h is measured with a Δ that lacks the last updates: this share of those since x_ref moved.
        rescaled: α, how much of a change of the scale moves x along Δ.
        fade: in step t, Δ is multiplied by t/(t + fade), and x_ref moves along.
        reward_decay: r decays by β to this power.
        betas: β.
        per: what has a scale of its own: the ``"model"``, its matrices and its vectors (``"kind"``), the last layer and
            the rest (``"head"``), or each ``"tensor"``.
        held_out: the share of the training rows that h is measured on, and that are not trained on meanwhile.
        clairvoyant: for T steps h is measured on the validation rows; a bound, and no rule.
        every: after the first 100 steps h is measured at every so many, and the scale stays in between.
        until: the share of the steps, or their number, after which the scale stays, and all rows are trained on.
        fall: it does not stay then, but falls as the number of steps to the power of minus this.
        learns: T, the steps after which something else happens.
        learns_passes: T is so many passes, but neither less than 81 nor more than ``learns`` steps.
        anew: until T, x_ref moves after so many passes, too.
        then: what that is. ``"noise"``: (10) to (13); ``"sum"``: the scale falls as one over the root of the sum of h²
            since the start; ``"largest"``: as one over the largest h so far; ``"recent"``: as one over the root of the
            largest mean of h² over some T steps; ``"warm"``: bets go on while the schedule's factor rises, then the
            scale stays; ``"mean"``: bets are on how h differs from its mean since x_ref moved.
        usual: which h are usual: those of the last ``gauges`` steps (``"recent"``), without the present one
            (``"before"``), where these were largest (``"most"``), or those of the first after T (``"first"``), in which
            the scale stays.
        gauges: steps that say how large h² usually is.
        counts: so many steps of noise take 1/√2 of the scale.
        free: they leave it as it is, and four times as many halve it.
        short: steps between two moves of x_ref after T; 0: as before.
        evens: what h is divided by the schedule's factor for: what is usual (``"gauge"``), ``"all"`` after T up to the
            highest before it, or ``"nothing"``; all but the first is for the ``"first"``.
        holds: after T, the scale falls by as much as the schedule's factor rises above its highest.
        seen: a key of `OF_PASSES`: what a step counts for in (11).
        passes: a key of `OF_PASSES`: the power of the fall, in place of ``power``.
        premium: after T, the scale rises by as much as the schedule's factor has fallen, up to this factor: π of (12).
        averaged: after T the scale is that of the mean rate in this share of the steps up to there; 0: of the last.
        mean_of: ``"rates"`` or ``"scales"``.
        arithmetic: that mean is not the geometric one.
        rises: that may take the rate above that of step T by so many times: its fall counts from there.
        again: what it has fallen since is made up for to this power, up to the rate at its highest factor.
        climbs: where it has fallen to counts as higher by this share in every step after T, up to its highest factor.
        gate: π is all that to a power: c to the power of ``gate``, that is 1 where it is 0.
        signal: what h_t h_{t-1} counts for in (11).
        uphill: and that times this where both are above 0.
        unusual: the root of its bound there, in the usual size of h.
        known: it counts as that of rows that were seen so many times before, at most.
        rescued: after T, the scale falls where two h in a row are above the norm of all before: d of (13).
        outlier: the most that the largest h grows by in a step.
        memory: the decay rate of that mean; with 0 it is h, and the bets are 0.
        width: the mean counts for at most so many standard deviations of h: if h is lost on average, and if it is won.
        period: the most steps between two moves of x_ref, if it is growing.
        power: of the sums of h², or of c, in (13).
        noise: half of the square of the difference from the h before takes the place of h² in these sums.
        shared: the schedule's decay since its highest factor counts as a part of the fall, but for the premium.
    """

    learner: str = "score"
    pace: float = 1.0
    quadratic: bool = False
    sure: float = tuner.SURE
    bound: float = 1.0
    losses_bound: bool = True
    s_init: float | None = None
    share: float = tuner.SHARE
    watched: int = tuner.WATCHED
    latest: bool = False
    stake: float = tuner.STAKE
    ramp: tuple[float, float] = (math.inf, 0.0)
    triples: float = tuner.TRIPLES
    warmup: float = tuner.WARMUP
    by_factor: bool = True
    counted: bool = True
    recentre: str = "listed"
    turns: tuple[int, ...] = TURNS
    lasting: bool = False
    left: float = 0.0
    left_at: tuple[int, ...] = (81,)
    first: int = 1
    growth: float = 3.0
    kept: float = 1.0
    restart: bool = False
    least: float = 0.0
    clip: bool = True
    losses: float = 1.0
    lost: str = ""
    lost_epoch: float = 0.0
    lost_until: float = math.inf
    wins: float = math.inf
    forgiving: float = 0.0
    bounces: float = 0.0
    settle: float = 0.0
    settles: float = math.inf
    ceiling: float = 0.0
    forget: float | None = None
    s_decay: float = 0.0
    charged: str = ""
    published_decay: bool = False
    midway: float = 0.0
    along: bool = False
    delay: float = 0.0
    rescaled: float = tuner.RESCALED
    fade: float = 0.0
    reward_decay: float = 1.0
    betas: tuple[float, ...] = (1.0,)
    per: str = "model"
    held_out: float = 0.0
    clairvoyant: bool = False
    every: int = 1
    until: float = 1.0
    fall: float = 0.0
    learns: float = UNKNOWN
    learns_passes: float = math.inf
    anew: float = math.inf
    then: str = "noise"
    usual: str = "recent"
    gauges: int = tuner.USUAL
    counts: int = tuner.USUAL
    free: bool = False
    short: int = tuner.SHORT
    evens: str = "gauge"
    holds: bool = True
    seen: str = "once"
    passes: str = ""
    premium: float = tuner.PREMIUM
    averaged: float = 0.0
    mean_of: str = "rates"
    arithmetic: bool = False
    rises: float = 1.0
    again: float = 1.0
    climbs: float = 0.0
    gate: float = 1.0
    signal: float = 2.0
    uphill: float = 1.0
    unusual: float = math.inf
    known: float = math.inf
    rescued: bool = True
    outlier: float = math.inf
    memory: float = 0.0
    width: tuple[float, float] = (math.inf, math.inf)
    period: float = math.inf
    power: float = 0.5
    noise: bool = False
    shared: bool = False


POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
TOLD = Idea(seen="before", learns=MOST, learns_passes=float(tuner.EPOCHS))
SQUARED = Idea(again=2.0, gate=0.0, premium=3.0)
SQUARED_TOLD = replace(TOLD, again=2.0, gate=0.0, premium=3.0)
SOONER = replace(SQUARED, sure=2.0)
SOONER_TOLD = replace(SQUARED_TOLD, sure=2.0)
SCORE = replace(SOONER, turns=AGAIN, learns=162, unusual=3.0, rescued=False)
SCORE_TOLD = replace(SCORE, seen="before", learns=MOST, learns_passes=12.0)
BETS = replace(SCORE, learner="bets", bound=0.0, watched=1, stake=27.0, turns=EARLY, betas=BETAS, learns=MOST)
IN_20 = replace(BETS, lost="half at first", lost_epoch=20.25)
MADE_UP = replace(BETS, warmup=math.inf)
AT_ONCE = replace(MADE_UP, stake=30.0, triples=math.inf)
TRIPLED = replace(AT_ONCE, recentre="growing")
NOISE = replace(TRIPLED, premium=1.0)
TRIPLING = replace(NOISE, learns=math.inf, short=0)
DOUBLING = replace(TRIPLING, growth=2.0, rescaled=1.0)
FIXED = replace(DOUBLING, recentre="never", clip=False)
PUBLISHED = replace(FIXED, s_decay=1e-2, published_decay=True, stake=100)
HALF = replace(DOUBLING, rescaled=0.5)
FADING = replace(TRIPLING, recentre="never", fade=3.0)
NO_BETS = replace(TRIPLING, learns=243, then="mean")
LESS_MEAN = replace(NO_BETS, memory=0.9)
FALLING = replace(TRIPLING, learns=243, then="sum", period=729)
FIRST = replace(NOISE, usual="first")
AS_IT_COMES = replace(FIRST, evens="nothing", holds=False)
TWICE = replace(TRIPLED, gate=1.0)
ONCE = replace(TWICE, again=1.0)
MEAN = replace(TWICE, averaged=1 / 3)
PREMIUM = replace(ONCE, rises=math.inf)
CHARGED = replace(ONCE, s_decay=0.01, charged="once")
TOLD_ONCE = replace(PREMIUM, seen="before")
EPOCHS = replace(TOLD_ONCE, rises=1.0)
NINE = replace(EPOCHS, learns_passes=9.0)
UPHILL = replace(NINE, uphill=2 / 3)
TOLD_TWICE = replace(UPHILL, again=2.0)
TOLD_MEAN = replace(TOLD_TWICE, averaged=1 / 3)
TWELVE = replace(TOLD_TWICE, learns_passes=12.0)
TOLD_EVEN = replace(BETS, seen="before", uphill=2 / 3, learns_passes=float(tuner.EPOCHS))
TOLD_NOW = replace(TOLD_EVEN, lost="half at first", lasting=True)


def at(*steps: int) -> Idea:
    """The default before, with these steps after which x_ref moves until T."""
    return replace(AT_ONCE, turns=steps)


IDEAS = {
    "the default": Idea(),
    "without (8): s_init is 1e-8": Idea(s_init=1e-8),
    "without the longest of eight: s_init by the first update": Idea(watched=1),
    "without κ: s_init is the first scale": Idea(stake=1.0),
    "without (2'): h is not bounded": Idea(bound=math.inf),
    "without (5'): a warmup is made up for": Idea(warmup=math.inf),
    "without φ: log s in proportion to z": Idea(sure=math.inf),
    "without (7'): α = 1": Idea(rescaled=1.0),
    "without (7'): α = 0": Idea(rescaled=0.0),
    "without (9): Δ never starts again": Idea(recentre="never"),
    "without a long Δ: it starts again every nine steps": Idea(recentre="every", first=tuner.SHORT),
    "without T: the scale is learned to the end": Idea(learns=math.inf, short=0, premium=1.0),
    "without (10) to (13): the scale stays after T": Idea(until=UNKNOWN),
    "without (11): noise counts for nothing": Idea(seen="never"),
    "without (12): π = 1": Idea(premium=1.0),
    "without c in (12)": Idea(gate=0.0),
    "without d in (13)": Idea(rescued=False),
    "π is at most 27": Idea(premium=27.0),
    "π is at most 81": Idea(premium=81.0),
    "π is at most 3": Idea(premium=3.0),
    "π is at most 3, to the power of √c": Idea(gate=0.5, premium=3.0),
    "π is at most 3, to the power of c²": Idea(gate=2.0, premium=3.0),
    "π is at most 3, without c in (12)": Idea(gate=0.0, premium=3.0),
    "π is at most 2, without c in (12)": Idea(gate=0.0, premium=2.0),
    "the default, given the epoch": TOLD,
    "without T after eight: T is 243, given the epoch": replace(TOLD, learns_passes=math.inf),
    "without e: a noisy step counts once, given the epoch": replace(TOLD, seen="once"),
    "without (12): π = 1, given the epoch": replace(TOLD, premium=1.0),
    "without c in (12), given the epoch": replace(TOLD, gate=0.0),
    "π is at most 27, given the epoch": replace(TOLD, premium=27.0),
    "π is at most 81, given the epoch": replace(TOLD, premium=81.0),
    "π is at most 3, given the epoch": replace(TOLD, premium=3.0),
    "π is at most 3, to the power of √c, given the epoch": replace(TOLD, gate=0.5, premium=3.0),
    "π is at most 3, to the power of c², given the epoch": replace(TOLD, gate=2.0, premium=3.0),
    "π is at most 3, without c in (12), given the epoch": replace(TOLD, gate=0.0, premium=3.0),
    "π is at most 2, without c in (12), given the epoch": replace(TOLD, gate=0.0, premium=2.0),
    "what repeats uphill counts three quarters, given the epoch": replace(TOLD, uphill=3 / 4),
    "what repeats uphill counts two thirds, given the epoch": replace(TOLD, uphill=2 / 3),
    "what repeats uphill counts half, given the epoch": replace(TOLD, uphill=1 / 2),
    "what repeats uphill counts for nothing, given the epoch": replace(TOLD, uphill=0.0),
    "signal counts as seen 9 times at most, given the epoch": replace(TOLD, known=9.0),
    "signal counts as seen 27 times at most, given the epoch": replace(TOLD, known=27.0),
    "signal counts as seen 81 times at most, given the epoch": replace(TOLD, known=81.0),
    "the schedule is made up for twice": SQUARED,
    "κ = 12": replace(SQUARED, stake=12.0),
    "κ = 15": replace(SQUARED, stake=15.0),
    "κ = 27": replace(SQUARED, stake=27.0),
    "κ = 15, T = 96": replace(SQUARED, stake=15.0, learns=96),
    "κ = 15, T = 81": replace(SQUARED, stake=15.0, learns=LEAST),
    "κ = 12, h is bounded by 3 √v": replace(SQUARED, stake=12.0, bound=3.0),
    "h is bounded by 3 √v": replace(SQUARED, bound=3.0),
    "z²/4 from 4 on": replace(SQUARED, sure=4.0),
    "the schedule is made up for twice, given the epoch": SQUARED_TOLD,
    "κ = 12, given the epoch": replace(SQUARED_TOLD, stake=12.0),
    "κ = 15, given the epoch": replace(SQUARED_TOLD, stake=15.0),
    "log s as z²/2 from 2 on": SOONER,
    "… T = 81": replace(SOONER, learns=LEAST),
    "… T = 162": replace(SOONER, learns=162),
    "… T = 243": replace(SOONER, learns=MOST),
    "… Δ starts again at 1, 2, 4, 8": replace(SOONER, turns=TURNS[:-1]),
    "… Δ starts again at 1, 2, 4, 8, 27, 54": replace(SOONER, turns=(*TURNS, 54)),
    "… Δ starts again at 1, 2, 4, 8, 27, 81": replace(SOONER, turns=AGAIN),
    "… what repeats uphill counts two thirds": replace(SOONER, uphill=2 / 3),
    "… what repeats uphill counts half": replace(SOONER, uphill=1 / 2),
    "… s stays where losses explode": replace(SOONER, rescued=False),
    "… κ rises to 27 from 1 by 1": replace(SOONER, stake=27.0, ramp=(1.0, 1.0)),
    "… κ rises to 27 from 3 by 1/3": replace(SOONER, stake=27.0, ramp=(3.0, 1 / 3)),
    "log s as z²/2 from 2 on, given the epoch": SOONER_TOLD,
    "… T after six, given the epoch": replace(SOONER_TOLD, learns_passes=6.0),
    "… T after twelve, given the epoch": replace(SOONER_TOLD, learns_passes=12.0),
    "… Δ starts again at 1, 2, 4, 8, 27, 81, given the epoch": replace(SOONER_TOLD, turns=AGAIN),
    "… what repeats uphill counts half, given the epoch": replace(SOONER_TOLD, uphill=1 / 2),
    "Δ starts again at 81": SCORE,
    "… log s walks": replace(SCORE, learner="walk"),
    "… log s in proportion to z": replace(SCORE, sure=math.inf),
    "… log s as z²/2 throughout": replace(SCORE, quadratic=True),
    "… half as fast": replace(SCORE, pace=0.5),
    "… 0.7 times as fast": replace(SCORE, pace=0.7),
    "… 1.5 times as fast": replace(SCORE, pace=1.5),
    "… h is bounded by 3 √v": replace(SCORE, bound=3.0),
    "… h is not bounded": replace(SCORE, bound=math.inf),
    "… h is bounded where it is below 0 only": replace(SCORE, losses_bound=False),
    "… κ = 1": replace(SCORE, stake=1.0),
    "… κ = 3": replace(SCORE, stake=3.0),
    "… κ = 27": replace(SCORE, stake=27.0),
    "… s_init by the first update": replace(SCORE, watched=1),
    "… s_init by the first update, h is bounded where it is below 0 only": replace(
        SCORE, watched=1, losses_bound=False
    ),
    "… s_init by the first update, 0.7 times as fast": replace(SCORE, watched=1, pace=0.7),
    "… s_init by the first update, κ = 3": replace(SCORE, watched=1, stake=3.0),
    "… s_init by the first update, κ = 27": replace(SCORE, watched=1, stake=27.0),
    "… s_init by the eighth update": replace(SCORE, latest=True),
    "… s_init by the longest of sixteen": replace(SCORE, watched=16),
    "… Δ starts again at 1, 3, 9, 27, 81": replace(SCORE, turns=(1, 3, 9, 27, 81)),
    "… Δ starts again at 1, 2, 4, 8, 16, 32, 81": replace(SCORE, turns=EARLY),
    "… Δ starts again at 1, 2, 9, 27, 81": replace(SCORE, turns=(1, 2, 9, 27, 81)),
    "… α = 1": replace(SCORE, rescaled=1.0),
    "… α = 0.25": replace(SCORE, rescaled=0.25),
    "Δ starts again at 81, given the epoch": SCORE_TOLD,
    "… log s in proportion to z, given the epoch": replace(SCORE_TOLD, sure=math.inf),
    "… log s as z²/2 throughout, given the epoch": replace(SCORE_TOLD, quadratic=True),
    "… κ = 3, given the epoch": replace(SCORE_TOLD, stake=3.0),
    "… κ = 27, given the epoch": replace(SCORE_TOLD, stake=27.0),
    "… 0.7 times as fast, given the epoch": replace(SCORE_TOLD, pace=0.7),
    "… h is bounded where it is below 0 only, given the epoch": replace(SCORE_TOLD, losses_bound=False),
    "… h > 0 counts less in the first epochs, given the epoch": replace(SCORE_TOLD, lost="half at first"),
    "… what repeats uphill counts two thirds, given the epoch": replace(SCORE_TOLD, uphill=2 / 3),
    "… s_init by the first update, given the epoch": replace(SCORE_TOLD, watched=1),
    "… Δ starts again at 1, 2, 4, 8, 16, 32, 81, given the epoch": replace(SCORE_TOLD, turns=EARLY),
    "… T after twenty, given the epoch": replace(SCORE_TOLD, learns_passes=20.0),
    "bets": BETS,
    "bets, T = 162": replace(BETS, learns=162),
    "… all elements count for s_init": replace(BETS, counted=False),
    "… a warmup is made up for": MADE_UP,
    "… at most 27 s_init in a warmup": replace(BETS, warmup=27.0),
    "… s_init is 1e-8": replace(BETS, s_init=1e-8),
    "… the first scale is s_init": replace(BETS, stake=1.0),
    "… the first scale at once, 30 s_init": AT_ONCE,
    "… s triples, up to 30 s_init": replace(BETS, stake=30.0),
    "… s doubles, up to 8 s_init": replace(BETS, stake=8.0, triples=2.0),
    "… Δ does not start again at 81": replace(BETS, turns=EARLY[:-1]),
    "… half of Δ is left at 81": replace(BETS, left=0.5),
    "… a quarter of Δ is left at 81": replace(BETS, left=0.25),
    "… a quarter of Δ is left each time": replace(BETS, left=0.25, left_at=EARLY),
    "… half of Δ is left each time": replace(BETS, left=0.5, left_at=EARLY),
    "… half of Δ is left at 1, 2, 4, 8, 16, 32, 64, 128": replace(BETS, left=0.5, left_at=POWERS, turns=POWERS),
    "… losses count as in an epoch of 20 steps": IN_20,
    "… losses count as in an epoch of 40 steps": replace(IN_20, lost_epoch=40.0),
    "… losses count as in an epoch of 81 steps": replace(IN_20, lost_epoch=81.0),
    "… losses count as in an epoch of 20 steps, half of Δ is left at 81": replace(IN_20, left=0.5),
    "… losses count as in an epoch of 20 steps, Δ does not start again at 81": replace(IN_20, turns=EARLY[:-1]),
    "… s_init at least": replace(BETS, least=1.0),
    "… 9 s_init at least, unless h says less": replace(BETS, least=9.0),
    "… 27 s_init at least, unless h says less": replace(BETS, least=27.0),
    "… losses count half up to step 16": replace(BETS, losses=0.5, lost_until=16),
    "… losses count half up to step 32": replace(BETS, losses=0.5, lost_until=32),
    "… losses count half up to step 81": replace(BETS, losses=0.5, lost_until=81),
    "… ρ = 2e-3": replace(BETS, share=2e-3, stake=13.5),
    "… ρ = 3e-3": replace(BETS, share=3e-3, stake=9.0),
    "… ρ = 0.7e-3, κ = 27": replace(BETS, share=0.7e-3),
    "… ρ = 2e-3, κ = 27": replace(BETS, share=2e-3),
    "… ρ = 3e-3, half of Δ is left at 81": replace(BETS, share=3e-3, stake=9.0, left=0.5),
    "… ρ = 3e-3, Δ does not start again at 81": replace(BETS, share=3e-3, stake=9.0, turns=EARLY[:-1]),
    "… Δ never starts again": replace(BETS, recentre="never"),
    "… Δ starts again every nine steps from the start": replace(BETS, recentre="every", first=tuner.SHORT),
    "… all of a change of the scale is made up for: α = 1": replace(BETS, rescaled=1.0),
    "… bets are not clipped": replace(BETS, clip=False),
    "… bets go on to the end": replace(BETS, learns=math.inf, short=0, premium=1.0),
    "… after T, the scale stays": replace(BETS, until=MOST),
    "… noise counts for nothing": replace(BETS, seen="never"),
    "… where h is noise, the schedule counts in full: π to the power of c": TWICE,
    "Δ starts again at 1, 3, 9, 27, 81: tripling": TRIPLED,
    "… at 1, 2, 4, 8, 16, 32, 64, 128: doubling": at(*POWERS),
    "… at 2, 4, 8, 16, 32, 81": at(2, 4, 8, 16, 32, 81),
    "… at 3, 8, 16, 32, 81": at(3, 8, 16, 32, 81),
    "… at 4, 8, 16, 32, 81": at(4, 8, 16, 32, 81),
    "… at 8, 16, 32, 81": at(8, 16, 32, 81),
    "… at 1, 2, 4, 8, 16, 32, 64": at(1, 2, 4, 8, 16, 32, 64),
    "… at 1, 2, 4, 8, 16, 32, 96": at(1, 2, 4, 8, 16, 32, 96),
    "… at 1, 2, 4, 8, 16, 32, 100": at(1, 2, 4, 8, 16, 32, 100),
    "… at 1, 2, 4, 8, 16, 32": at(1, 2, 4, 8, 16, 32),
    "… at 1, 2, 4, 8, 16, 27, 81": at(1, 2, 4, 8, 16, 27, 81),
    "… at 1, 2, 4, 8, 27, 81": at(1, 2, 4, 8, 27, 81),
    "… at 1, 2, 3, 5, 9, 16, 27, 81": at(1, 2, 3, 5, 9, 16, 27, 81),
    "… at 1, 2, …, 9, 27, 81": at(*range(1, 10), 27, 81),
    "… at 1, 2, …, 9, 18, 36, 81": at(*range(1, 10), 18, 36, 81),
    "… at 1, 4, 16, 27, 81": at(1, 4, 16, 27, 81),
    "… at 1, 4, 9, 16, 25, 36, 81": at(1, 4, 9, 16, 25, 36, 81),
    "… at 1, 3, 9, 18, 27, 81": at(1, 3, 9, 18, 27, 81),
    "… at 1, 3, 9, 27, 54, 81": at(1, 3, 9, 27, 54, 81),
    "… at 1, 3, 9, 27, 47, 81, 140": at(1, 3, 9, 27, 47, 81, 140),
    "… at 1, 3, 9, 27, 81, 162": at(1, 3, 9, 27, 81, 162),
    "… at 1, 3, 9, 27, 81, 162, losses count 0.7": replace(at(1, 3, 9, 27, 81, 162), losses=0.7),
    "… at 1, 3, 9, 27, 81, 216": at(1, 3, 9, 27, 81, 216),
    "… at none: Δ fades by t/(t + 3) until T, α = 0.25": replace(at(), fade=3.0, rescaled=0.25),
    "… at 1, 3, 9, 27, 81, T = 162": replace(TRIPLED, learns=162),
    "the first scale = 10 s_init": replace(BETS, stake=10.0),
    "α = 0.35": replace(BETS, rescaled=0.35),
    "α = 0.25": replace(BETS, rescaled=0.25),
    "forgetting half each time until T": replace(BETS, kept=0.5),
    "forgetting half each time until T, β is 1": replace(BETS, kept=0.5, betas=(1.0,)),
    "tripling, given the epoch": replace(TOLD_EVEN, recentre="growing"),
    "losses count 0.8": replace(BETS, losses=0.8),
    "losses count 0.7": replace(BETS, losses=0.7),
    "losses count half": replace(BETS, losses=0.5),
    "losses count half where h is signal": replace(BETS, bounces=0.5),
    "losses count in full, given the epoch": TOLD_EVEN,
    "… losses count 0.8, given the epoch": replace(TOLD_EVEN, losses=0.8),
    "… losses count 0.7, given the epoch": replace(TOLD_EVEN, losses=0.7),
    "… losses count 0.6, given the epoch": replace(TOLD_EVEN, losses=0.6),
    "… losses count half, given the epoch": replace(TOLD_EVEN, losses=0.5),
    "… losses count half where h is signal, given the epoch": replace(TOLD_EVEN, bounces=0.5),
    "… losses count a tenth where h is signal, given the epoch": replace(TOLD_EVEN, bounces=0.9),
    "… losses count t/(12 E), but half at least, given the epoch": replace(TOLD_EVEN, lost="half until the sixth"),
    "… losses count (1 + t/E)/(2 + t/E), given the epoch": replace(TOLD_EVEN, lost="half at first, at once more"),
    "bets, given the epoch": TOLD_NOW,
    "… all elements count for s_init, given the epoch": replace(TOLD_NOW, counted=False),
    "… a warmup is made up for, given the epoch": replace(TOLD_NOW, warmup=math.inf),
    "… the first scale at once, 30 s_init, given the epoch": replace(
        TOLD_NOW, stake=30.0, triples=math.inf, warmup=math.inf
    ),
    "… half of Δ is left at 81, given the epoch": replace(TOLD_NOW, left=0.5),
    "… 9 s_init at least, unless h says less, given the epoch": replace(TOLD_NOW, least=9.0),
    "… 27 s_init at least, unless h says less, given the epoch": replace(TOLD_NOW, least=27.0),
    "… ρ = 2e-3, given the epoch": replace(TOLD_NOW, share=2e-3, stake=13.5),
    "… ρ = 0.7e-3, κ = 27, given the epoch": replace(TOLD_NOW, share=0.7e-3),
    "… ρ = 2e-3, κ = 27, given the epoch": replace(TOLD_NOW, share=2e-3),
    "… ρ = 3e-3, given the epoch": replace(TOLD_NOW, share=3e-3, stake=9.0),
    "… ρ = 3e-3, half of Δ is left at 81, given the epoch": replace(TOLD_NOW, share=3e-3, stake=9.0, left=0.5),
    "… Δ does not start again at 81, given the epoch": replace(TOLD_NOW, turns=EARLY[:-1], lasting=False),
    "h of a point midway": replace(BETS, midway=0.5),
    "h of a point midway, by half": replace(BETS, midway=0.25),
    "h of a point midway, by a tenth": replace(BETS, midway=0.1),
    "h of a point midway, by half, given the epoch": replace(TOLD_NOW, midway=0.25),
    "h of a point midway, by half, losses in full, given the epoch": replace(TOLD_EVEN, midway=0.25),
    "h of a point midway, by a tenth, losses in full, given the epoch": replace(TOLD_EVEN, midway=0.1),
    "h along the coming update": replace(BETS, along=True),
    "h of an older Δ": replace(BETS, delay=1 / 8),
    "h of an older Δ, given the epoch": replace(TOLD_NOW, delay=1 / 8),
    "… T is 243 steps, given the epoch": replace(TOLD_NOW, learns_passes=math.inf),
    "… a noisy step counts once, given the epoch": replace(TOLD_NOW, seen="once"),
    "published": replace(PUBLISHED, s_init=1e-8),
    "published, s_init 1e-4": replace(PUBLISHED, s_init=1e-4),
    "s_init from the data": FIXED,
    "…, and settled while the schedule decays": replace(FIXED, settle=1.0),
    "…, settled below 0.7 of its peak": replace(FIXED, settle=0.7),
    "x + s u, Δ decays by 0.99": replace(FIXED, forget=0.99),
    "x + s u, Δ decays by 0.999": replace(FIXED, forget=0.999),
    "doubling, s_init 1e-8": replace(DOUBLING, s_init=1e-8, stake=100),
    "doubling, unclipped": replace(DOUBLING, clip=False),
    "doubling": DOUBLING,
    "…, λ = 0.01, times the scale": replace(DOUBLING, s_decay=1e-2, published_decay=True),
    "…, λ = 0.01": replace(DOUBLING, s_decay=1e-2),
    "…, λ = 0.02": replace(DOUBLING, s_decay=2e-2),
    "…, λ = 0.1": replace(DOUBLING, s_decay=1e-1),
    "…, h of an older Δ": replace(DOUBLING, delay=1 / 8),
    "…, h of an older Δ, λ = 0.02": replace(DOUBLING, delay=1 / 8, s_decay=2e-2),
    "…, r does not decay": replace(DOUBLING, reward_decay=0.0),
    "…, forgetting half each time": replace(DOUBLING, kept=0.5),
    "…, forgetting half each time, ρ = 1.5e-3": replace(DOUBLING, kept=0.5, share=1.5e-3),
    "…, forgetting 9/10 each time": replace(DOUBLING, kept=0.1),
    "…, losses count half": replace(DOUBLING, losses=0.5),
    "…, losses count half, λ = 0.04": replace(DOUBLING, losses=0.5, s_decay=4e-2),
    "…, settled below 0.5": replace(DOUBLING, settle=0.5),
    "…, not divided by the factor": replace(DOUBLING, by_factor=False),
    "…, first scale = s_init": replace(DOUBLING, stake=1),
    "…, first scale = 100 s_init": replace(DOUBLING, stake=100),
    "…, ρ = 1e-4": replace(DOUBLING, share=1e-4),
    "…, ρ = 2e-3": replace(DOUBLING, share=2e-3),
    "…, ρ = 1e-2": replace(DOUBLING, share=1e-2),
    "…, ρ = 1e-2, first scale = s_init": replace(DOUBLING, share=1e-2, stake=1),
    "…, from step 32": replace(DOUBLING, first=32),
    "…, by a factor of 1.4": replace(DOUBLING, growth=1.4),
    "…, by a factor of 3": replace(DOUBLING, growth=3.0),
    "…, by a factor of 4": replace(DOUBLING, growth=4.0),
    "…, every 100 steps": replace(DOUBLING, recentre="every", first=100),
    "…, starting the tuner anew each time": replace(DOUBLING, kept=0.0, restart=True),
    "…, β = 0.99 alone": replace(DOUBLING, betas=(0.99,)),
    "…, β = 0.9, 0.99, 0.999": replace(DOUBLING, betas=(0.9, 0.99, 0.999)),
    "…, a scale for matrices, one for vectors": replace(DOUBLING, per="kind"),
    "…, a scale for the last layer, one for the rest": replace(DOUBLING, per="head"),
    "…, a scale for each tensor": replace(DOUBLING, per="tensor"),
    "doubling, α = 0.75": replace(DOUBLING, rescaled=0.75),
    "doubling, α = 0.5": HALF,
    "doubling, α = 0.5, λ = 0.01": replace(HALF, s_decay=1e-2),
    "doubling, α = 0.5, forgetting half each time": replace(HALF, kept=0.5),
    "doubling, α = 0.5, losses count 0.8": replace(HALF, losses=0.8),
    "doubling, α = 0.25": replace(DOUBLING, rescaled=0.25),
    "doubling, α = 0": replace(DOUBLING, rescaled=0.0),
    "tripling, α = 0.5, losses count half": replace(TRIPLING, losses=0.5),
    "by a factor of 4, α = 0.5": replace(TRIPLING, growth=4.0),
    "by a factor of 4, α = 0.25": replace(TRIPLING, growth=4.0, rescaled=0.25),
    "tripling, α = 0.5": TRIPLING,
    "…, λ = 0.005": replace(TRIPLING, s_decay=5e-3),
    "…, α = 0.25": replace(TRIPLING, rescaled=0.25),
    "…, Δ fades by t/(t + 3)": FADING,
    "…, Δ fades by t/(t + 3), α = 0.25": replace(FADING, rescaled=0.25),
    "…, Δ fades by t/(t + 1), α = 0.25": replace(FADING, fade=1.0, rescaled=0.25),
    "…, no higher than since the move before": replace(TRIPLING, ceiling=1.0),
    "…, no higher than twice that": replace(TRIPLING, ceiling=2.0),
    "…, every fourth step": replace(TRIPLING, every=4),
    "…, for half of the steps": replace(TRIPLING, until=0.5),
    "…, on 1/10 of the rows": replace(TRIPLING, held_out=0.1),
    "…, on 1/10 of the rows, every fourth step": replace(TRIPLING, held_out=0.1, every=4),
    "…, on 1/10 of the rows, every fourth step, for half of the steps": replace(
        TRIPLING, held_out=0.1, every=4, until=0.5
    ),
    "…, on 1/5 of the rows": replace(TRIPLING, held_out=0.2),
    "…, on 1/5 of the rows, every fourth step": replace(TRIPLING, held_out=0.2, every=4),
    "…, on 1/5 of the rows, every fourth step, for a third of the steps": replace(
        TRIPLING, held_out=0.2, every=4, until=1 / 3
    ),
    "…, on 1/5 of the rows, every fourth step, for half of the steps": replace(
        TRIPLING, held_out=0.2, every=4, until=0.5
    ),
    "…, on 1/5 of the rows, every fourth step, for two thirds of the steps": replace(
        TRIPLING, held_out=0.2, every=4, until=2 / 3
    ),
    "…, for 243 steps": replace(TRIPLING, until=243),
    "…, for 243 steps, then it falls as 1/√t": replace(TRIPLING, until=243, fall=0.5),
    "…, for 243 steps, then h less its mean": LESS_MEAN,
    "…, for 81 steps, then h less its mean": replace(LESS_MEAN, learns=81),
    "…, for 729 steps, then h less its mean": replace(LESS_MEAN, learns=729),
    "…, for 243 steps, then h less its mean where that is won": replace(LESS_MEAN, width=(0.0, math.inf)),
    "…, for 243 steps, then h less its mean within one deviation": replace(LESS_MEAN, width=(1.0, 1.0)),
    "…, for 243 steps, then h less its mean within two": replace(LESS_MEAN, width=(2.0, 2.0)),
    "…, for 243 steps, then h less its mean within three": replace(LESS_MEAN, width=(3.0, 3.0)),
    "…, for 243 steps, then bets of 0": NO_BETS,
    "…, for 243 steps, then as 1/√v": replace(FALLING, period=math.inf),
    "tripling, for 243 steps, then as 1/√v, Δ anew every 729": FALLING,
    "…, for 81 steps, Δ anew every 243": replace(FALLING, learns=81, period=243),
    "…, for 729 steps, Δ anew every 2187": replace(FALLING, learns=729, period=2187),
    "…, Δ anew every 243": replace(FALLING, period=243),
    "…, the schedule's decay counted": replace(FALLING, shared=True),
    "…, as 1/∛v": replace(FALLING, power=1 / 3),
    "…, as 1/∛v, the schedule's decay counted": replace(FALLING, power=1 / 3, shared=True),
    "…, the noise of h": replace(FALLING, noise=True),
    "…, the noise of h, Δ anew every 243": replace(FALLING, noise=True, period=243),
    "…, as 1/max |h|": replace(FALLING, then="largest"),
    "…, as 1/max |h|, by no more than 1/1.1 a step": replace(FALLING, then="largest", outlier=1.1),
    "…, as one over the largest mean of h²": replace(FALLING, then="recent"),
    "…, bets while a warmup goes on, then none": replace(FALLING, then="warm"),
    "…, h less its mean": replace(FALLING, then="mean", memory=0.9),
    "tripling, for 243 steps, then by the noise of a short Δ": NOISE,
    "…, to the power of 3/4": replace(NOISE, power=0.75),
    "…, noise counts half": replace(NOISE, counts=2 * tuner.USUAL),
    "…, 81 steps of noise for free": replace(NOISE, free=True),
    "…, beside the h² before": replace(NOISE, usual="before"),
    "…, beside the most of h²": replace(NOISE, usual="most"),
    "…, α = 0.25 in place of 0.5": replace(NOISE, rescaled=0.25),
    "…, by a factor of 4, α = 0.25": replace(NOISE, growth=4.0, learns=256, rescaled=0.25),
    "…, forgetting half each time until then": replace(NOISE, kept=0.5),
    "…, h of an older Δ throughout": replace(NOISE, delay=1 / 8),
    "…, first scale = 10 s_init": replace(NOISE, stake=10),
    "…, losses count 0.7": replace(NOISE, losses=0.7),
    "…, losses count half until then": replace(NOISE, losses=0.5),
    "…, losses count as much as the schedule": replace(NOISE, forgiving=1.0),
    "…, losses count as its square": replace(NOISE, forgiving=2.0),
    "…, losses count half where h is signal": replace(NOISE, bounces=0.5),
    "…, a premium of 1.5": replace(PREMIUM, premium=1.5, gate=0.0),
    "…, a premium of 2": replace(PREMIUM, premium=2.0, gate=0.0),
    "…, a premium of 3": replace(PREMIUM, premium=3.0, gate=0.0),
    "**…, a premium of 3 where h is signal**": PREMIUM,
    "**…, from T on**": ONCE,
    "…, from T on, and half as much again": replace(ONCE, rises=1.5),
    "…, from T on, and up to its peak by 1/81 a step": replace(ONCE, climbs=1 / 81),
    "…, from T on, and up to its peak, one and a half times": replace(ONCE, again=1.5),
    "**…, from T on, and up to its peak, twice**": TWICE,
    "…, from T on, and up to its peak, three times": replace(ONCE, again=3.0),
    "**up to the peak twice, the mean of the last third**": MEAN,
    "up to the peak twice, the mean of the last half": replace(MEAN, averaged=1 / 2),
    "up to the peak twice, the mean of the last two thirds": replace(MEAN, averaged=2 / 3),
    "up to the peak twice, the arithmetic mean": replace(MEAN, arithmetic=True),
    "up to the peak twice, the arithmetic mean of the last two thirds": replace(MEAN, arithmetic=True, averaged=2 / 3),
    "up to the peak twice, the mean of the scales of the last third": replace(MEAN, mean_of="scales"),
    "up to the peak twice, the mean of the scales of the last two thirds": replace(
        MEAN, mean_of="scales", averaged=2 / 3
    ),
    "up to the peak once, the mean of the last third": replace(MEAN, again=1.0),
    "…, from T on, λ = 0.005 until then": replace(CHARGED, s_decay=0.005),
    "…, from T on, λ = 0.01 until then": CHARGED,
    "…, from T on, λ = 0.02 until then": replace(CHARGED, s_decay=0.02),
    "…, from T on, λ = 0.005 until then, losses count 0.8": replace(CHARGED, s_decay=0.005, losses=0.8),
    "…, from T on, λ = 0.01 until then, losses count 0.8": replace(CHARGED, losses=0.8),
    "…, from T on, λ = 0.01 until then, losses count 0.7": replace(CHARGED, losses=0.7),
    "…, from T on, λ = 0.01 until then, losses count 0.7, forgetting half": replace(CHARGED, losses=0.7, kept=0.5),
    "…, from T on, forgetting half each time until then": replace(ONCE, kept=0.5),
    "…, a premium of 1.5 where h is signal": replace(PREMIUM, premium=1.5),
    "…, a premium of 2 where h is signal": replace(PREMIUM, premium=2.0),
    "…, a premium of 4 where h is signal": replace(PREMIUM, premium=4.0),
    "…, a premium of 2 where h is signal, to the power of c²": replace(PREMIUM, premium=2.0, gate=2.0),
    "…, a premium of 3 where h is signal, to the power of c²": replace(PREMIUM, gate=2.0),
    "…, a premium of 4 where h is signal, to the power of c²": replace(PREMIUM, premium=4.0, gate=2.0),
    "with the epoch given": TOLD_ONCE,
    "with the epoch given, the premium from T on": EPOCHS,
    "with the epoch given, T after nine, the premium from T on": NINE,
    "…, T after six": replace(NINE, learns_passes=6.0),
    "…, T after twelve": replace(NINE, learns_passes=12.0),
    "…, T after fifteen": replace(NINE, learns_passes=15.0),
    "…, T after nine, forgetting half each time until then": replace(NINE, kept=0.5),
    "…, T after nine, then Δ anew every 3": replace(NINE, short=3),
    "…, T after nine, then Δ anew every 27": replace(NINE, short=27),
    "…, T after nine, λ = 0.005": replace(NINE, s_decay=0.005, charged="once"),
    "…, T after nine, λ = 0.01 from the ninth on": replace(NINE, s_decay=0.01, charged="to one in nine"),
    "**…, T after nine, what repeats uphill counts two thirds**": UPHILL,
    "…, T after nine, what repeats uphill counts two thirds, up to its peak by 1/81 a step": replace(
        UPHILL, climbs=1 / 81
    ),
    "…, T after nine, what repeats uphill counts two thirds, up to its peak, one and a half times": replace(
        UPHILL, again=1.5
    ),
    "…, T after nine, what repeats uphill counts two thirds, up to its peak, twice": TOLD_TWICE,
    "…, T after nine, what repeats uphill counts two thirds, up to its peak, three times": replace(UPHILL, again=3.0),
    "…, T after nine, what repeats uphill counts for nothing": replace(NINE, uphill=0.0),
    "…, T after nine, forgetting half each time until then, β = 1": replace(UPHILL, kept=0.5, betas=(1.0,)),
    "…, T after nine, forgetting half each time until then, β = 1, and half as much again": replace(
        UPHILL, kept=0.5, betas=(1.0,), rises=1.5
    ),
    "with the epoch given, T after nine, up to the peak twice, the mean of the last third": TOLD_MEAN,
    "with the epoch given, T after nine, up to the peak twice, the mean of the last two thirds": replace(
        TOLD_MEAN, averaged=2 / 3
    ),
    "with the epoch given, T after nine, up to the peak twice, the arithmetic mean": replace(
        TOLD_MEAN, arithmetic=True
    ),
    "**with the epoch given, T after twelve, up to the peak twice, the mean of the last third**": replace(
        TWELVE, averaged=1 / 3
    ),
    "**with the epoch given, T after twelve, up to the peak twice**": TWELVE,
    "with the epoch given, T after twelve, up to the peak twice, the mean of the scales of the last third": replace(
        TWELVE, averaged=1 / 3, mean_of="scales"
    ),
    "…, no rise after nine": replace(EPOCHS, settles=9.0),
    "…, wins count half after ten": replace(EPOCHS, wins=10.0),
    "…, Δ anew every pass": replace(EPOCHS, anew=1.0),
    "…, Δ anew every two passes": replace(EPOCHS, anew=2.0),
    "for 81 steps": replace(ONCE, learns=81),
    "what repeats uphill counts two thirds": replace(ONCE, uphill=2 / 3),
    "a noisy step counts a third": replace(ONCE, seen="a third"),
    "noise counts for nothing": replace(ONCE, seen="never"),
    "what the schedule decays is a part of the fall": replace(ONCE, shared=True),
    "forgetting half each time until T, β = 1": replace(ONCE, kept=0.5, betas=(1.0,)),
    "h of the validation rows until T": replace(ONCE, clairvoyant=True),
    "h of the validation rows until T, with the epoch given": replace(EPOCHS, clairvoyant=True),
    "with the epoch given, the premium from T on, λ = 0.01 until then, losses count 0.7": replace(
        CHARGED, losses=0.7, seen="before"
    ),
    "with the epoch given, the premium from T on, λ = 0.01 until then, losses count 0.8": replace(
        CHARGED, losses=0.8, seen="before"
    ),
    "with the epoch given, this pass counts too": replace(TOLD_ONCE, seen="so far"),
    "with the epoch given, the root of the passes": replace(TOLD_ONCE, seen="root"),
    "with the epoch given, ten passes at most": replace(TOLD_ONCE, seen="to ten"),
    "with the epoch given, thirty passes at most": replace(TOLD_ONCE, seen="to thirty"),
    "with the epoch given, the root of max(0, e − 1)": replace(TOLD_ONCE, seen="root of before"),
    "with the epoch given, to the power of e/(1 + e)": replace(TOLD_ONCE, seen="once", passes="e/(1 + e)"),
    "with the epoch given, to the power of 1 − 1/e": replace(TOLD_ONCE, seen="once", passes="1 - 1/e"),
    "with the epoch given, a premium of 3 throughout": replace(TOLD_ONCE, gate=0.0),
    "with the epoch given, the schedule's decay counted": replace(TOLD_ONCE, shared=True),
    "with the epoch given, λ = 0.005 from the first pass on": replace(TOLD_ONCE, s_decay=0.005, charged="to one"),
    "with the epoch given, λ = 0.01 from the first pass on": replace(TOLD_ONCE, s_decay=0.01, charged="to one"),
    "with the epoch given, λ = 0.01 from the fifth on": replace(TOLD_ONCE, s_decay=0.01, charged="to one in five"),
    "with the epoch given, λ = 0.01 (1 − 1/e)": replace(TOLD_ONCE, s_decay=0.01, charged="1 - 1/e"),
    "with the epoch given, wins count half after ten": replace(TOLD_ONCE, wins=10.0),
    "with the epoch given, T after nine": replace(TOLD_ONCE, learns_passes=9.0),
    "with the epoch given, no rise after nine": replace(TOLD_ONCE, settles=9.0),
    "beside the first h²": FIRST,
    "beside the first h², long warmups not held": replace(FIRST, holds=False),
    "beside the first h², h over the schedule's factor": replace(FIRST, evens="all", holds=False),
    "beside the first h² as it comes": AS_IT_COMES,
    "beside the first h² as it comes, to the power of 3/4": replace(AS_IT_COMES, power=0.75),
    "beside the first h² as it comes, to the power of 1": replace(AS_IT_COMES, power=1.0),
    "beside the first h² as it comes, the signal counts once": replace(AS_IT_COMES, signal=1.0),
    "beside the first h² as it comes, Δ anew every 27": replace(AS_IT_COMES, short=27),
    "beside the first h² as it comes, 243 steps to measure": replace(AS_IT_COMES, gauges=243, counts=243),
    "beside the first h² as it comes, unbounded": replace(AS_IT_COMES, unusual=math.inf),
    "tripling, Δ anew every 729": replace(TRIPLING, period=729),
}


class Tuner:
    """The state of one idea: scales for every seed and group of tensors."""

    def __init__(self, idea: Idea, stack: Stack) -> None:
        self.steps_per_epoch = stack.task.steps_per_epoch
        if idea.learns_passes < math.inf:
            passes = max(LEAST, idea.learns_passes * self.steps_per_epoch)
            idea = replace(idea, learns=round(min(passes, idea.learns)))
        if idea.lasting and self.steps_per_epoch > idea.learns:
            idea = replace(idea, turns=idea.turns[:-1])
        self.idea = idea
        self.betas = torch.tensor(idea.betas, dtype=torch.float64)
        self.n = len(idea.betas)
        self.counts = torch.tensor([shape.numel() for shape in stack.shapes.values()])
        last = list(stack.shapes)[-1].rpartition(".")[0]
        self.group = torch.tensor(
            [
                {"model": 0, "kind": int(len(shape) > 1), "head": int(name.startswith(last)), "tensor": i}[idea.per]
                for i, (name, shape) in enumerate(stack.shapes.items())
            ]
        )
        self.scale = torch.zeros(len(stack.seeds), int(self.group.max()) + 1, dtype=torch.float64)
        self.descent = self.scale
        self.start = torch.full((*self.scale.shape, 1), idea.s_init or 0.0, dtype=torch.float64)
        self.v: Tensor = self.scale.new_zeros(*self.scale.shape, self.n)
        self.s = self.r = self.m = self.v
        self.mean = self.mean_square = self.before = self.alike = self.square = torch.zeros_like(self.start)
        self.gauge = self.late = self.most = self.said = self.weighed = self.before
        self.count = 0
        self.highest = self.peak = self.top = self.level = self.recent = 0.0
        self.largest, self.limit = self.scale, torch.full_like(self.scale, torch.inf)
        self.turn = idea.first
        self.rates: list[Tensor] = []

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """<a, b> within every group, (seeds, groups)."""
        parts = [part.sum(-1) for part in (a.double() * b.double()).split(self.counts.tolist(), -1)]
        return torch.zeros_like(self.scale).index_add(-1, self.group, torch.stack(parts, -1))

    def spread(self, scale: Tensor) -> Tensor:
        """A number for every group, at every element."""
        return scale[:, self.group].repeat_interleave(self.counts, -1)

    def counted(self, u: Tensor, g: Tensor) -> Tensor:
        """1 where an element counts for s_init, 0 elsewhere, see `manic.kernels.plain.counted`."""
        parts = zip(*(tensor.split(self.counts.tolist(), -1) for tensor in (u, g)), strict=True)
        return torch.cat([counted(u, g, g.any(-1, keepdim=True)).to(u) for u, g in parts], -1)

    def step(self, delta: Tensor, g: Tensor, x: Tensor, u: Tensor, part: float) -> Tensor:
        """The next scale at every element, from Δ, g and x before a base step, what that adds, and the factor."""
        idea = self.idea
        learning = self.count < idea.learns
        h = self.product(delta, g)
        if idea.along and learning and part > 0:
            h = -self.product(delta, u) / part
        if idea.midway:
            before, self.descent = self.descent, self.product(u, g)
            h = torch.where(h != 0, h + learning * idea.midway * before, h)
        if idea.s_decay:
            weight = idea.s_decay * (self.scale if idea.published_decay else 1.0)
            if idea.charged:
                e = (self.count + 1) / self.steps_per_epoch
                weight *= OF_PASSES[idea.charged](e) * learning
            h += weight * (self.product(g, g) / self.product(x, x)).sqrt() * self.product(delta, x)
        if not self.highest or self.count < idea.watched:
            self.seek(g, x, u, part)
        return self.spread(self.update(h, part))

    def seek(self, g: Tensor, x: Tensor, u: Tensor, part: float) -> None:
        """Find s_init, (8), or lower it and s."""
        idea, before = self.idea, self.start
        if idea.s_init is None:
            counts = self.counted(u, g) if idea.counted else torch.ones_like(x)
            size = torch.maximum(self.product(x, x * counts), tuner.LEAST_SIZE**2 * self.product(counts, counts))
            moved = self.product(u, u * counts).sqrt() / (min(part, 1.0) if idea.by_factor else 1.0)
            found = (idea.share * size.sqrt() / moved).unsqueeze(-1)
            self.start = torch.minimum(found, before) if self.highest and not idea.latest else found
        if self.highest:
            self.s = self.s * (self.start / before)
        else:
            self.s = (min(idea.triples, idea.stake, idea.ramp[0]) * self.start / self.n).expand_as(self.s)

    def update(self, h: Tensor, part: float) -> Tensor:
        """The next scale of every group, from h and the schedule's factor."""
        idea, h = self.idea, h.unsqueeze(-1)
        if idea.evens == "all" and h.any():  # else Δ starts again
            h = h * self.peak / min(self.peak, self.recent) if self.count >= idea.learns else h
            self.recent = max(self.recent, part)
        else:
            self.recent = part
        before, self.before = self.before, h
        self.count += 1
        rises, self.highest = part - self.highest, max(self.highest, part)
        self.peak = self.highest if self.count <= idea.learns else self.peak
        if self.count <= idea.learns:
            self.top = self.highest if math.isinf(idea.rises) else min(self.highest, idea.rises * part)
        self.top = max(min(self.top * (1 + idea.climbs), self.highest), part)
        e = self.count / self.steps_per_epoch
        if self.count > idea.learns and not (idea.then == "mean" or (idea.then == "warm" and rises > 0)):
            if self.rates:
                rates, self.rates = torch.stack(self.rates), []
                mean = rates.mean(0) if idea.arithmetic else rates.log().mean(0).exp()
                self.s = self.s * (mean / rates[-1]).unsqueeze(-1)
            held = self.peak / self.highest if idea.then == "noise" and idea.holds else 1.0
            fall = held * self.fall(h, before, part, held)
            self.scale = (self.premium(part) * fall * self.s).sum(-1)
            return self.scale
        bound = self.learn(h, before, part, rises, e)
        self.s = self.s * self.raised(h, bound) if idea.least else self.s
        scale = self.s.sum(-1)
        settled = part < idea.settle * self.highest or (self.count > 81 and e > idea.settles)
        limit = self.scale if settled else self.limit
        self.s = self.s * (limit / scale).clamp(max=1).unsqueeze(-1)
        self.scale = torch.minimum(scale, limit)
        self.largest = torch.maximum(self.largest, self.scale)
        if idea.averaged and self.count >= idea.learns - idea.averaged * idea.learns // 1:
            rate = self.scale * (part if idea.mean_of == "rates" else 1.0)
            self.rates = [*self.rates, rate] if part > 0 else []
        return self.scale

    def learn(self, h: Tensor, before: Tensor, part: float, rises: float, e: float) -> Tensor:
        """(2) to (6); what h was bounded by."""
        idea = self.idea
        usual = idea.bound * self.v.sqrt() if idea.bound else self.m
        bound = torch.where(usual > 0, usual, torch.inf) if idea.clip else torch.full_like(usual, torch.inf)
        bet = torch.maximum(self.bet(h), -bound)
        bet = torch.minimum(bet, bound) if idea.losses_bound else bet
        self.alike, self.square = 0.9 * self.alike + h * before, 0.9 * self.square + h**2
        signal = (self.alike / self.square).nan_to_num(0).clamp(0, 1)
        passes = self.count / (idea.lost_epoch or self.steps_per_epoch)
        losses = idea.losses * (OF_PASSES[idea.lost](passes) if idea.lost else 1.0)
        losses = losses if self.count < idea.lost_until else 1.0
        losses = losses * (part / self.highest) ** idea.forgiving * (1 - idea.bounces * signal)
        bet = torch.where(bet > 0, losses * bet, bet / (1 + max(0.0, e - 1) / idea.wins))
        self.m = torch.maximum(self.betas * self.m, h.abs())
        bets = idea.learner == "bets"
        self.v = self.betas**2 * self.v + (h if bets else bet) ** 2
        self.r = self.betas**idea.reward_decay * self.r - bet * (self.s if bets else 1.0)
        self.r = self.r.clamp(min=0) if bets else self.r
        root, start = self.v.sqrt(), self.start / self.n
        if part < 1 and rises > 0 and idea.warmup < math.inf:
            ceiling = max(idea.warmup, 1 / rises)
            most = math.log(ceiling / idea.stake) / idea.pace
            score = root * (most if most < idea.sure else math.sqrt(most * idea.sure))
            self.r = torch.minimum(self.r, start * (ceiling * root - self.m) if bets else score)
        stake = min(idea.stake, max(idea.ramp[0], idea.ramp[1] * self.count))
        rising = self.s if self.count == 1 else torch.minimum(idea.triples * self.s, stake * start)
        if bets:
            learned = (start * self.m + self.r) / root
        elif idea.learner == "walk":
            learned = self.s * torch.exp(-idea.pace * bet / root)
        else:
            z = self.r / root
            moved = z * z.abs() / 2 if idea.quadratic else torch.where(z > idea.sure, z**2 / idea.sure, z)
            learned = stake * start * torch.exp(idea.pace * moved)
        self.s = torch.where(self.v > 0, learned, rising)
        return bound

    def raised(self, h: Tensor, bound: Tensor) -> Tensor:
        """What the scale is multiplied by, for the sake of `Idea.least`."""
        clipped = torch.minimum(h.abs(), bound).mean(-1, True).copysign(h)
        self.said, self.weighed = 0.999 * self.said + clipped, 0.999**2 * self.weighed + clipped**2
        sure = (2 * self.said / self.weighed.sqrt()).clamp(0, 1)
        floor = self.start * self.idea.least ** (1 - sure)
        return torch.where(self.weighed > 0, (floor / self.s.sum(-1, True)).clamp(min=1), 1.0)

    def premium(self, part: float) -> Tensor:
        """π of (12)."""
        idea = self.idea
        signal = (idea.counts / (idea.counts + self.late)) ** idea.gate
        if part == 0:
            return torch.as_tensor(idea.premium if self.top > 0 else 1.0) ** signal
        return min((self.top / part) ** idea.again, self.highest / part, idea.premium) ** signal

    def fall(self, h: Tensor, before: Tensor, part: float, held: float) -> Tensor:
        """What of the scale is left after T, from h, the one before, the schedule's factor, and what is done to it."""
        idea, total = self.idea, self.v[..., -1:]
        if idea.then == "warm":
            return torch.ones_like(h)
        if idea.then == "noise":
            self.before = held * h
            if idea.usual == "first":
                if self.count <= idea.learns + idea.gauges:
                    self.gauge, self.level = self.gauge + h**2, self.level + part**2
                    return torch.ones_like(h)
                usual = self.gauge * (self.peak**2 / self.level if idea.evens == "gauge" else 1 / idea.gauges)
            else:
                forget, earlier = 1 - 1 / idea.gauges, self.gauge * (self.peak**2 / (self.level or 1))
                self.gauge, self.level = forget * self.gauge + h**2, forget * self.level + part**2
                usual = earlier if idea.usual == "before" else self.gauge * (self.peak**2 / self.level)
                if idea.usual == "most" and self.count > idea.learns + idea.gauges:
                    self.most = usual = torch.maximum(self.most, usual)
            signal = idea.signal * (self.before * before / usual).clamp(max=idea.unusual**2)
            signal = torch.where((self.before > 0) & (before > 0), idea.uphill * signal, signal)
            e = self.count / self.steps_per_epoch
            seen = torch.full_like(h, OF_PASSES[idea.seen](e))
            seen = torch.where(before == 0, seen.clamp(max=1), seen)
            noise = seen * self.before**2 / usual - seen.clamp(max=idea.known) * signal
            self.late = (self.late + torch.where(usual > 0, noise, 0)).clamp(min=0)
            late = self.late.clamp(min=idea.counts) if idea.free else idea.counts + self.late
            left = (idea.counts / late) ** (OF_PASSES[idea.passes](e) if idea.passes else idea.power)
            if idea.rescued and total.any():
                root = total.sqrt()
                self.v = total + torch.minimum(self.before.abs(), root) ** 2
                left = left * root / torch.maximum(root, torch.minimum(self.before, before.abs()))
            if idea.shared:
                premium = self.premium(part)
                left = torch.minimum(left * (self.highest / part if part > 0 else math.inf), premium) / premium
            return left
        if idea.then == "largest":
            self.most = torch.maximum(self.most, self.m[..., -1:])
            self.most = torch.maximum(self.most, torch.minimum(h.abs(), idea.outlier * self.most))
            return self.m[..., -1:] / self.most
        if idea.then == "recent":
            self.late = (1 - 1 / idea.learns) * (self.late if self.most.any() else total) + h**2
            self.most = torch.maximum(self.most, self.late)
            return (total / self.most).clamp(max=1).sqrt()
        self.late = self.late + ((h - before) ** 2 / 2 if idea.noise else h**2)
        fall = (total / (total + self.late)) ** idea.power
        return (fall * self.highest / part).clamp(max=1) if idea.shared else fall

    def bet(self, h: Tensor) -> Tensor:
        """What is bet on, before it is clipped."""
        self.mean = torch.lerp(h, self.mean, self.idea.memory)
        self.mean_square = torch.lerp(h**2, self.mean_square, self.idea.memory)
        if self.count <= self.idea.learns or self.idea.then == "warm":
            return h
        deviation = (self.mean_square - self.mean**2).clamp(min=1e-300).sqrt()
        lost, won = (width * deviation for width in self.idea.width)
        return h - self.mean.clamp(-won, lost)

    def recentres(self, step: int) -> bool:
        """Whether x_ref moves after a step, counted from 1."""
        passes = [s / self.steps_per_epoch // self.idea.anew for s in (step - 1, step)]
        if step < min(self.turn, self.idea.learns) and passes[0] != passes[1]:
            return True
        listed = self.idea.recentre == "listed"
        if listed and step < self.idea.learns and step not in self.idea.turns:
            return False
        if self.idea.recentre == "never" or step < self.turn:
            return False
        self.turn = step + self.idea.first
        if self.idea.short and step >= self.idea.learns:
            self.turn = step + self.idea.short
        elif self.idea.recentre == "growing":
            learned = self.idea.learns if step < self.idea.learns else math.inf
            self.turn = min(max(step + 1, round(step * self.idea.growth)), step + self.idea.period, learned)
        if self.idea.ceiling and step >= 81:
            self.limit = self.idea.ceiling * self.largest
        self.largest = torch.zeros_like(self.scale)
        self.mean = self.mean_square = torch.zeros_like(self.start)
        kept = self.idea.kept
        self.r, self.m, self.v = kept * self.r, kept * self.m, kept**2 * self.v
        if self.idea.restart:
            self.start = self.scale.unsqueeze(-1)
            self.s = (self.start / self.n).expand_as(self.s)
        return True


def train(stack: Stack, base: str, schedule: str, ideas: list[Idea], steps: int) -> Iterator[Tensor]:
    """The parameters at each check, (seeds, ideas, parameters), of ideas with the same rows to train on."""
    x = stack.start[:, None].repeat(1, len(ideas), 1)
    reference, delta = x.clone(), torch.zeros_like(x)
    state = torch.zeros_like(x), torch.zeros_like(x)
    tuners = [Tuner(idea, stack) for idea in ideas]
    recent: list[list[Tensor]] = [[] for _ in ideas]  # updates since x_ref moved
    share, until, clairvoyant = ideas[0].held_out, ideas[0].until, ideas[0].clairvoyant
    until = round(until * steps if until <= 1 else until)
    data, others = stack.batches(steps), None
    if share:
        first, others = (Stack(part, stack.seeds).batches(until) for part in held_out(stack.task, share, 0))
        data = chain(first, stack.batches(steps - until))
    if clairvoyant:
        valid = replace(stack.task, train=stack.task.valid)
        others = Stack(valid, [50 + seed for seed in stack.seeds]).batches(MOST)
    for step, rows in enumerate(data):
        g = tuned_on = stack.gradient(x, *rows)[0]
        tuned = [step < until and (step < ALWAYS or step % idea.every == 0) for idea in ideas]
        if others and any(tuned) and not (clairvoyant and step >= MOST):
            tuned_on = stack.gradient(x, *next(others))[0]
        part, after = factor(schedule, step, steps), x.clone()
        base_step(base, after, g, *state, torch.tensor(part), step + 1)
        u = after - x
        for i, one in enumerate(tuners):
            before = scale = one.spread(one.scale).to(x.dtype)
            late = recent[i][len(recent[i]) - int(one.idea.delay * len(recent[i])) :]
            if tuned[i]:
                scale = one.step(delta[:, i] - sum(late), tuned_on[:, i], x[:, i], u[:, i], part).to(x.dtype)
            elif step >= until and one.idea.fall:
                one.scale = one.scale * (step / (step + 1)) ** one.idea.fall
                scale = one.spread(one.scale).to(x.dtype)
            if one.idea.delay:
                recent[i].append(u[:, i].clone())
            reference[:, i] += (1 - one.idea.rescaled) * (before - scale) * delta[:, i]
            if one.idea.fade and step + 1 < one.idea.learns:
                kept = step / (step + one.idea.fade)
                reference[:, i] += (1 - kept) * scale * delta[:, i]
                delta[:, i] *= kept
            delta[:, i] = (one.idea.forget or 1.0) * delta[:, i] + u[:, i]
            if one.idea.forget is not None:
                x[:, i] += scale * u[:, i]
                continue
            x[:, i] = reference[:, i] + scale * delta[:, i]
            if one.recentres(step + 1):
                delta[:, i] *= one.idea.left * (step + 1 in one.idea.left_at)
                reference[:, i], recent[i] = x[:, i] - scale * delta[:, i], []
        if is_check(step + 1, steps):
            yield x


def pair(
    task: str, base: str, schedule: str, names: list[str], smaller: int, steps: int, seeds: int, **rows: bool
) -> dict[str, list[tuple[float, float]]]:
    """Of every idea: gap and regret of each of the losses in `SCORED`."""
    torch.set_num_threads(1)
    made = TASKS[task]()
    made = replace(made, batch=made.batch // smaller, **rows)
    stack = Stack(made, list(range(seeds)))
    _, tuned = stack.tuned(base, schedule, steps)
    start = mean(row[0].valid for row in stack.losses([stack.start[:, None]]))
    result = {}

    def kind_of(name: str) -> tuple[float, float, bool]:
        return IDEAS[name].held_out, IDEAS[name].until, IDEAS[name].clairvoyant

    for kind in set(map(kind_of, names)):
        alike = [name for name in names if kind_of(name) == kind]
        tried = stack.losses(train(stack, base, schedule, [IDEAS[name] for name in alike], steps))
        for i, name in enumerate(alike):
            result[name] = []
            for kind in SCORED:
                loss, best = mean(getattr(row[i], kind) for row in tried), getattr(tuned, kind)
                result[name].append((loss / best - 1, min(1.0, (loss - best) / (start - best))))
    return result


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=list(IDEAS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=CHOSEN_ON)
    parser.add_argument("--bases", nargs="+", choices=(*BASES, PLAIN), default=BASES)
    parser.add_argument("--schedules", nargs="+", choices=(*SCHEDULES, *FOR_IDEAS), default=SCHEDULES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--smaller", type=int, default=1, metavar="N", help="batches of an N-th of their size")
    parser.add_argument("--replacement", action="store_true", help="draw rows at random, not shuffled by epoch")
    parser.add_argument("--recognized", action="store_true", help="count epochs where rows are augmented as well")
    parser.add_argument("--out", type=Path, default=Path("runs/robustness"))
    options = parser.parse_args()
    found = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        places = product(options.tasks, options.bases, options.schedules)
        more = options.ideas, options.smaller, options.steps, options.seeds
        rows = {"replacement": options.replacement, "recognized": options.recognized}
        jobs = {pool.submit(pair, *place, *more, **rows): place for place in places}
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="pair"):
            found[" | ".join(jobs[job])] = job.result()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ideas.json").write_text(json.dumps(found, indent=1))

    for i, title in enumerate(SCORED.values()):
        print(f"\n{len(found)} pairs, {options.seeds} seeds, {options.steps} steps: {title}\n")
        print("| | median gap | within 10 % | worst gap | mean regret | " + " | ".join(options.schedules) + " |")
        print("|---|---|---|---|---|" + "---|" * len(options.schedules))
        for name in options.ideas:
            gaps = {place: row[name][i][0] for place, row in found.items()}
            by_schedule = [
                statistics.median(gap for place, gap in gaps.items() if place.endswith(schedule))
                for schedule in options.schedules
            ]
            within = sum(gap <= 0.1 for gap in gaps.values()) / len(gaps)
            worst = max(gaps.values())
            regret = statistics.fmean(row[name][i][1] for row in found.values())
            print(
                f"| {name} | {statistics.median(gaps.values()):.1%} | {within:.0%} | "
                f"{worst:.0%} | {regret:.3f} | " + " | ".join(f"{gap:.1%}" for gap in by_schedule) + " |"
            )


if __name__ == "__main__":
    main()
