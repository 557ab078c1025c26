"""The scale that is learned from held-out rows: when they are asked for, and what becomes of the other gradients."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from problems import assert_same_bits, backward, flat, make_net, pair, pending, train
from torch import nn

from manic import Mechanic, Updater


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
    train(model, updater, mechanic, range(120))
    assert [row["iter_count"] for row in logged] == list(range(every, 121, every))


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
