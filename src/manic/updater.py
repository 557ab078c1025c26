"""`Updater`: owns the base optimizer, its schedule, the displacement and the scale in force."""

from __future__ import annotations

import copy
import logging
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from manic import rates
from manic.checkpoint import (
    STATE_VERSION,
    check_entries,
    check_rates,
    check_version,
    copied,
    dtypes,
    keep_dtypes,
    load_schedule,
    undone_on_error,
)
from manic.checks import base_of, check_closure, check_groups, check_options, check_schedule
from manic.displacement import Displacement
from manic.distributed import version
from manic.hooks import Guard, call_step_hooks, held_step_hooks
from manic.kernels.compiled import outside_graphs
from manic.kernels.plain import scale_dtype
from manic.warn import Once, warn

LOWEST_FACTOR = 1e-15  # of a schedule that is stepped as often as it is meant to be, but for 0

logger: logging.Logger = logging.getLogger("manic")


class Updater:
    """Takes the base optimizer's step, and moves the parameters by its update times the scale instead.

    It is used with a `Mechanic`, which sets the scale: ``mechanic.step(); updater.step()`` after each backward pass.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose parameter groups have an ``lr``.
        lr_scheduler: a scheduler of that optimizer, stepped once in every `step`; ``None`` keeps the rate as it is.
            A ``ReduceLROnPlateau`` needs a metric, so you step that one yourself.
        store_delta: keep Δ beside x_ref (exact, two extra copies of the model), or recompute it from the
            parameters (one copy, and a transient one in `step`).
        cpu_offload: keep these copies in host memory (pinned, with CUDA), from where every step takes them over the
            bus in blocks of 16 MiB: the accelerator carries no extra copy, and the run is the same. What
            ``optimizer.state`` of a mechanized optimizer shows of them may lag behind; its state dict does not.
        internal_lr: the base optimizer steps with every group's lr times internal_lr / (largest initial lr), so that
            the run does not depend on a common factor in lr: bit for bit in float32, but for rounding in float64.
            ``None`` steps at the lr given, as the published implementations do.
            With parameters so large beside their gradients that a step at rate 1 is lost to rounding (SGD in bfloat16),
            give a larger one, such as 1e3.
        nonfinite: what to do about a step whose gradient or h is not finite: ``"skip"`` it, or ``"raise"``. On an
            accelerator with a fused base optimizer, without waiting for the device; the schedule then goes on.
        process_group: the ranks that the model is spread over, where the parameters do not tell: with FSDP1, whose
            parameters are plain tensors, or when ``DTensor`` parameters are spread over some ranks only.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or has a learning rate that is not a number; ``lr_scheduler`` is
            no scheduler; another argument is of another type.
        ValueError: another argument is out of range, or belongs to another optimizer.

    Example:
        >>> import torch
        >>> from manic import Mechanic, Updater
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> updater = Updater(torch.optim.AdamW([weight], lr=1e-9))  # any lr will do
        >>> mechanic = Mechanic(updater)
        >>> for _ in range(300):
        ...     updater.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     mechanic.step()
        ...     updater.step()
        >>> bool(weight.abs().max() < 0.5)
        True
    """

    _step_supports_amp_scaling = True  # has a GradScaler leave it to `step` to skip, which may need no sync

    def __init__(
        self,
        optimizer: Optimizer,
        lr_scheduler: Any = None,
        *,
        store_delta: bool = True,
        cpu_offload: bool = False,
        internal_lr: float | None = 1.0,
        nonfinite: str = "skip",
        process_group: Any = None,
    ) -> None:
        base = base_of(optimizer, lr_scheduler)
        check_options(store_delta, cpu_offload, internal_lr, nonfinite, process_group)
        check_schedule(lr_scheduler, base, optimizer)
        self.base_optimizer: Optimizer = base
        self.lr_scheduler = lr_scheduler
        self._stepped = optimizer
        self.nonfinite = nonfinite
        self.displacement: Displacement = Displacement(
            store_delta=store_delta, offload=cpu_offload, process_group=process_group
        )
        self._claimed = False  # by a Mechanic
        self._pending = False  # a scale was proposed and waits for `step`, beside:
        self._begin: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self._judge: Callable[[Tensor], None] | None = None
        self._restart: bool | Tensor = False
        self._restart_away = False
        self._gradient: tuple[int, int] | None = None  # the first one's identity and version
        self._handed_off = False
        self._once = Once()
        self._epoch: int | None = None  # of the schedule, as `step` left it
        check_groups(self.param_groups, self._kinds()["optimizer"])
        self._nominal = rates.Nominal(None if internal_lr is None else float(internal_lr))
        self._nominal.find(self.param_groups)
        self._restored: dict[str, bool] = {}  # who has loaded a state since the last step, and if it is of another step
        Guard.stand_before(self.base_optimizer, self)
        self._parameter_count = 0
        self._steps = self._skipped = 0  # taken, as far as the host knows, and skipped since
        device = self._parameters()[0].device
        self._scale = torch.zeros((), device=device, dtype=scale_dtype(device))
        self._next_scale = self._scale.clone()
        self._finite = torch.ones((), device=device, dtype=torch.bool)
        self._taken = torch.zeros((), device=device, dtype=torch.int64)  # steps, those in replays of a CUDA graph too

    def __getstate__(self) -> dict[str, Any]:
        # What a `step` would need of the `mechanic.step()` before it is not in a copy.
        return {**self.__dict__, "_parameter_count": -1, "_begin": None, "_judge": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._handed_off:
            Guard.stand_before(self.base_optimizer, self)  # copies of optimizers have no hooks

    def __repr__(self) -> str:
        kinds = ", ".join(kind for kind in self._kinds().values() if kind is not None)
        options = {
            "store_delta": (self.displacement.store_delta, True),
            "cpu_offload": (self.displacement.offload, False),
            "internal_lr": (self._nominal.internal_lr, 1.0),
            "nonfinite": (self.nonfinite, "skip"),
        }
        changed = "".join(f", {name}={value!r}" for name, (value, usual) in options.items() if value != usual)
        return f"Updater({kinds}{changed}, steps={self._steps})"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    @property
    def scale(self) -> Tensor:
        """The scale, 0-d, on the parameters' device: scale × a group's lr is the group's effective learning rate.

        After `Mechanic.hand_off` it is what the rates were multiplied by, and no longer in force.
        """
        return self._next_scale * self._nominal.unit

    def get_last_lr(self) -> list[float]:
        """The effective learning rate of each parameter group, scale × lr; reads the scale from its device."""
        scale = 1.0 if self._handed_off else float(self.scale)  # it is in the rates then
        return [scale * float(group["lr"]) for group in self.param_groups]

    def _parameters(self) -> list[Tensor]:
        """The parameters of all groups, in their order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base optimizer's ``zero_grad`` does."""
        self.base_optimizer.zero_grad(set_to_none)

    @contextmanager
    def _gradients_aside(self) -> Iterator[None]:
        """Have no gradients for a while, and then those of before."""
        kept = [(x, x.grad) for x in self._parameters()]
        with torch.no_grad():  # views may be of memory that the next backward pass writes, as DDP's buckets
            views = [(grad, grad.clone()) for _, grad in kept if grad is not None and grad._is_view()]
        try:
            for x, _ in kept:
                x.grad = None
            yield
        finally:
            with torch.no_grad():
                for grad, values in views:
                    grad.copy_(values)
            for x, grad in kept:
                x.grad = grad

    def _observe(self, *, hooks: bool) -> Tensor:
        """See who takes part in the coming step; the scale in force, 0-d, in the tuner's units.

        `Mechanic.step` calls this. It is here that parameters get their x_ref, that changes made by others since the
        last step are noticed, and that hooks before the base optimizer's step are called: what they do counts.

        Args:
            hooks: whether to call them: for the gradients that the step is taken with.

        Raises:
            ValueError: a group has ``maximize`` or ``differentiable``, or two parameters share memory.
        """
        self._check_open()
        self._check_restored()
        if hooks:
            call_step_hooks("pre", self.base_optimizer)
        check_groups(self.param_groups, self._kinds()["optimizer"])
        self._nominal.settle(self.param_groups)
        parameters = self._parameters()
        self._to(parameters[0].device)
        self._parameter_count, self._gradient = len(parameters), _first_gradient(parameters)
        self._tell(self.displacement.refresh(parameters, self._scale))
        return self._scale

    def _tell(self, lost: bool) -> None:
        """Warn if a Δ had to be given up."""
        if lost:
            self._once.warn(
                "change",
                "Parameters were changed between steps. With store_delta=False the displacement of these starts again "
                "from zero; if this happens at every step (weight clipping, say), use store_delta=True.",
            )

    def _newcomers(self) -> tuple[float, float]:
        """Of the parameters that take part: the share that is new since the last call, and N'/N as in (14).

        Both are 0 in the first step. With a ``process_group`` too: a rank does not know who joins on the others.
        """
        newcomers, self.displacement.newcomers = self.displacement.newcomers, set()
        if self.displacement.process_group is not None:
            return 0.0, 0.0
        slots, nominal = self.displacement.slots, self._nominal.of(self.param_groups)
        largest = max(nominal) or 1.0  # their squares might be out of range
        pairs = zip(self.param_groups, nominal, strict=True)
        sizes = {x: x.numel() * (rate / largest) ** 2 for group, rate in pairs for x in group["params"] if x in slots}
        older = sum(size for x, size in sizes.items() if x not in newcomers)
        new = sum(size for x, size in sizes.items() if x in newcomers and not slots[x].away)
        now = sum(size for x, size in sizes.items() if not slots[x].away)
        return (new / now, min(1.0, older / now)) if now > 0 and older > 0 else (0.0, 0.0)

    def _propose(
        self,
        scale: Tensor,
        finite: Tensor,
        begin: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
        judge: Callable[[Tensor], None],
        restart: bool | Tensor,
        restart_away: bool,
    ) -> None:
        """Set the scale that the next `step` moves to; `Mechanic.step` calls this.

        Args:
            scale: Σ_i s_{t+1,i}, 0-d, in the tuner's units.
            finite: whether the gradient and h were finite, 0-d bool; if not, `step` changes nothing.
            begin: if given, gives that scale instead, from ‖x‖, ‖u/f‖ and the number of elements; see `tuner.begin`.
            judge: called with ``finite`` if `step` finds that it is not: the closure, or a ``GradScaler``, says so.
            restart: have Δ start again from 0 after the coming step; a 0-d bool may say so on the device.
            restart_away: that of the parameters that do not take part, as far as the host knows.
        """
        torch.where(finite, scale, self._scale, out=self._next_scale)
        self._finite.copy_(finite)
        self._begin, self._judge, self._restart, self._restart_away = begin, judge, restart, restart_away
        self._pending = True

    def _start(self, scale: Tensor) -> None:
        """Set the scale in force, which no step has led to; `Mechanic` calls this when it is made or loaded."""
        self._pending = False
        if self.displacement.slots and not torch.equal(self._scale, scale.to(self._scale)):
            self.displacement.stay()
        self._scale.copy_(scale)
        self._next_scale.copy_(scale)

    @outside_graphs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the base optimizer's step, move the parameters as the scale says, and step the schedule.

        Args:
            closure: passed to the base optimizer, which evaluates the model with it.

        Returns:
            What the base optimizer's ``step`` returned: the loss, if a closure was given. ``None`` for a skipped step.

        Raises:
            RuntimeError: there was no ``mechanic.step()`` before, or parameters were added since; a ``GradScaler`` has
                not unscaled the gradients; another Updater was built on the optimizer since; or after `hand_off`.
            FloatingPointError: with ``nonfinite="raise"``, the gradient after the closure is not finite.
            TypeError: ``closure`` is not a function, or the optimizer's step put a parameter into new memory.
        """
        check_closure(closure)
        try:
            return self._step(closure)
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # a GradScaler takes back what it told only after a step
                vars(self).pop(name, None)
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._check_pending()
        self._heed_scaler()
        parameters = self._parameters()
        if self._gradient != _first_gradient(parameters):
            self._once.warn(
                "gradient",
                "The gradients were changed between mechanic.step() and updater.step(); expected the same in both. "
                "Unscale, accumulate and clip before mechanic.step().",
            )
        with torch.no_grad():
            self._tell(self.displacement.keep_changes(parameters, self._scale))
            one_pass = self._plan_one_pass() if closure is None else None
            on_device = self._base_can_skip(one_pass is not None)
            if not on_device and not bool(self._finite):  # with "raise", a GradScaler alone has found it so
                return self._skip()
            restart = self._finite & self._restart if on_device and self._restart is not False else self._restart
            before = self.displacement.backup() if one_pass is None else None

        try:
            with (
                self._rates_times(self._nominal.unit),
                self._found_inf(on_device),
                held_step_hooks(self.base_optimizer),
            ):
                if one_pass is not None:
                    loss = one_pass(self._scale, self._next_scale, self._finite, restart)
                else:
                    loss = self._stepped.step() if closure is None else self._stepped.step(self._checked(closure))
            with torch.no_grad():
                if one_pass is None:
                    self._move(before, self._finite if on_device else None, restart)
                self._scale.copy_(self._next_scale)
                self._steps += 1
                self._taken += self._finite
                if self._restart_away:
                    self.displacement.restart_away()
        except BaseException as error:
            with torch.no_grad():
                self.displacement.restore(before, self._scale)
            if isinstance(error, _NotFiniteError):
                self._refuse(torch.zeros_like(self._finite))
                return self._skip()
            raise
        self._pending, self._begin, self._judge, self._skipped = False, None, None, 0
        call_step_hooks("post", self.base_optimizer, *([] if closure is None else [closure]))
        if self.lr_scheduler is not None and not isinstance(self.lr_scheduler, lr_scheduler.ReduceLROnPlateau):
            self._step_schedule(self.lr_scheduler)
        return loss

    def _check_pending(self) -> None:
        self._check_open()
        if not self._pending:
            raise RuntimeError(
                "updater.step() was called without a mechanic.step() before it. Call mechanic.step(), then "
                "updater.step(), once each after every backward pass. Was the Mechanic built on another Updater?"
            )
        Guard.check(self.base_optimizer, self)
        if self._parameter_count != len(self._parameters()):
            raise RuntimeError(
                "The parameters are not those that mechanic.step() saw: some were added since, or this is a copy. "
                "Call mechanic.step() again."
            )

    def _heed_scaler(self) -> None:
        """Skip the step if a ``GradScaler``, which is about to take it, has found an inf.

        Raises:
            RuntimeError: it has not unscaled the gradients, or those of another object.
        """
        told = vars(self)
        if told.get("grad_scale") is not None:
            raise RuntimeError(
                "The GradScaler has not unscaled the gradients of this Updater. Call scaler.unscale_(updater), and not "
                "scaler.unscale_(optimizer), before mechanic.step(). Nothing was changed."
            )
        if "found_inf" in told:
            self._refuse(told["found_inf"].to(self._finite.device) == 0)

    def _refuse(self, finite: Tensor) -> None:
        """Note that a step is not finite after all, if it is not; the device may know it only."""
        self._finite.logical_and_(finite)
        torch.where(self._finite, self._next_scale, self._scale, out=self._next_scale)
        if self._judge is not None:
            self._judge(self._finite)

    def _move(self, before: Any, finite: Tensor | None, restart: bool | Tensor) -> None:
        """Scale what the base step did."""
        self.displacement.check_memory()
        if self._begin is not None:
            self._next_scale.copy_(torch.where(self._finite, self._begin(*self._first_sizes(before)), self._scale))
        self.displacement.move(before, self._scale, self._next_scale, finite, restart)

    def _take_back(self) -> None:
        """Forget the scale that was proposed."""
        self._pending, self._begin, self._judge = False, None, None
        self._next_scale.copy_(self._scale)

    def _skip(self) -> None:
        self._take_back()
        self._skipped += 1
        expected = "found_inf" in vars(self)  # while a GradScaler looks for its scale
        if self._skipped & (self._skipped - 1) == 0 and not expected:  # 1, 2, 4, 8, …
            count = f", {self._skipped} in a row by now: are the parameters finite?" if self._skipped > 1 else "."
            logger.warning("A step was skipped after step %d: its gradient or h is not finite%s", self._steps, count)

    def _checked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, which ends the step where it leaves gradients that are not finite."""

        def evaluate() -> Any:
            loss = closure()
            with torch.no_grad():
                norm = self.displacement.sums(self._scale).grad_square.sqrt()
            if norm.isfinite():
                return loss
            if self.nonfinite == "skip":
                raise _NotFiniteError
            raise FloatingPointError(
                f"The gradient's norm is {float(norm)} after the closure; expected a finite number. Nothing was "
                "changed. Is the loss diverging? nonfinite='skip' goes on."
            )

        return evaluate

    def _step_schedule(self, schedule: Any) -> None:
        epoch = _epoch_of(schedule)
        if None not in (epoch, self._epoch) and epoch > self._epoch:
            self._once.warn(
                "epoch",
                f"Since the last updater.step() the schedule went from step {self._epoch} to {epoch}. "
                "updater.step() steps it: leave out lr_scheduler.step(), or do not give it to Updater.",
            )
        schedule.step()
        self._epoch = _epoch_of(schedule)
        shares = rates.shares(self.param_groups, self._nominal.of(self.param_groups))
        lowest = min((share for share in shares if not isinstance(share, Tensor)), default=1)
        if 0 < lowest < LOWEST_FACTOR:
            self._once.warn(
                "lowest",
                f"The schedule has lowered a learning rate to {lowest:.0e} of its initial value. Is it meant to be "
                "stepped once an epoch? updater.step() steps it every time: do not give it to Updater, and call "
                "lr_scheduler.step() after each epoch.",
            )

    @torch.no_grad()
    def init_state(self) -> None:
        """Set up all state that a first step would, without moving anything.

        For loaders that fill the tensors of a state dict in place, as ``torch.distributed.checkpoint.load`` does.
        Load a state then: the base optimizer has counted a step, with gradients of zero. It changes nothing once a
        step was taken.
        """
        self._check_open()
        if self.displacement.slots:
            return
        parameters = [x for x in self._parameters() if x.requires_grad or x.grad is not None]  # who would take part
        with self._gradients_aside(), self._rates_times(0), held_step_hooks(self.base_optimizer):
            for x in parameters:
                x.grad = torch.zeros_like(x)
            self.base_optimizer.step()
        self.displacement.refresh(self._parameters(), self._scale)
        self.displacement.newcomers.clear()
        self.displacement.joined = False

    @torch.no_grad()
    def rebase(self) -> None:
        """Go on from the parameters as others have left them.

        A change that takes back a part of Δ, as clipping weights does, is taken out of Δ; x_ref shifts by the rest.
        Changes that move a tensor's version counter (all in-place operations on the parameter) are noticed without
        this. Call it after those that do not, such as writes through ``parameter.data``. With ``store_delta=False`` Δ
        cannot be told from the change, and starts again from zero; as the parameters may be loaded after the state, a
        change between a load and the next step is then not noticed either.
        """
        self._check_open()
        self.displacement.refresh(self._parameters(), self._scale, changed=True)

    def hand_off(self) -> tuple[Optimizer, Any]:
        """Fold the scale into the learning rates, free x_ref and Δ, give the parts back: see `Mechanic.hand_off`."""
        self._check_open()
        if hasattr(self.base_optimizer, "covered_class"):
            raise TypeError(
                "hand_off() gives back a plain optimizer and its schedule, and a mechanized optimizer has neither. "
                "Train with Updater(optimizer, lr_scheduler) and Mechanic."
            )
        scale = float(self._scale) * self._nominal.unit
        if not scale > 0:
            raise RuntimeError(
                f"The scale is {scale}, so there is no learning rate to hand off yet. Train for more steps first."
            )
        if rates.NOT_IN_PROPORTION.intersection(kind.__name__ for kind in type(self.base_optimizer).__mro__):
            raise ValueError(
                f"hand_off() cannot rescale {type(self.base_optimizer).__name__}: its state, or its step, is not in "
                "proportion to the learning rate. Keep the scale as it is with mechanic.step(tune=False), or start a "
                "new optimizer with lr multiplied by float(mechanic.scale)."
            )
        if isinstance(self.base_optimizer, getattr(torch.optim, "Adafactor", ())):  # torch 2.4 has none
            raise ValueError(
                "hand_off() cannot rescale torch's Adafactor: it steps at min(lr, 1/√t), which would be another rate "
                "from here on. Keep tuning."
            )
        pairs = zip(self.param_groups, self._nominal.of(self.param_groups), strict=True)
        others = any("initial_lr" in group or (nominal and float(group["lr"]) != nominal) for group, nominal in pairs)
        if self.lr_scheduler is None and others:
            warn(
                "Rates that are set again from here on, by hand or by a schedule that Updater was not given, lack the "
                f"scale: multiply them (a schedule's base_lrs, as a rule) by {scale:.6g}."
            )
        rates.rescale(self.param_groups, self.lr_scheduler, scale)
        self._take_back()
        self.displacement = Displacement(store_delta=self.displacement.store_delta, offload=self.displacement.offload)
        Guard.leave(self.base_optimizer)
        self._handed_off = True
        return self.base_optimizer, self.lr_scheduler

    def state_dict(self) -> dict[str, Any]:
        """The state after the last complete step, the base optimizer's and the schedule's included.

        Plain containers and tensors of its own; ``torch.load(weights_only=True)`` reads it.

        Raises:
            RuntimeError: the base is a ``ZeroRedundancyOptimizer`` whose state is still spread over the ranks.
            TypeError: this is the ``updater`` of a mechanized optimizer, which saves and loads all.
        """
        self._check_open()
        self._check_separate()
        try:
            base_optimizer = copied(self.base_optimizer.state_dict())
        except RuntimeError as error:
            if not hasattr(self.base_optimizer, "consolidate_state_dict"):
                raise
            raise RuntimeError(
                f"The state of the {type(self.base_optimizer).__name__} is spread over the ranks. Call "
                "updater.base_optimizer.consolidate_state_dict(to=0) on every rank before each save, and "
                "updater.state_dict() on rank 0 only."
            ) from error
        return {
            "version": STATE_VERSION,
            "kinds": self._kinds(),
            "base_optimizer": base_optimizer,
            "lr_scheduler": None if self.lr_scheduler is None else copy.deepcopy(self.lr_scheduler.state_dict()),
            "scale": self._scale.clone(),
            "unit": self._nominal.unit,
            "nominal_rates": self._nominal.of(self.param_groups),
            "steps": self._count(),
            "displacement": self.displacement.state(self._parameters(), self._scale),
            "dtypes": dtypes(self.base_optimizer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state that `state_dict` gave; nothing is changed if it does not fit.

        Raises:
            ValueError: the state is of another kind, model or schedule.
            TypeError: this is the ``updater`` of a mechanized optimizer, which saves and loads all.
        """
        self._check_open()
        self._check_separate()
        tuning: dict[str, Any] = {
            "scale": Tensor,
            "unit": numbers.Real,
            "nominal_rates": list,
            "steps": numbers.Integral,
            "displacement": dict,
        }
        types = {"kinds": dict, "base_optimizer": dict, "dtypes": list, **tuning}
        check_version(state_dict, "Updater", ("lr_scheduler", *types))
        check_entries(state_dict, "Updater", types)
        for part, kind in self._kinds().items():
            saved = state_dict["kinds"].get(part)
            if kind != saved:
                raise ValueError(
                    f"The state dict was saved with {part}={saved}, and this Updater has {part}={kind}. Build it as it "
                    "was when saved."
                )
        self._check_displacement(state_dict["displacement"])
        groups = [len(group["params"]) for group in state_dict["base_optimizer"]["param_groups"]]
        expected = [len(group["params"]) for group in self.param_groups]
        if groups != expected:
            raise ValueError(
                f"The state dict is of another model: its groups have {groups} parameters, expected {expected}."
            )
        base_optimizer = state_dict["base_optimizer"]
        check_rates(state_dict["nominal_rates"], groups, "Updater")
        with undone_on_error(self.base_optimizer):
            # Copies: torch steps with the tensors that it is given, and ZeroRedundancyOptimizer takes out the state of
            # other ranks.
            self.base_optimizer.load_state_dict({**base_optimizer, "state": copied(base_optimizer["state"])})
            keep_dtypes(self.base_optimizer, base_optimizer, state_dict["dtypes"])
            if self.lr_scheduler is not None:
                load_schedule(self.lr_scheduler, state_dict["lr_scheduler"])
        self._epoch = None
        self._load_tuning(*(state_dict[key] for key in tuning))

    def _count(self) -> int:
        """The steps taken, as the device counts them: with those in replays of CUDA graphs, without skipped ones."""
        self._steps = int(self._taken)
        return self._steps

    def _check_displacement(self, displacement: dict[int, dict[str, Tensor]]) -> None:
        """Raise ValueError unless `_load_tuning` can take ``displacement``."""
        names = [name for group in self.param_groups for name in group.get("param_names", group["params"])]
        self.displacement.check_state(displacement, self._parameters(), names)

    def _load_tuning(
        self,
        scale: Tensor,
        unit: float,
        nominal_rates: list[float],
        steps: int,
        displacement: dict[int, dict[str, Tensor]],
    ) -> None:
        """Take up a saved scale (in the tuner's units), `unit`, nominal rates, number of steps, and displacement."""
        self._note_load("Updater", steps != self._count())
        self._steps = steps
        self._taken.fill_(steps)
        settled = bool(displacement)  # Accelerate saves and loads before the first step
        self._nominal.load(self.param_groups, unit, nominal_rates, settled)
        self._start(scale)
        self.displacement.load_state(displacement, self._parameters())

    @property
    def _factor(self) -> Tensor:
        """The schedule's factor f, 0-d."""
        return rates.factor(self.param_groups, self._nominal.of(self.param_groups), self._scale)

    def _first_sizes(self, before: Any) -> tuple[Tensor, Tensor, Tensor]:
        """‖x‖ before the base step just taken, ‖u‖ over the schedule's factor or 1, and the number of elements; 0-d."""
        factor = self._factor
        param_square, update_square, count = self.displacement.first_sizes(before, self._scale)
        return param_square.sqrt(), update_square.sqrt() / torch.where(factor > 0, factor.clamp(max=1), 1), count

    def _check_open(self) -> None:
        if self._handed_off:
            raise RuntimeError(
                "hand_off() gave the optimizer and its schedule back; carry on with optimizer.step(), "
                "or build a new Updater and Mechanic."
            )

    def _check_separate(self) -> None:
        if hasattr(self.base_optimizer, "covered_class"):
            raise TypeError(
                "This is a part of a mechanized optimizer; expected one of Updater(optimizer) and Mechanic. Save and "
                "load the state dict of the optimizer itself: the tuner's is in it."
            )

    def _note_load(self, part: str, moved: bool) -> None:
        """Note that a part has loaded a state, and whether it is of another step than the part was at."""
        self._restored[part] = moved or self._restored.get(part, False)

    def _check_restored(self) -> None:
        """Raise RuntimeError if only one of `Updater` and `Mechanic` has loaded a state, and it is of another step."""
        if len(self._restored) == 1 and any(self._restored.values()):
            (part,) = self._restored
            other = "Mechanic" if part == "Updater" else "Updater"
            raise RuntimeError(
                f"The {part} has loaded the state of another step, and the {other} has not; expected both. Call "
                f"{other.lower()}.load_state_dict() too. To learn the scale anew, then call mechanic.hand_off(), and "
                "build a new Updater and Mechanic."
            )
        self._restored = {}

    def _kinds(self) -> dict[str, str | None]:
        scheduler = None if self.lr_scheduler is None else type(self.lr_scheduler).__name__
        optimizer = getattr(self.base_optimizer, "kind", type(self.base_optimizer).__name__)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _to(self, device: torch.device) -> None:
        if self._scale.device != device:
            self._scale = self._scale.to(device, scale_dtype(device))
            self._next_scale = self._next_scale.to(device, scale_dtype(device))
            self._finite, self._taken = self._finite.to(device), self._taken.to(device)

    @contextmanager
    def _rates_times(self, factor: float) -> Iterator[None]:
        """Have the base optimizer see its rates times a factor."""
        given = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * factor
            yield
        finally:
            for group, rate in zip(self.param_groups, given, strict=True):
                group["lr"] = rate

    def _plan_one_pass(self) -> Any:
        """The base step and the move as one pass, see `Displacement.plan`; not if somebody wraps the base's step."""
        if self._stepped is not self.base_optimizer or self._begin is not None:  # which looks at the base's step
            return None
        plan = self.displacement.plan(self.base_optimizer)
        if plan is not None:
            optimizer: Any = self.base_optimizer
            optimizer._opt_called = True  # schedulers look here for whether there was a step
        return plan

    def _base_can_skip(self, one_pass: bool) -> bool:
        """Whether the base optimizer itself reads on the device if it has to skip the step, as torch's fused ones do.

        The host then need not wait to know. Not when parameters have just joined: a fused base would set up their state
        from a gradient that is not finite.
        """
        if self._finite.device.type == "cpu":
            return False
        if one_pass:  # SGD counts no steps
            return all(
                group.get("fused") or group.get("capturable") or "momentum" in group for group in self.param_groups
            )
        return (
            getattr(self.base_optimizer, "_step_supports_amp_scaling", False)
            and all(group.get("fused") for group in self.param_groups)
            and not self.displacement.joined
        )

    @contextmanager
    def _found_inf(self, on_device: bool) -> Iterator[None]:
        if not on_device:
            yield
            return
        optimizer: Any = self.base_optimizer
        optimizer.grad_scale, optimizer.found_inf = None, (~self._finite).float()
        try:
            yield
        finally:
            del optimizer.grad_scale, optimizer.found_inf


class _NotFiniteError(Exception):
    """Raised in a base step that has to be skipped."""


def _first_gradient(parameters: list[Tensor]) -> tuple[int, int] | None:
    """The identity and version of the first gradient there is: others, if somebody has changed the gradients."""
    gradients = (parameter.grad for parameter in parameters)
    return next(((id(gradient), version(gradient)) for gradient in gradients if gradient is not None), None)


def _epoch_of(schedule: Any) -> Any:
    """How many steps a schedule has taken, or ``None`` if it does not say; the parts of a chained one do."""
    if isinstance(schedule, lr_scheduler.ChainedScheduler):
        return _epoch_of(schedule._schedulers[0])
    return getattr(schedule, "last_epoch", None)
