"""`manic.opt_list`: the figures, the schedule, and the optimizer, against an oracle in plain floats."""

import copy
import fractions
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from manic import Mechanic, Updater, mechanize
from manic.opt_list import Config, NAdamW, config_for_idx, optimizer_for_idx

PASSES = {"single_tensor": {"foreach": False}, "foreach": {}, "fused": {"fused": True}}
START = [3.0, -2.0, 0.5]
STEPS = 120


def gradient(step, i):
    """A gradient that changes sign and size, and does not depend on x, so that rounding cannot grow."""
    return math.sin(0.7 * step + i) + 0.3 * (i + 1)


def oracle(entry, steps, training_steps, start=START):
    """The published update in plain floats: the points after every step."""
    xs = list(start)
    ms, vs = [0.0] * len(xs), [0.0] * len(xs)
    points = []
    for step in range(steps):
        now = min(step, training_steps)
        plateau = entry["constant_fraction"] * training_steps
        rising = max(entry["warmup_fraction"], entry["constant_fraction"]) * training_steps
        if entry["warmup_fraction"] and now < rising:
            lr = entry["lr"] * now / rising
        elif now <= plateau:
            lr = entry["lr"]
        else:
            low = entry["final_lr_fraction"] * entry["lr"]
            angle = (now - plateau) / (training_steps - plateau) * math.pi
            lr = low + (entry["lr"] - low) * (math.cos(angle) / 2 + 0.5)
        t = step + 1
        lr_t = lr * (1 - entry["beta2"] ** t) ** 0.5 / (1 - entry["beta1"] ** t)
        for i, x in enumerate(xs):
            g = gradient(step, i) - entry["l2_weight_decay"] * x
            ms[i] = entry["beta1"] * ms[i] + (1 - entry["beta1"]) * g
            vs[i] = entry["beta2"] * vs[i] + (1 - entry["beta2"]) * g**2
            top = entry["beta1"] * ms[i] + (1 - entry["beta1"]) * g if entry["nesterov"] else ms[i]
            change = lr_t * top / (vs[i] ** 0.5 + entry["eps"])
            xs[i] = x - change - lr_t * entry["decoupled_weight_decay"] * x
        points.append(list(xs))
    return points


def entry_of(idx):
    config = config_for_idx(idx)
    entry = dict(vars(config))
    entry["beta1"], entry["beta2"] = entry.pop("betas")
    return entry


def points_of(optimizer, weight, steps):
    points = []
    for step in range(steps):
        weight.grad = torch.tensor([gradient(step, i) for i in range(len(weight))], dtype=weight.dtype)
        optimizer.step()
        points.append(weight.tolist())
    return points


def weight_of(start=START, dtype=torch.float64):
    return nn.Parameter(torch.tensor(start, dtype=dtype))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def loss_of(model):
    parameter = next(model.parameters())
    x = torch.sin(torch.arange(120, dtype=torch.float64)).reshape(20, 6).to(parameter)
    return (model(x).squeeze(1) - 2 * x[:, 0] + x[:, 1] * x[:, 2] - 1).square().mean()


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


# The figures


@pytest.mark.parametrize(
    ("idx", "expected"),
    [
        (0, Config(lr=0.001194834, betas=(0.9360043, 0.9989497), eps=5.875814e-06, decoupled_weight_decay=0.01014196,
                   constant_fraction=0.747304)),
        (13, Config(lr=0.1879582, betas=(0.9859738, 0.565309), eps=3.335463, decoupled_weight_decay=0.003867884,
                    l2_weight_decay=1.265087e-05, nesterov=True, constant_fraction=0.2050654,
                    final_lr_fraction=0.107922)),
        (99, Config(lr=0.005795263, betas=(0.6151843, 0.8103502), eps=6.11996e-06, decoupled_weight_decay=0.02512419,
                    warmup_fraction=0.05928975, constant_fraction=0.6753501, final_lr_fraction=1.135867e-05)),
    ],
)  # fmt: skip
def test_the_figures_are_the_published_ones(idx, expected):
    assert config_for_idx(idx) == expected


def test_all_hundred_entries_are_there_and_differ():
    assert len({config_for_idx(idx) for idx in range(100)}) == 100
    assert sum(config_for_idx(idx).nesterov for idx in range(100)) == 47
    assert sum(config_for_idx(idx).l2_weight_decay > 0 for idx in range(100)) == 31


@pytest.mark.parametrize("idx", [-1, 100, 10**9])
def test_a_place_outside_the_list_is_refused(idx):
    with pytest.raises(ValueError, match=rf"idx is {idx}; expected a place in the list, 0 .* to 99"):
        config_for_idx(idx)
    with pytest.raises(ValueError, match="expected a place"):
        optimizer_for_idx([weight_of()], idx, 10)


@pytest.mark.parametrize("idx", [0.0, "0", None])
def test_a_place_that_is_no_whole_number_is_refused(idx):
    with pytest.raises(TypeError, match="whole number"):
        config_for_idx(idx)


# The schedule


def test_schedule_without_warmup_is_constant_then_half_a_cosine():
    config = Config(lr=1.0, betas=(0.9, 0.99), eps=1e-8, constant_fraction=0.2, final_lr_fraction=0.1)
    expected = {0: 1.0, 20: 1.0, 40: 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi / 4)), 60: 0.55, 100: 0.1, 1000: 0.1}
    assert {step: config.lr_factor(step, 100) for step in expected} == pytest.approx(expected, abs=1e-15)


def test_warmup_lasts_through_the_constant_part():
    config = Config(lr=1.0, betas=(0.9, 0.99), eps=1e-8, warmup_fraction=0.01, constant_fraction=0.5)
    expected = {0: 0.0, 1: 0.02, 25: 0.5, 49: 0.98, 50: 1.0, 75: 0.5, 100: 0.0}
    assert {step: config.lr_factor(step, 100) for step in expected} == pytest.approx(expected, abs=1e-15)


def test_warmup_longer_than_the_constant_part_ends_on_the_cosine():
    config = Config(lr=1.0, betas=(0.9, 0.99), eps=1e-8, warmup_fraction=0.6, constant_fraction=0.2)
    expected = {30: 0.5, 59: 59 / 60, 60: 0.5, 100: 0.0}
    assert {step: config.lr_factor(step, 100) for step in expected} == pytest.approx(expected, abs=1e-15)


def test_training_steps_of_numpy_are_saved_as_plain_ones(tmp_path):
    optimizer = optimizer_for_idx([weight_of()], 0, np.int64(100))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["param_groups"][0]["training_steps"] == 100


@pytest.mark.parametrize("training_steps", [0, -5, 10.0, "10"])
def test_training_steps_that_are_none_are_refused(training_steps):
    with pytest.raises(ValueError, match=r"training_steps is .*; expected the number of optimizer steps"):
        optimizer_for_idx([weight_of()], 0, training_steps)
    with pytest.raises(ValueError, match="training_steps"):
        config_for_idx(0).lr_factor(0, training_steps)


@pytest.mark.parametrize("step", [-5, math.nan, "5"])
def test_a_step_before_the_first_is_refused(step):
    with pytest.raises(ValueError, match=f"step is {step!r}; expected the number of steps taken before this one"):
        config_for_idx(3).lr_factor(step, 100)


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
def test_after_the_last_step_the_last_rate_stays_and_one_warning_is_given(options):
    still, moving = weight_of(), weight_of()
    for idx, weight in ((0, still), (12, moving)):
        assert (config_for_idx(idx).final_lr_fraction > 0) == (weight is moving)
        optimizer = optimizer_for_idx([weight], idx, training_steps=20, **options)
        expected = oracle(entry_of(idx), 30, 20)
        assert points_of(optimizer, weight, 20)[-1] == pytest.approx(expected[19], rel=1e-12)
        with pytest.warns(UserWarning, match=r"step 21 of a schedule of training_steps=20") as warned:
            points = points_of(optimizer, weight, 1)
        assert warned[0].filename == __file__
        points += points_of(optimizer, weight, 9)  # warnings are errors
        assert (points[0] == points[-1]) == (weight is still)


# The update


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
def test_every_entry_takes_the_published_steps(options):
    for idx in range(100):
        weight = weight_of()
        points = points_of(optimizer_for_idx([weight], idx, STEPS, **options), weight, STEPS)
        expected = oracle(entry_of(idx), STEPS, STEPS)
        assert all(abs(x - x0) > 1e-5 for x, x0 in zip(expected[-1], START, strict=True)), idx  # it moved
        assert torch.tensor(points).numpy() == pytest.approx(torch.tensor(expected).numpy(), rel=1e-11), idx


def test_the_sign_of_l2_is_the_published_one():
    weight = weight_of([1.0])
    optimizer = NAdamW([weight], lr=0.1, l2_weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.item() > 1  # it grows


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_passes_agree_on_a_net(options, nesterov, dtype):
    settings = {
        "lr": 0.01, "eps": 1e-4, "decoupled_weight_decay": 0.1, "l2_weight_decay": 1e-3, "nesterov": nesterov,
        "training_steps": STEPS, "warmup_fraction": 0.1, "constant_fraction": 0.3,
    }  # fmt: skip
    models = [net(dtype), net(dtype)]
    before = loss_of(models[0]).item()
    train(models[0], NAdamW(models[0].parameters(), foreach=False, **settings), STEPS)
    train(models[1], NAdamW(models[1].parameters(), **settings, **options), STEPS)
    assert loss_of(models[0]).item() < 0.7 * before
    for plain, fast in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
def test_gradients_are_not_written(options):
    weight = weight_of()
    optimizer = NAdamW([weight], l2_weight_decay=0.1, nesterov=True, maximize=True, **options)
    weight.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optimizer.step()
    assert weight.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("options", [{"foreach": False}, {}], ids=["single_tensor", "foreach"])
def test_a_step_reads_nothing_back_from_the_device(options):
    weight = nn.Parameter(torch.empty(3, device="meta"))  # reading a value of a meta tensor raises
    optimizer = optimizer_for_idx([weight], 15, 10, **options)
    for _ in range(3):
        weight.grad = torch.empty_like(weight)
        optimizer.step()


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
def test_maximize_climbs_what_minimize_descends(options):
    down, up = weight_of(), weight_of()
    minimizer = NAdamW([down], lr=0.1, nesterov=True, **options)
    maximizer = NAdamW([up], lr=0.1, nesterov=True, maximize=True, **options)
    for step in range(100):
        down.grad = torch.tensor([gradient(step, i) for i in range(3)], dtype=torch.float64)
        up.grad = -down.grad
        minimizer.step()
        maximizer.step()
    assert down.tolist() != START
    assert torch.equal(down, up)


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
def test_complex_parameters_are_pairs_of_real_ones(options):
    real = weight_of([1.0, -2.0, 3.0, 0.5])
    pair = nn.Parameter(torch.tensor([1.0 - 2.0j, 3.0 + 0.5j], dtype=torch.complex128))
    optimizers = [optimizer_for_idx([weight], 15, 100, **options) for weight in (real, pair)]
    for step in range(100):
        real.grad = torch.tensor([gradient(step, i) for i in range(4)], dtype=torch.float64)
        pair.grad = torch.view_as_complex(real.grad.reshape(2, 2).clone())
        for optimizer in optimizers:
            optimizer.step()
    assert real.tolist() != [1.0, -2.0, 3.0, 0.5]
    assert torch.equal(torch.view_as_real(pair.detach()).flatten(), real.detach())


# The habits of a torch optimizer


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resuming_changes_no_bit(options, dtype):
    def build():
        model = net(dtype)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02, "nesterov": True}]
        return model, NAdamW(groups, lr=0.01, training_steps=80, constant_fraction=0.3, **options)

    whole, optimizer = build()
    train(whole, optimizer, 80)

    model, optimizer = build()
    train(model, optimizer, 37)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = build()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 43)
    for resumed, uninterrupted, start in zip(
        model.parameters(), whole.parameters(), net(dtype).parameters(), strict=True
    ):
        assert not torch.equal(uninterrupted, start)
        assert torch.equal(resumed, uninterrupted)


def test_it_can_be_pickled_and_copied():
    weight = weight_of()
    optimizer = optimizer_for_idx([weight], 7, 50)
    points_of(optimizer, weight, 20)
    twins = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    expected = points_of(optimizer, weight, 20)
    assert expected[0] != expected[-1]
    for twin in twins:
        assert points_of(twin, twin.param_groups[0]["params"][0], 20) == expected


def test_groups_have_options_of_their_own():
    first, second = weight_of(), weight_of()
    optimizer = NAdamW([{"params": [first], "lr": 0.1}, {"params": [second], "nesterov": True}], lr=0.03)
    alone = weight_of(), weight_of()
    separate = NAdamW([alone[0]], lr=0.1), NAdamW([alone[1]], lr=0.03, nesterov=True)
    for step in range(100):
        for weight in (first, second, *alone):
            weight.grad = torch.tensor([gradient(step, i) for i in range(3)], dtype=torch.float64)
        for each in (optimizer, *separate):
            each.step()
    assert not torch.equal(first, second)
    assert torch.equal(first, alone[0])
    assert torch.equal(second, alone[1])


def test_a_group_that_joins_late_is_where_the_schedule_is():
    old, new = weight_of(), weight_of()
    optimizer = NAdamW([old], lr=0.1, training_steps=100, constant_fraction=0.0)
    points_of(optimizer, old, 60)
    optimizer.add_param_group({"params": [new]})
    new.grad = torch.ones_like(new)
    optimizer.step()
    # The first step of Adam is lr·sign(g); here with the rate of step 60.
    expected = 0.1 * (1 + math.cos(math.pi * 0.6)) / 2
    assert (torch.tensor(START).double() - new.detach()).tolist() == pytest.approx([expected] * 3, rel=1e-6)
    with pytest.raises(ValueError, match="lr is -1"):
        optimizer.add_param_group({"params": [weight_of()], "lr": -1})
    for betas in (0.9, (0.9,), (0.9, 0.99, 0.999)):
        with pytest.raises(ValueError, match=r"betas is .*; expected a pair of numbers in \[0, 1\)"):
            optimizer.add_param_group({"params": [weight_of()], "betas": betas})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
def test_a_parameter_without_a_gradient_rests_and_joins_at_the_rate_of_the_others(options):
    early, late, never = weight_of(), weight_of(), weight_of()
    optimizer = NAdamW([early, late, never], lr=0.1, training_steps=100, **options)
    points_of(optimizer, early, 60)
    assert late.tolist() == START
    late.grad = torch.ones_like(late)
    optimizer.step()
    expected = 0.1 * (1 + math.cos(math.pi * 0.6)) / 2
    assert (torch.tensor(START).double() - late.detach()).tolist() == pytest.approx([expected] * 3, rel=1e-6)
    assert never.tolist() == START
    assert never not in optimizer.state


def test_a_closure_gives_the_loss_and_the_gradients():
    weight = weight_of()
    optimizer = NAdamW([weight], lr=0.1)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert losses[0] == 13.25
    assert losses[-1] < 0.1


def test_parameters_of_several_dtypes_are_stepped_together():
    weights = [weight_of(dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64)]
    optimizer = NAdamW(weights, lr=0.1)
    for step in range(30):
        for weight in weights:
            weight.grad = torch.tensor([gradient(step, i) for i in range(3)], dtype=weight.dtype)
        optimizer.step()
    assert torch.equal(weights[0], weights[3])
    torch.testing.assert_close(weights[1].double(), weights[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights[2].double(), weights[0], rtol=0.05, atol=0.05)


def test_a_torch_schedule_multiplies_the_rate():
    config = config_for_idx(7)
    inside, outside = weight_of(), weight_of()
    optimizer = optimizer_for_idx([outside], 7, None)
    schedule = LambdaLR(optimizer, lambda step: config.lr_factor(step, STEPS))
    expected = points_of(optimizer_for_idx([inside], 7, STEPS), inside, STEPS)
    points = []
    for step in range(STEPS):
        outside.grad = torch.tensor([gradient(step, i) for i in range(3)], dtype=torch.float64)
        optimizer.step()
        schedule.step()
        points.append(outside.tolist())
    assert points == expected
    assert points[-1] != START


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = NAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(4, 2\) is sparse"):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0
    assert not optimizer.state


@pytest.mark.parametrize("nesterov", [False, True])
def test_tensors_that_lie_differently_in_memory(nesterov):
    """As a gradient that was set by hand, or a parameter with gaps; torch's fused kernel goes through memory."""
    ends = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        whole = torch.linspace(-1.0, 1.0, 240).reshape(2, 3, 4, 10)
        weights = [whole.to(memory_format=torch.channels_last), whole[..., ::2], whole.clone()]
        weights = [nn.Parameter(weight) for weight in weights]
        optimizer = NAdamW(weights, lr=0.1, nesterov=nesterov, **options)
        for step in range(5):
            for weight in weights:
                weight.grad = torch.sin(torch.arange(weight.numel()) + step).reshape(weight.shape)
            optimizer.step()
        ends.append(torch.cat([weight.detach().flatten() for weight in weights]))
    assert (
        float((ends[0] - torch.cat([weight.flatten() for weight in (whole, whole[..., ::2], whole)])).abs().max()) > 0.1
    )
    assert torch.allclose(ends[1], ends[0], atol=1e-5)
    assert torch.allclose(ends[2], ends[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lr", {"lr": -0.1}),
        ("lr", {"lr": math.inf}),
        ("lr", {"lr": torch.tensor(0.1)}),
        (r"betas\[0\]", {"betas": (1.0, 0.9)}),
        (r"betas\[1\]", {"betas": (0.9, -0.1)}),
        ("eps", {"eps": 0.0}),
        ("decoupled_weight_decay", {"decoupled_weight_decay": -1e-4}),
        ("l2_weight_decay", {"l2_weight_decay": math.nan}),
        ("warmup_fraction", {"warmup_fraction": 1.5}),
        ("constant_fraction", {"constant_fraction": 1.0}),
        ("final_lr_fraction", {"final_lr_fraction": -0.1}),
        ("training_steps", {"training_steps": 0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected"):
        NAdamW([weight_of()], **options)
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected"):
        NAdamW([{"params": [weight_of()], **options}])


# With the tuner


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("idx", [0, 8, 15])
def test_an_updater_trains_it_at_any_rate_the_same(idx, options):
    losses = []
    for factor in (1.0, 2.0**-30):
        model = net()
        optimizer = optimizer_for_idx(model.parameters(), idx, 200, **options)
        optimizer.param_groups[0]["lr"] *= factor
        updater = Updater(optimizer)
        mechanic = Mechanic(updater)
        start = loss_of(model).item()
        for _ in range(200):
            updater.zero_grad()
            loss_of(model).backward()
            mechanic.step()
            updater.step()
        losses.append(loss_of(model).item())
    assert losses[0] < 0.8 * start
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_mechanized_it_resumes_bit_for_bit():
    def build():
        model = net()
        config = config_for_idx(15)
        return model, mechanize(NAdamW)(model.parameters(), **vars(config), training_steps=200)

    whole, optimizer = build()
    start = loss_of(whole).item()
    train(whole, optimizer, 200)
    assert loss_of(whole).item() < 0.8 * start

    model, optimizer = build()
    train(model, optimizer, 90)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = build()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 110)
    for resumed, uninterrupted in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(resumed, uninterrupted)


def test_numbers_of_any_kind_are_taken():
    assert NAdamW([weight_of()], lr=fractions.Fraction(1, 8)).defaults["lr"] == 0.125
