"""The published forms of Mechanic, against a plain-float oracle and against the published packages themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mechanic_pytorch
import numpy as np
import optax
import pytest
import torch
from oracle import Oracle
from problems import OPTIMIZERS, SCHEDULERS, backward, flat, make_net, relative_difference

from manic import Mechanic, Updater

STEPS, PUBLISHED_STEPS = 360, 120  # after 108 or 243 the default rule's scale follows noise and schedule
BATCHES = 500  # held-out ones come after these
BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
TOLERANCE = 1e-9
SCHEDULES = {**SCHEDULERS, "long_warmup": lambda base: torch.optim.lr_scheduler.LinearLR(base, 0.1, 1.0, STEPS)}
S_INIT = 1e-4  # reaches a useful scale within the steps of a test


def assert_moved(start: torch.Tensor, end: torch.Tensor, hs: list[float], scale: float) -> None:
    """Nothing may pass by standing still."""
    assert relative_difference(end, start) > 1e-2
    assert scale > 0
    assert min(hs) < 0 < max(hs)


def run_manic(
    optimizer: str,
    scheduler: str,
    *,
    store_delta: bool,
    rule: str,
    s_decay: float,
    s_init: float | None = S_INIT,
    steps_per_epoch: float | None = None,
    held_out: bool = False,
) -> tuple[torch.Tensor, float]:
    model = make_net()
    start, hs, scales = flat(model), [], []
    base = OPTIMIZERS[optimizer](model.parameters(), lr=0.5)
    updater = Updater(base, SCHEDULES[scheduler](base), store_delta=store_delta, internal_lr=None)
    options: dict[str, Any] = {"rule": rule, "s_decay": s_decay, "s_init": s_init, "steps_per_epoch": steps_per_epoch}
    mechanic = Mechanic(updater, **options, log_func=lambda d: hs.append(float(d["h"])))
    for step in range(STEPS if rule == "manic" else PUBLISHED_STEPS):
        if held_out:
            mechanic.held_out = partial(backward, model, BATCHES + step)
        backward(model, step)
        mechanic.step()
        updater.step()
        scales.append(float(mechanic.scale))
    if rule == "manic":
        assert max(abs(scale / scales[107] - 1) for scale in scales[108:]) > 0.005
    assert_moved(start, flat(model), hs, float(mechanic.scale))
    return flat(model), float(mechanic.scale)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in model.parameters()])


def drive(
    optimizer: str, scheduler: str, tune: Callable[..., list[float]], steps: int, *, held_out: bool = False
) -> torch.Tensor:
    """Train with a plain torch optimizer whose update is replaced by what ``tune(x, g, u, factor)`` returns for x.

    With ``held_out``, g is of other batches in the first hundred steps, then in every fourth up to 243.
    """
    model = make_net()
    base = OPTIMIZERS[optimizer](model.parameters(), lr=0.5)
    schedule = SCHEDULES[scheduler](base)
    for step in range(steps):
        others = held_out and step < 243
        backward(model, BATCHES + step if others else step)
        g = gradient(model).tolist() if not others or step < 100 or step % 4 == 0 else None
        backward(model, step)
        x = flat(model)
        factor = base.param_groups[0]["lr"] / 0.5
        base.step()
        u = flat(model) - x
        new = torch.tensor(tune(x.tolist(), g, u.tolist(), factor), dtype=torch.float64)
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(new, list(model.parameters()))
        if schedule is not None:
            schedule.step()
    return flat(model)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("rule", "s_decay", "s_init"),
    [
        *((rule, 1e-2, S_INIT) for rule in ("paper", "mechanic_pytorch", "optax", "manic")),
        ("manic", 0.0, None),
        ("manic", 1e-2, None),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "adamw"])
def test_oracle(optimizer: str, scheduler: str, rule: str, s_decay: float, s_init: float | None) -> None:
    eps = 0.0 if rule == "manic" else 1e-8
    oracle = Oracle(flat(make_net()).tolist(), rule, betas=list(BETAS), lam=s_decay, s_init=s_init, eps=eps)
    expected = drive(optimizer, scheduler, oracle.step, STEPS if rule == "manic" else PUBLISHED_STEPS)
    parameters, scale = run_manic(optimizer, scheduler, store_delta=True, rule=rule, s_decay=s_decay, s_init=s_init)
    assert relative_difference(parameters, expected) < TOLERANCE
    assert scale == pytest.approx(sum(oracle.s), rel=TOLERANCE)


def test_a_warmup_that_is_longer_than_the_search() -> None:
    test_oracle("adamw", "long_warmup", "manic", 0.0, None)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps_per_epoch", [5, 12.5, 100, 310.5])
def test_rows_that_were_seen_before(steps_per_epoch: float, scheduler: str) -> None:
    known: dict[str, Any] = {"s_init": None, "steps_per_epoch": steps_per_epoch}
    oracle = Oracle(flat(make_net()).tolist(), "manic", lam=0.0, eps=0.0, **known)
    expected = drive("sgd_nesterov", scheduler, oracle.step, STEPS)
    parameters, scale = run_manic("sgd_nesterov", scheduler, store_delta=True, rule="manic", s_decay=0.0, **known)
    known["steps_per_epoch"] = None
    _, scale_if_not_known = run_manic("sgd_nesterov", scheduler, store_delta=True, rule="manic", s_decay=0.0, **known)
    assert abs(scale / scale_if_not_known - 1) > 0.05
    assert relative_difference(parameters, expected) < TOLERANCE
    assert scale == pytest.approx(sum(oracle.s), rel=TOLERANCE)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps_per_epoch", [None, 12.5])
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_scale_learned_from_held_out_rows(store_delta: bool, steps_per_epoch: float | None, scheduler: str) -> None:
    """Which were not seen before, however long an epoch is; it counts once the scale is learned."""
    known: dict[str, Any] = {"s_init": None, "steps_per_epoch": steps_per_epoch}
    oracle = Oracle(flat(make_net()).tolist(), "manic", lam=0.0, eps=0.0, held_out=True, **known)
    expected = drive("adamw", scheduler, oracle.step, STEPS, held_out=True)
    options: dict[str, Any] = {"store_delta": store_delta, "rule": "manic", "s_decay": 0.0, **known}
    parameters, scale = run_manic("adamw", scheduler, **options, held_out=True)
    same_batches, _ = run_manic("adamw", scheduler, **options)
    assert relative_difference(parameters, same_batches) > 1e-2
    assert relative_difference(parameters, expected) < TOLERANCE
    assert scale == pytest.approx(sum(oracle.s), rel=TOLERANCE)


@pytest.fixture
def _float64_by_default() -> Any:
    torch.set_default_dtype(torch.float64)  # the published package makes its tuner state in the default dtype
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64_by_default")
@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mechanic_pytorch(optimizer: str, store_delta: bool) -> None:
    """At λ = 0: the published package's λ term reads the parameters after the base step."""
    model, base = make_net(), OPTIMIZERS[optimizer]
    with_gradient = [p for p in model.parameters() if p is not model.unused]
    published = mechanic_pytorch.mechanize(base.cls, s_decay=0.0, s_init=S_INIT, store_delta=store_delta)(
        with_gradient, lr=0.5, **base.options
    )
    for step in range(PUBLISHED_STEPS):
        backward(model, step)
        published.step()
    ours, scale = run_manic(optimizer, "none", store_delta=store_delta, rule="mechanic_pytorch", s_decay=0.0)
    assert relative_difference(ours, flat(model)) < TOLERANCE
    assert scale == pytest.approx(float(published.state["_mechanic"]["s"].sum()), rel=TOLERANCE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optax(optimizer: str, scheduler: str) -> None:
    """At λ > 0. The base update inside optax is torch's, so that only Mechanic is compared."""
    base = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), lambda g, s, p, *, u: (u, s))
    published = optax.contrib.mechanize(base, weight_decay=1e-2, s_init=S_INIT)
    state = published.init(jnp.asarray(flat(make_net()).numpy()))
    update = jax.jit(lambda g, state, x, u: published.update(g, state, x, u=u))

    def tune(x: list[float], g: list[float], u: list[float], factor: float) -> list[float]:
        nonlocal state
        change, state = update(np.array(g), state, np.array(x), np.array(u))
        return (np.array(x) + np.asarray(change)).tolist()

    expected = drive(optimizer, scheduler, tune, PUBLISHED_STEPS)
    expected_scale = float(state.s.sum())
    ours, scale = run_manic(optimizer, scheduler, store_delta=False, rule="optax", s_decay=1e-2)
    assert relative_difference(ours, expected) < TOLERANCE
    assert scale == pytest.approx(expected_scale, rel=TOLERANCE)
