"""What the two objects promise about groups, schedules, hooks, steps that fail, copies and hand-off."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from problems import (
    OPTIMIZERS,
    SCHEDULERS,
    Net,
    assert_same_bits,
    backward,
    evaluate,
    failing_step,
    flat,
    loss_of,
    make_net,
    pair,
    pending,
    relative_difference,
    train,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from manic import Mechanic, Updater, mechanize
from manic.tuner import TunerConfig


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("store_delta", [True, False])
def test_it_learns(optimizer: str, store_delta: bool) -> None:
    """From an lr that is wrong by ten orders of magnitude."""
    model = make_net()
    before = evaluate(model)
    base = OPTIMIZERS[optimizer](model.parameters(), lr=1e-10)
    updater = Updater(base, store_delta=store_delta)
    train(model, updater, Mechanic(updater, s_init=1e-3), range(400))
    assert evaluate(model) < 0.8 * before
    assert base.param_groups[0]["lr"] == 1e-10


@pytest.mark.parametrize("lr", [1e-12, 1e-8, 0.3, 1e6])
@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "adamw", "rmsprop"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_lr_does_not_matter(optimizer: str, scheduler: str, lr: float) -> None:
    def run(lr: float) -> tuple[torch.Tensor, float]:
        model = make_net()
        start = flat(model)
        base = OPTIMIZERS[optimizer](model.parameters(), lr=lr)
        updater = Updater(base, SCHEDULERS[scheduler](base))
        train(model, updater, Mechanic(updater, s_init=1e-3), range(120))
        assert relative_difference(flat(model), start) > 1e-2
        return flat(model), float(updater.scale) * lr

    parameters, effective = run(lr)
    expected_parameters, expected_effective = run(1.0)
    assert relative_difference(parameters, expected_parameters) < 1e-9
    assert effective == pytest.approx(expected_effective, rel=1e-9)


class Watched(torch.optim.SGD):
    """Notes the rates that its steps are taken at."""

    def step(self, closure: Any = None) -> Any:
        self.rates: list[list[float]] = [*getattr(self, "rates", []), [group["lr"] for group in self.param_groups]]
        return super().step(closure)


def test_groups_keep_their_ratio_and_get_effective_rates() -> None:
    model = make_net()
    optimizer = Watched([{"params": model.hidden.parameters(), "lr": 4e-3}, {"params": model.out.parameters()}], 1e-3)
    updater = Updater(optimizer, lr_scheduler.StepLR(optimizer, 1, 0.5), internal_lr=2.0)
    mechanic = Mechanic(updater)
    train(model, updater, mechanic, range(2))
    assert optimizer.rates == [[2.0, 0.5], [1.0, 0.25]]  # internal_lr / largest initial lr, and the schedule's factor
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 0.25e-3]
    assert updater.get_last_lr() == [float(updater.scale) * 1e-3, float(updater.scale) * 0.25e-3]
    assert mechanic.get_last_lr() == [float(mechanic.scale)] * 2
    assert updater.param_groups is optimizer.param_groups


def test_a_group_without_parameters_has_no_say_in_the_internal_rate() -> None:
    model = make_net()
    optimizer = Watched([{"params": model.parameters(), "lr": 1.0}, {"params": [], "lr": 1e9}])
    updater = Updater(optimizer, internal_lr=2.0)
    mechanic = Mechanic(updater)
    backward(model, 0)
    mechanic.step()
    updater.step()
    assert [rate for rate, _ in optimizer.rates] == [2.0]


def test_groups_without_parameters_have_no_say_in_the_factor() -> None:
    """They share what a group is known by."""
    rates, scales = ([], [1.0, 1e-3]), []
    for lrs in rates:
        model = make_net()
        groups = [{"params": [], "lr": lr} for lr in lrs]
        base = torch.optim.AdamW([{"params": model.parameters()}, *groups], lr=1.0)
        updater = Updater(base, lr_scheduler.CosineAnnealingLR(base, 40))
        mechanic = Mechanic(updater)
        train(model, updater, mechanic, range(30))
        assert 0 < updater._factor < 0.2
        scales.append(float(mechanic.scale))
        updater.load_state_dict(updater.state_dict())
        mechanic.load_state_dict(mechanic.state_dict())
        train(model, updater, mechanic, range(30, 32))
        mechanic.hand_off()
    assert scales[0] == scales[1]


def test_a_group_without_parameters_is_no_rate_set_by_hand() -> None:
    model = make_net()
    updater = Updater(
        torch.optim.SGD([{"params": model.parameters()}, *({"params": [], "lr": r} for r in (1, 2))], lr=1.0)
    )
    mechanic = Mechanic(updater)
    train(model, updater, mechanic, range(20))
    mechanic.hand_off()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.99**epoch),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=100),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 10, cycle_momentum=False),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20),
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(o, 0.99), lr_scheduler.StepLR(o, 10, 0.5)], o
        ),
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: min(1.0, epoch / 10)),  # the first rate is zero
    ],
)
def test_any_schedule(make: Any) -> None:
    model, twin = make_net(), make_net()
    plain = torch.optim.AdamW(twin.parameters(), lr=1.0)
    expected = make(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    updater = Updater(optimizer, make(optimizer))
    mechanic = Mechanic(updater, s_init=1e-3)
    for step in range(60):
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        train(model, updater, mechanic, range(step, step + 1))
        plain.step()
        expected.step()
    assert relative_difference(flat(model), flat(twin)) > 1e-3


def test_a_plateau_schedule_is_stepped_by_its_user() -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    updater = Updater(optimizer, plateau)
    train(model, updater, Mechanic(updater), range(3))
    assert optimizer.param_groups[0]["lr"] == 1.0
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
@pytest.mark.parametrize("before_too", [False, True])
def test_a_copy_notices_changes_before_its_first_step(copy_of: Any, before_too: bool) -> None:
    runs = []
    for copied in (False, True):
        model = make_net()
        parts = model, *pair(model, store_delta=False)
        train(*parts, range(60))
        if before_too:
            with torch.no_grad():
                model.out.weight.add_(0.25)
        model, updater, mechanic = copy_of(parts) if copied else parts
        with torch.no_grad():
            model.out.weight.clamp_(-0.01, 0.01)
        with pytest.warns(UserWarning, match="store_delta=True"):
            train(model, updater, mechanic, range(60, 62))
        runs.append(flat(model))
    assert torch.equal(*runs)


def test_a_copy_of_a_pending_run_has_nothing_of_the_mechanic() -> None:
    """Such as a log_func, which may not be one that can be pickled."""
    model = make_net()
    updater = Updater(torch.optim.AdamW(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater, log_func=lambda row: None)
    backward(model, 0)
    mechanic.step()
    other = pickle.loads(pickle.dumps(updater))
    with pytest.raises(RuntimeError, match="or this is a copy"):
        other.step()
    updater.step()
    assert relative_difference(flat(model), flat(make_net())) > 0


@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("how", ["state dict", "deepcopy"])
def test_a_run_that_is_saved_just_after_a_change_goes_on_the_same_way(how: str, store_delta: bool) -> None:
    model = make_net()
    updater, mechanic = pair(model, store_delta=store_delta)
    train(model, updater, mechanic, range(60))
    before = flat(model)
    with torch.no_grad():
        model.out.weight.clamp_(-0.05, 0.05)
    assert relative_difference(flat(model), before) > 1e-2
    if how == "deepcopy":
        other, *others = copy.deepcopy((model, updater, mechanic))
    else:
        other = make_net(1)
        others = pair(other, store_delta=store_delta)
        for old, new in zip((model, updater, mechanic), (other, *others), strict=True):
            new.load_state_dict(copy.deepcopy(old.state_dict()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Parameters were changed")
        train(model, updater, mechanic, range(60, 90))
    train(other, *others, range(60, 90))
    assert relative_difference(flat(model), before) > 1e-2
    assert torch.equal(flat(other), flat(model))


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("store_delta", [True, False])
def test_hooks_after_the_base_step_see_where_the_step_leads(store_delta: bool, of_all: bool) -> None:
    model = make_net()
    updater, mechanic = pair(model, store_delta=store_delta)
    seen, arguments = [], []
    register = register_optimizer_step_post_hook if of_all else updater.base_optimizer.register_step_post_hook
    handle = register(lambda *given: (seen.append(flat(model)), arguments.append(given)))
    for step in range(10):
        backward(model, step)
        if step == 5:
            assert model.gain.grad is not None
            model.gain.grad.fill_(math.nan)
        mechanic.step()
        updater.step()
        assert len(seen) == step + (step < 5)
        assert torch.equal(seen[-1], flat(model))
    assert relative_difference(seen[-1], seen[0]) > 1e-3
    assert arguments[0] == (updater.base_optimizer, (updater.base_optimizer,), {})
    handle.remove()
    train(model, updater, mechanic, range(10, 11))
    assert len(seen) == 9


def test_hooks_are_called_in_the_order_of_torch() -> None:
    calls: dict[bool, list[str]] = {False: [], True: []}
    for tuned, called in calls.items():
        model = make_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handles = [
            register(lambda *_, name=name, called=called: called.append(name))
            for name, register in {
                "own before": optimizer.register_step_pre_hook,
                "all before": register_optimizer_step_pre_hook,
                "own after": optimizer.register_step_post_hook,
                "all after": register_optimizer_step_post_hook,
            }.items()
        ]
        backward(model, 0)
        if tuned:
            updater = Updater(optimizer)
            Mechanic(updater).step()
            updater.step()
        else:
            optimizer.step()
        for handle in handles:
            handle.remove()
    assert calls[True] == calls[False]
    assert len(calls[True]) == 4


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("how", ["gradient", "weight", "rate"])
def test_what_hooks_before_the_base_step_do_counts(how: str, of_all: bool) -> None:
    """They see the rates given, and the run is that of a drop-in, whose hooks come before all else."""
    ends = []
    for drop_in in (False, True):
        model, rates = make_net(), []

        def hook(optimizer: Any, args: Any, kwargs: Any, model: Net = model, rates: list[float] = rates) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            if how == "gradient":
                assert model.gain.grad is not None
                model.gain.grad.nan_to_num_(0.5)
            elif how == "weight":
                with torch.no_grad():
                    model.out.weight.mul_(0.99)
            else:
                optimizer.param_groups[0]["lr"] *= 0.9

        if drop_in:
            optimizer: Any = mechanize(torch.optim.AdamW, s_init=1e-3)(model.parameters(), lr=1e-4)
            steppers, updater = [optimizer], optimizer.updater
        else:
            updater, mechanic = pair(model, lr=1e-4)
            steppers, optimizer = [mechanic, updater], updater.base_optimizer
        register = register_optimizer_step_pre_hook if of_all else optimizer.register_step_pre_hook
        handle = register(hook)
        for step in range(20):
            backward(model, step)
            if how == "gradient":
                assert model.gain.grad is not None
                model.gain.grad.fill_(math.nan)
            for stepper in steppers:
                stepper.step()
        handle.remove()
        assert rates == pytest.approx([1e-4 * (0.9**i if how == "rate" else 1) for i in range(20)])
        ends.append((flat(model), float(updater.scale)))
    assert relative_difference(ends[0][0], flat(make_net())) > 1e-3
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_a_hook_that_is_registered_in_a_step_stays() -> None:
    model, calls = make_net(), []
    updater, mechanic = pair(model)
    base = updater.base_optimizer
    base.register_step_post_hook(lambda *_: calls.append("old"))

    def register(*_: Any) -> None:
        handle.remove()
        base.register_step_post_hook(lambda *_: calls.append("new"))

    handle = base.register_step_pre_hook(register)
    train(model, updater, mechanic, range(1))
    calls.clear()
    train(model, updater, mechanic, range(1, 3))
    assert calls == ["old", "new"] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_step_with_a_bad_gradient_might_not_have_been(bad: float, at: int, scheduler: str, store_delta: bool) -> None:
    model, twin = make_net(), make_net()
    updater, mechanic = pair(model, scheduler=scheduler, store_delta=store_delta)
    twin_updater, twin_mechanic = pair(twin, scheduler=scheduler, store_delta=store_delta)
    start = flat(model)
    for step in range(40):
        if step == at:
            backward(model, 999)
            assert model.gain.grad is not None
            model.gain.grad.fill_(bad)
            mechanic.step()
            assert updater.step() is None
        train(model, updater, mechanic, range(step, step + 1))
    train(twin, twin_updater, twin_mechanic, range(40))
    assert relative_difference(flat(model), start) > 1e-3
    assert torch.equal(flat(model), flat(twin))
    assert torch.equal(updater.scale, twin_updater.scale)
    assert int(mechanic.state_dict()["skipped"]) == 1


def test_nonfinite_raise() -> None:
    model = make_net()
    updater, mechanic = pair(model, nonfinite="raise")
    train(model, updater, mechanic, range(5))
    before, state = flat(model), updater.state_dict()
    backward(model, 5)
    assert model.gain.grad is not None
    model.gain.grad.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="At step 6 the norm of the gradient is nan"):
        mechanic.step()
    assert torch.equal(flat(model), before)
    assert torch.equal(updater.state_dict()["scale"], state["scale"])
    with pytest.raises(RuntimeError, match=r"without a mechanic.step\(\)"):
        updater.step()


def test_a_second_mechanic_step_replaces_the_first() -> None:
    """As when a GradScaler skips ``updater.step()``."""
    model, twin = make_net(), make_net()
    (updater, mechanic), (twin_updater, twin_mechanic) = pair(model), pair(twin)
    for step in range(30):
        backward(model, step + 500)
        mechanic.step()
        train(model, updater, mechanic, range(step, step + 1))
    train(twin, twin_updater, twin_mechanic, range(30))
    assert relative_difference(flat(twin), flat(make_net())) > 1e-3
    assert torch.equal(flat(model), flat(twin))


def test_a_scale_that_was_proposed_for_a_skipped_step_is_not_shown() -> None:
    model = make_net()
    updater, mechanic = pair(model)
    train(model, updater, mechanic, range(10))
    scale = float(mechanic.scale)
    backward(model, 10)
    mechanic.step()
    assert float(mechanic.scale) != scale
    assert model.gain.grad is not None
    model.gain.grad.fill_(math.nan)
    mechanic.step(tune=False)
    updater.step()
    assert float(mechanic.scale) == scale == updater.get_last_lr()[0]


def test_a_step_is_skipped_once_however_often_its_gradients_were_bad() -> None:
    """Also in what is saved before it is skipped."""
    model = make_net()
    updater, mechanic = pair(model)
    train(model, updater, mechanic, range(5))
    backward(model, 5)
    assert model.gain.grad is not None
    model.gain.grad.fill_(math.nan)
    for _ in range(2):
        mechanic.step()
        assert int(mechanic.state_dict()["skipped"]) == 0
    assert updater.step() is None
    assert int(mechanic.state_dict()["skipped"]) == 1


def test_making_the_two_reads_nothing_from_the_device() -> None:
    """A meta tensor has nothing to read."""
    _, mechanic = pair(make_net().to("meta"))
    assert mechanic.scale.is_meta


def test_a_base_has_no_state_until_a_step_was_taken() -> None:
    """A fused one would set it up from what two bad gradients leave in its memory."""
    model = make_net()
    updater, mechanic = pair(model)
    for _ in range(2):
        backward(model, 0)
        assert model.gain.grad is not None
        model.gain.grad.fill_(math.inf)
        mechanic.step()
        assert updater.displacement.joined
        assert updater.step() is None
    train(model, updater, mechanic, range(1))
    assert not updater.displacement.joined


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_fused_base_that_begins_with_bad_gradients() -> None:
    """It takes the steps of a run without them; of later ones that the device skips a state dict knows."""
    ends = []
    for bad in (2, 0):
        model = make_net().cuda()
        updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, fused=True))
        mechanic = Mechanic(updater, s_init=1e-3)
        for step in (*[-1] * bad, *range(20)):
            backward(model, step)
            if step < 0:
                model.gain.grad = torch.full_like(model.gain, math.inf)
            mechanic.step()
            updater.step()
        ends.append(flat(model))
        model.gain.grad = torch.full_like(model.gain, math.inf)
        mechanic.step()
        updater.step()
        assert updater.state_dict()["steps"] == 20
    assert relative_difference(ends[0], flat(make_net().cuda())) > 1e-3
    assert torch.equal(*ends)


@pytest.mark.parametrize("change", ["clip", "accumulate", "new"])
def test_gradients_that_change_between_the_two_steps_are_told_once(change: str) -> None:
    model = make_net()
    updater, mechanic = pair(model)
    for told in (1, 0):
        backward(model, 0)
        mechanic.step()
        if change == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        elif change == "accumulate":
            loss_of(model, 1).backward()
        else:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            updater.step()
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == told
        assert all("were changed between mechanic.step() and updater.step()" in message for message in messages)


def test_closure() -> None:
    model, twin = make_net(), make_net()
    (updater, mechanic), (twin_updater, twin_mechanic) = pair(model), pair(twin)
    train(twin, twin_updater, twin_mechanic, range(30))
    for step in range(30):
        expected = backward(model, step)
        mechanic.step()

        def closure(step: int = step) -> torch.Tensor:
            return backward(model, step)

        assert torch.equal(updater.step(closure), expected)
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("store_delta", [True, False])
def test_a_gradient_of_the_closure_that_is_not_finite_skips_the_step(store_delta: bool) -> None:
    model, updater, mechanic, before = pending(store_delta=store_delta)
    state = copy.deepcopy(updater.base_optimizer.state_dict())

    def closure() -> torch.Tensor:
        loss = backward(model, 30)
        assert model.gain.grad is not None
        model.gain.grad.fill_(math.nan)
        return loss

    tuner = mechanic.state_dict()
    assert updater.step(closure) is None
    assert torch.equal(flat(model), before)
    assert_same_bits(updater.base_optimizer.state_dict(), state)
    assert_same_bits(mechanic.state_dict(), {**tuner, "steps": 31, "skipped": torch.tensor(1)})
    with pytest.raises(RuntimeError, match=r"without a mechanic\.step\(\)"):
        updater.step()
    train(model, updater, mechanic, range(30, 40))
    assert 0 < relative_difference(flat(model), before) < 1

    updater.nonfinite = "raise"
    before = flat(model)
    backward(model, 40)
    mechanic.step()
    with pytest.raises(FloatingPointError, match="after the closure"):
        updater.step(closure)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("who", ["closure", "scaler"])
def test_steps_that_only_the_updater_knows_to_be_bad_are_told_to_the_mechanic(who: str) -> None:
    """They count as skipped, nothing is learned for them, and nobody is told that updater.step() was left out."""
    model, logged = make_net(), []
    updater, mechanic = pair(model)
    mechanic.log_func = logged.append
    train(model, updater, mechanic, range(10))
    before, tuner = flat(model), mechanic.state_dict()["tuner"]

    def closure() -> torch.Tensor:
        loss = backward(model, 10)
        assert model.gain.grad is not None
        model.gain.grad.fill_(math.nan)
        return loss

    for _ in range(12):
        backward(model, 10)
        mechanic.step()
        if who == "closure":
            assert updater.step(closure) is None
        else:
            updater.found_inf = torch.ones(())  # type: ignore
            assert updater.step() is None
            del updater.found_inf  # type: ignore
        assert_same_bits(mechanic.state_dict()["tuner"], tuner)
    assert torch.equal(flat(model), before)
    train(model, updater, mechanic, range(11, 12))
    assert [(row["iter_count"], int(row["skipped"])) for row in logged[10:]] == [(11 + i, i) for i in range(13)]


def test_steps_that_are_skipped_in_a_row_are_told_ever_less_often(caplog: pytest.LogCaptureFixture) -> None:
    model = make_net()
    updater, mechanic = pair(model)
    for bad, told in (10, 4), (1, 1):  # 1, 2, 4, 8; 1
        train(model, updater, mechanic, range(5))
        caplog.clear()
        for _ in range(bad):
            backward(model, 0)
            assert model.gain.grad is not None
            model.gain.grad.fill_(math.nan)
            mechanic.step()
            updater.step()
        assert len(caplog.records) == told
    assert "after step 10" in caplog.text


def test_where_a_bad_gradient_is_refused_no_step_is_pending() -> None:
    model = make_net()
    updater, mechanic = pair(model)
    updater.nonfinite = "raise"
    train(model, updater, mechanic, range(30))
    before, state, scale = flat(model), mechanic.state_dict(), float(mechanic.scale)
    backward(model, 30)
    mechanic.step()
    assert float(mechanic.scale) != scale
    assert model.gain.grad is not None
    model.gain.grad.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="At step 31"):
        mechanic.step(tune=False)
    assert float(mechanic.scale) == scale
    with pytest.raises(RuntimeError, match=r"without a mechanic.step\(\)"):
        updater.step()
    assert torch.equal(flat(model), before)
    assert_same_bits(mechanic.state_dict(), state)


@pytest.mark.parametrize("store_delta", [True, False])
def test_a_failing_base_step_leaves_the_parameters(store_delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base step at the internal rate throws parameters far away; an interrupt there must not leave them so."""
    model, updater, mechanic, before = pending(lr=1e-3, store_delta=store_delta)
    base = updater.base_optimizer
    monkeypatch.setattr(base, "step", failing_step(base, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        updater.step()
    monkeypatch.undo()
    assert torch.equal(flat(model), before)
    assert updater.param_groups[0]["lr"] == 1e-3
    train(model, updater, mechanic, range(31, 40))
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("store_delta", [True, False])
def test_an_interrupt_in_the_move_leaves_a_point_near_the_last(
    store_delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not some parameters at the base optimizer's internal rate."""
    monkeypatch.setattr("manic.displacement.PACK", 1)
    monkeypatch.setattr("manic.displacement.FEW", 1)  # one bucket a parameter
    model, updater, mechanic, before = pending(store_delta=store_delta)
    move, calls = updater.displacement._buckets[0].kernels.move, []

    def interrupt(*args: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        move(*args)

    with monkeypatch.context() as context:
        context.setattr(updater.displacement._buckets[0].kernels, "move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            updater.step()
    assert relative_difference(flat(model), before) < 0.05
    train(model, updater, mechanic, range(31, 40))
    assert relative_difference(flat(model), before) < 0.5


def test_after_an_interrupt_in_the_first_move_a_start_is_still_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_net()
    updater, mechanic = pair(model, s_init=None)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(updater.displacement, "move", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, updater, mechanic, range(1))
    monkeypatch.undo()
    train(model, updater, mechanic, range(3))
    assert float(mechanic.scale) > 0


def test_gradients_set_by_hand() -> None:
    """As evolution strategies do, on tensors that require none."""
    weight = torch.full((3,), 2.0, dtype=torch.float64)
    updater = Updater(torch.optim.SGD([weight], lr=1.0))
    mechanic = Mechanic(updater, s_init=1e-3)
    for step in range(60):
        weight.grad = weight - 0.3 * (step % 3)
        mechanic.step()
        updater.step()
    assert 0 < float(weight.norm()) < 1.5


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("store_delta", [True, False])
def test_copies_go_on_the_same_way(copy_of: Any, store_delta: bool) -> None:
    model = make_net()
    updater, mechanic = pair(model, store_delta=store_delta)
    train(model, updater, mechanic, range(20))
    twin, twin_updater, twin_mechanic = copy_of((model, updater, mechanic))
    start = flat(model)
    train(model, updater, mechanic, range(20, 40))
    train(twin, twin_updater, twin_mechanic, range(20, 40))
    assert relative_difference(flat(model), start) > 1e-3
    assert torch.equal(flat(model), flat(twin))


def test_what_they_are_in_words() -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(base, lr_scheduler.StepLR(base, 10), store_delta=False)
    mechanic = Mechanic(updater, rule="optax", max_scale=0.5)
    train(model, updater, mechanic, range(2))
    assert repr(updater) == "Updater(SGD, StepLR, store_delta=False, steps=2)"
    assert repr(mechanic) == f"Mechanic({updater!r}, rule='optax', max_scale=0.5, scale={float(mechanic.scale)!r})"
    assert repr(Mechanic(Updater(base))) == "Mechanic(Updater(SGD, steps=0), scale=0.0)"


def test_max_scale_is_in_units_of_the_lr_given() -> None:
    model = make_net()
    updater = Updater(torch.optim.AdamW(model.parameters(), lr=0.01))
    mechanic = Mechanic(updater, s_init=1e-3, max_scale=0.2)
    train(model, updater, mechanic, range(60))
    assert float(mechanic.scale) == pytest.approx(0.2, rel=1e-12)


def test_the_options_are_checked_in_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=4.0))
    mechanic = Mechanic(updater, max_scale=0.2)
    train(model, updater, mechanic, range(1))  # the unit of the scale is settled
    monkeypatch.setattr(TunerConfig, "__post_init__", lambda _: pytest.fail("checked again"))
    train(model, updater, mechanic, range(1, 3))


def test_hand_off_with_a_schedule_that_was_not_given() -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = lr_scheduler.LambdaLR(base, lambda step: 1.0)
    updater = Updater(base)
    mechanic = Mechanic(updater)
    train(model, updater, mechanic, range(20))
    (rate,), scale = updater.get_last_lr(), float(mechanic.scale)
    with pytest.warns(UserWarning, match=f"lack the scale: multiply them .* by {scale:.6g}"):
        mechanic.hand_off()
    schedule.base_lrs = [lr * scale for lr in schedule.base_lrs]
    base.step()
    schedule.step()
    assert base.param_groups[0]["lr"] == pytest.approx(rate)


def test_hand_off_with_rates_that_were_set_by_hand() -> None:
    model = make_net()
    updater, mechanic = pair(model)
    train(model, updater, mechanic, range(20))
    updater.param_groups[0]["lr"] = 0.5
    train(model, updater, mechanic, range(20, 22))
    with pytest.warns(UserWarning, match="set again from here on, by hand"):
        mechanic.hand_off()


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "one_cycle", "cyclic", "cosine_floor"])
@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "adamw", "rmsprop"])
def test_hand_off_goes_on_as_a_frozen_scale(optimizer: str, scheduler: str) -> None:
    """The frozen scale by hand: x ← x + scale · u, with u the base optimizer's update at the lr it was given."""
    more = {
        "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=200, cycle_momentum=False),
        "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.002, 0.02, 13, cycle_momentum=False),
        "cosine_floor": lambda o: lr_scheduler.CosineAnnealingLR(o, 70, eta_min=0.004),
    }
    make = {**SCHEDULERS, **more}[scheduler]
    model = make_net()
    base = OPTIMIZERS[optimizer](model.parameters(), lr=0.02)
    updater = Updater(base, make(base))
    mechanic = Mechanic(updater, s_init=1e-3)
    train(model, updater, mechanic, range(60))

    twin = copy.deepcopy(model)
    frozen = OPTIMIZERS[optimizer](twin.parameters(), lr=0.02)
    schedule = make(frozen)
    frozen.load_state_dict(copy.deepcopy(base.state_dict()))
    if schedule is not None:
        schedule.load_state_dict(copy.deepcopy(updater.state_dict()["lr_scheduler"]))
    scale = float(updater.scale)

    backward(model, 60)
    mechanic.step()  # what it proposes is not in force yet
    plain, plain_schedule = mechanic.hand_off()
    assert plain is base
    assert float(updater.scale) == scale
    start = flat(model)
    for step in range(60, 100):
        backward(model, step)
        plain.step()
        backward(twin, step)
        x = [p.detach().clone() for p in twin.parameters()]
        frozen.step()
        with torch.no_grad():
            for p, before in zip(twin.parameters(), x, strict=True):
                p.copy_(before + scale * (p - before))
        if plain_schedule is not None and schedule is not None:
            plain_schedule.step()
            schedule.step()
    assert relative_difference(flat(model), start) > 1e-3
    assert relative_difference(flat(model), flat(twin)) < 1e-9
    assert updater.get_last_lr() == [group["lr"] for group in plain.param_groups]
    assert mechanic.get_last_lr() == [1.0] * len(plain.param_groups)
    assert not updater.displacement.slots
    for call in (mechanic.step, updater.step, mechanic.hand_off):
        with pytest.raises(RuntimeError, match="hand_off"):
            call()
