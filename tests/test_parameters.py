"""Parameters that join, leave, are frozen or changed by others; their dtypes and layouts in memory."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from problems import (
    OPTIMIZERS,
    Net,
    backward,
    batch,
    evaluate,
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

from manic import Mechanic, Updater
from manic.tuner import RESCALED

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


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
    assert float(delta.min()) < -0.01 / scale < 0 < delta.max()
    left = torch.where(delta < 0, (delta + 0.01 / scale).clamp(max=0), delta)
    changed = weight.detach() + 0.01
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
    assert torch.allclose(slot.reference, reference + 0.01 - RESCALED * scale * (left - delta), rtol=1e-12)
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


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_that_are_clipped_after_every_step(optimizer: str, size: int) -> None:
    """What clipping undoes cannot pay for a larger scale, even if it undoes most."""
    torch.manual_seed(0)
    weight, target = nn.Parameter(torch.randn(1000).clamp(-1, 1)), size * torch.randn(1000)
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
    assert 0 < (moved - before).abs().sort().values[-2] < 0.5


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

    train(model, updater, mechanic, range(20, 25))
    assert delta() > 0
    train(model, updater, mechanic, range(25, 27))  # Δ starts again after step 27
    assert delta() == 0
    before = flat(model)
    model.out.weight.requires_grad_(True)
    train(model, updater, mechanic, range(27, 29))
    assert 0 < relative_difference(flat(model), before) < 1


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
