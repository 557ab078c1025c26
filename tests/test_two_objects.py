"""What the two objects promise about parameters, groups, dtypes, gradients and changes made by others."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from problems import (
    OPTIMIZERS,
    SCHEDULERS,
    Net,
    assert_same_bits,
    backward,
    batch,
    failing_step,
    flat,
    loss_of,
    make_net,
    relative_difference,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from manic import Mechanic, Updater, mechanize
from manic.tuner import RESCALED, TunerConfig

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def pair(model: nn.Module, lr: float = 1.0, scheduler: str = "none", **options: Any) -> tuple[Updater, Mechanic]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    s_init = options.pop("s_init", 1e-3)
    updater = Updater(optimizer, SCHEDULERS[scheduler](optimizer), **options)
    return updater, Mechanic(updater, s_init=s_init)


def train(model: nn.Module, updater: Updater, mechanic: Mechanic, steps: range, **kwargs: Any) -> float:
    loss = math.nan
    for step in steps:
        loss = float(backward(model, step, **kwargs))
        mechanic.step()
        updater.step()
    return loss


def pending(**options: Any) -> tuple[Net, Updater, Mechanic, torch.Tensor]:
    """A run of which only ``updater.step()`` of step 31 is missing, and its parameters."""
    model = make_net()
    updater, mechanic = pair(model, **options)
    train(model, updater, mechanic, range(30))
    backward(model, 30)
    mechanic.step()
    return model, updater, mechanic, flat(model)


def evaluate(model: nn.Module, dtype: torch.dtype = torch.float64) -> float:
    with torch.no_grad():
        return sum(float(loss_of(model, step, dtype)) for step in range(500, 520)) / 20


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


class Rearranged(nn.Module):
    """`Net` with its hidden weight in two tensors, and the parameters in another order."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.out = copy.deepcopy(net.out)
        self.bias = nn.Parameter(net.hidden.bias.detach().clone())
        self.lower = nn.Parameter(net.hidden.weight.detach()[3:].clone())
        self.gain = nn.Parameter(net.gain.detach().clone())
        self.upper = nn.Parameter(net.hidden.weight.detach()[:3].clone())
        self.unused = nn.Parameter(net.unused.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * self.out(torch.tanh(x @ torch.cat([self.upper, self.lower]).T + self.bias))


@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "adamw"])
@pytest.mark.parametrize("store_delta", [True, False])
def test_splitting_and_permuting_parameters_changes_nothing(optimizer: str, store_delta: bool) -> None:
    model = make_net()
    twin = Rearranged(model)
    start = evaluate(model)
    assert evaluate(twin) == pytest.approx(start, rel=1e-12)
    for net in (model, twin):
        updater = Updater(OPTIMIZERS[optimizer](net.parameters(), lr=1.0), store_delta=store_delta)
        train(net, updater, Mechanic(updater, s_init=1e-3), range(120))
    assert evaluate(model) < 0.9 * start
    assert evaluate(twin) == pytest.approx(evaluate(model), rel=1e-9)


@pytest.mark.parametrize("store_delta", [True, False])
def test_thousands_of_small_parameters_are_packed_in_linear_time(
    store_delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each was once cut from all of its pack: the first step of 4,000 took 28 seconds."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(200)]
    updater = Updater(torch.optim.SGD(parameters, lr=1.0), store_delta=store_delta)
    mechanic = Mechanic(updater)
    cuts, split = [], torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda *args: cuts.extend(split(*args)) or split(*args))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    mechanic.step()
    assert len(cuts) == len(parameters) * (1 + store_delta)


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


@pytest.mark.parametrize("store_delta", [True, False])
def test_parameters_join_freeze_and_return(store_delta: bool) -> None:
    model = make_net()
    model.hidden.requires_grad_(False)
    updater, mechanic = pair(model, store_delta=store_delta)
    hidden = model.hidden.weight.detach().clone()
    train(model, updater, mechanic, range(40))
    assert torch.equal(model.hidden.weight, hidden)
    model.hidden.requires_grad_(True)  # unfrozen: its x_ref is its value now
    train(model, updater, mechanic, range(40, 41))
    assert relative_difference(model.hidden.weight.detach(), hidden) < 0.3
    train(model, updater, mechanic, range(41, 80))
    moved = model.hidden.weight.detach().clone()
    assert relative_difference(moved, hidden) > 1e-2
    model.hidden.requires_grad_(False)  # frozen again: stays, while the scale goes on
    train(model, updater, mechanic, range(80, 100))
    assert torch.equal(model.hidden.weight, moved)
    model.hidden.requires_grad_(True)
    train(model, updater, mechanic, range(100, 101))
    assert relative_difference(model.hidden.weight.detach(), moved) < 0.3
    late = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    updater.base_optimizer.add_param_group({"params": [late]})
    for step in range(101, 200):
        updater.zero_grad()
        x, y = batch(step)
        (model(x) + late - y - 3).square().mean().backward()
        mechanic.step()
        updater.step()
    assert float(late.detach()) > 0.1


def test_weights_loaded_after_construction_are_the_reference() -> None:
    model, loaded = make_net(0), make_net(1)
    updater, mechanic = pair(model)
    model.load_state_dict(loaded.state_dict())
    twin_updater, twin_mechanic = pair(loaded)
    for net, u, m in ((model, updater, mechanic), (loaded, twin_updater, twin_mechanic)):
        train(net, u, m, range(50))
    assert relative_difference(flat(loaded), flat(make_net(1))) > 1e-3
    assert torch.equal(flat(model), flat(loaded))


@pytest.mark.parametrize("through", ["version counter", "rebase"])
def test_changes_by_others_are_kept(through: str) -> None:
    """What takes back a part of the displacement comes out of it; the reference point shifts by the rest."""
    model = make_net()
    updater, mechanic = pair(model)
    train(model, updater, mechanic, range(60))
    weight = model.out.weight
    slot = updater.displacement.slots[weight]
    reference, delta, rest = slot.reference.clone(), slot.delta.clone(), model.hidden.weight.detach().clone()
    scale = float(updater.scale)
    assert float(delta.min()) < -0.02 / scale < 0 < delta.max()
    left = torch.where(delta < 0, (delta + 0.02 / scale).clamp(max=0), delta)
    changed = weight.detach() + 0.02
    if through == "rebase":
        weight.data.copy_(changed)  # moves no version counter
        updater.rebase()
    else:
        with torch.no_grad():
            weight.copy_(changed)
    backward(model, 60)
    mechanic.step()
    assert torch.allclose(weight, changed, rtol=1e-14)
    assert torch.allclose(slot.delta, left, rtol=1e-9)
    assert torch.equal(slot.delta == delta, delta >= 0)
    assert torch.allclose(slot.reference, reference + 0.02 - RESCALED * scale * (left - delta), rtol=1e-12)
    assert torch.equal(model.hidden.weight, rest)
    updater.step()
    assert relative_difference(weight.detach(), changed) < 0.2


def test_a_nan_that_others_write_and_take_back() -> None:
    model = make_net()
    updater, mechanic = pair(model)
    train(model, updater, mechanic, range(60))
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.out.weight.fill_(math.nan)
    train(model, updater, mechanic, range(60, 61))  # skipped
    model.load_state_dict(kept)
    train(model, updater, mechanic, range(61, 70))
    assert flat(model).isfinite().all()
    assert 1e-6 < relative_difference(model.out.weight.detach(), kept["out.weight"]) < 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_that_are_clipped_after_every_step(optimizer: str) -> None:
    """What clipping undoes cannot pay for a larger scale."""
    torch.manual_seed(0)
    weight, target = nn.Parameter(torch.randn(1000).clamp(-1, 1)), 5 * torch.randn(1000)
    updater = Updater(OPTIMIZERS[optimizer]([weight], lr=1.0))
    mechanic = Mechanic(updater)
    for _ in range(300):
        updater.zero_grad()
        (weight - target).square().mean().backward()
        mechanic.step()
        updater.step()
        with torch.no_grad():
            weight.clamp_(-1, 1)
    assert float(updater.scale) < 1e4
    assert relative_difference(weight.detach(), target.clamp(-1, 1)) < 1e-2


def test_swapping_weights_and_back_changes_nothing() -> None:
    """As an average of the weights does, for evaluation."""
    model, twin = make_net(), make_net()
    (updater, mechanic), (twin_updater, twin_mechanic) = pair(model), pair(twin)
    train(model, updater, mechanic, range(60))
    train(twin, twin_updater, twin_mechanic, range(60))
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(make_net(3).state_dict())
    model.load_state_dict(kept)
    train(model, updater, mechanic, range(60, 90))
    train(twin, twin_updater, twin_mechanic, range(60, 90))
    assert torch.equal(flat(model), flat(twin))


def test_without_a_stored_displacement_a_change_starts_it_anew_and_says_so() -> None:
    model = make_net()
    updater, mechanic = pair(model, store_delta=False)
    train(model, updater, mechanic, range(60))
    with torch.no_grad():
        model.out.weight.add_(0.25)
    changed = model.out.weight.detach().clone()
    backward(model, 60)
    with pytest.warns(UserWarning, match="store_delta=True") as caught:
        mechanic.step()
    assert [warning.filename for warning in caught] == [__file__]
    updater.step()
    assert relative_difference(model.out.weight.detach(), changed) < 0.2


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_a_copy_notices_changes_before_its_first_step(copy_of: Any) -> None:
    runs = []
    for copied in (False, True):
        model = make_net()
        parts = model, *pair(model, store_delta=False)
        train(*parts, range(60))
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


def test_a_frozen_parameter_that_is_changed_starts_its_displacement_anew() -> None:
    """Without a stored one the change would be taken for displacement."""
    model = make_net()
    updater, mechanic = pair(model, store_delta=False)
    train(model, updater, mechanic, range(60))
    model.out.requires_grad_(False)
    train(model, updater, mechanic, range(60, 62))
    with torch.no_grad():
        model.out.weight.add_(10.0)
    train(model, updater, mechanic, range(62, 64))
    model.out.requires_grad_(True)
    before = model.out.weight.detach().clone()
    with pytest.warns(UserWarning, match="store_delta=True"):
        train(model, updater, mechanic, range(64, 65))
    assert 0 < float((model.out.weight.detach() - before).abs().max()) < 0.1


@pytest.mark.parametrize("store_delta", [True, False])
def test_parameters_that_take_turns_keep_their_displacement(store_delta: bool) -> None:
    """Also in a copy, and in a run that is resumed, while one is away."""
    model = make_net()
    updater, mechanic = pair(model, store_delta=store_delta)
    train(model, updater, mechanic, range(30))
    model.hidden.requires_grad_(False)
    before = model.hidden.weight.detach().clone()
    train(model, updater, mechanic, range(30, 45))
    others = [copy.deepcopy((model, updater, mechanic))]
    other = make_net(3)
    other.hidden.requires_grad_(False)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    others.append((other, *pair(other, store_delta=store_delta)))
    for ours, theirs in zip((updater, mechanic), others[-1][1:], strict=True):
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for net, its_updater, its_mechanic in ((model, updater, mechanic), *others):
        net.hidden.requires_grad_(True)
        train(net, its_updater, its_mechanic, range(45, 46))
        slot = its_updater.displacement.slots[net.hidden.weight]
        moved = slot.x() - slot.reference if slot.delta is None else slot.delta
        assert float(moved.abs().max()) > 1e-3  # a step alone does less
        train(net, its_updater, its_mechanic, range(46, 60))
        assert relative_difference(flat(net), flat(model)) < 1e-9
    assert 1e-3 < relative_difference(model.hidden.weight.detach(), before) < 1


@pytest.mark.parametrize("store_delta", [True, False])
def test_parameters_cut_from_one_tensor(store_delta: bool) -> None:
    """They share a version counter, by which changes of others are noticed."""
    whole = torch.linspace(-1.0, 1.0, 20)
    runs = []
    for cut in (whole.clone().split(10), [part.clone() for part in whole.split(10)]):
        weights = [nn.Parameter(part) for part in cut]
        updater = Updater(torch.optim.AdamW(weights, lr=1.0), store_delta=store_delta)
        mechanic = Mechanic(updater)
        for _ in range(60):
            updater.zero_grad()
            sum((weight - 3).square().sum() for weight in weights).backward()
            mechanic.step()
            updater.step()
        runs.append(torch.cat([weight.detach() for weight in weights]))
    assert relative_difference(runs[0], whole) > 1e-2
    assert torch.equal(*runs)


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


@pytest.mark.parametrize("bad", ["held-out rows", "training rows"])
def test_a_bad_gradient_where_the_scale_is_learned_from_held_out_rows(bad: str) -> None:
    """Of held-out rows it leaves the scale, and training goes on; of training rows it skips the step, bet and all."""
    model, logged = make_net(), []
    updater, mechanic = pair(model)
    mechanic.log_func = logged.append

    def of(rows: str, step: int) -> None:
        backward(model, step)
        if (rows, step % 500) == (bad, 20):
            assert model.gain.grad is not None
            model.gain.grad.fill_(math.nan)

    for step in range(30):
        before, scale = flat(model), float(mechanic.scale)
        mechanic.held_out = partial(of, "held-out rows", 500 + step)
        of("training rows", step)
        mechanic.step()
        updater.step()
        assert torch.equal(flat(model), before) == (step == 20 and bad == "training rows")
        if step == 20:
            assert float(mechanic.scale) == scale  # the one in force
            assert float(mechanic.state_dict()["tuner"]["scales"].sum()) == scale
    assert int(mechanic.state_dict()["skipped"]) == (bad == "training rows")
    assert [row["iter_count"] for row in logged] == list(range(1, 31))


@pytest.mark.parametrize(("options", "last"), [({}, 243), ({"steps_per_epoch": 10}, 243), ({"rule": "paper"}, 300)])
def test_when_held_out_rows_are_asked_for(options: dict[str, Any], last: int) -> None:
    """In the first hundred steps, then in every fourth up to the last in which the scale is learned."""
    model, asked = make_net(), []
    updater = Updater(torch.optim.AdamW(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater, s_init=1e-3, **options)
    for step in range(1, 301):
        backward(model, step)
        kept = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]

        def held_out(step: int = step) -> None:
            assert all(p.grad is None for p in model.parameters())
            asked.append(step)
            backward(model, 500 + step)

        mechanic.held_out = held_out
        with torch.no_grad():
            mechanic.step()
        assert mechanic.learning_steps >= last
        for p, (gradient, values) in zip(model.parameters(), kept, strict=True):
            assert p.grad is gradient
            assert gradient is None or torch.equal(gradient, values)
        updater.step()
    assert asked == [step for step in range(1, 301) if step <= last and (step <= 100 or step % 4 == 1)]


def test_held_out_rows_are_asked_for_again_when_many_parameters_join() -> None:
    old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(8), requires_grad=False)
    updater = Updater(torch.optim.AdamW([old, new], lr=1.0))
    mechanic, asked = Mechanic(updater), []

    def gradients(step: int | None = None) -> None:
        for parameter in (old, new):
            parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
        if step is not None:
            asked.append(step)

    for step in range(1, 361):
        new.requires_grad_(step > 250)
        gradients()
        mechanic.held_out = partial(gradients, step)
        mechanic.step()
        updater.step()
    assert [step for step in asked if step > 243] == [*range(252, 351), 351, 355, 359]


def test_held_out_rows_that_fail_change_nothing() -> None:
    model, updater, mechanic, _ = pending()
    backward(model, 30)

    def fail() -> None:
        backward(model, 500)
        raise KeyboardInterrupt

    states = [copy.deepcopy(part.state_dict()) for part in (updater, mechanic)]
    kept = [p.grad for p in model.parameters()]
    mechanic.held_out = fail
    with pytest.raises(KeyboardInterrupt):
        mechanic.step()
    mechanic.held_out = lambda: None
    with pytest.raises(ValueError, match=r"held_out\(\) has left no gradient; expected it to compute the loss"):
        mechanic.step()
    mechanic.held_out = torch.tensor(1.0)  # type: ignore
    with pytest.raises(
        TypeError, match=r"held_out is tensor\(1\.\); expected a function that computes the loss of held-"
    ):
        mechanic.step()
    mechanic.held_out = mechanic.step
    with pytest.raises(RuntimeError, match=r"held_out\(\) takes a step, in which it would be called again; expected"):
        mechanic.step()
    updater.nonfinite = "raise"
    mechanic.held_out = lambda: model.gain.backward(torch.full_like(model.gain, math.nan))
    with pytest.raises(FloatingPointError, match="At step 31 the norm of the gradient of the held-out rows is nan"):
        mechanic.step()
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), kept, strict=True))
    assert_same_bits([updater.state_dict(), mechanic.state_dict()], states)


def test_what_held_out_rows_have_said_is_taken_back_if_the_step_is_refused() -> None:
    """As for a sparse gradient, which the tuner sees when it has bet on those of held-out rows."""
    model = make_net()
    updater, mechanic = pair(model)
    mechanic.held_out = partial(backward, model, 500)
    train(model, updater, mechanic, range(10))
    states = [copy.deepcopy(part.state_dict()) for part in (updater, mechanic)]
    scale, weights = float(updater.scale), flat(model)

    backward(model, 10)
    assert model.gain.grad is not None
    kept, model.gain.grad = model.gain.grad, model.gain.grad.to_sparse()
    with pytest.raises(ValueError, match="expected a dense one"):
        mechanic.step()
    assert float(updater.scale) == scale
    with pytest.raises(RuntimeError, match=r"without a mechanic.step\(\)"):
        updater.step()
    assert_same_bits([updater.state_dict(), mechanic.state_dict()], states)
    assert torch.equal(flat(model), weights)

    model.gain.grad = kept
    mechanic.step()
    updater.step()
    assert float(updater.scale) != scale
    assert mechanic.state_dict()["steps"] == 11


def test_steps_that_are_skipped_leave_what_held_out_rows_have_said() -> None:
    """The weights stay, and so would say the same again and again."""
    model, logged = make_net(), []
    updater, mechanic = pair(model)
    mechanic.log_func, mechanic.held_out = logged.append, partial(backward, model, 500)
    for step in range(20):
        backward(model, step)
        if step >= 10:
            assert model.gain.grad is not None
            model.gain.grad.fill_(math.nan)
        mechanic.step()
        assert updater.step() is None
        if step == 9:
            scale, state = float(mechanic.scale), mechanic.state_dict()
    assert float(mechanic.scale) == scale
    assert_same_bits(mechanic.state_dict()["tuner"], state["tuner"])
    assert [(row["iter_count"], int(row["skipped"])) for row in logged] == [(i + 1, max(0, i - 9)) for i in range(20)]


@pytest.mark.parametrize("every", [1, 10])
def test_every_step_with_held_out_rows_is_logged(every: int) -> None:
    """Also those that do not ask for them."""
    model, logged = make_net(), []
    updater, mechanic = pair(model)
    mechanic.log_func, mechanic.log_every = logged.append, every
    mechanic.held_out = partial(backward, model, 500)
    train(model, updater, mechanic, range(130))
    assert [row["iter_count"] for row in logged] == list(range(every, 131, every))


def test_hooks_are_for_the_gradients_that_the_step_is_taken_with() -> None:
    """Not for those of held-out rows."""
    model, seen = make_net(), []
    updater, mechanic = pair(model)
    mechanic.held_out = partial(backward, model, 500)
    updater.base_optimizer.register_step_pre_hook(lambda *_: seen.append(model.gain.grad))
    for step in range(5):
        backward(model, step)
        gradient = model.gain.grad
        mechanic.step()
        updater.step()
        assert len(seen) == step + 1
        assert seen[-1] is gradient


def test_held_out_rows_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be asked for in every replay."""
    model, _, mechanic, _ = pending()
    monkeypatch.setattr("manic.mechanic._is_captured", lambda tensor: True)
    mechanic.held_out = partial(backward, model, 500)
    with pytest.raises(RuntimeError, match="A CUDA graph captures a step in which the scale is learned from held-out"):
        mechanic.step()


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
    assert_same_bits(mechanic.state_dict(), tuner)
    with pytest.raises(RuntimeError, match=r"Call mechanic.step\(\) again"):
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
def test_what_others_do_between_the_two_calls_is_kept(store_delta: bool) -> None:
    """Without a stored displacement this starts again from zero, which is told."""
    model, updater, _, before = pending(store_delta=store_delta)
    with torch.no_grad():
        model.gain.fill_(5.0)
    with nullcontext() if store_delta else pytest.warns(UserWarning, match="store_delta=True"):
        updater.step()
    moved = flat(model)
    assert float(model.gain.detach()) == pytest.approx(5, abs=0.1)
    assert 0 < (moved - before).abs().sort().values[-2] < 0.1


@pytest.mark.parametrize("store_delta", [True, False])
def test_the_displacement_of_a_frozen_layer_restarts_with_the_others(store_delta: bool) -> None:
    model = make_net()
    updater, mechanic = pair(model, store_delta=store_delta)
    train(model, updater, mechanic, range(20))
    slot = updater.displacement.slots[model.out.weight]
    model.out.weight.requires_grad_(False)
    model.out.weight.grad = None

    def delta() -> float:
        return float((slot.x() - slot.reference).norm() if slot.delta is None else slot.delta.norm())

    train(model, updater, mechanic, range(20, 31))
    assert delta() > 0
    train(model, updater, mechanic, range(31, 33))  # Δ restarts after step 32
    assert delta() == 0
    before = flat(model)
    model.out.weight.requires_grad_(True)
    train(model, updater, mechanic, range(33, 35))
    assert 0 < relative_difference(flat(model), before) < 1


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


@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "adamw"])
def test_frozen_parameters_with_a_leftover_gradient_move_as_in_torch(optimizer: str) -> None:
    """torch steps whatever has a gradient; at the effective rate, not at the internal one."""
    model = make_net()
    base = OPTIMIZERS[optimizer](model.parameters(), lr=1e-6)
    updater = Updater(base)
    mechanic = Mechanic(updater, s_init=1e-4)
    train(model, updater, mechanic, range(10))
    model.hidden.requires_grad_(False)
    before = flat(model.hidden)
    for step in range(10, 15):
        updater.zero_grad(set_to_none=False)
        loss_of(model, step).backward()
        mechanic.step()
        updater.step()
    assert relative_difference(flat(model.hidden), before) < 0.1


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masked_weights_stay_small(dtype: torch.dtype) -> None:
    """In bfloat16 x_ref alone is too coarse to hold a change; the displacement takes the rest."""
    weight = nn.Parameter(torch.linspace(0.5, 1.5, 100).to(dtype))
    updater = Updater(torch.optim.AdamW([weight], lr=1.0))
    mechanic = Mechanic(updater, s_init=1e-3)
    for step in range(51):
        if step == 50:
            with torch.no_grad():
                weight[::2] = 0
            kept = weight.detach().clone()
        updater.zero_grad()
        (weight.float() - 0.3).square().sum().backward()
        mechanic.step()
        if step < 50:
            updater.step()
    assert float(kept[1::2].float().min()) > 0.1
    assert torch.allclose(weight.float(), kept.float(), atol=1e-6)


def test_writes_through_data_that_move_the_memory_are_noticed() -> None:
    model, twin = make_net(), make_net()
    (updater, mechanic), (twin_updater, twin_mechanic) = pair(model), pair(twin)
    train(model, updater, mechanic, range(40))
    train(twin, twin_updater, twin_mechanic, range(40))
    new = flat(model) + 0.1
    torch.nn.utils.vector_to_parameters(new.clone(), model.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p += 0.1
    train(model, updater, mechanic, range(40, 50))
    train(twin, twin_updater, twin_mechanic, range(40, 50))
    assert relative_difference(flat(model), new) > 1e-4
    assert torch.allclose(flat(model), flat(twin), rtol=1e-12)


def test_a_conjugated_gradient() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(4, 3, dtype=torch.complex128)
    p = nn.Parameter(torch.ones(3, dtype=torch.complex128))
    updater = Updater(torch.optim.SGD([p], lr=1.0))
    mechanic = Mechanic(updater, s_init=1e-3)
    for _ in range(60):
        updater.zero_grad()
        loss = (matrix @ p.conj()).abs().square().sum()
        loss.backward()
        assert p.grad is not None
        assert p.grad.is_conj()
        mechanic.step()
        updater.step()
    assert float(loss.detach()) < 1


@pytest.mark.parametrize("store_delta", [True, False])
def test_a_negated_parameter(store_delta: bool) -> None:
    """An imaginary part of a conjugate is a view that has the sign as a flag."""
    target = torch.randn(5, generator=torch.Generator().manual_seed(0))
    values = torch.full((5,), 1 - 2j).conj().imag, torch.full((5,), 2.0)
    parameters = [nn.Parameter(value) for value in values]
    assert [p.is_neg() for p in parameters] == [True, False]
    for p in parameters:
        updater = Updater(torch.optim.AdamW([p], lr=1.0), store_delta=store_delta)
        mechanic = Mechanic(updater)
        for _ in range(60):
            updater.zero_grad()
            (p - target).square().sum().backward()
            mechanic.step()
            updater.step()
    negated, other = parameters
    assert (other - target).norm() < (2 - target).norm() / 4
    assert torch.allclose(negated, other, rtol=1e-6)


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    """Half-precision parameters train; their x_ref and Δ and the tuner's numbers are float32 or wider."""
    model = make_net(dtype=dtype).to(device)
    before = evaluate(model.cpu(), dtype)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, eps=1e-4)
    updater = Updater(optimizer)
    mechanic = Mechanic(updater, s_init=1e-3)
    for step in range(200):
        model.zero_grad()
        x, y = (t.to(device) for t in batch(step, dtype))
        (model(x) - y).square().mean().backward()
        mechanic.step()
        updater.step()
    slot = updater.displacement.slots[model.gain]
    assert slot.delta is not None
    assert slot.reference.dtype == slot.delta.dtype == torch.promote_types(dtype, torch.float32)
    assert updater.scale.dtype == torch.float64
    assert updater.scale.device.type == device
    assert evaluate(model.cpu(), dtype) < 0.8 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_displacement_that_is_recomputed_does_as_well(dtype: torch.dtype) -> None:
    """In bfloat16 too: what x is rounded by is not taken for a way that was gone."""

    def loss(store_delta: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
        x = torch.randn(2048, 16)
        y = x[:, :4].prod(1, keepdim=True) + x[:, 4:8].sum(1, keepdim=True) / 2
        base = torch.optim.AdamW(model.parameters(), lr=1.0)
        updater = Updater(base, lr_scheduler.CosineAnnealingLR(base, 400), store_delta=store_delta)
        mechanic = Mechanic(updater)
        for _ in range(400):
            rows = torch.randint(2048, (64,))
            updater.zero_grad()
            nn.functional.mse_loss(model(x[rows].to(dtype)).float(), y[rows]).backward()
            mechanic.step()
            updater.step()
        with torch.no_grad():
            return float(nn.functional.mse_loss(model(x.to(dtype)).float(), y))

    stored = loss(store_delta=True)
    assert stored < 1.1
    assert loss(store_delta=False) < 1.03 * stored


@pytest.mark.parametrize("numel", [10, 1 << 17], ids=["packed", "large"])
def test_parameters_that_share_memory_are_refused(numel: int) -> None:
    """Each would be moved by what was done to both. Parts of one tensor that lie side by side are well."""
    whole = torch.randn(2 * numel)
    first, second, other = nn.Parameter(whole[:numel]), nn.Parameter(whole[numel:]), nn.Parameter(torch.zeros(numel))
    updater = Updater(torch.optim.SGD([first, second, other], lr=1.0))
    mechanic = Mechanic(updater)
    for parameter in (first, second, other):
        parameter.grad = parameter.detach().clone()
    for _ in range(2):
        mechanic.step()
        updater.step()
    other.data = whole[1 : numel + 1]
    before = whole.clone()
    with pytest.raises(ValueError, match=rf"of shapes \({numel},\) and .* share memory.*out.weight = embedding"):
        mechanic.step()
    assert torch.equal(whole, before)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_given_twice_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    updater = Updater(torch.optim.SGD([weight, weight], lr=1.0))
    weight.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"of shape \(3,\) is in the optimizer twice.*dict.fromkeys\(parameters\)"):
        Mechanic(updater).step()


def test_complex_parameters() -> None:
    """A complex parameter is its real and imaginary parts."""
    target = torch.tensor([1 + 2j, -0.5j, 3.0], dtype=torch.complex128)
    complex_one = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    real_one = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    for parameter in (complex_one, real_one):
        updater = Updater(torch.optim.SGD([parameter], lr=1.0, momentum=0.9))
        mechanic = Mechanic(updater, s_init=1e-3)
        for step in range(60):
            updater.zero_grad()
            scale = 1 + 0.5 * math.sin(step)
            value = torch.view_as_complex(parameter) if parameter is real_one else parameter
            (value - scale * target).abs().square().sum().backward()
            mechanic.step()
            updater.step()
    assert float((complex_one - target).detach().abs().max()) < 2
    assert torch.allclose(torch.view_as_real(complex_one), real_one, rtol=1e-9)


def test_memory_layouts() -> None:
    """Transposed, channels-last, sliced, empty and 0-d parameters follow the same run as contiguous ones."""
    torch.manual_seed(0)
    shapes = [(5, 4), (2, 3, 4, 5), (6,), (0, 3), ()]
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    plain = [nn.Parameter(t.clone()) for t in start]
    odd = [
        nn.Parameter(start[0].T.contiguous().T),
        nn.Parameter(start[1].contiguous(memory_format=torch.channels_last)),
        nn.Parameter(torch.stack([start[2], start[2]], 1)[:, 0]),
        nn.Parameter(start[3].clone()),
        nn.Parameter(start[4].clone()),
    ]
    assert not odd[0].is_contiguous()
    assert not odd[2].is_contiguous()
    for parameters in (plain, odd):
        for store_delta in (True, False):
            with torch.no_grad():
                for p, value in zip(parameters, start, strict=True):
                    p.copy_(value)
            updater = Updater(torch.optim.AdamW(parameters, lr=1.0), store_delta=store_delta)
            mechanic = Mechanic(updater, s_init=1e-3)
            for step in range(50):
                updater.zero_grad()
                sum((p * p - 0.1 * step % 3 * p).sum() for p in parameters).backward()
                mechanic.step()
                updater.step()
    for a, b, first in zip(plain, odd, start, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
        assert a.numel() == 0 or relative_difference(a.detach(), first) > 1e-2


@pytest.mark.parametrize("numel", [1, (1 << 16) - 1, 1 << 16, (1 << 17) + 3])
def test_blocks(numel: int) -> None:
    """Tensors of any size against one division of the same elements into small ones."""
    torch.manual_seed(0)
    values = torch.randn(numel, dtype=torch.float64)
    whole = [nn.Parameter(values.clone())]
    pieces = [nn.Parameter(piece.clone()) for piece in values.split(max(1, numel // 7))]
    for parameters in (whole, pieces):
        updater = Updater(torch.optim.SGD(parameters, lr=1.0, momentum=0.5))
        mechanic = Mechanic(updater, s_init=1e-3)
        for step in range(20):
            for p in parameters:
                p.grad = p.detach() - (step % 3)
            mechanic.step()
            updater.step()
    assert relative_difference(whole[0].detach(), values) > 1e-3
    assert torch.allclose(whole[0], torch.cat(pieces), rtol=1e-9)


def test_parameters_without_gradients_still_move_with_the_scale() -> None:
    model = make_net()
    updater, mechanic = pair(model)
    train(model, updater, mechanic, range(40))
    before, gain = float(updater.scale), model.gain.detach().clone()
    backward(model, 40)
    model.gain.grad = None
    mechanic.step()
    updater.step()
    slot = updater.displacement.slots[model.gain]
    assert float(updater.scale) != before
    assert slot.delta is not None
    assert torch.equal(model.gain.detach().reshape(1), slot.reference + slot.delta * (RESCALED * updater.scale))
    assert not torch.equal(model.gain.detach(), gain)


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
