"""The drop-in is an optimizer like any other."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from problems import OPTIMIZERS, backward, flat, loss_of, make_net, relative_difference
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from manic import Mechanic, Updater, is_mechanized, mechanize
from manic.tuner import RESCALED


def make(model: nn.Module, name: str = "adamw", **options: Any) -> Any:
    base = OPTIMIZERS[name]
    return mechanize(base.cls, **{"s_init": 1e-3, **options})(model.parameters(), lr=0.1, **base.options)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


@pytest.mark.parametrize("schedule", [False, True])
def test_warnings_are_of_the_line_that_steps(schedule: bool) -> None:
    """A scheduler wraps the step of the optimizer's object once more."""
    model = make_net()
    optimizer = make(model, store_delta=False)
    if schedule:
        lr_scheduler.StepLR(optimizer, 1000)
    train(model, optimizer, range(20))
    with torch.no_grad():
        model.out.weight.add_(0.25)
    backward(model, 20)
    with pytest.warns(UserWarning, match="Parameters were changed between steps") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


def test_the_published_one_liner_and_options() -> None:
    model = make_net()
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    train(model, optimizer, range(3))
    optimizer = mechanize(
        torch.optim.SGD, rule="mechanic_pytorch", s_decay=0.0, betas=(0.999, 0.999999), store_delta=False
    )(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    assert float(optimizer.mechanic.scale) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_its_base(name: str) -> None:
    optimizer = make(make_net(), name)
    assert isinstance(optimizer, OPTIMIZERS[name].cls)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert is_mechanized(optimizer)
    assert not is_mechanized(OPTIMIZERS[name](make_net().parameters(), lr=0.1))
    assert type(optimizer).__name__ == f"Mechanized{OPTIMIZERS[name].cls.__name__}"
    assert "lr: 0.1" in repr(optimizer)
    assert "mechanic_" not in repr(optimizer)


@pytest.mark.parametrize("plain_first", [True, False])
def test_hooks_fire_once(plain_first: bool) -> None:
    """Also when torch has already wrapped the base's step for a plain optimizer."""

    class Fresh(torch.optim.SGD):
        pass

    model, fired = make_net(), []
    if plain_first:
        Fresh(make_net().parameters(), lr=0.1)
    optimizer = mechanize(Fresh)(model.parameters(), lr=0.1)
    if not plain_first:
        Fresh(make_net().parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: fired.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: fired.append("post"))
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: fired.append("global"))
    train(model, optimizer, range(2))
    handle.remove()
    assert fired == ["pre", "post", "global"] * 2


def test_a_slip_in_an_option_is_not_taken_for_the_default_nor_the_default_for_it() -> None:
    """As 1 equals True."""
    parameters = [nn.Parameter(torch.ones(2))]
    slips: list[dict[str, Any]] = [{"store_delta": 1}, {"internal_lr": True}, {"log_every": False}]
    right = mechanize(torch.optim.Adam)
    for slip in slips:
        with pytest.raises(TypeError, match=f"{next(iter(slip))} is"):
            mechanize(torch.optim.Adam, **slip)
    assert mechanize(torch.optim.Adam) is right
    assert is_mechanized(right(parameters, lr=1.0))


def test_hooks_before_a_load_see_the_whole_state() -> None:
    """One that goes by the names of parameters, and not by their order, as torch advises."""
    model, other = make_net(), make_net(1)
    optimizer = mechanize(torch.optim.AdamW)(model.named_parameters(), lr=1.0)
    train(model, optimizer, range(20))
    turned = list(other.named_parameters())[::-1]
    resumed = mechanize(torch.optim.AdamW)(turned, lr=1.0)
    calls = []

    def by_name(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        (group,), names = saved["param_groups"], optimizer.param_groups[0]["param_names"]
        places = dict(zip(group["param_names"], group["params"], strict=True))
        state = {i: saved["state"][places[name]] for i, name in enumerate(names)}
        calls.append(names)
        return {"state": state, "param_groups": [{**group, "params": list(state), "param_names": names}]}

    resumed.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert calls == [[name for name, _ in turned]]
    before = flat(model)
    train(model, optimizer, range(20, 60))
    train(other, resumed, range(20, 60))
    assert relative_difference(flat(model), before) > 1e-3
    assert relative_difference(flat(other), flat(model)) < 1e-9
    resumed.load_state_dict(optimizer.state_dict())
    assert len(calls) == 2  # the hook stays


def test_hooks_after_a_save_see_the_whole_state() -> None:
    """One that saves by name, and its inverse before the load."""

    def named(seed: int) -> tuple[nn.Module, Any]:
        model = make_net(seed)
        optimizer = mechanize(torch.optim.AdamW)(model.named_parameters(), lr=1.0)
        names = optimizer.param_groups[0]["param_names"]

        def renamed(state_dict: dict[str, Any], key: dict[Any, Any]) -> dict[str, Any]:
            return {**state_dict, "state": {key[i]: entries for i, entries in state_dict["state"].items()}}

        optimizer.register_state_dict_post_hook(lambda _, saved: renamed(saved, dict(enumerate(names))))
        optimizer.register_load_state_dict_pre_hook(
            lambda _, saved: renamed(saved, {name: i for i, name in enumerate(names)})
        )
        return model, optimizer

    (model, optimizer), (other, resumed) = named(0), named(1)
    train(model, optimizer, range(20))
    saved = optimizer.state_dict()
    assert all({"reference", "delta"} <= entries.keys() for entries in saved["state"].values())
    assert saved["state"].keys() == set(optimizer.param_groups[0]["param_names"])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    before = flat(model)
    train(model, optimizer, range(20, 60))
    train(other, resumed, range(20, 60))
    assert relative_difference(flat(model), before) > 1e-3
    assert torch.equal(flat(other), flat(model))
    assert optimizer.state_dict()["state"].keys() == saved["state"].keys()  # the hook stays


def test_schedulers_see_and_set_the_lr_given() -> None:
    model = make_net()
    optimizer = make(model)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert optimizer.get_last_lr() == [float(optimizer.mechanic.scale) * optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw"])
def test_copies_go_on_the_same_way(name: str, store_delta: bool, copy_of: Any) -> None:
    model = make_net()
    optimizer = make(model, name, store_delta=store_delta)
    lr_scheduler.StepLR(optimizer, 1000)  # a scheduler wraps the step of the optimizer's object
    train(model, optimizer, range(20))
    twin_model, twin = copy_of((model, optimizer))
    assert type(twin) is type(optimizer)
    start = flat(model)
    train(model, optimizer, range(20, 40))
    assert torch.equal(flat(twin_model), start)
    train(twin_model, twin, range(20, 40))
    assert relative_difference(flat(model), start) > 1e-3
    assert torch.equal(flat(twin_model), flat(model))
    p = twin_model.gain
    assert torch.equal(twin.state[p]["reference"], twin.state_dict()["state"][0]["reference"])


@pytest.mark.parametrize("copied", [False, True])
def test_its_memory_is_free_as_soon_as_it_is_dropped(copied: bool) -> None:
    model = make_net()
    optimizer = make(model)
    train(model, optimizer, range(2))
    if copied:
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
        train(model, optimizer, range(2, 4))
    slot = weakref.ref(optimizer.updater.displacement.slots[model.gain])
    gc.disable()
    try:
        del optimizer
        assert slot() is None
    finally:
        gc.enable()


def test_its_updater_is_a_part_of_it() -> None:
    model = make_net()
    optimizer = make(model)
    train(model, optimizer, range(3))
    backward(model, 3)
    optimizer.updater.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    for call in (optimizer.updater.state_dict, partial(optimizer.updater.load_state_dict, {})):
        with pytest.raises(TypeError, match="Save and load the state dict of the optimizer itself"):
            call()
    mechanic = copy.deepcopy(optimizer.mechanic)
    with pytest.raises(RuntimeError, match="that this updater is a part of is gone"):
        mechanic.step()


def test_a_subclass_stays_itself() -> None:
    twin = copy.deepcopy(Tuned([torch.ones(2, requires_grad=True)], lr=1.0))
    assert type(twin) is Tuned
    assert is_mechanized(twin)


class Tuned(mechanize(torch.optim.SGD)):
    pass


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 7])
def test_a_step_with_a_bad_gradient_might_not_have_been(name: str, at: int) -> None:
    model, twin = make_net(), make_net()
    optimizer, twin_optimizer = make(model, name), make(twin, name)
    for step in range(20):
        if step == at:
            backward(model, 999)
            assert model.gain.grad is not None
            model.gain.grad.fill_(float("nan"))
            optimizer.step()
        train(model, optimizer, range(step, step + 1))
    train(twin, twin_optimizer, range(20))
    assert relative_difference(flat(model), flat(make_net())) > 1e-4
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=200),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 10, cycle_momentum=False),
    ],
)
def test_a_scheduler_that_sets_its_own_rates(schedule: Any) -> None:
    """The rate given is overwritten after construction, and so cannot matter; the two objects take the same run."""

    def run(lr: float, two_objects: bool = False) -> torch.Tensor:
        model = make_net()
        if two_objects:
            base = torch.optim.AdamW(model.parameters(), lr=lr)
            updater = Updater(base, schedule(base))
            mechanic = Mechanic(updater, s_init=1e-3)
        else:
            optimizer = mechanize(torch.optim.AdamW, s_init=1e-3)(model.parameters(), lr=lr)
            scheduler = schedule(optimizer)
        for step in range(60):
            backward(model, step)
            if two_objects:
                mechanic.step()
                updater.step()
            else:
                optimizer.step()
                scheduler.step()
        assert relative_difference(flat(model), flat(make_net())) > 1e-3
        return flat(model)

    assert torch.equal(run(1e-8), run(1e4))
    assert torch.equal(run(1e-8), run(1.0, two_objects=True))


def test_a_base_whose_step_takes_no_closure() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] * p.grad

    model = nn.Linear(6, 1, dtype=torch.float64)
    optimizer = mechanize(Plain, s_init=1e-3)(model.parameters(), lr=1.0)
    losses = [float(optimizer.step(lambda step=step: backward(model, step))) for step in range(100)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[4:24])


def test_closure_is_evaluated_once_and_errors_leave_everything() -> None:
    model, twin = make_net(), make_net()
    optimizer, twin_optimizer = make(model), make(twin)
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        return backward(model, len(calls) - 1)

    losses = [optimizer.step(closure) for _ in range(20)]
    train(twin, twin_optimizer, range(20))
    assert len(calls) == 20
    assert float(losses[0]) > 0
    assert relative_difference(flat(model), flat(make_net())) > 1e-3
    assert torch.equal(flat(model), flat(twin))

    def broken() -> torch.Tensor:
        raise KeyError("in the closure")

    before = flat(model)
    with pytest.raises(KeyError, match="in the closure"):
        optimizer.step(broken)
    assert torch.is_grad_enabled()
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("closure", [False, True])
def test_held_out_rows(closure: bool) -> None:
    """The run of the two objects; with a closure too, whose gradients are put back."""
    model, twin = make_net(), make_net()
    optimizer = make(model)
    optimizer.mechanic.held_out = partial(backward, model, 500)
    updater = Updater(torch.optim.AdamW(twin.parameters(), lr=0.1))
    mechanic = Mechanic(updater, s_init=1e-3, steps_per_epoch=math.inf)
    for step in range(30):
        if closure:
            optimizer.step(partial(backward, model, step))
        else:
            train(model, optimizer, range(step, step + 1))
        backward(twin, 500)
        mechanic.step()
        backward(twin, step)
        mechanic.step(tune=False)
        updater.step()
    assert relative_difference(flat(model), flat(make_net())) > 1e-3
    assert torch.equal(flat(model), flat(twin))
    assert float(optimizer.mechanic.scale) == float(mechanic.scale)


def test_a_closure_costs_no_pass_over_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those that the tuner has seen, so nothing has to look whether they are finite."""
    model = make_net()
    optimizer = make(model)
    passes = []
    sums = optimizer.updater.displacement.sums
    monkeypatch.setattr(optimizer.updater.displacement, "sums", lambda *a, **k: passes.append(1) or sums(*a, **k))
    for step in range(5):
        optimizer.step(lambda step=step: backward(model, step))
    assert len(passes) == 5


def test_a_parameter_without_gradients_does_not_keep_the_step_from_being_taken_in_one_pass() -> None:
    """x_ref and Δ of the others are shown; those of a latecomer as soon as it has taken part in a step."""
    model = make_net()
    optimizer = make(model)
    train(model, optimizer, range(2))
    assert "reference" not in optimizer.state.get(model.unused, {})
    assert optimizer.updater.base_optimizer.covered_class is torch.optim.AdamW
    backward(model, 2)
    model.unused.grad = torch.ones_like(model.unused)
    optimizer.step()
    for parameter in (model.gain, model.unused):
        slot = optimizer.updater.displacement.slots[parameter]
        assert optimizer.state[parameter]["reference"].data_ptr() == slot.reference.data_ptr()


def test_lbfgs_evaluates_its_closure_again() -> None:
    model, calls = make_net(), []
    parameters = [p for p in model.parameters() if p is not model.unused]
    with pytest.warns(UserWarning, match="LBFGS, which chooses its own step lengths.*Use it alone"):
        optimizer = mechanize(torch.optim.LBFGS)(parameters, lr=1.0, max_iter=5)

    def closure() -> torch.Tensor:
        calls.append(1)
        return backward(model, 0)

    expected = float(backward(model, 0))
    assert float(optimizer.step(closure)) == expected
    assert len(calls) > 2
    assert relative_difference(flat(model), flat(make_net())) > 0


def test_add_param_group_and_missing_gradients() -> None:
    model = make_net()
    optimizer = mechanize(torch.optim.AdamW, s_init=1e-3)(model.hidden.parameters(), lr=0.1)
    train(model, optimizer, range(20))
    optimizer.add_param_group({"params": [*model.out.parameters(), model.unused], "lr": 0.05})
    before = model.out.weight.detach().clone()
    train(model, optimizer, range(20, 60))
    assert relative_difference(model.out.weight.detach(), before) > 1e-2
    assert torch.equal(model.unused, torch.ones(3))
    state = optimizer.state_dict()
    assert [len(group["params"]) for group in state["param_groups"]] == [2, 3]
    assert {"reference", "delta", "exp_avg", "exp_avg_sq", "step"} == set(state["state"][0])
    assert state["state"][2]["delta"].shape == model.out.weight.shape


def test_a_parameter_that_takes_the_place_of_another() -> None:
    """As where a model is pruned: the new one has a state of its own, and nothing is kept of the old."""
    weight = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 30))
    optimizer = mechanize(torch.optim.Adam)([weight], lr=0.1)
    for step in range(30):
        optimizer.zero_grad()
        (weight - 1).square().sum().backward()
        optimizer.step()
        if step % 10 == 9:
            state, old, weight = optimizer.state.pop(weight), weight, torch.nn.Parameter(weight.detach()[1:].clone())
            moments = {name: state[name][1:] for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": state["step"], **moments}
            optimizer.param_groups[0]["params"][0] = weight
    (weight - 1).square().sum().backward()
    optimizer.step()
    assert list(optimizer.updater.displacement.slots) == list(optimizer.state) == [weight]
    assert old.shape == (28,)
    assert optimizer.state[weight]["reference"].shape == optimizer.state_dict()["state"][0]["delta"].shape == (27,)


def test_a_logger_without_a_hash() -> None:
    rows: list[dict[str, Any]] = []

    class Logger:
        __hash__ = None  # as of a dataclass

        def __call__(self, row: dict[str, Any]) -> None:
            rows.append(row)

    model = make_net()
    optimizer = mechanize(torch.optim.SGD, log_func=Logger())(model.parameters(), lr=1.0)
    backward(model, 0)
    optimizer.step()
    assert len(rows) == 1


def test_live_state_is_in_torchs_layout() -> None:
    model = make_net()
    optimizer = make(model)
    train(model, optimizer, range(20))
    state = optimizer.state[model.out.weight]
    internal = optimizer.mechanic.scale * 0.1  # the scale of a base that steps at lr 1
    assert torch.allclose(model.out.weight, state["reference"] + RESCALED * state["delta"] * internal, rtol=1e-12)
    assert float(state["delta"].norm()) > 0


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad"])
def test_distributed_checkpoint_state_dicts(name: str, flatten: bool) -> None:
    """By parameter name, and taking one changes nothing, not even for an optimizer without a state of its own."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_net()
    model.unused.requires_grad_(False)
    optimizer = make(model, name)
    train(model, optimizer, range(20))
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    state = get_optimizer_state_dict(model, optimizer, options=options)
    after = optimizer.state_dict()
    assert torch.equal(after["param_groups"][0]["mechanic_tuner"], before["param_groups"][0]["mechanic_tuner"])
    name_of_delta = "state.out.weight.delta" if flatten else "out.weight"
    assert name_of_delta in (state if flatten else state["state"])

    twin = make_net(3)
    twin.unused.requires_grad_(False)
    twin_optimizer = make(twin, name)
    set_optimizer_state_dict(twin, twin_optimizer, copy.deepcopy(state), options=options)
    twin.load_state_dict(model.state_dict())
    start = flat(model)
    for net, one in ((model, optimizer), (twin, twin_optimizer)):
        train(net, one, range(20, 40))
    assert relative_difference(flat(model), start) > 1e-3
    assert torch.equal(flat(twin), flat(model))


@pytest.mark.parametrize("form", ["drop-in", "two objects"])
def test_grad_scaler_skips_whole_steps(form: str) -> None:
    """Injected infs, in float32 with a loss scale: the run is that of the finite steps alone."""

    def run(bad: set[int]) -> torch.Tensor:
        model = make_net(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, backoff_factor=0.999999)
        if form == "drop-in":
            mechanic, target = None, make(model)
        else:
            target = Updater(torch.optim.AdamW(model.parameters(), lr=0.1))
            mechanic = Mechanic(target, s_init=1e-3)
        finite = 0
        for step in range(30 + len(bad)):
            model.zero_grad()
            scaler.scale(loss_of(model, finite, torch.float32)).backward()
            if step in bad:
                assert model.gain.grad is not None
                model.gain.grad.fill_(float("inf"))
            finite += step not in bad
            scaler.unscale_(target)
            if mechanic is not None:
                mechanic.step()
            scaler.step(target)
            scaler.update()
        assert finite == 30
        return flat(model)

    with_bad, without = run({0, 1, 9, 20}), run(set())
    assert relative_difference(without, flat(make_net(dtype=torch.float32))) > 1e-3
    assert relative_difference(with_bad, without) < 1e-3
