"""Gradients that are accumulated, clipped or scaled before a step, with both forms."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from problems import assert_same_bits, backward, batch, flat, make_net, relative_difference
from torch import nn

from manic import Mechanic, Updater, mechanize

FORMS = ["two objects", "drop-in"]
STEPS, PARTS = 40, 4
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Tuned:
    """Either form behind one `step`, and what a GradScaler is given."""

    def __init__(self, form: str, model: nn.Module, **options: Any) -> None:
        if form == "drop-in":
            self.target: Any = mechanize(torch.optim.AdamW, s_init=1e-3)(model.parameters(), lr=0.1, **options)
            self.before, self.mechanic = [], self.target.mechanic
        else:
            self.target = Updater(torch.optim.AdamW(model.parameters(), lr=0.1, **options))
            self.mechanic = Mechanic(self.target, s_init=1e-3)
            self.before = [self.mechanic]

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        for part in self.before:
            part.step()
        self.target.step() if scaler is None else scaler.step(self.target)


def train(
    form: str, *, parts: int, limit: float | None, scale: float | None
) -> tuple[torch.Tensor, float, list[float]]:
    model = make_net()
    tuned = Tuned(form, model)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10)
    norms = []
    for step in range(STEPS):
        x, y = batch(step)
        model.zero_grad()
        for rows, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = (model(rows) - targets).square().mean() / parts
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(tuned.target)
        if limit is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
        tuned.step(scaler)
        if scaler is not None:
            scaler.update()
    return flat(model), float(tuned.mechanic.scale), norms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_accumulated_parts_of_a_batch_are_the_batch(form: str, limit: float | None, scale: float | None) -> None:
    """float64; the loss scale is a power of two, which rounds nothing."""
    expected, expected_scale, norms = train(form, parts=1, limit=limit, scale=None)
    assert relative_difference(expected, flat(make_net())) > 1e-2
    assert expected_scale > 0
    assert limit is None or sum(norm > limit for norm in norms) > STEPS // 2
    parameters, found_scale, _ = train(form, parts=PARTS, limit=limit, scale=scale)
    assert relative_difference(parameters, expected) < 1e-10
    assert found_scale == pytest.approx(expected_scale, rel=1e-10)
    if limit is not None:  # and clipping matters
        assert relative_difference(train(form, parts=1, limit=None, scale=None)[0], expected) > 1e-3


@pytest.mark.parametrize("unscaled", ["nothing", "the optimizer"])
def test_gradients_that_a_scaler_has_not_unscaled_for_the_updater_are_refused(unscaled: str) -> None:
    """It would divide them after `Mechanic.step` has seen them, for the second time if the optimizer's were."""
    model = make_net()
    tuned = Tuned("two objects", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def backward(step: int) -> None:
        x, y = batch(step)
        model.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()

    for step in range(5):
        backward(step)
        scaler.unscale_(tuned.target)
        tuned.step(scaler)
        scaler.update()
    backward(5)
    if unscaled == "the optimizer":
        scaler.unscale_(tuned.target.base_optimizer)
    before, state = flat(model), tuned.target.state_dict()
    with pytest.raises(RuntimeError, match=r"Call scaler\.unscale_\(updater\), and not scaler\.unscale_\(optimizer\)"):
        tuned.step(scaler)
    assert torch.equal(flat(model), before)
    assert_same_bits(tuned.target.state_dict(), state)
    scaler.update()
    backward(5)
    scaler.unscale_(tuned.target)
    tuned.step(scaler)
    assert 0 < relative_difference(flat(model), before) < 1


def test_what_a_scaler_told_is_forgotten_after_an_error() -> None:
    """Or all steps without a scaler would be skipped, because this one found an inf once."""
    model = make_net()
    tuned = Tuned("two objects", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = batch(0)
    scaler.scale((model(x) - y).square().mean() * float("inf")).backward()
    scaler.unscale_(tuned.target)
    with pytest.raises(RuntimeError, match=r"without a mechanic\.step\(\)"):
        scaler.step(tuned.target)
    before = flat(model)
    for step in range(10):
        x, y = batch(step)
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        tuned.step()
    assert relative_difference(flat(model), before) > 1e-3


def skip_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: torch's fused optimizers skip a step that is not finite, and the host does not wait to know."""
    monkeypatch.setattr("manic.mechanic._counts", lambda tensor: True)
    monkeypatch.setattr(Updater, "_base_can_skip", lambda self, one_pass: not self.displacement.joined)


def test_steps_that_the_device_skips_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The displacement restarts, and bets end, at the same steps taken, with a save in between or without."""
    bad = (7, 30, 31, 32, 33)

    def trained(*, save: bool) -> torch.Tensor:
        model = make_net()
        del model.unused
        updater = Updater(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
        mechanic = Mechanic(updater, steps_per_epoch=20)
        for call in range(265):
            backward(model, call - sum(one < call for one in bad))
            if call in bad:
                model.gain.grad.fill_(float("inf"))
            mechanic.step()
            updater.step()
            if save and call == 60:
                updater.state_dict()
        return flat(model)

    on_host = trained(save=False)
    skip_on_the_device(monkeypatch)
    on_device = trained(save=False)
    assert relative_difference(on_device, flat(make_net())[: len(on_device)]) > 1e-2
    assert torch.equal(trained(save=True), on_device)
    assert relative_difference(on_device, on_host) < 1e-6


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("skips", ["host", "device"])
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_step_that_only_the_scaler_knows_to_be_bad_is_skipped(
    store_delta: bool, skips: str, nonfinite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of the training rows, where the scale is learned from others, and nobody has checked them."""
    if skips == "device":
        skip_on_the_device(monkeypatch)
    model = make_net()
    del model.unused
    base = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    updater = Updater(base, store_delta=store_delta, nonfinite=nonfinite)
    mechanic = Mechanic(updater, s_init=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(10):
        before, scale = flat(model), float(updater._scale)
        for rows in ("held-out rows", "training rows"):
            x, y = batch(step + 500 * (rows == "held-out rows"))
            model.zero_grad()
            loss = (model(x) - y).square().mean()
            (loss if rows == "held-out rows" else scaler.scale(loss)).backward()
            if rows == "held-out rows":
                mechanic.step()
        if step == 5:
            assert model.gain.grad is not None
            model.gain.grad.fill_(float("inf"))
        scaler.unscale_(updater)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the gradients are others than those that `Mechanic.step` saw
            scaler.step(updater)
        scaler.update()
        assert torch.equal(flat(model), before) == (step == 5)
        assert step != 5 or float(updater._scale) == scale


def test_held_out_rows_have_a_loss_scale_of_their_own() -> None:
    """float64; loss scales are powers of two, which round nothing."""

    def trained(*, scaled: bool) -> torch.Tensor:
        model = make_net()
        tuned = Tuned("two objects", model)
        held_out, training = (
            torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10, enabled=scaled)
            for scale in (2.0**16, 2.0**8)
        )

        def unscaled(scaler: torch.amp.GradScaler, step: int) -> None:
            x, y = batch(step)
            scaler.scale((model(x) - y).square().mean()).backward()
            scaler.unscale_(tuned.target)

        def others(step: int) -> None:
            unscaled(held_out, 500 + step)
            held_out.update()

        for step in range(STEPS):
            model.zero_grad()
            unscaled(training, step)
            tuned.mechanic.held_out = partial(others, step)
            tuned.mechanic.step()
            training.step(tuned.target)
            training.update()
        return flat(model)

    expected = trained(scaled=False)
    assert relative_difference(expected, flat(make_net())) > 1e-2
    assert relative_difference(trained(scaled=True), expected) < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("device", "fused"), [("cpu", False), pytest.param("cuda", False, marks=gpu), pytest.param("cuda", True, marks=gpu)]
)
@pytest.mark.parametrize("scaled", [True, False])
def test_an_infinite_gradient_skips_the_whole_step(form: str, device: str, fused: bool, scaled: bool) -> None:
    """Under autocast: base optimizer, displacement and tuner are as before, but for the counts of steps.

    Without a loss scale a fused base skips on the device, and any other on the host.
    """
    model = make_net(dtype=torch.float32).to(device)
    tuned = Tuned(form, model, fused=fused)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=scaled)
    parts = {"target": tuned.target, **({"mechanic": tuned.mechanic} if form == "two objects" else {})}

    def step(i: int, *, bad: bool = False) -> None:
        x, y = (tensor.to(device) for tensor in batch(i, torch.float32))
        with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
            loss = (model(x) - y).square().mean()
        model.zero_grad()
        scaler.scale(loss).backward()
        if bad:
            assert model.gain.grad is not None
            model.gain.grad.fill_(float("inf"))
        scaler.unscale_(tuned.target)
        tuned.step(scaler)
        scaler.update()

    start = flat(model)
    for i in range(30):
        step(i)
    before, states = flat(model), {name: part.state_dict() for name, part in parts.items()}
    assert relative_difference(before, start) > 1e-3
    assert float(tuned.mechanic.scale) > 0
    loss_scale = scaler.get_scale()
    step(30, bad=True)
    assert scaler.get_scale() == (loss_scale / 2 if scaled else loss_scale)
    assert torch.equal(flat(model), before)
    for name, part in parts.items():
        assert_same_bits(without_count(part.state_dict()), without_count(states[name]))
    for i in range(31, 40):
        step(i)
    assert relative_difference(flat(model), before) > 1e-3


def without_count(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without the numbers of steps seen and skipped, which count what did not happen too."""
    names = ("skipped", "steps", "mechanic_skipped", "mechanic_steps")
    groups = state.get("param_groups")
    if groups is not None:
        state = {**state, "param_groups": [{k: v for k, v in group.items() if k not in names} for group in groups]}
    return {key: value for key, value in state.items() if key not in names}
