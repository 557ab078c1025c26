"""Warnings about the scale: each ailment is told of, once, and healthy runs are not."""

from __future__ import annotations

import importlib
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import OPTIMIZERS, SCHEDULERS, assert_same_bits, backward, make_net
from torch import Tensor
from torch.optim import lr_scheduler

from manic import Mechanic, ScaleWarning, Updater, mechanize
from manic.diagnosis import FIRST, TURNS, WINDOW, Diagnosis
from manic.displacement import Displacement
from manic.tuner import RULES, Sums

STEPS = 520
Gradient = Callable[[Tensor, int], Tensor]


class Ascent(torch.optim.SGD):
    """Moves uphill."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            with torch.no_grad():
                parameter.add_(parameter.grad, alpha=self.param_groups[0]["lr"])


def messages(gradient: Gradient, cls: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> list[str]:
    """What is said in a run of 20 parameters whose gradient is a function of their values and the step."""
    weight = torch.nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(0)))
    updater = Updater(cls([weight], lr=1.0))
    mechanic = Mechanic(updater, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, STEPS + 1):
            weight.grad = gradient(weight.detach(), step)
            mechanic.step()
            updater.step()
    assert all(warning.category is ScaleWarning and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_the_drop_in_warns_at_the_line_that_steps() -> None:
    weight = torch.nn.Parameter(torch.ones(20))
    optimizer = mechanize(torch.optim.SGD)([weight], lr=1.0)
    weight.grad = torch.zeros(20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            optimizer.step()
    assert [(warning.category, warning.filename) for warning in caught] == [(ScaleWarning, __file__)]


def noise(step: int) -> Tensor:
    return torch.randn(20, generator=torch.Generator().manual_seed(step))


def test_a_scale_that_stays_at_its_start() -> None:
    (message,) = messages(lambda x, step: x + noise(step), Ascent)
    assert message.startswith("At step 108 the scale is at its start, or below, ")
    assert "does the optimizer maximize?" in message
    (message,) = messages(lambda x, step: x + noise(step), Ascent, steps_per_epoch=1)
    assert message.startswith("At step 81 the scale is at its start, or below, ")
    assert "at none of the last 17 steps" in message


@pytest.mark.parametrize(("learn", "told"), [(0, False), (WINDOW // 4, False), (WINDOW // 4 + 1, True), (WINDOW, True)])
def test_only_steps_that_learn_say_whether_the_scale_is_at_its_start(learn: int, told: bool) -> None:
    diagnosis, one = Diagnosis(), torch.tensor(1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(WINDOW):
            step = FIRST - WINDOW + 1 + i
            diagnosis.watch(step, one[None], torch.zeros(1), i < learn, Sums(one, one, one, one), 1.0, 0)
    assert len(caught) == told


@pytest.mark.parametrize("tune", [True, False])
def test_a_scale_that_is_held_is_not_told_to_be_at_its_start(tune: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(20))
    updater = Updater(Ascent([weight], lr=1.0))
    mechanic = Mechanic(updater, s_init=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(FIRST):
            weight.grad = weight.detach() + noise(step)
            mechanic.step(tune=tune)
            updater.step()
    assert len(caught) == tune


def test_no_gradient() -> None:
    (message,) = messages(lambda x, step: 0 * x)
    assert "The norm of the gradient was 0 to 0. " in message


def test_steps_in_a_graph_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device may not be asked while they are captured, and every replay would read the parameters for it."""
    sums, read = Displacement.sums, []

    def noted(self: Displacement, scale: Tensor, *, complete: bool = True) -> Sums:
        read.append(complete)
        return sums(self, scale, complete=complete)

    monkeypatch.setattr(Displacement, "sums", noted)
    monkeypatch.setattr("manic.mechanic._is_captured", lambda scale: True)
    assert not messages(lambda x, step: 0 * x)
    assert len(read) == STEPS
    assert not any(read)


def test_the_paper_s_rule_that_never_starts() -> None:
    (message,) = messages(lambda x, step: x + 0, rule="paper")
    assert "at its start, or below, 0: " in message


def test_a_body_that_is_unfrozen_is_no_growth() -> None:
    """The norm is that of the parameters that take part."""
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)])
    torch.nn.init.constant_(model[0].weight, 100)
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    for step in range(1, 260):
        model[0].requires_grad_(step >= 100)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model[1](model[0](x / 100)) - x[:, :1]).square().mean().backward()
        optimizer.step()


def test_a_ceiling_keeps_it_from_running_away() -> None:
    assert not messages(lambda x, step: 1 + noise(step) / 4, max_scale=1e-3)


@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize(("pinned", "part"), [(False, "the run is running away"), (True, "Clip at a higher norm")])
def test_a_run_that_runs_away(pinned: bool, part: str, store_delta: bool) -> None:
    """From a loss without a lower bound; with gradients that are clipped the advice is another."""
    weight = torch.nn.Parameter(noise(0))
    optimizer = mechanize(torch.optim.SGD, store_delta=store_delta)([weight], lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 260):
            weight.grad = 1 + noise(step) / 4
            if pinned:
                torch.nn.utils.clip_grad_norm_(weight, 0.1)
            optimizer.step()
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("From step 65 to 128 the norm of the parameters grew from ")
    assert part in message


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_weights_that_have_far_to_go_do_not_run_away(cls: type[torch.optim.Optimizer]) -> None:
    """They grow tenfold from step 65 to 128, as on targets in dollars, but the gradient shrinks."""
    rows = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(8, 1)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = mechanize(cls)(model.parameters(), lr=1.0)
    for step in range(130):
        picked = torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(rows[picked]) - 1e6 * rows[picked, :1]).square().mean().backward()
        optimizer.step()
    assert float(model.weight.detach().norm()) > 5e5


def test_a_scale_that_oscillates() -> None:
    """Two tasks take turns, and each undoes what the other learned."""

    def gradient(x: Tensor, step: int) -> Tensor:
        return x - 10 * noise(0) * (1 if step // 8 % 2 else -1)

    (message,) = messages(gradient, steps_per_epoch=math.inf)
    assert "the scale turned" in message
    assert "by a factor of 2 or more" in message


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_said_of_the_cases(optimizer: str, scheduler: str, rule: str) -> None:
    """Warnings are errors here, as everywhere in the tests."""
    model = make_net()
    base = OPTIMIZERS[optimizer](model.parameters(), lr=1.0)
    updater = Updater(base, SCHEDULERS[scheduler](base))
    mechanic = Mechanic(updater, rule=rule)
    for step in range(260):
        backward(model, step)
        mechanic.step()
        updater.step()


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("task", ["diabetes", "lines", "new_digits"])
def test_nothing_is_said_of_real_tasks(
    task: str, optimizer: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks" / "robustness"))
    it = importlib.import_module("tasks").TASKS[task]()
    torch.manual_seed(0)
    model = it.make()
    base = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](model.parameters(), lr=1.0)
    updater = Updater(base, lr_scheduler.CosineAnnealingLR(base, STEPS) if schedule == "cosine" else None)
    mechanic = Mechanic(updater)
    for _ in range(STEPS):
        rows = torch.randint(len(it.train[0]), (it.batch,))
        updater.zero_grad()
        it.loss(model(it.train[0][rows]), it.train[1][rows]).backward()
        mechanic.step()
        updater.step()


@pytest.mark.parametrize(("first", "second"), [(TURNS, TURNS), (TURNS - 1, TURNS), (TURNS, TURNS - 1)])
def test_it_oscillates_if_it_turns_often_before_two_checks(first: int, second: int) -> None:
    """The first rise is no turn; nor is one that follows on a change by less than a factor of 2."""
    diagnosis, one = Diagnosis(), torch.tensor(1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for check, turns in ((FIRST, first), (2 * FIRST, second)):
            scales = [0.1, 0.9, 0.6, 1.0, *(1.0 if turn % 2 else 0.4 for turn in range(turns))]
            scales += scales[-1:] * (WINDOW - len(scales))
            for step, scale in enumerate(scales, check - WINDOW + 1):
                diagnosis.watch(step, torch.tensor([scale]), one[None], True, Sums(one, one, one, one), 1.0, 0)
    assert len(caught) == (first >= TURNS <= second)


def test_only_the_checks_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_net()
    updater = Updater(torch.optim.AdamW(model.parameters(), lr=0.2))
    mechanic = Mechanic(updater)
    reads: list[int] = []
    for step in range(1, 300):
        backward(model, step)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
                method = getattr(Tensor, name)
                patch.setattr(Tensor, name, lambda *args, method=method: (reads.append(step), method(*args))[1])  # noqa: B023
            mechanic.step()
        updater.step()
    assert reads == [128, 256]


def test_a_watched_run_pickles_and_resumes_bit_for_bit() -> None:
    """At a step before a check, where tensors wait to be read, some of them of a skipped step."""
    model = make_net()
    updater = Updater(torch.optim.AdamW(model.parameters(), lr=0.2))
    run = (model, updater, Mechanic(updater))

    def train(run: Any, steps: range) -> None:
        for step in steps:
            backward(run[0], step)
            if step == 80:
                run[0].gain.grad.fill_(math.nan)
            run[2].step()
            run[1].step()

    train(run, range(100))
    copy = pickle.loads(pickle.dumps(run))
    fresh = make_net()
    fresh.load_state_dict(run[0].state_dict())
    fresh_updater = Updater(torch.optim.AdamW(fresh.parameters(), lr=0.2))
    loaded = (fresh, fresh_updater, Mechanic(fresh_updater))
    for mine, saved in zip(loaded, run, strict=True):
        mine.load_state_dict(saved.state_dict())
    for one in (run, copy, loaded):
        train(one, range(100, 260))
    for other in (copy, loaded):
        for a, b in zip(run, other, strict=True):
            assert_same_bits(a.state_dict(), b.state_dict())
