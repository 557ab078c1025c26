"""Groups with rates of their own, frozen and unfrozen layers, and adapters: what a fine-tune does."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Oracle
from problems import assert_same_bits, backward, fit, make_net, relative_difference
from torch import Tensor, nn
from torch.optim import lr_scheduler

from manic import Mechanic, Updater, mechanize
from manic.tuner import RESCALED

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda optimizer: None,
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 200),
    "long cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 700),
    "warmup": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10),
}


def steps(
    form: str, groups: Any, schedule: str = "constant"
) -> tuple[Callable[[], None], Updater, torch.optim.Optimizer]:
    """What to call after a backward pass, the updater and the optimizer."""
    if form == "drop-in":
        optimizer = mechanize(torch.optim.AdamW)(groups, lr=1.0)
        scheduler = SCHEDULES[schedule](optimizer)

        def step() -> None:
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

        return step, optimizer.updater, optimizer
    base = torch.optim.AdamW(groups, lr=1.0)
    updater = Updater(base, SCHEDULES[schedule](base))
    mechanic = Mechanic(updater)
    return lambda: (mechanic.step(), updater.step())[0], updater, base


@pytest.mark.parametrize("form", ["two objects", "drop-in"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_ratios_between_groups_are_kept(form: str, schedule: str) -> None:
    model = make_net()
    groups = [
        {"params": model.hidden.parameters(), "lr": 0.25},
        {"params": model.out.parameters(), "lr": 16.0},
        {"params": [model.gain], "lr": 1.0},
    ]
    step, updater, _ = steps(form, groups, schedule)
    rates = []
    for i in range(100):
        backward(model, i)
        step()
        rates.append(updater.get_last_lr())
    assert len({rate[0] for rate in rates}) > 90
    for low, high, middle in rates:
        assert high == pytest.approx(64 * low, rel=1e-12)
        assert middle == pytest.approx(4 * low, rel=1e-12)


def test_a_group_moves_in_proportion_to_its_rate() -> None:
    """Under SGD Δ is linear in lr: twins with the same gradients, one of them at 16 times the rate."""
    weights = [nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64)) for _ in range(2)]
    start = weights[0].detach().clone()
    groups = [{"params": [weights[0]], "lr": 1e-9}, {"params": [weights[1]], "lr": 16e-9}]
    updater = Updater(torch.optim.SGD(groups))
    mechanic = Mechanic(updater)
    for i in range(60):
        gradient = weights[0].detach() - (i % 3)
        for weight in weights:
            weight.grad = gradient.clone()
        mechanic.step()
        updater.step()
        slow, fast = (weight.detach() - start for weight in weights)
        torch.testing.assert_close(fast, 16 * slow, rtol=1e-9, atol=1e-13)
    assert float(slow.abs().max()) > 1e-3


@pytest.mark.parametrize("form", ["two objects", "drop-in"])
@pytest.mark.parametrize("layers_join", ["requires_grad", "add_param_group"])
def test_layers_unfrozen_one_by_one(form: str, layers_join: str) -> None:
    """Each takes its reference in the step in which it joins, also if its values have changed since the start.

    Half of its first update is in the reference then, and half in the displacement.
    """
    model = make_net()
    layers: dict[str, Any] = {"hidden": model.hidden, "out": model.out, "gain": model.gain}
    joins = {"hidden": 0, "out": 40, "gain": 70}
    named = {name: [part] if isinstance(part, Tensor) else list(part.parameters()) for name, part in layers.items()}
    for name in ("out", "gain"):
        layers[name].requires_grad_(False)
    first = list(model.parameters()) if layers_join == "requires_grad" else named["hidden"]
    step, updater, optimizer = steps(form, [{"params": first}])
    references: dict[str, list[Tensor]] = {}
    for i in range(160):
        if i == 30:  # while it is frozen
            with torch.no_grad():
                model.out.weight.mul_(0.5)
        for name, at in joins.items():
            if i != at:
                continue
            references[name] = [p.detach().clone() for p in named[name]]
            layers[name].requires_grad_(True)
            if layers_join == "add_param_group" and name != "hidden":
                optimizer.add_param_group({"params": named[name]})
        frozen = {name: [p.detach().clone() for p in named[name]] for name, at in joins.items() if i < at}
        backward(model, i)
        step()
        for name, before in frozen.items():
            assert all(torch.equal(p, old) for p, old in zip(named[name], before, strict=True))
            assert not any(p in updater.displacement.slots for p in named[name])  # no memory for what is frozen
        for name, at in joins.items():
            if i == at > 0:  # after the first step of all the displacement restarts
                for p, old in zip(named[name], references[name], strict=True):
                    reference = updater.displacement.slots[p].tensors()["reference"]
                    assert not torch.equal(p, old)
                    assert torch.allclose(reference, old + (1 - RESCALED) * (p - old), rtol=1e-12)
    for name, before in references.items():
        for p, old in zip(named[name], before, strict=True):
            assert not torch.equal(p.detach(), old)
    assert relative_difference(model.out.weight.detach(), references["out"][0]) > 1e-3


def shaken(parameters: list[nn.Parameter], step: int) -> None:
    """Gradients of a bowl, its middle at ones, with noise that leaves the tuner in doubt."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        noise = 0.3 * torch.randn(len(parameter), generator=generator, dtype=torch.float64)
        steep = torch.linspace(0.1, 1, len(parameter), dtype=torch.float64)
        gradient = (steep * (parameter.detach() - 1) + noise).to(parameter)
        parameter.grad = gradient if parameter.requires_grad else None


def zeros(*counts: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(count, dtype=torch.float64)) for count in counts]


@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("at", [2, 100, 310])
def test_where_many_join_the_scale_falls_and_is_learned_again(at: int, schedule: str, store_delta: bool) -> None:
    """As in an oracle in plain floats."""

    def bowls() -> tuple[list[nn.Parameter], torch.optim.Optimizer, Any]:
        head, body = zeros(4, 12)
        base = torch.optim.SGD([head, body.requires_grad_(False)], lr=1.0, momentum=0.9)
        return [head, body], base, SCHEDULES[schedule](base)

    ours, base, scheduler = bowls()
    updater = Updater(base, scheduler, store_delta=store_delta)
    mechanic = Mechanic(updater)
    plain, other, other_schedule = bowls()
    oracle = Oracle([0.0] * 4, "manic", lam=0.0, s_init=None, eps=0.0)
    scales = []
    for step in range(at + 400):
        if step == at:
            made_up = float(mechanic.state_dict()["tuner"]["premium"][0])
            assert (made_up > 1.1) == (at == 310 and schedule == "long cosine")
            ours[1].requires_grad_(True)
            plain[1].requires_grad_(True)
            oracle.join(12, other.param_groups[0]["lr"])
        shaken(ours, step)
        mechanic.step()
        updater.step()
        scales.append(float(mechanic.scale))

        shaken(plain, step)
        taking = [p for p in plain if p.requires_grad]
        x, g = torch.cat(taking).detach(), torch.cat([p.grad for p in taking if p.grad is not None])
        factor = other.param_groups[0]["lr"]
        other.step()
        u = torch.cat(taking).detach() - x
        moved = oracle.step(x.tolist(), g.tolist(), u.tolist(), factor)
        with torch.no_grad():
            nn.utils.vector_to_parameters(torch.tensor(moved, dtype=torch.float64), taking)
        if other_schedule is not None:
            other_schedule.step()
        assert scales[-1] == pytest.approx(sum(oracle.s), rel=1e-6)
    assert relative_difference(torch.cat(ours).detach(), torch.cat(plain).detach()) < 1e-7
    assert float(ours[1].detach().min()) > 0.3
    assert mechanic.learning_steps == at + 108
    learned = [after / before - 1 for before, after in zip(scales[at:], scales[at + 1 : at + 108], strict=False)]
    assert min(learned) < -0.01
    assert max(learned) > 0.01


@pytest.mark.parametrize("form", ["two objects", "drop-in"])
def test_a_resumed_run_goes_on_learning(form: str) -> None:
    def run(start: int, stop: int, state: dict[str, Any] | None = None) -> tuple[dict[str, Any], int]:
        head, body = zeros(4, 12)
        if form == "drop-in":
            optimizer = mechanize(torch.optim.AdamW)([head, body], lr=1.0)
            parts, mechanic, step = {"optimizer": optimizer}, optimizer.mechanic, optimizer.step
        else:
            updater = Updater(torch.optim.AdamW([head, body], lr=1.0))
            mechanic = Mechanic(updater)
            parts = {"updater": updater, "mechanic": mechanic}
            step = lambda: (mechanic.step(), updater.step())  # noqa: E731
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            with torch.no_grad():
                head.copy_(state["head"])
                body.copy_(state["body"])
        for i in range(start, stop):
            body.requires_grad_(i >= 200)
            shaken([head, body], i)
            step()
        weights = {"head": head.detach(), "body": body.detach()}
        return {name: part.state_dict() for name, part in parts.items()} | weights, mechanic.learning_steps

    whole, learned = run(0, 500)
    assert learned == 308
    assert float(whole["body"].min()) > 0.3
    for at in (200, 300):
        resumed, still_learned = run(at, 500, run(0, at)[0])
        assert still_learned == 308
        for name in ("head", "body"):
            assert torch.equal(whole[name], resumed[name])


def learned_to(
    counts: list[int],
    takes_part: Callable[[int], list[bool]],
    rates: list[float] | None = None,
    before: Callable[[Updater, Mechanic, list[nn.Parameter], int], None] | None = None,
    **options: Any,
) -> tuple[int, list[float]]:
    """The last step that the scale is learned in, and the scales, of a run of 300 steps."""
    parameters = zeros(*counts)
    groups = [{"params": [x], "lr": rate} for x, rate in zip(parameters, rates or [1.0] * len(counts), strict=True)]
    group = options.pop("process_group", None)
    updater = Updater(torch.optim.AdamW(groups), process_group=group)
    mechanic = Mechanic(updater, **options)
    scales = []
    for step in range(300):
        for x, trains in zip(parameters, takes_part(step), strict=True):
            x.requires_grad_(trains)
        shaken(parameters, step)
        if before is not None:
            before(updater, mechanic, parameters, step)
        mechanic.step()
        updater.step()
        scales.append(float(mechanic.scale))
    return mechanic.learning_steps, scales


def test_a_quarter_are_many() -> None:
    assert learned_to([9, 3], lambda step: [True, step >= 260])[0] == 108 + 260
    assert learned_to([10, 3], lambda step: [True, step >= 260])[0] == 108


def test_those_that_do_not_take_part_do_not_count() -> None:
    """A body that is frozen when a new head comes; a body that is back, which the scale was learned of."""
    learned, scales = learned_to([100, 10], lambda step: [step < 260, step >= 260])
    assert learned == 108 + 260
    assert scales[260] == pytest.approx(scales[259], rel=1e-6)
    assert learned_to([10, 100], lambda step: [True, not 200 <= step < 260])[0] == 108


def test_nor_do_those_that_left_before_they_were_counted() -> None:
    def leaves(updater: Updater, mechanic: Mechanic, parameters: list[nn.Parameter], step: int) -> None:
        if step == 260:
            updater.rebase()
            del updater.param_groups[1]

    assert learned_to([4, 12], lambda step: [True, step >= 260], before=leaves)[0] == 108


def test_a_slow_group_counts_as_its_steps_do() -> None:
    """Those of a hundred elements at a tenth of the rate are as long as those of one."""
    assert learned_to([9, 200], lambda step: [True, step >= 260], rates=[1.0, 0.1])[0] == 108
    learned, scales = learned_to([9, 300], lambda step: [True, step >= 260], rates=[1.0, 0.1])
    assert learned == 108 + 260
    assert scales[260] / scales[259] == pytest.approx((9 / 12) ** 0.5, rel=1e-6)


def test_they_are_seen_whoever_looks_first() -> None:
    def rebase(updater: Updater, mechanic: Mechanic, parameters: list[nn.Parameter], step: int) -> None:
        if step == 260:
            updater.rebase()

    def other_rows(updater: Updater, mechanic: Mechanic, parameters: list[nn.Parameter], step: int) -> None:
        mechanic.step(tune=False)
        assert mechanic.learning_steps == (108 if step < 260 else 368)

    def resumed(updater: Updater, mechanic: Mechanic, parameters: list[nn.Parameter], step: int) -> None:
        rebase(updater, mechanic, parameters, step)
        for part in (updater, mechanic):
            part.load_state_dict(copy.deepcopy(part.state_dict()))

    def not_finite(updater: Updater, mechanic: Mechanic, parameters: list[nn.Parameter], step: int) -> None:
        gradient = parameters[1].grad
        if step == 260 and gradient is not None:
            updater.nonfinite = "raise"
            states = [copy.deepcopy(part.state_dict()) for part in (updater, mechanic)]
            parameters[1].grad = gradient * torch.nan
            with pytest.raises(FloatingPointError, match="Nothing was changed"):
                mechanic.step()
            assert_same_bits([updater.state_dict(), mechanic.state_dict()], states)
            parameters[1].grad = gradient

    def refused(updater: Updater, mechanic: Mechanic, parameters: list[nn.Parameter], step: int) -> None:
        gradient = parameters[1].grad
        if step == 260 and gradient is not None:
            parameters[1].grad = gradient.to_sparse()
            with pytest.raises(ValueError, match="expected a dense one"):
                mechanic.step()
            parameters[1].grad = gradient

    for before in (rebase, other_rows, resumed, refused, not_finite):
        learned, scales = learned_to([4, 12], lambda step: [True, step >= 260], before=before)
        assert learned == 108 + 260
        assert scales[260] == pytest.approx(scales[259] / 2, rel=1e-6)


def test_they_are_seen_between_the_rows_that_are_learned_from_and_those_that_are_not() -> None:
    def unfreeze(updater: Updater, mechanic: Mechanic, parameters: list[nn.Parameter], step: int) -> None:
        mechanic.step()
        if step == 260:
            parameters[1].requires_grad_(True)
            shaken(parameters, step)
        mechanic.step(tune=False)

    learned, scales = learned_to([4, 12], lambda step: [True, step > 260], before=unfreeze)
    assert learned == 108 + 260
    assert scales[260] == pytest.approx(scales[259] / 2, rel=0.1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tune", [True, False])
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_step_in_which_many_join_is_skipped_if_it_is_not_finite(store_delta: bool, tune: bool, bad: float) -> None:
    """Δ is 0 from there on, whatever the gradient is."""
    parameters = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(12), requires_grad=False)]
    updater = Updater(torch.optim.AdamW(parameters, lr=1.0), store_delta=store_delta)
    mechanic = Mechanic(updater)
    for step in range(40):
        parameters[1].requires_grad_(step >= 20)
        for parameter in parameters:
            parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
        if step == 20:
            parameters[1].grad = torch.full((12,), bad)
        before = [parameter.detach().clone() for parameter in parameters]
        mechanic.step(tune=tune or step != 20)
        updater.step()
        moved = [not torch.equal(*pair) for pair in zip(parameters, before, strict=True)]
        assert moved == ([True, False] if step < 20 else [step > 20] * 2)


def test_steps_that_were_skipped_do_not_count() -> None:
    def spoil(updater: Updater, mechanic: Mechanic, parameters: list[nn.Parameter], step: int) -> None:
        if step in (100, 260):
            assert parameters[0].grad is not None
            parameters[0].grad[0] = torch.nan

    learned, scales = learned_to([4, 12], lambda step: [True, step >= 260], before=spoil)
    assert learned == 108 + 259
    assert scales[261] < 0.8 * scales[259]


def test_not_under_a_published_rule_and_not_where_ranks_do_not_know() -> None:
    assert learned_to([4, 12], lambda step: [True, step >= 260], rule="mechanic_pytorch")[0] == sys.maxsize
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert learned_to([4, 12], lambda step: [True, step >= 260], process_group=group)[0] == 108
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form", ["two objects", "drop-in"])
@pytest.mark.parametrize("fate", ["stays", "deepcopy", "pickle", "loaded"])
def test_groups_that_change_places_or_leave_keep_their_nominal_rates(form: str, fate: str) -> None:
    def build() -> tuple[Any, ...]:
        model = make_net()
        parts = {"hidden": model.hidden.parameters(), "out": model.out.parameters(), "gain": [model.gain]}
        groups = [
            {"params": list(parts[name]), "lr": rate} for name, rate in zip(parts, (0.25, 16.0, 1.0), strict=True)
        ]
        optimizer = (mechanize(torch.optim.AdamW) if form == "drop-in" else torch.optim.AdamW)(groups, lr=1.0)
        updater = optimizer.updater if form == "drop-in" else Updater(optimizer)
        return model, optimizer, updater, updater if form == "drop-in" else Mechanic(updater)

    def step(run: tuple[Any, ...], i: int) -> None:
        model, optimizer, updater, mechanic = run
        backward(model, i)
        if form == "drop-in":
            optimizer.step()
        else:
            mechanic.step()
            updater.step()

    run = build()
    for i in range(3):
        step(run, i)
    if fate == "loaded":
        fresh, saved = build(), slice(1, 2) if form == "drop-in" else slice(2, 4)
        for mine, theirs in zip(fresh[saved], run[saved], strict=True):
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        run = fresh
    elif fate != "stays":
        run = copy.deepcopy(run) if fate == "deepcopy" else pickle.loads(pickle.dumps(run))
    model, optimizer, updater, _ = run
    for group in optimizer.param_groups:
        group["lr"] /= 2
    optimizer.add_param_group({"params": [model.unused], "lr": 3.0})
    optimizer.param_groups.reverse()
    step(run, 3)
    assert updater._nominal.of(updater.param_groups) == [3.0, 1.0, 16.0, 0.25]
    for i in range(4, 6):
        optimizer.param_groups.pop(0)
        step(run, i)
        assert float(updater._factor) == 0.5


class LoRA(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, layer.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(layer.out_features, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


def test_adapters_that_start_at_zero_train_and_the_rest_stays() -> None:
    """On a layer that has to change by a matrix of the adapter's rank."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 8).double()
    weight, x = layer.weight.detach().clone(), torch.randn(64, 6, dtype=torch.float64)
    y = x @ (weight + (torch.randn(8, 2) @ torch.randn(2, 6)).double()).T + layer.bias.detach()
    model = LoRA(layer)
    groups = [{"params": [model.a], "lr": 1.0}, {"params": [model.b], "lr": 16.0}]
    updater = Updater(torch.optim.AdamW(groups))
    losses = fit(model, updater, Mechanic(updater), x, y, 600)
    assert losses[-1] < 0.1 * losses[0]
    slow, fast = updater.get_last_lr()
    assert fast == pytest.approx(16 * slow, rel=1e-12)
    assert torch.equal(layer.weight, weight)
    assert not any(p in updater.displacement.slots for p in layer.parameters())
