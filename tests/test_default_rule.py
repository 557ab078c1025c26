"""What the default rule does that the published ones do not: its start, and a reference point that moves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest
import torch
from problems import OPTIMIZERS, Calls, backward, fit, flat, loss_of, make_net, relative_difference
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR

from manic import Mechanic, Updater, tuner
from manic.functional import SGDConfig, mechanize, sgd_init, sgd_step
from manic.tuner import LEAST_SIZE, SHARE, STAKE, TRIPLES

FIRST = SHARE * TRIPLES
T = 108  # the last step that the scale is learned in


def moved(model: torch.nn.Module, start: torch.Tensor) -> float:
    """How far the parameters that have a gradient are from where they were, as a share of their norm."""
    sizes = [(p.numel(), p.grad is not None) for p in model.parameters()]
    reached = torch.cat([torch.full((count,), has) for count, has in sizes])
    return relative_difference(flat(model)[reached], start[reached])


@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("lr", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion"])
def test_the_first_update_moves_the_parameters_by_a_share_of_their_norm(
    optimizer: str, lr: float, store_delta: bool
) -> None:
    model = make_net()
    start = flat(model)
    updater = Updater(OPTIMIZERS[optimizer](model.parameters(), lr=lr), store_delta=store_delta)
    mechanic = Mechanic(updater)
    backward(model, 0)
    mechanic.step()
    updater.step()
    assert moved(model, start) == pytest.approx(FIRST, rel=1e-6)
    assert updater.get_last_lr()[0] == pytest.approx(float(mechanic.scale) * lr)


def test_until_the_first_bet_steps_get_three_times_as_long() -> None:
    """Up to κ s_init, and no further if there is none."""
    config, sizes = tuner.TunerConfig(), [torch.tensor(size) for size in (1.0, 2.0, 1.0, 4)]
    state, betas, found = tuner.init(config), torch.tensor(config.betas, dtype=torch.float64), []
    for _ in range(5):
        state = tuner.begin(tuner.update(state, torch.tensor(0.0), betas, config), *sizes, config)
        found.append(float(state.scales.sum()))
    assert found == pytest.approx([2 * SHARE * growth for growth in (3, STAKE, STAKE, STAKE, STAKE)])

    model = make_net()
    updater = Updater(OPTIMIZERS["lion"](model.parameters(), lr=1.0))  # all updates are of the same length
    mechanic, found = Mechanic(updater), []
    for step in range(4):
        backward(model, step)
        mechanic.step()
        updater.step()
        found.append(float(mechanic.scale))
    assert found[:3] == pytest.approx([found[0], 3 * found[0], 3 * found[0]], rel=0.02)
    assert abs(math.log(found[3] / found[2])) == pytest.approx(1, rel=0.02)  # h_4, and its standard score


@pytest.mark.parametrize("options", [{}, {"store_delta": False}, {"cpu_offload": True}], ids=str)
def test_the_longest_of_the_first_eight_updates_counts(options: dict[str, bool]) -> None:
    """And s falls with s_init, but for what h says."""
    lengths = [1.0, 0.5, 4.0, 4.0, 2.0, 8.0, 8.0, 16.0, 32.0, 64.0]
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    updater = Updater(torch.optim.SGD([weight], lr=1.0), **options)
    mechanic, found = Mechanic(updater), []
    for length in lengths:
        weight.grad = torch.tensor([0.0, length], dtype=torch.float64)
        norm = float(weight.detach()[1].abs())
        mechanic.step()
        updater.step()
        state = mechanic.state_dict()["tuner"]
        r, v, start = (float(state[name]) for name in ("reward", "sum_squares", "start"))
        found.append(start / (SHARE * norm))
        if v:
            z = r / math.sqrt(v)
            assert float(mechanic.scale) == pytest.approx(start * STAKE * math.exp(z if z < 3 else z**2 / 3))
    expected = [1 / max(lengths[: min(step, 8)]) for step in range(1, 11)]
    assert found == pytest.approx(expected, rel=0.5)
    assert found[9] < 1.2 * found[7]


@pytest.mark.parametrize("gentle", [True, False])
def test_so_a_net_survives_that_a_long_first_step_ruins(gentle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of its norm is that of gains, and most of its gradient that of the last layer."""
    if not gentle:
        for name, value in (("TRIPLES", 30), ("STAKE", 30), ("WATCHED", 0)):
            monkeypatch.setattr(tuner, name, value)
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x.prod(1, keepdim=True).tanh()
    layers: list[torch.nn.Module] = []
    for width in (8, 128, 128, 128):
        layers += [torch.nn.Linear(width, 128, bias=False), torch.nn.BatchNorm1d(128), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(128, 1))
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9))
    losses = fit(model, updater, Mechanic(updater), x, y, 60)
    if gentle:
        assert max(losses) < 30 * losses[0]
        assert losses[-1] < 0.1 * losses[0]
    else:
        assert not math.isfinite(losses[-1])


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *product(["rows", "unused", "rate of 0", "hidden"], ["two objects", "offloaded", "without Δ"]),
        *product(["rows", "hidden"], ["functional"]),  # where every tensor has a gradient, and the same rate
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_has_no_gradient_or_does_not_move_says_nothing_of_the_first_scale(
    kind: str, weight_decay: float, form: str
) -> None:
    """But for a tensor that has no gradient yet, as behind a last layer of zeros."""
    mine, other = torch.tensor([3.0, -4.0]), torch.full((500,), 10.0)
    table = torch.cat([mine, other]).view(-1, 2)
    x = [table] if kind == "rows" else [mine, other]
    gradients = [torch.tensor([1.0, -2.0]), torch.full_like(other, kind == "rate of 0")]
    gradients = [torch.cat(gradients).view(-1, 2)] if kind == "rows" else gradients
    update = gradients[0].view(-1)[:2] + weight_decay * mine
    size, step = mine.norm(), update.norm()
    if kind == "hidden":
        size, step = torch.cat(x).norm(), torch.cat([update, weight_decay * other]).norm()

    if form == "functional":
        config = SGDConfig(lr=1.0, weight_decay=weight_decay)
        init, take = mechanize(sgd_step)
        state = take(x, gradients, init(x, sgd_init(x, config), config), config)[1]
        start = state.tuner.start.sum()
    else:
        parameters = [torch.nn.Parameter(tensor) for tensor in x]
        groups = [{"params": [parameter]} for parameter in parameters]
        groups[-1]["lr"] = 0.0 if kind == "rate of 0" else 1.0
        base = torch.optim.SGD(groups, lr=1.0, weight_decay=weight_decay)
        updater = Updater(base, store_delta=form != "without Δ", cpu_offload=form == "offloaded")
        mechanic = Mechanic(updater)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if kind == "unused":
            parameters[-1].grad = None
        mechanic.step()
        updater.step()
        start = mechanic.state_dict()["tuner"]["start"].sum()
    assert float(start) == pytest.approx(SHARE * float(size / step), rel=1e-6)


def test_so_a_large_embedding_does_not_ruin_a_net_under_sgd() -> None:
    """As torch starts it, it has nearly all of the norm, and a batch of 64 reaches few of its rows."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(10_000, 32)
    model = torch.nn.Sequential(table, torch.nn.Flatten(), torch.nn.Linear(128, 64), torch.nn.ReLU())
    model.append(torch.nn.Linear(64, 1))
    words = (10_000 * torch.rand(64, 4) ** 3).long()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9))
    losses = fit(model, updater, Mechanic(updater), words, (words[:, :1] % 2).float(), 100)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("options", [{}, {"store_delta": False}, {"cpu_offload": True}], ids=str)
@pytest.mark.parametrize("unit", [1e-4, 1.0])
def test_no_first_step_is_longer_than_what_it_moves(
    unit: float, options: dict[str, bool], watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAdam's first five updates are as long as gradients, and so as the unit of the loss is; later ones are not."""
    if not watched:
        monkeypatch.setattr(tuner, "WATCHED", 0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 4
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    updater = Updater(torch.optim.RAdam(model.parameters(), lr=1.0), **options)
    mechanic, moves, losses = Mechanic(updater), [], []
    for _ in range(300):
        before = flat(model)
        updater.zero_grad()
        loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
        (unit * loss).backward()
        mechanic.step()
        updater.step()
        moves.append(relative_difference(flat(model), before))
        losses.append(float(loss.detach()))
    if watched or unit == 1:
        assert max(moves) < 1
        assert losses[-1] < 0.1 * losses[0]
    else:
        assert max(moves[:8]) > 10


def test_weights_of_zero_start_too() -> None:
    weight = torch.zeros(100, dtype=torch.float64, requires_grad=True)
    updater = Updater(torch.optim.SGD([weight], lr=1.0))
    mechanic = Mechanic(updater)
    (weight - 1).square().sum().backward()
    mechanic.step()
    updater.step()
    assert float(weight.detach().norm()) == pytest.approx(FIRST * LEAST_SIZE * 10)
    for _ in range(200):
        updater.zero_grad()
        (weight - 1).square().sum().backward()
        mechanic.step()
        updater.step()
    assert float((weight.detach() - 1).abs().max()) < 0.05


@pytest.mark.parametrize("first", [0.0, 0.1, 0.5])
def test_a_warmup_moves_less(first: float) -> None:
    """Its factor is no sign of a small update, and a factor of 0 none of a first one."""
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=3.0)
    factors = [first, 0.5, 0.75, 1.0]
    updater = Updater(base, LambdaLR(base, lambda step: factors[min(step, 3)]))
    mechanic = Mechanic(updater)
    for step in range(2):
        before = flat(model)
        backward(model, step)
        mechanic.step()
        updater.step()
        if first == 0 and step == 0:
            assert torch.equal(flat(model), before)
            continue
        assert moved(model, before) == pytest.approx(FIRST * factors[step], rel=1e-6)
        break


@pytest.mark.parametrize("made_up_for", [False, True])
@pytest.mark.parametrize(("steps", "ceiling"), [(30, 81), (200, 200)])
def test_a_warmup_stays_one(steps: int, ceiling: float, made_up_for: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bets that are won at low rates do not make up for them, and what they earned is gone when it is over."""
    if made_up_for:
        monkeypatch.setattr(tuner, "WARMUP", 1e9)
    found = scales_of(steps + 1, lambda _: -1.0, lambda step: min(1.0, step / steps))
    highest, after = max(found[: steps - 1]), found[-1]
    assert (highest <= ceiling * (1 + 1e-9)) != made_up_for
    assert highest > 0.99 * ceiling
    assert after < 3 * highest


def steep(step: int) -> float:
    """A thousand times as high after 100 steps, and so on."""
    return 1 + 999 * (1 - abs(step % 200 - 100) / 100)


def train_on_all_rows(
    make: Callable[[torch.nn.Module], Updater], seed: int, steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Of a small net that reads all rows in each batch: how far each step moves it, its losses and its scales."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    x = torch.randn(256, 4)
    updater = make(model)
    mechanic = Mechanic(updater)
    moves, losses, scales = [], [], []
    for _ in range(steps):
        before = flat(model)
        updater.zero_grad()
        loss = (model(x) - x.prod(1, keepdim=True)).square().mean()
        loss.backward()
        mechanic.step()
        updater.step()
        moves.append(relative_difference(flat(model), before))
        losses.append(float(loss.detach()))
        scales.append(float(mechanic.scale))
    return moves, losses, scales


@pytest.mark.parametrize("kind", ["rises", "starts high", "left by another schedule"])
def test_nor_does_a_factor_above_one_move_more(kind: str) -> None:
    """A schedule that rises above its start, as a cyclic one, is no warmup."""

    def make(model: torch.nn.Module) -> Updater:
        base = torch.optim.SGD(model.parameters(), lr=1e-4 if kind == "left by another schedule" else 1.0)
        factors = {"rises": steep, "starts high": lambda step: 100.0 if step < 3 else 1.0}
        schedule = LambdaLR(base, factors.get(kind, lambda step: 1.0))
        if kind == "left by another schedule":
            base.param_groups[0]["lr"] = 1.0
            schedule = None
        return Updater(base, schedule)

    moves, losses, _ = train_on_all_rows(make, seed=0, steps=400)
    assert moves[0] == pytest.approx(FIRST, rel=1e-5)
    assert max(moves[:10]) < 1.5 * math.e * STAKE * SHARE
    assert sorted(losses[-100:])[50] < 0.5 * losses[0]
    assert losses[-1] < 10 * losses[0]  # with all rows in each batch, losses go on having peaks


def test_before_the_search_is_over_the_scale_falls_as_the_schedule_rises_above_one() -> None:
    """And not while it rises to one, nor is a low rate that stays a warmup."""
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    def jump(step: int) -> float:
        return 0.5 if step <= 50 else 1.0 if step <= 100 else 10.0

    constant, rising = (scales_of(200, lambda step: noise[step - 1] - 1, factor) for factor in (lambda _: 1.0, jump))
    assert max(constant[:50]) > tuner.WARMUP
    assert rising[:100] == constant[:100]
    assert rising[100:] == pytest.approx([scale / 10 for scale in constant[100:]])


def test_the_start_is_at_the_first_step_that_moves_something() -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(base, LambdaLR(base, lambda step: float(step >= 5)))
    mechanic = Mechanic(updater)
    start = flat(model)
    for step in range(6):
        assert torch.equal(flat(model), start)
        backward(model, step)
        mechanic.step()
        updater.step()
    assert moved(model, start) == pytest.approx(FIRST, rel=1e-6)


@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("zeros", [1, 5])
def test_weight_decay_alone_starts_nothing(zeros: int, store_delta: bool) -> None:
    """The rate at which it would move the weights by a share of their norm is far too high for gradients."""
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=1e-4)
    updater = Updater(base, store_delta=store_delta)
    mechanic = Mechanic(updater)
    start = flat(model)
    for step in range(zeros):
        model.zero_grad()
        (0 * loss_of(model, step)).backward()
        mechanic.step()
        updater.step()
        assert torch.equal(flat(model), start)
    backward(model, zeros)
    mechanic.step()
    updater.step()
    assert moved(model, start) == pytest.approx(FIRST, rel=1e-2)


def test_a_schedule_is_known_by_its_rates() -> None:
    """OneCycleLR starts at a share of its highest rate, and notes that share as the initial one."""
    models = make_net(), make_net()
    bases = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    schedule = OneCycleLR(bases[0], 0.7, 300, cycle_momentum=False)
    rates = [0.7 / 25]
    bases[1].param_groups[0]["lr"] = 0.7
    updaters = [Updater(bases[0], schedule), Updater(bases[1], LambdaLR(bases[1], lambda step: rates[step] / 0.7))]
    mechanics = [Mechanic(updater) for updater in updaters]
    start = flat(models[0])
    for step in range(299):
        for model, mechanic, updater in zip(models, mechanics, updaters, strict=True):
            backward(model, step)
            mechanic.step()
            updater.step()
            if updater is updaters[0]:
                rates.append(schedule.get_last_lr()[0])
    assert relative_difference(flat(models[0]), start) > 0.1
    assert relative_difference(flat(models[0]), flat(models[1])) < 1e-9


@pytest.mark.parametrize("store_delta", [True, False])
def test_the_displacement_starts_again_now_and_then(store_delta: bool) -> None:
    model = make_net()
    updater = Updater(torch.optim.AdamW(model.parameters(), lr=1.0), store_delta=store_delta)
    mechanic = Mechanic(updater)
    restarted_at = []
    for step in range(1, 300):
        backward(model, step)
        mechanic.step()
        updater.step()
        if torch.equal(updater.displacement.slots[model.out.weight].reference, model.out.weight.detach().reshape(-1)):
            restarted_at.append(step)
    assert restarted_at == [1, 2, 4, 8, 27, *range(T, 300, 9)]


@pytest.mark.parametrize(
    ("steps_per_epoch", "learns"),
    [(None, T), (2, 81), (12, 96), (30.25, 242), (30.4, 243), (243, 243), (math.inf, 243)],
)
def test_and_from_step_t_on_every_nine_steps(steps_per_epoch: float | None, learns: int) -> None:
    """T is 108, or eight epochs, but 81 at least and 243 at most."""
    config = tuner.TunerConfig(steps_per_epoch=steps_per_epoch)
    expected = [1, 2, 4, 8, 27, *range(learns, 3000, 9)]
    assert [step for step in range(1, 3000) if tuner.is_learning(step, config)] == [*range(1, learns + 1)]
    assert [step for step in range(1, 3000) if tuner.restarts(step, config)] == expected
    steps = torch.arange(1, 3000)
    assert steps[tuner.restarts(steps, config)].tolist() == expected


def test_a_skipped_step_does_not_count() -> None:
    model = make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater)
    for step in range(4):
        backward(model, step)
        if step == 1:
            model.out.weight.grad.fill_(math.nan)  # type: ignore
        mechanic.step()
        updater.step()
    slot = updater.displacement.slots[model.out.weight]
    assert not torch.equal(slot.reference, model.out.weight.detach().reshape(-1))  # 3 steps were taken


@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "lion"])
@pytest.mark.parametrize("internal_lr", [1.0, None])
def test_neither_the_unit_of_the_rate_nor_that_of_the_loss_matters(optimizer: str, internal_lr: float | None) -> None:
    ends = []
    for lr, unit in ((1.0, 1.0), (1e-6, 1.0), (1e6, 1.0), (1.0, 1e-6), (1.0, 1e6)):
        model = make_net()
        start = flat(model)
        base = OPTIMIZERS[optimizer](model.parameters(), lr=lr)
        base.param_groups[0]["weight_decay"] = 0.0  # it is not in units of the loss
        updater = Updater(base, internal_lr=internal_lr)
        mechanic = Mechanic(updater)
        for step in range(150):
            updater.zero_grad()
            (unit * loss_of(model, step)).backward()
            mechanic.step()
            updater.step()
        assert relative_difference(flat(model), start) > 0.1
        ends.append(flat(model))
    assert max(relative_difference(end, ends[0]) for end in ends) < 1e-6


def scales_of(
    steps: int,
    product: Callable[[int], float],
    factor: Callable[[int], float] = lambda step: 1.0,
    **options: float,
) -> list[float]:
    """The scale after each step, if h in step t is ``product(t)``, and the schedule's factor ``factor(t)``."""
    config = tuner.TunerConfig(s_init=1.0, **options)
    state, betas, found = tuner.init(config), torch.tensor(config.betas, dtype=torch.float64), []
    for step in range(1, steps + 1):
        h, learning = torch.tensor(product(step)), tuner.is_learning(step, config)
        seen = tuner.seen(torch.tensor(step, dtype=torch.float64), config.steps_per_epoch)
        state = tuner.update(state, h, betas, config, learning, factor(step), seen)
        found.append(float(state.scales.sum()))
    return found


@pytest.mark.parametrize(("known", "learns"), [({}, T), ({"steps_per_epoch": 11}, 88)])
def test_the_scale_rises_for_108_steps_or_eight_epochs_and_no_further(known: dict[str, float], learns: int) -> None:
    """However far downhill Δ points."""
    scales = scales_of(400, lambda step: -1.0, **known)
    assert scales[:learns] == pytest.approx(
        [STAKE * math.exp(math.sqrt(step) if step < 9 else step / 3) for step in range(1, learns + 1)]
    )
    assert scales[learns:] == pytest.approx((400 - learns) * [scales[learns - 1]], rel=0.01)


def test_after_that_it_falls_as_one_over_the_root_of_the_noisy_steps() -> None:
    noise = torch.randn(16_000 + T, generator=torch.Generator().manual_seed(0)).tolist()
    scales = scales_of(len(noise), lambda step: noise[step - 1])
    assert scales[4000 + T - 1] / scales[T - 1] == pytest.approx(math.sqrt(81 / 4081), rel=0.2)
    assert scales[-1] / scales[4000 + T - 1] == pytest.approx(0.5, rel=0.1)


def test_noise_counts_as_often_as_its_rows_were_seen_before() -> None:
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(0)).tolist()
    once, told = (scales_of(5000, lambda step: noise[step - 1], **known) for known in ({}, {"steps_per_epoch": 1000}))
    assert once[999] < once[T - 1] / 2
    assert told[242:1000] == [told[242]] * 758
    for step in (2000, 5000):
        counted = sum(t / 1000 - 1 for t in range(1001, step + 1))
        assert told[step - 1] / told[242] == pytest.approx(math.sqrt(81 / (81 + counted)), rel=0.2)


@pytest.mark.parametrize("steps_per_epoch", [1, 10])
def test_the_first_step_of_a_new_displacement_is_no_noise_however_often_rows_were_seen(steps_per_epoch: float) -> None:
    """It has no h before it to be compared with."""
    scales = scales_of(3000, lambda step: -float(step < 244 or step % 9 > 0), steps_per_epoch=steps_per_epoch)
    assert scales[243:] == pytest.approx(2757 * [scales[242]], rel=0.02)


def test_rows_that_never_come_again_are_no_noise() -> None:
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    scales = scales_of(1000, lambda step: noise[step - 1], steps_per_epoch=math.inf)
    assert scales[242:] == [scales[242]] * 758


@pytest.mark.parametrize(("signal", "falls"), [(0.7, True), (1.4, False)])
def test_it_stays_where_noise_is_the_smaller_half(signal: float, falls: bool) -> None:
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(0)).tolist()
    for sign in (1, -1):
        scales = scales_of(3000, lambda step, sign=sign: sign * signal + noise[step - 1])
        assert (scales[-1] < scales[T - 1] / 3) == falls
        assert (scales[-1] > scales[T - 1] / 1.3) != falls


def test_noise_leaves_the_scale_where_it_was_and_signal_does_not() -> None:
    """Within a factor of e, or somewhat more, of κ s_init, however many steps there are."""
    generator = torch.Generator().manual_seed(0)
    ends = []
    for signal in (0.0, -0.5, 0.5):
        for _ in range(50):
            noise = torch.randn(T, generator=generator).tolist()
            ends.append(math.log(scales_of(T, lambda step, h=noise, m=signal: m + h[step - 1])[-1] / STAKE))
    noise, downhill, uphill = ends[:50], ends[50:100], ends[100:]
    assert abs(statistics.fmean(noise)) < 0.5
    assert 0.5 < statistics.stdev(noise) < 1.5
    assert min(downhill) > max(noise)
    assert max(uphill) < min(noise)


@pytest.mark.parametrize("outlier", [-1e6, 1e6])
def test_one_outlier_does_not_decide(outlier: float) -> None:
    """It counts as much as all before it."""
    noise = torch.randn(T, generator=torch.Generator().manual_seed(0)).tolist()
    plain = scales_of(T, lambda step: noise[step - 1] - 0.5)
    hit = scales_of(T, lambda step: outlier if step == 80 else noise[step - 1] - 0.5)
    z = math.sqrt(3 * math.log(plain[78] / STAKE))
    assert z > 3
    after = (z - math.copysign(1, outlier)) / math.sqrt(2)
    assert math.log(hit[79] / STAKE) == pytest.approx(after if after < 3 else after**2 / 3)
    assert hit[-1] > 2 * STAKE


def test_it_comes_back_when_the_noise_is_over() -> None:
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    scales = scales_of(3000, lambda step: noise[step - 1] if step <= 1000 else 1.0)
    assert scales[999] < scales[T - 1] / 2
    assert scales[-1] == pytest.approx(scales[T - 1])


@pytest.fixture(scope="module")
def steady_noise() -> tuple[list[float], list[float]]:
    """The h of 10,000 steps, and the scales that come of them."""
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).tolist()
    return noise, scales_of(len(noise), lambda step: noise[step - 1])


@pytest.mark.parametrize("times", [100.0, 0.01])
def test_it_falls_no_further_if_gradients_become_larger_or_smaller(
    steady_noise: tuple[list[float], list[float]], times: float
) -> None:
    noise, steady = steady_noise
    changed = scales_of(len(noise), lambda step: noise[step - 1] * (times if step > 1000 else 1.0))
    assert changed[1200] != pytest.approx(steady[1200], rel=0.1)
    assert changed[-1] == pytest.approx(steady[-1], rel=0.1)


def test_one_outlier_counts_as_81_steps_of_noise(steady_noise: tuple[list[float], list[float]]) -> None:
    noise, steady = steady_noise
    hit = scales_of(len(noise), lambda step: noise[step - 1] * (1000 if step == 1000 else 1))
    counted = 81 * (hit[T - 1] / hit[998]) ** 2
    assert hit[999] / hit[998] == pytest.approx(math.sqrt(counted / (counted + 81)), rel=0.01)
    assert hit[-1] == pytest.approx(steady[-1], rel=0.1)


def test_models_at_different_steps_are_tuned_in_one_call() -> None:
    config = tuner.TunerConfig(s_init=1.0)
    betas = torch.tensor(config.betas, dtype=torch.float64)
    state = tuner.init(config)
    for h, learning in ((-1.0, True), (1.0, False)):
        state = tuner.update(state, torch.tensor(h), betas, config, learning)
    products, learn = (-2.0, -2.0), (True, False)
    apart = [tuner.update(state, torch.tensor(h), betas, config, one) for h, one in zip(products, learn, strict=True)]
    two = tuner.TunerState(*(torch.stack([tensor] * 2) for tensor in state))
    together = tuner.update(two, torch.tensor(products), betas, config, torch.tensor(learn))
    assert apart[0].scales.sum() > state.scales.sum() > apart[1].scales.sum()
    for one, tensor in zip(zip(*apart, strict=True), together, strict=True):
        assert torch.equal(torch.stack(one), tensor)


@pytest.mark.parametrize("growth", [2.0, 10.0, -2.0, -10.0])
def test_a_loss_that_explodes_takes_the_scale_down_faster_than_it_grows(growth: float) -> None:
    """Once two h in a row are above the norm of all before; where they change sign, in every other step."""
    reached = T + 1 + math.ceil(math.log(math.sqrt(T), abs(growth)))
    scales = scales_of(reached + 10, lambda step: -1.0 if step <= T else growth ** (step - T - 1))
    assert scales[T] == pytest.approx(scales[T - 1], rel=0.02)
    for step in range(reached + 6, reached + 10):
        assert scales[step] / scales[step - 2] < growth**-2


@pytest.mark.parametrize("seed", [4, 51, 53])
def test_a_net_that_reads_all_rows_in_each_batch_does_not_diverge(seed: int) -> None:
    """No noise bounds its scale, which grows up to step T: with these seeds until steps are too long."""
    _, losses, scales = train_on_all_rows(
        lambda model: Updater(torch.optim.SGD(model.parameters(), lr=1.0)), seed, steps=300
    )
    assert max(losses[T:]) > 5 * losses[T - 1]
    assert max(scales[T:]) == pytest.approx(scales[T - 1], rel=1e-3)
    assert scales[-1] < 0.8 * scales[T - 1]
    assert losses[-1] < 2 * losses[0]  # which is inf if d of (13) is 1


def test_a_single_outlier_does_not() -> None:
    outlier = {T + 20: 1e6}
    scales = scales_of(T + 40, lambda step: outlier.get(step, -1.0))
    assert scales[-1] > 0.5 * scales[T - 1]


def test_noise_counts_as_much_as_the_schedule_lets_it() -> None:
    """And that of a higher rate, after warm restarts say, is not more than usual."""
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    low = dict.fromkeys(range(T + 1, T + 162), 0.05)
    constant = scales_of(1000, lambda step: noise[step - 1])
    dips = scales_of(1000, lambda step: low.get(step, 1.0) * noise[step - 1], lambda step: low.get(step, 1.0))
    unseen = scales_of(1000, lambda step: low.get(step, 1.0) * noise[step - 1])
    assert dips[T + 160] > 0.98 * constant[T - 1]
    assert max(constant[T + 160], unseen[T + 160]) < 0.7 * constant[T - 1]
    assert dips[-1] == pytest.approx(constant[999 - 161], rel=0.1)
    assert unseen[-1] < 0.8 * dips[-1]


def decay(step: int) -> float:
    """Linear, to a twentieth and no further."""
    return max(0.05, 1 - step / 1000)


def test_where_h_is_signal_the_rate_stays_until_it_is_nine_times_what_the_schedule_has() -> None:
    def late(step: int) -> float:
        return decay(max(step - 250, 0))

    for schedule in decay, late:
        scales = scales_of(1200, lambda step: -1.0, schedule)
        rates = [scale * schedule(step) / scales[T - 1] for step, scale in enumerate(scales, 1)]
        expected = [min(schedule(T), 9 * schedule(step)) for step in range(1, 1201)]
        settled = slice(T + 2, None)  # the first two of a new Δ are no signal yet
        assert rates[settled] == pytest.approx(expected[settled], rel=1e-3)
        assert expected[T] > 0.8
        assert expected[-1] < 0.5


def test_plain_descent_survives_a_schedule_that_had_decayed_when_the_scale_was_learned() -> None:
    """Without momentum the rate that is found is just below those at which a net diverges."""
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = (x @ torch.randn(16, 8)).argmax(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(base, torch.optim.lr_scheduler.LinearLR(base, 1.0, 0.0, 400))
    mechanic = Mechanic(updater)
    losses, rates = [], []
    for _ in range(400):
        rows = torch.randint(len(x), (64,))
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        updater.zero_grad()
        loss.backward()
        mechanic.step()
        rates.append(updater.get_last_lr()[0])
        updater.step()
        losses.append(float(loss.detach()))
    assert rates[T] < 1.01 * rates[T - 1]
    assert max(losses[300:]) < 0.1 < losses[0]


def test_the_more_noise_has_lowered_the_scale_the_less_the_schedule_is_made_up_for() -> None:
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    def dip(low: int, step: int) -> float:
        return 1.0 if step < low else 0.5

    constant = scales_of(5000, lambda step: noise[step - 1])
    left = {low: (constant[low - 1] / constant[T - 1]) ** 2 for low in (250, 1000, 5000)}
    assert 1 > left[250] > 2 * left[1000] > 8 * left[5000]
    for low, c in left.items():
        decayed = scales_of(low, lambda step, low=low: dip(low, step) * noise[step - 1], partial(dip, low))
        assert decayed[: low - 1] == pytest.approx(constant[: low - 1])
        assert decayed[-1] == pytest.approx(2**c * constant[low - 1], rel=0.02)
    assert scales_of(400, lambda step: -1.0, partial(dip, 301))[-1] == pytest.approx(
        2 * scales_of(400, lambda step: -1.0)[-1]
    )


def test_a_schedule_that_rises_again_takes_back_what_made_up_for_its_fall() -> None:
    scales = scales_of(500, lambda step: -1.0, lambda step: 0.0 if 300 < step <= 400 else 1.0)
    assert scales[300:400] == pytest.approx(100 * [9 * scales[T - 1]])
    assert scales[400:] == pytest.approx(100 * [scales[T - 1]])


def test_nor_does_it_lift_the_scale_above_the_largest_allowed() -> None:
    """And once it is taken back, the scale is what it would be without."""

    def dip(step: int) -> float:
        return 0.25 if 300 < step <= 400 else 1.0

    free = scales_of(500, lambda step: -1.0, dip)
    capped = scales_of(500, lambda step: -1.0, dip, max_scale=2 * free[T - 1])
    assert free[399] == pytest.approx(4 * free[T - 1])
    assert capped[300:400] == pytest.approx(100 * [2 * free[T - 1]])
    assert capped[400:] == pytest.approx(free[400:])


def trained(updater: Updater, predict: Callable[[torch.Tensor], torch.Tensor], steps: int) -> Iterator[float]:
    """The scale after each step of a fit to noisy targets."""
    mechanic = Mechanic(updater)
    for _ in range(steps):
        x = torch.randn(4, 8)
        updater.zero_grad()
        (predict(x) - x.sum(1, keepdim=True) - torch.randn(4, 1)).square().mean().backward()
        mechanic.step()
        updater.step()
        yield float(mechanic.scale)


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)])
def test_under_warm_restarts_the_scale_falls_as_it_should(lr: float | torch.Tensor) -> None:
    """At the tuner's last bets the schedule is near its bottom; the mean of its square is 3/8."""
    for make_schedule, share in (
        (lambda base: CosineAnnealingWarmRestarts(base, 330), 3 / 8),
        (lambda base: LambdaLR(base, lambda step: 1.0), 1.0),
    ):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 1)
        base = torch.optim.SGD(model.parameters(), lr=lr)
        scales = list(trained(Updater(base, make_schedule(base)), model, 990))
        c = 81 / (81 + share * 747)
        premium = 1.0 if share == 1 else 9.0**c  # the last step is at the bottom
        assert scales[-1] / scales[T - 1] == pytest.approx(math.sqrt(c) * premium, rel=0.2)


def test_a_rate_above_those_that_the_scale_was_learned_at_lowers_it() -> None:
    """As in a warmup that goes on: by as much, and not more, if h rises with it."""
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    def factor(step: int) -> float:
        return 1.0 if step <= 350 else 10.0

    constant = scales_of(1000, lambda step: noise[step - 1])
    rising = scales_of(1000, lambda step: factor(step) * noise[step - 1], factor)
    assert rising[:350] == pytest.approx(constant[:350])
    assert rising[-1] == pytest.approx(constant[-1] / 10, rel=0.01)


def test_a_warmup_that_goes_on_after_the_search_takes_the_rate_no_further() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(base, LambdaLR(base, lambda step: min(1.0, (step + 1) / 800)))
    rates = [updater.get_last_lr()[0] for _ in trained(updater, model, 900)]
    assert max(rates[T:]) < 1.001 * rates[T]
    assert rates[-1] > rates[T] / 10
    assert base.param_groups[0]["lr"] > 3 * (T + 1) / 800


@pytest.mark.parametrize("one", [1.0, torch.tensor(1.0)])
def test_a_group_that_joins_at_a_higher_rate_does_not_slow_the_others(one: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    model, late = torch.nn.Linear(8, 1), torch.nn.Parameter(torch.zeros(()))
    base = torch.optim.SGD([{"params": [model.weight], "lr": one}, {"params": [model.bias], "lr": 0 * one}])
    scales = []
    for scale in trained(Updater(base), lambda x: model(x) + late, 332):
        scales.append(scale)
        if len(scales) == 330:
            base.param_groups[1]["lr"] = 1.5 * one
            base.add_param_group({"params": [late], "lr": 1.5 * one})
    assert scales[330] > 0.9 * scales[329]  # before its updates are in h
    assert late != 0


@pytest.mark.parametrize("one", [1.0, torch.tensor(1.0)])
def test_a_group_that_joins_at_a_lower_rate_leaves_the_noise_of_the_others(one: float | torch.Tensor) -> None:
    def scale_after(joins: bool) -> float:
        torch.manual_seed(0)
        model, late = torch.nn.Linear(8, 1), torch.nn.Parameter(torch.zeros(()))
        base = torch.optim.SGD(model.parameters(), lr=one)
        scales = []
        for scale in trained(Updater(base), lambda x: model(x) + late, 1000):
            scales.append(scale)
            if len(scales) == 300 and joins:
                base.add_param_group({"params": [late], "lr": 0.1 * one})
        assert not joins or late != 0
        return scales[-1] / scales[299]

    assert scale_after(joins=True) == pytest.approx(scale_after(joins=False), rel=0.1)
    assert scale_after(joins=True) < 0.6


@pytest.mark.parametrize("one", [1.0, torch.tensor(1.0)])
def test_a_group_whose_rate_is_set_to_zero_does_not_slow_the_others(one: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    base = torch.optim.SGD([{"params": [model.bias], "lr": 0.1 * one}, {"params": [model.weight], "lr": one}])
    scales = []
    for scale in trained(Updater(base), model, 302):
        scales.append(scale)
        if len(scales) == 300:
            base.param_groups[0]["lr"] = 0 * one
    assert scales[301] > 0.9 * scales[299]


@pytest.mark.parametrize("one", [1.0, torch.tensor(1.0)])
def test_a_group_that_is_warmed_up_alone_does_not_slow_the_others(one: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    model, late = torch.nn.Linear(8, 1), torch.nn.Parameter(torch.zeros(()))
    base = torch.optim.SGD([{"params": model.parameters(), "lr": one}, {"params": [late], "lr": 0 * one}])
    scales = []
    for scale in trained(Updater(base), lambda x: model(x) + late, 320):
        scales.append(scale)
        if len(scales) >= 300:
            base.param_groups[1]["lr"] = (len(scales) - 299) / 20 * one
    assert late != 0
    assert scales[-1] > 0.8 * scales[299]


def error_of_a_noisy_fit(seed: int, *, held_out: bool, steps_per_epoch: float | None) -> float:
    """Against the line that the targets are, with as much noise again, after 600 steps on 200 rows."""
    torch.manual_seed(seed)
    x, unseen = torch.randn(200, 8), torch.randn(2000, 8)
    y = x[:, :1] + torch.randn(200, 1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    updater = Updater(torch.optim.AdamW(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater, steps_per_epoch=steps_per_epoch)

    def backward(rows: torch.Tensor) -> None:
        model.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()

    steps = 300 if held_out else 600
    mechanic.held_out = partial(backward, torch.arange(40)) if held_out else None
    for _ in range(steps):
        backward(torch.randint(40 if held_out else 0, 200, (32,)))
        mechanic.step()
        updater.step()
    optimizer, _ = mechanic.hand_off()
    for _ in range(steps, 600):
        backward(torch.randint(200, (32,)))
        optimizer.step()
    with torch.no_grad():
        return float((model(unseen) - unseen[:, :1]).square().mean())


@pytest.mark.parametrize("steps_per_epoch", [None, 10])
def test_no_number_is_copied_to_the_device(steps_per_epoch: float | None) -> None:
    """Which would wait for it."""
    updater = Updater(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=1.0))
    mechanic = Mechanic(updater, steps_per_epoch=steps_per_epoch)
    weight = updater._parameters()[0]
    with Calls() as calls:
        for _ in range(250):
            weight.grad = weight.detach().clone()
            mechanic.step()
            updater.step()
        assert {"mul.Tensor", "where.self"} <= calls.of.keys()
        assert "lift_fresh.default" not in calls.of
        torch.tensor(1.0)
        assert "lift_fresh.default" in calls.of


@pytest.mark.filterwarnings("ignore::manic.ScaleWarning")  # nothing helps the held-out rows any more
def test_a_net_does_not_learn_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*, held_out: bool = False, steps_per_epoch: float | None = None) -> float:
        errors = (error_of_a_noisy_fit(seed, held_out=held_out, steps_per_epoch=steps_per_epoch) for seed in range(3))
        return statistics.fmean(errors)

    by_default, told, with_held_out = error(), error(steps_per_epoch=200 / 32), error(held_out=True)
    monkeypatch.setattr(tuner, "is_learning", lambda step, config: True)
    monkeypatch.setattr(tuner, "restarts", lambda step, config: 729 % step == 0)
    with_noise = error()
    assert with_noise > 0.3
    assert by_default < with_noise / 2
    assert told < by_default
    assert with_held_out < with_noise / 2
