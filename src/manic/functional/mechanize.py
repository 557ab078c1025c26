"""`mechanize`: the tuner as a transformation of any functional stepper."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from manic import tuner
from manic.functional.tree import Tree, alike, check_params, map_leaves, tree_where
from manic.kernels.plain import counted, kept, scale_dtype, wide
from manic.tuner import Sums, TunerConfig, TunerState


class MechanizeState(NamedTuple):
    """What a mechanized stepper remembers.

    ``base`` is the stepper's own state; ``reference`` (x_ref) and ``delta`` (Δ, in at least float32) are trees like the
    parameters; ``tuner`` has tensors of shape (n,), ``betas`` is the tuner's β, of shape (n,), where n is 1 for the
    rule ``manic``; ``steps``, 0-d, counts the steps that were not skipped, and ``lr``, 0-d, is the rate that the
    schedule multiplies.
    """

    base: Any
    reference: Tree
    delta: Tree
    tuner: TunerState
    betas: Tensor
    steps: Tensor
    lr: Tensor

    @property
    def scale(self) -> Tensor:
        """The scale, 0-d (one per model if the state is of an ensemble): scale × lr is the effective learning rate."""
        return self.tuner.scales.sum(-1)


class Mechanized(NamedTuple):
    """What `mechanize` returns: ``init(params, base_state, config=1.0)``, and a ``step`` called as the base's is."""

    init: Callable[..., MechanizeState]
    step: Callable[[Tree, Tree, MechanizeState, Any], tuple[Tree, MechanizeState]]


def mechanize(
    step: Callable[[Tree, Tree, Any, Any], tuple[Tree, Any]], config: TunerConfig | None = None
) -> Mechanized:
    """Have a stepper's learning-rate scale learned while it runs.

    The new stepper is pure if the given one is, and equals `Mechanic` and `Updater` with ``store_delta=True,
    internal_lr=None``: parameters changed between two steps keep the change, and a step whose gradient or h is not
    finite changes nothing. It steps at the lr of the config, of which the scale is in units.

    Args:
        step: ``step(params, grads, state, config) -> (params, state)``, whose state is a tree of tensors.
        config: the tuner's constants; ``None`` for the defaults.

    Returns:
        ``init`` and ``step``. The former takes the base's config, or the rate that a schedule multiplies as a number or
        a 0-d tensor: by it, and by the ``lr`` of each step's config, a warmup's first update is told from a small
        one. Both raise ValueError: ``init`` if that rate is not a finite number > 0, ``step`` if the base's config has
        ``maximize=True``. ``step`` raises TypeError if the stepper does not return parameters like those given, and a
        state.

    Source:
        Cutkosky, Defazio, Mehta, *Mechanic: A Learning Rate Tuner*, arXiv:2306.00144, Algorithm 1; see ``manic.tuner``.

    Example:
        >>> import torch
        >>> from manic.functional import AdamConfig, adam_init, adamw_step, mechanize
        >>> init, step = mechanize(adamw_step)
        >>> config = AdamConfig(lr=1.0)
        >>> params = {"w": torch.tensor([3.0, -2.0])}
        >>> state = init(params, adam_init(params, config), config)
        >>> for _ in range(300):
        ...     grads = torch.func.grad(lambda params: params["w"].square().sum())(params)
        ...     params, state = step(params, grads, state, config)
        >>> bool(params["w"].abs().max() < 0.5)
        True
    """
    if isinstance(step, type) or not callable(step):
        raise TypeError(
            f"step is {step!r:.60}; expected a function such as manic.functional.adamw_step. An optimizer class of "
            "torch goes to manic.mechanize."
        )
    constants = TunerConfig() if config is None else config
    if not isinstance(constants, TunerConfig):
        raise TypeError(
            f"config is of type {type(config).__name__}; expected a manic.tuner.TunerConfig. The config of the stepper "
            "goes to the step that mechanize returns, as it went to the stepper."
        )

    def init(params: Tree, base_state: Any, config: Any = 1.0) -> MechanizeState:
        device = check_params(params)
        dtype, lr = scale_dtype(device), getattr(config, "lr", config)
        if not isinstance(lr, Tensor) and not (isinstance(lr, numbers.Real) and 0 < float(lr) < math.inf):
            raise ValueError(f"lr is {lr!r}; expected the rate that the schedule multiplies, a finite number > 0.")
        if isinstance(lr, Tensor) and lr.dim():
            raise ValueError(f"lr has shape {tuple(lr.shape)}; expected a number, or a 0-d tensor.")
        return MechanizeState(
            base=base_state,
            reference=tree_map(lambda x: x.to(wide(x.dtype), copy=True), params),
            delta=tree_map(lambda x: torch.zeros_like(x, dtype=wide(x.dtype)), params),
            tuner=tuner.init(constants, device, dtype),
            betas=torch.tensor(constants.betas, device=device, dtype=dtype),
            steps=torch.zeros((), device=device, dtype=torch.int64),
            lr=torch.as_tensor(lr, device=device, dtype=dtype).clone(),
        )

    def mechanized_step(params: Tree, grads: Tree, state: MechanizeState, config: Any) -> tuple[Tree, MechanizeState]:
        if getattr(config, "maximize", False):
            raise ValueError(
                "The config has maximize=True, which turns the sign of the update against the gradient; "
                "expected False. Minimize the negative of the objective instead."
            )
        if not isinstance(state, MechanizeState):
            raise TypeError(
                f"state is of type {type(state).__name__}; expected the MechanizeState that init(params, base_state) "
                "of this mechanize returned, or the last step."
            )
        scale = state.scale
        old = constants.rescaled * scale

        def keep(x: Tensor, _: Tensor, reference: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
            return x, *kept(x, reference, delta, old, constants.rescaled)

        _, references, deltas = map_leaves(keep, params, grads, state.reference, state.delta)
        returned = step(params, grads, state.base, config)
        if not (isinstance(returned, tuple) and len(returned) == 2 and alike(returned[0], params)):
            raise TypeError(
                f"The stepper returned {returned!r:.80}; expected (params, state), parameters like those that it got "
                "and its next state."
            )
        tentative, base = returned
        sums = _sums(params, grads, deltas, scale)
        h = tuner.inner_product(sums, scale, constants)
        steps = state.steps + 1
        factor = getattr(config, "lr", state.lr) / state.lr
        learning = tuner.is_learning(steps, constants)
        seen = tuner.seen(steps.to(scale.dtype), constants.steps_per_epoch)
        tuned = tuner.update(state.tuner, h, state.betas, constants, learning, factor, seen)
        if constants.s_init is None:
            begun = _begun(tuned, sums.grad_square, params, tentative, grads, factor, constants)
            seeks = (tuned.start.sum() == 0) | (steps <= tuner.WATCHED)
            tuned = tree_where(seeks, begun, tuned)
        next_scale = tuned.scales.sum(-1)
        restart = torch.zeros_like(steps, dtype=torch.bool) | tuner.restarts(steps, constants)
        new, final = constants.rescaled * next_scale, (1 - constants.rescaled) * next_scale

        def move(x: Tensor, after: Tensor, reference: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
            u = after.to(delta.dtype) - x.to(delta.dtype)
            reference, delta = reference + u * final, delta + u
            end = reference + delta * new
            return end.to(x.dtype), torch.where(restart, end, reference), torch.where(restart, 0, delta)

        moved, reference, delta = map_leaves(move, params, tentative, references, deltas)
        after = moved, MechanizeState(base, reference, delta, tuned, state.betas, steps, state.lr)
        return tree_where(h.isfinite() & sums.grad_square.isfinite(), after, (params, state))

    return Mechanized(init, mechanized_step)


def _begun(
    state: TunerState, grad_square: Tensor, before: Tree, after: Tree, grads: Tree, factor: Tensor, config: TunerConfig
) -> TunerState:
    """`tuner.begin`, from the parameters before and after a base step."""
    dtype = state.start.dtype

    def sizes(x: Tensor, moved: Tensor, g: Tensor) -> Tensor:
        x, moved = x.to(dtype), moved.to(dtype)
        counts = counted(moved - x, g, (g != 0).any())
        return torch.stack([*(part.where(counts, 0).square().sum() for part in (x, moved - x)), counts.sum().to(dtype)])

    param_square, update_square, count = torch.stack(tree_leaves(tree_map(sizes, before, after, grads))).sum(0).unbind()
    update_norm = update_square.sqrt() / factor.clamp(max=1)
    return tuner.begin(state, grad_square, param_square.sqrt(), update_norm, count, config)


def _sums(params: Tree, grads: Tree, delta: Tree, scale: Tensor) -> Sums:
    """The four sums, 0-d tensors of the scale's dtype; products are in that of Δ, whatever autocast makes of ``@``."""

    def row(d: Tensor, g: Tensor, x: Tensor) -> Tensor:
        d = d.reshape(-1)
        g, x = g.reshape(-1).to(d.dtype), x.reshape(-1).to(d.dtype)
        return torch.stack([torch.dot(*pair) for pair in ((d, g), (d, x), (g, g), (x, x))]).to(scale.dtype)

    return Sums(*torch.stack(tree_leaves(tree_map(row, delta, grads, params))).sum(0))
