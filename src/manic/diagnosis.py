"""`Diagnosis`: what ails a run, told from its scale. The figures behind the thresholds: `docs/troubleshooting.md`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manic.tuner import Sums
from manic.warn import Once

HELP = "https://github.com/dscamiss/manic/blob/main/docs/troubleshooting.md"
WINDOW = 64  # steps before a check that it looks at
ENDS = 8  # steps at either end of it
FIRST = 128  # the first check; the others are at the powers of two after it
GROWTH = 10.0  # of the parameters' norm beyond the largest at the checks before
PINNED_GROWTH = 4.0  # the same, if the gradient's norm is the same at every step
TURNS = 5  # of the scale, each after a change by a factor of 2, before this check and before the last
SPREAD = 1e-3  # of the gradient's norm in a window, relative: less is the same norm at every step


class ScaleWarning(UserWarning):
    """The scale shows that something is wrong. `Mechanic.step` warns of each ailment once.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("ignore", category=ScaleWarning)  # hides it
    """


class Signs(NamedTuple):
    """What a check judges by.

    Attributes:
        idle: the share of the window's steps that learned and found no hope; 0 if there were too few.
        growth: of the parameters' norm, beside its largest at the checks before; 0 if the gradient's fell to less than
            half in the window, for a run that runs away comes no closer to a minimum.
        turns: of the scale in the window, each after a change by a factor of 2.
        turns_in_two: in this window or in that before the last check, whichever has fewer.
        spread: of the gradient's norm in the window, relative.
    """

    idle: float
    growth: float
    turns: int
    turns_in_two: int
    spread: float


class Diagnosis:
    """Warns, once for each ailment, of a scale that stays at its start, runs away or oscillates.

    It keeps a few 0-d tensors of the `WINDOW` steps before a check, and reads them in one transfer at the check: at
    steps 128, 256, 512, … None of it is saved; a resumed run is judged afresh.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._largest: tuple[float, int] | None = None  # ‖x‖ at the checks so far, and the step
        self._pinned = False  # whether ‖g‖ was the same at every step before the last check
        self._turns = 0  # of the scale, before the last check
        self._once = Once()
        self._packings = 0

    @staticmethod
    def looks_at(step: int) -> bool:
        """Whether a step, counted from 1, is one of the `WINDOW` before a check, where the sums with x are needed."""
        return max(FIRST, 1 << (step - 1).bit_length()) - step < WINDOW

    def watch(
        self, step: int, scales: Tensor, hope: Tensor, learning: bool, sums: Sums, unit: float, packings: int
    ) -> None:
        """See a step that it looks at, counted from 1; the sums must be of that step alone, not written later.

        Args:
            step: the step's number; the same number again replaces what was seen first.
            scales: what `tuner.update` returned, of shape (n,).
            hope: of `tuner.hope`, of the same shape.
            learning: whether the step learned: only then it says whether there is a reason to take longer ones.
            sums: what h was made of.
            unit: a scale in the user's units per scale in the tuner's.
            packings: changes when other parameters take part, whose norms do not compare.
        """
        if packings != self._packings:
            self._packings, self._largest, self._seen = packings, None, {}
        self._seen[step] = (learning, scales.clone(), hope.clone(), sums.grad_square, sums.param_square)
        if step & (step - 1):
            return
        steps = [i for i in range(step - WINDOW + 1, step + 1) if i in self._seen]
        learned, *columns = zip(*(self._seen[i] for i in steps), strict=True)
        self._seen = {}
        scales, hopes, *squares = (torch.stack([x.to(sums.grad_square) for x in column]) for column in columns)
        norms = [square.sqrt() for square in squares]
        read = torch.stack([scales.sum(-1) * unit, hopes.amax(-1), *norms], 1).tolist()
        places = zip(steps, learned, read, strict=True)
        rows = [(i, learns, *row) for i, learns, row in places if all(map(math.isfinite, row))]
        if len(rows) > WINDOW // 2:
            self._judge(step, rows)

    def _signs(self, rows: list[tuple[Any, ...]], largest: float) -> Signs:
        _, learned, scales, hopes, gradients, norms = zip(*rows, strict=True)
        idle = [hope <= 0 for hope, learns in zip(hopes, learned, strict=True) if learns]
        low, high, turns = min(gradients), max(gradients), _turns(scales)
        closer = 2 * sum(gradients[-ENDS:]) < sum(gradients[:ENDS])
        return Signs(
            idle=sum(idle) / len(idle) if len(idle) > WINDOW // 4 else 0.0,
            growth=norms[-1] / largest if largest > 0 and not closer else 0.0,
            turns=turns,
            turns_in_two=min(turns, self._turns),
            spread=(high - low) / high if high > 0 else math.inf,
        )

    def _judge(self, step: int, rows: list[tuple[Any, ...]]) -> None:
        steps, learned, scales, _, gradients, norms = zip(*rows, strict=True)
        largest, at = self._largest or (norms[0], steps[0])
        signs = self._signs(rows, largest)
        if signs.idle == 1:
            last = [i for i, learns in enumerate(learned) if learns]
            self._tell(
                "start",
                f"At step {steps[last[-1]]} the scale is at its start, or below, {scales[last[-1]]:.3g}: at none of "
                f"the last {len(last)} steps was there a reason to take longer ones. The norm of the gradient was "
                f"{min(gradients):.3g} to {max(gradients):.3g}. There may be nothing to gain (for the held-out rows, "
                "if there are some), or the optimizer's updates lead uphill: is the gradient zero, or is it that of "
                "another loss, or does the optimizer maximize? rule='paper' may stay at its start for ever.",
            )
        pinned = signs.spread < SPREAD
        pinned_lately, self._pinned = pinned or self._pinned, pinned
        if signs.growth > (PINNED_GROWTH if pinned_lately else GROWTH):
            grew = f"From step {at} to {step} the norm of the parameters grew from {largest:.3g} to {norms[-1]:.3g}"
            if pinned_lately:
                self._tell(
                    "pinned",
                    f"{grew}, and the norm of the gradient was the same at every step. A gradient that is normalized, "
                    "or clipped at every step, does not shrink as the loss does, so the scale cannot tell that it is "
                    "large enough. Clip at a higher norm, or not at all.",
                )
            else:
                self._tell(
                    "runaway",
                    f"{grew}, and the scale is {scales[-1]:.3g}: the run is running away. Is zero_grad() called "
                    "before each backward pass, and is the loss bounded from below? Let the schedule decay to zero, or "
                    "give Mechanic a max_scale.",
                )
        if signs.turns_in_two >= TURNS:
            self._tell(
                "oscillation",
                f"In the {len(rows)} steps up to {step} the scale turned {signs.turns} times, each time after a change "
                f"by a factor of 2 or more, between {min(scales):.3g} and {max(scales):.3g}, and it did so before the "
                "last check too. What is right for some steps is wrong for the next: shuffle the data, or average over "
                "larger batches.",
            )
        self._largest, self._turns = max((norms[-1], step), (largest, at)), signs.turns

    def _tell(self, ailment: str, message: str) -> None:
        self._once.warn(ailment, f"{message} See {HELP}", ScaleWarning)


def _turns(scales: tuple[float, ...]) -> int:
    """How often the scale turned round after a change by a factor of 2."""
    turns, way, extreme = 0, 1, -math.inf
    for value in (math.log2(scale) for scale in scales if scale > 0):
        if way * (value - extreme) > 0:
            extreme = value
        elif way * (extreme - value) >= 1:
            turns, way, extreme = turns + 1, -way, value
    return turns
