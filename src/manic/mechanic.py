"""`Mechanic`: gathers h, runs the tuner, and hands the scale to the updater."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic import tuner
from manic.checkpoint import STATE_VERSION, check_entries, check_version
from manic.diagnosis import Diagnosis
from manic.kernels.compiled import one_launch, outside_graphs
from manic.tuner import Sums, TunerConfig, TunerState
from manic.updater import Updater
from manic.warn import warn

ALWAYS, EVERY = 100, 4  # the scale is learned from held-out rows in the first steps, then in every so many
REPEATS = 10  # calls of `Mechanic.step` for one step that are too many

logger: logging.Logger = logging.getLogger("manic")


class Mechanic:
    """Learns the scale of the learning rate while the model trains.

    Args:
        updater: owns the optimizer and the schedule. One Mechanic per Updater.
        rule: ``"manic"``, or one of the published forms, ``"paper"``, ``"mechanic_pytorch"``, ``"optax"``.
        betas: decay rates of the memories of the published rules, each in [0, 1). They have nothing to do with Adam's.
        s_decay: weight of the tuner's own decay term (λ of the paper), ≥ 0: with it the scale is smaller where the
            displacement makes the norm of the parameters grow. ``None`` takes the rule's own, 0 for ``"manic"`` and
            1e-2 for the published ones.
        s_init: where the scale starts from, an underestimate of the effective learning rate over ``internal_lr`` (where
            that is ``None``, over lr). ``None`` takes the rule's own: ``"manic"`` finds it from the longest of the
            first eight updates, and the first step moves the parameters by 0.3 % of their norm; the published ones have
            1e-8, ``"optax"`` 1e-6.
        eps: keeps the divisions of the published rules finite, > 0.
        max_scale: the largest scale allowed, in units of the lr given, or ``None``.
        steps_per_epoch: how many steps an epoch takes, usually ``len(loader)``, for the rule ``"manic"``.
            The scale is then learned for eight epochs, but for 81 to 243 steps. After that noise lowers it the more,
            the more often its rows were seen before, and not at all in the first epoch. ``math.inf``: no row comes
            twice, as where inputs are augmented at random. ``None``: not known; the scale is learned for 108 steps.
        held_out: computes the loss of rows that are not trained on, such as validation rows, and calls its
            ``backward()``. The scale is then learned from these gradients: `step` calls it in each of the first 100
            steps, and in every fourth after them up to `learning_steps`, which is 243, and puts the other gradients
            back after it. Also an attribute, to be set before the scale is learned: learning that has ended before step
            243 would go on from where it ended. For a mechanized optimizer, that of its ``mechanic``.
        log_func: called with a dict in a step: ``iter_count`` (int), and as 0-d tensors on the parameters' device,
            so that nothing waits for it, ``s`` (the scale), ``h``, ``skipped`` (steps skipped so far) and the list
            ``lr`` (effective learning rate per group); ``again`` (bool) if it was called for this step before.
            ``manic.History`` is one. ``None`` logs a line.
        log_every: call it every so many steps; 0 means every step if a ``log_func`` is given, else never.

    Raises:
        ValueError: an argument is out of range, the rule is ``paper`` and the updater has ``store_delta=False``, or the
            updater has a Mechanic already.
        TypeError: an argument is of another type.

    Source:
        Cutkosky, Defazio, Mehta, *Mechanic: A Learning Rate Tuner*, arXiv:2306.00144, Algorithm 1; see ``manic.tuner``.

    Example:
        >>> import torch
        >>> from manic import Mechanic, Updater
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> updater = Updater(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100))
        >>> mechanic = Mechanic(updater)
        >>> for _ in range(2):
        ...     updater.zero_grad()
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     mechanic.step()
        ...     updater.step()
        >>> float(mechanic.scale) > 0
        True
    """

    def __init__(
        self,
        updater: Updater,
        *,
        rule: str = "manic",
        betas: Sequence[float] | None = None,
        s_decay: float | None = None,
        s_init: float | None = None,
        eps: float = 1e-8,
        max_scale: float | None = None,
        steps_per_epoch: float | None = None,
        held_out: Callable[[], object] | None = None,
        log_func: Callable[[dict[str, Any]], object] | None = None,
        log_every: int = 0,
    ) -> None:
        if not isinstance(updater, Updater):
            raise TypeError(
                f"updater is of type {type(updater).__name__}; expected a manic.Updater, as in "
                "Mechanic(Updater(optimizer))."
            )
        if updater._claimed:
            raise ValueError("This Updater has a Mechanic already; use that one, or build a new Updater for a new one.")
        check_logging(log_func, log_every)
        config = TunerConfig(
            rule=rule,
            betas=betas,
            s_decay=s_decay,
            s_init=s_init,
            eps=eps,
            max_scale=max_scale,
            steps_per_epoch=steps_per_epoch,
        )
        if rule == "paper" and not updater.displacement.store_delta:
            raise ValueError(
                "rule is 'paper', and the Updater has store_delta=False; expected store_delta=True: the paper's first "
                "scale is 0, at which the displacement cannot be recomputed from the parameters, and they would never "
                "move. Leave store_delta out."
            )
        self.updater = updater
        self.held_out: Callable[[], object] | None = held_out
        self.log_func = log_func
        self.log_every = log_every
        self._steps = 0
        self._repeats = 0  # calls of `step` before this one for the same step
        self._since = 0  # steps taken before (14)
        self._asks = False  # while held_out is called
        self._tunes = True  # whether a call of `step` for the present step tunes
        self._logged = 0  # the last step that was logged
        self._diagnosis = Diagnosis()
        self._skipped = torch.zeros_like(updater.scale, dtype=torch.int64)
        self._skipped_before = self._skipped.clone()  # before the step that is pending
        self._configure(config)
        self._state = tuner.init(config, updater.scale.device, updater.scale.dtype)
        self._previous = TunerState(*map(torch.clone, self._state))
        updater._claimed = True
        updater._start(self._state.scales.sum())

    def __repr__(self) -> str:
        options = _options(self._config)
        if self.scale.is_cpu:  # else it would have to be waited for
            options["scale"] = float(self.scale)
        return f"Mechanic({', '.join([repr(self.updater), *_words(options)])})"

    @property
    def scale(self) -> Tensor:
        """The scale, 0-d, on the parameters' device: scale × a group's lr is the group's effective learning rate."""
        return self.updater.scale

    @property
    def learning_steps(self) -> int:
        """The last step that the scale is learned in: 108, or that of eight epochs if these are known, from 81 to 243.

        With ``held_out`` it is 243. If many parameters join on the way, it is as many steps after that. With a
        published rule, which learns for as long as a run takes, ``sys.maxsize``.
        """
        return self._since + self._learning.learning_steps

    @property
    def _learning(self) -> TunerConfig:
        """What the scale is learned with: rows that are held out are not learned by heart, so that T is 243."""
        unseen = self.held_out is not None and self._config.rule == "manic"
        return _of_new_rows(self._config) if unseen else self._config

    @property
    def optimizer(self) -> Optimizer:
        """The updater's base optimizer. Setting it to that same optimizer is allowed and changes nothing."""
        return self.updater.base_optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        if optimizer is not self.updater.base_optimizer:
            raise ValueError(
                "mechanic.optimizer can only be its updater's base optimizer; to tune another optimizer, build a new "
                "Updater and Mechanic for it."
            )

    def get_last_lr(self) -> list[float]:
        """The scale, once per parameter group; reads it from its device. See `Updater.get_last_lr` for the rates.

        After `hand_off` it is 1: the rates of the groups are those in force.
        """
        return [1.0 if self.updater._handed_off else float(self.scale)] * len(self.updater.param_groups)

    @outside_graphs
    def step(self, *, tune: bool = True) -> None:
        """Compute the scale of the coming ``updater.step()`` from the parameters and their gradients.

        Call it after the backward pass, and after anything that changes the gradients (unscaling, clipping). Called
        again before ``updater.step()``, it replaces what it computed first.

        At steps 128, 256, 512, … it reads from the device how the scale fared in the last 64 steps, and warns if it
        stays at its start, runs away or oscillates; not once a step was captured in a CUDA graph.

        When many parameters join on the way, unfrozen or added to the optimizer, so that a quarter or more of the
        elements that take part are new, the rule ``"manic"`` lowers the scale and learns it for as many steps more.

        Args:
            tune: ``False`` only checks that the gradients are finite: it logs nothing, and leaves the scale as it is,
                or as a call before this one has set it, unless s_init is still to be found or many parameters join.

        Raises:
            FloatingPointError: the gradient or h is not finite and the updater was built with ``nonfinite="raise"``.
            ValueError: a gradient is sparse, a parameter group has ``maximize`` or ``differentiable``, two parameters
                share memory, or ``held_out`` has left no gradient.
            TypeError: ``held_out`` is not a function.
            RuntimeError: after `hand_off`, where of this and the updater one alone has loaded the state of another
                step, a CUDA graph would capture ``held_out``, or ``held_out`` takes a step.

        Warns:
            ScaleWarning: once for each of these.
        """
        again = self.updater._pending
        self._repeats = self._repeats + 1 if again else 0
        self._tunes = tune or (again and self._tunes)
        if self._repeats == REPEATS:
            self.updater._once.warn(
                "repeats",
                f"mechanic.step() was called {REPEATS + 1} times without updater.step(), which moves the weights. "
                "Call it too after every backward pass, with a schedule or without; if gradients are accumulated over "
                "parts of a batch, call both once, after the last part.",
            )
        held_out = self.held_out if tune and self._is_learning() else None
        due = self._told() <= ALWAYS or self._told() % EVERY == 1
        try:
            asked = self._ask(held_out) if held_out is not None and due else None
            h = self._step(tune and held_out is None)
        except BaseException:
            self._take_back()
            raise
        if tune:
            self._log(h if asked is None else asked)

    def _ask(self, held_out: Callable[[], object]) -> Tensor:
        """Learn the scale from the gradients of held-out rows, and leave those there are as they are; h."""
        if _is_captured(self._betas):
            raise RuntimeError(
                "A CUDA graph captures a step in which the scale is learned from held-out rows, and every replay would "
                "call held_out(). Capture steps after mechanic.learning_steps, or set mechanic.held_out = None."
            )
        if not callable(held_out):
            raise TypeError(
                f"held_out is {held_out!r:.60}; expected a function that computes the loss of held-out rows and calls "
                "its backward()."
            )
        if self._asks:
            raise RuntimeError(
                "held_out() takes a step, in which it would be called again; expected it to compute the loss of "
                "held-out rows and to call its backward(), and no more."
            )
        with self.updater._gradients_aside():
            self._asks = True
            try:
                with torch.enable_grad():
                    held_out()
            finally:
                self._asks = False
            if all(parameter.grad is None for parameter in self.updater._parameters()):
                raise ValueError(
                    "held_out() has left no gradient; expected it to compute the loss of held-out rows with the model "
                    "that is trained, and not one that this is a copy of, and to call the loss's backward()."
                )
            return self._step(tune=True, held_out=True)

    @torch.no_grad()
    def _step(self, tune: bool, *, held_out: bool = False) -> Tensor:
        """Tune with the gradients there are, which may be those of held-out rows, or only check them; h."""
        again = self.updater._pending
        step = self._steps + (not again)
        self._captured |= _is_captured(self._betas)
        scale = self.updater._observe(hooks=not held_out)
        self._to(scale)
        factor = self.updater._factor
        seeks, judged = self._seeks(step), self._diagnosis.looks_at(step) and not self._captured
        sums = self.updater.displacement.sums(scale, complete=self._config.s_decay != 0 or seeks or judged)
        sums = self._welcome(sums, factor)
        before = self._previous if again else self._state
        config = _in_unit(self._learning, self.updater._nominal.unit)

        # The host knows nothing of steps that a device skips by itself, and runs no Python in replays of a CUDA graph.
        taken = self.updater._taken if _counts(scale) else self.updater._steps
        number = taken + (1 - self._since)  # of this step since (14)
        known, count = self._config, None
        if known.steps_per_epoch is not None:  # as a tensor: compiled code would hold a number
            count = torch.zeros_like(scale).add_(taken + 1)
        h, finite, after, total, restart = _launched(_tune, scale)(
            sums, scale, before, self._betas, config, number, factor, known, count
        )
        if not tune:  # what other gradients have said is forgotten if the step is skipped
            after = _where(finite, self._state, before)
            total = after.scales.sum()
        if self.updater.nonfinite == "raise" and not finite:
            norm = self.updater.displacement.sums(scale).grad_square.sqrt()
            whose = "gradient of the held-out rows" if held_out else "gradient"
            raise FloatingPointError(
                f"At step {step} the norm of the {whose} is {float(norm)} and h is {float(h)}; "
                "expected finite numbers. Nothing was changed. Is the loss diverging? nonfinite='skip' goes on."
            )
        if not again:
            self._steps = step
            _write(self._previous, self._state)
            self._skipped_before.copy_(self._skipped)
        _write(self._state, after)
        torch.add(self._skipped_before, ~finite, out=self._skipped)
        begin = partial(self._begin, config, sums.grad_square) if seeks else None
        away = not self._captured and tuner.restarts(self._told(), config)
        self.updater._propose(total, finite, begin, self._judge, restart, away)
        if judged:
            learns, packings = self._tunes and self._is_learning(), self.updater.displacement.packings
            hope = tuner.hope(after, config)
            self._diagnosis.watch(self._steps, after.scales, hope, learns, sums, self.updater._nominal.unit, packings)
        return h

    def _judge(self, finite: Tensor) -> None:
        """Unlearn the step, and count it as skipped, unless it is finite; `Updater.step` calls this."""
        _write(self._state, _launched(_where, finite)(finite, self._state, self._previous))
        torch.add(self._skipped_before, ~finite, out=self._skipped)

    def _take_back(self) -> None:
        """Forget the scale that waits for `Updater.step`, if one does, and what was learned for it."""
        if self.updater._pending:
            self._steps -= 1
            self.updater._take_back()
            _write(self._state, self._previous)
            self._skipped.copy_(self._skipped_before)

    def _told(self) -> int:
        """The number of the coming step since (14), counted from 1, as far as the host knows."""
        return self.updater._steps + 1 - self._since

    def _is_learning(self) -> bool:
        return tuner.is_learning(self._told(), self._learning)

    def _welcome(self, sums: Sums, factor: Tensor) -> Sums:
        """Do (14) if many parameters have joined; the sums as they are then, with a Δ that starts again from zero."""
        updater = self.updater
        if not updater.displacement.newcomers or (updater.nonfinite == "raise" and not sums.delta_grad.isfinite()):
            return sums  # a step that is going to be refused leaves them new
        new, ratio = updater._newcomers()
        if new < tuner.MANY or self._config.rule != "manic":
            return sums
        states = (self._state, self._previous) if updater._pending else (self._state,)
        for state in states:
            _write(state, tuner.widen(state, ratio, factor))
        self._since = updater._count()
        updater.displacement.restart()
        updater._scale.copy_(states[-1].scales.sum())
        nothing = 0 * sums.delta_grad  # but nan if it is not finite, so that the step is skipped
        return sums._replace(delta_grad=nothing, delta_param=nothing)

    def _seeks(self, step: int) -> bool:
        """Whether to look at the update of a step, counted from 1: in the first ones, and until s_init is known.

        An accelerator is not asked whether it is known: there, after steps 16, 32, 64, …
        """
        if self._config.s_init is not None or self._captured:
            return False
        taken = self.updater._steps  # if it was found at this very step, that was broken off
        return taken < tuner.WATCHED or (self._found_at >= step and (self._betas.is_cpu or not taken & (taken + 1)))

    def _begin(
        self, config: TunerConfig, grad_square: Tensor, param_norm: Tensor, update_norm: Tensor, count: Tensor
    ) -> Tensor:
        """The scale of the coming move, with the s_init that its update allows; `Updater.step` calls this."""
        self._state = tuner.begin(self._state, grad_square, param_norm, update_norm, count, config)
        self._note_start()
        return self._state.scales.sum()

    def _note_start(self) -> None:
        """Note when s_init was found, if it was, where that can be read without waiting for a device."""
        if self._state.start.is_cpu and self._state.start.any():
            self._found_at = self._steps

    def hand_off(self) -> tuple[Optimizer, Any]:
        """Stop tuning: fold the scale into the learning rates and carry on with the plain optimizer.

        The optimizer's lr, and every rate that the scheduler keeps, are multiplied by the scale; x_ref and Δ are freed.
        For an optimizer whose update is linear in lr, the next steps are those of a scale that stays as it is.

        Returns:
            The base optimizer and the scheduler (``None`` if there is none), for ``optimizer.step()`` and
            ``lr_scheduler.step()``. The updater and this object are finished.

        Raises:
            RuntimeError: the scale is still zero.
            TypeError: this is the ``mechanic`` of a mechanized optimizer, which has no plain one to give back.
            ValueError: it is not known which of the scheduler's numbers are rates, or the optimizer's state or step is
                not in proportion to its rate, as with ``ASGD``, ``Rprop`` or ``Adafactor``; nothing was changed.

        Warns:
            UserWarning: a schedule that the updater was not given will set the rates again.
        """
        return self.updater.hand_off()

    def state_dict(self) -> dict[str, Any]:
        """The state after the last complete step: plain containers, and tensors of its own."""
        state = self._previous if self.updater._pending else self._state
        return {
            "version": STATE_VERSION,
            "config": {**asdict(self._config), "betas": list(self._config.betas or ())},
            "tuner": {name: tensor.clone() for name, tensor in state._asdict().items()},
            "scale": self.updater._scale.clone(),  # in force: not the tuner's after a step that was skipped
            "steps": self._steps - self.updater._pending,
            "since": self._since,
            "skipped": (self._skipped_before if self.updater._pending else self._skipped).clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state that `state_dict` gave, the options of the saved Mechanic included.

        Raises:
            ValueError: it is not the state of a Mechanic; nothing was changed.
            TypeError: this is the ``mechanic`` of a mechanized optimizer, which saves and loads all.
        """
        self.updater._check_separate()
        self._load(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        config = self._check_state(state_dict)
        saved = asdict(config)
        given = {name: value for name, value in _options(self._config).items() if value != saved[name]}
        if given:
            kept = _words({name: saved[name] for name in given})
            warn(
                f"This Mechanic was given {', '.join(_words(given))}, and the state was saved with {', '.join(kept)}, "
                "which it goes on with. To change an option, start a new Mechanic without loading a state."
            )
        scales = self._state.scales
        state = TunerState(*(state_dict["tuner"][name].to(scales, copy=True) for name in TunerState._fields))
        self._configure(config)
        self.updater._note_load("Mechanic", state_dict["steps"] != self._steps - self.updater._pending)
        self._steps, self._since = state_dict["steps"], state_dict["since"]
        self._diagnosis, self._logged = Diagnosis(), 0
        for skipped in (self._skipped, self._skipped_before):
            skipped.copy_(state_dict["skipped"])
        self._state = state
        self._note_start()
        self._previous = TunerState(*map(torch.clone, self._state))
        self.updater._start(state_dict["scale"])

    def _check_state(self, state_dict: dict[str, Any]) -> TunerConfig:
        """The saved options; or ValueError, unless `load_state_dict` can take ``state_dict``."""
        whole = numbers.Integral
        types = {"config": dict, "tuner": dict, "scale": Tensor, "steps": whole, "since": whole, "skipped": Tensor}
        check_version(state_dict, "Mechanic", tuple(types))
        check_entries(state_dict, "Mechanic", types)
        if state_dict["config"].keys() != asdict(self._config).keys():
            raise ValueError(
                f"The Mechanic state dict has a config of {', '.join(map(str, state_dict['config']))}; expected all of "
                f"{', '.join(asdict(self._config))}. Load what Mechanic.state_dict() returned, as it was saved."
            )
        config = TunerConfig(**state_dict["config"])
        n = len(config.betas or ())
        shapes = {name: tuple(getattr(tensor, "shape", "?")) for name, tensor in state_dict["tuner"].items()}
        if shapes != dict.fromkeys(TunerState._fields, (n,)):
            raise ValueError(f"The tuner's tensors have shapes {shapes}; expected ({n},) each.")
        return config

    def _configure(self, config: TunerConfig) -> None:
        self._config = config
        self._found_at = math.inf  # the step at which s_init was found, as far as the host knows
        self._captured = False  # a step in a CUDA graph: the host counts no replay, and may not ask the device
        self._betas = torch.tensor(config.betas, device=self.updater.scale.device, dtype=self.updater.scale.dtype)
        self.updater.displacement.rescaled = config.rescaled
        self.updater.displacement.eps = 1e-30 if config.rule == "manic" else config.eps

    def _to(self, like: Tensor) -> None:
        if self._betas.device != like.device:
            self._betas = self._betas.to(like)
            self._state = TunerState(*(tensor.to(like) for tensor in self._state))
            self._previous = TunerState(*(tensor.to(like) for tensor in self._previous))
            self._skipped = self._skipped.to(like.device)
            self._skipped_before = self._skipped_before.to(like.device)

    def _log(self, h: Tensor) -> None:
        every = self.log_every or (1 if self.log_func is not None else 0)
        if not every or self._steps % every:
            return
        if self.log_func is None:
            if logger.isEnabledFor(logging.INFO):  # else nothing is read from the device
                rates = self.updater.get_last_lr()
                logger.info("step %d: scale %.6g, learning rates %s", self._steps, self.scale, rates)
            return
        scale, again = self.scale, self._logged == self._steps
        self._logged = self._steps
        self.log_func(
            {
                "iter_count": self._steps,
                "s": scale,
                "h": h,
                "lr": [scale * group["lr"] for group in self.updater.param_groups],
                "skipped": self._skipped.clone(),
                "again": again,
            }
        )


def _options(config: TunerConfig) -> dict[str, Any]:
    """Those that are not what they are by default."""
    usual = asdict(TunerConfig(rule=config.rule)) | {"rule": "manic"}
    return {name: value for name, value in asdict(config).items() if value != usual[name]}


def _words(options: dict[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in options.items()]


def check_logging(log_func: Any, log_every: int) -> None:
    """Raise TypeError or ValueError unless `Mechanic` can take these."""
    if isinstance(log_every, bool) or not isinstance(log_every, numbers.Integral):
        raise TypeError(f"log_every is {log_every!r}; expected a whole number of steps, 0 or more.")
    if log_every < 0:
        raise ValueError(f"log_every is {log_every!r}; expected a whole number of steps, 0 or more.")
    if log_func is not None and (isinstance(log_func, type) or not callable(log_func)):
        raise TypeError(f"log_func is {log_func!r}; expected a function of one dict, or an object such as History().")


@lru_cache
def _of_new_rows(config: TunerConfig) -> TunerConfig:
    """The config, for rows of which none comes twice while the scale is learned."""
    return replace(config, steps_per_epoch=math.inf)


@lru_cache
def _in_unit(config: TunerConfig, unit: float) -> TunerConfig:
    """The config with its largest scale in the tuner's units."""
    return config if config.max_scale is None else replace(config, max_scale=config.max_scale / unit)


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _counts(tensor: Tensor) -> bool:
    """Whether the steps are counted on a tensor's device, where a base optimizer may skip them unseen by the host."""
    return tensor.is_cuda


def _launched(function: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    """A pure function of tensors that are where one is; on an accelerator it takes one launch."""
    return partial(one_launch, function) if like.is_cuda else function


def _tune(
    sums: Sums,
    scale: Tensor,
    state: TunerState,
    betas: Tensor,
    config: TunerConfig,
    number: int | Tensor,
    factor: Tensor,
    known: TunerConfig,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, TunerState, Tensor, bool | Tensor]:
    """h, whether it and the gradient are finite, the next state (the present one if not), its scale, if Δ restarts."""
    learning = tuner.is_learning(number, config)
    h = tuner.inner_product(sums, scale, config)
    finite = torch.isfinite(h + sums.grad_square)
    after = tuner.update(state, h, betas, config, learning, factor, tuner.seen(count, known.steps_per_epoch))
    after = _where(finite, after, state)
    return h, finite, after, after.scales.sum(), tuner.restarts(number, config)


def _where(finite: Tensor, after: TunerState, before: TunerState) -> TunerState:
    """The next state, or the one before where the step is skipped."""
    both = zip(after, before, strict=True)
    return TunerState(*(old if new is old else torch.where(finite, new, old) for new, old in both))


def _write(state: TunerState, values: TunerState) -> None:
    """Set a state, where it is in memory."""
    torch._foreach_copy_(list(state), list(values))  # type: ignore
