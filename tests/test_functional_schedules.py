"""The schedules against torch's and numbers worked out by hand; the loss scaler against torch's."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from manic.functional import loss_scaler, schedules
from manic.functional.loss_scaler import LossScalerConfig

T, WARMUP, FINAL = 200, 40, 0.1


def torch_rates(scheduler, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schedules.cosine, lambda o: lr_scheduler.CosineAnnealingLR(o, T - WARMUP, eta_min=FINAL)),
        (schedules.linear, lambda o: lr_scheduler.LinearLR(o, 1.0, FINAL, T - WARMUP)),
    ],
)
def test_decays_as_torch_does_after_the_warmup(ours, theirs):
    rates = torch_rates(theirs, T - WARMUP + 1)
    assert rates[-1] == pytest.approx(FINAL)
    for t, rate in enumerate(rates):
        assert float(ours((WARMUP + t) / T, warmup=WARMUP / T, final=FINAL)) == pytest.approx(rate, rel=1e-12)


def test_inverse_sqrt_is_that_of_the_transformer():
    for t in range(1, T + 1):
        expected = WARMUP**0.5 * min(t**-0.5, t * WARMUP**-1.5)
        assert float(schedules.inverse_sqrt(t / T, warmup=WARMUP / T)) == pytest.approx(expected, rel=1e-12)


def test_constant():
    assert [float(schedules.constant(t)) for t in (0, 0.5, 1)] == [1, 1, 1]


@pytest.mark.parametrize("schedule", [schedules.constant, schedules.linear, schedules.cosine, schedules.inverse_sqrt])
def test_what_all_schedules_share(schedule):
    for t, factor in ((0, 0), (0.05, 0.25), (0.1, 0.5), (0.2, 1.0)):
        assert float(schedule(t, warmup=0.2)) == pytest.approx(factor)
    assert torch.equal(schedule(-1.0, warmup=0.2), schedule(0.0, warmup=0.2))
    assert torch.equal(schedule(7.0, warmup=0.2), schedule(1.0, warmup=0.2))
    progress = torch.linspace(0, 1, 11)
    together = torch.func.vmap(lambda t: schedule(t, warmup=0.2))(progress)
    assert together.dtype == progress.dtype
    torch.testing.assert_close(together.tolist(), [float(schedule(float(t), warmup=0.2)) for t in progress])
    for warmup in (-0.1, 1.0, 100):
        with pytest.raises(ValueError, match=f"warmup is {warmup}"):
            schedule(0.5, warmup=warmup)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("constant", {"warmup": "0.1"}, r"warmup is '0.1'; expected a share of the training, in \[0, 1\)"),
        ("inverse_sqrt", {"warmup": None}, r"warmup is None; expected a number in \(0, 1\)"),
        ("linear", {"final": "a"}, "final is 'a'; expected a finite number"),
        ("cosine", {"final": None}, "final is None; expected a finite number"),
    ],
)
def test_shares_that_are_no_numbers_are_refused(name, options, message):
    with pytest.raises(TypeError, match=message):
        getattr(schedules, name)(0.5, **options)


def test_inverse_sqrt_needs_a_warmup():
    with pytest.raises(ValueError, match=r"warmup is 0.0; expected a number in \(0, 1\)"):
        schedules.inverse_sqrt(0.5, warmup=0.0)


OPTIONS = [
    {"init_scale": 2.0**10, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3},
    {"init_scale": 1000.0, "growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 1},
    {"init_scale": 2.0**126, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2},  # would grow to inf
]


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_scaler_equals_torch(options):
    theirs = torch.amp.GradScaler("cpu", **options)
    config = LossScalerConfig(**options)
    state = loss_scaler.init(config)
    generator = torch.Generator().manual_seed(0)
    scales = set()
    for t in range(40):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        data = torch.rand(2, generator=generator)
        if t % 11 in (3, 4):
            data[1] = (math.inf, math.nan)[t % 2]

        theirs.scale((weight * data).sum() / 1e3).backward()
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()

        def scaled_loss(weight, data=data, state=state):
            return loss_scaler.scale((weight * data).sum() / 1e3, state)

        grads = torch.func.grad(scaled_loss)(torch.tensor([1.0, -2.0]))
        (grads,), found_inf = loss_scaler.unscale([grads], state)
        assert bool(found_inf) == (not data.isfinite().all())
        torch.testing.assert_close(grads, weight.grad, rtol=0, atol=0, equal_nan=True)
        old = state.scale.clone()
        new = loss_scaler.update(state, found_inf, config)
        assert torch.equal(state.scale, old)
        state = new
        assert float(state.scale) == theirs.get_scale()
        assert int(state.growth_tracker) == theirs.state_dict()["_growth_tracker"]
        scales.add(float(state.scale))
    assert len(scales) >= 3


def test_loss_scaler_under_vmap():
    config = LossScalerConfig(growth_interval=1)
    states = torch.func.vmap(lambda _: loss_scaler.init(config))(torch.zeros(2))
    grads, found_inf = torch.func.vmap(loss_scaler.unscale)({"w": torch.tensor([[1.0], [math.inf]])}, states)
    assert found_inf.tolist() == [False, True]
    assert grads["w"][0] == 2.0**-16
    states = torch.func.vmap(lambda state, found: loss_scaler.update(state, found, config))(states, found_inf)
    assert states.scale.tolist() == [2.0**17, 2.0**15]


def test_loss_scaler_errors():
    with pytest.raises(ValueError, match=r"backoff_factor is 1\.5; expected a number between 0 and 1"):
        LossScalerConfig(backoff_factor=1.5)
    with pytest.raises(ValueError, match="growth_interval is 0"):
        LossScalerConfig(growth_interval=0)
    with pytest.raises(ValueError, match=r"growth_interval is 2\.5; expected a whole number"):
        LossScalerConfig(growth_interval=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="init_scale is 'a'; expected a number between"):
        LossScalerConfig(init_scale="a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"init_scale is 1e\+39; expected a number between 0 and 3\.4"):
        LossScalerConfig(init_scale=1e39)
    state = loss_scaler.init(LossScalerConfig())
    for grads in ({}, {"w": None}):
        with pytest.raises(TypeError, match=r"grads is {.*}; expected a tree of tensors. Pass zeros"):
            loss_scaler.unscale(grads, state)
    with pytest.raises(TypeError, match="found_inf is True; expected the 0-d tensor that unscale returned"):
        loss_scaler.update(state, True, LossScalerConfig())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="A gradient is float16; expected float32"):
        loss_scaler.unscale([torch.ones(2, dtype=torch.float16)], loss_scaler.init(LossScalerConfig()))
