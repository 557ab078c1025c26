"""`functional.mechanize` against `Mechanic` and `Updater`, and what only pure functions can do."""

import math
from dataclasses import replace

import pytest
import torch
from functional_problem import distance, make_problem, needs_recent_compiler
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

import manic
from manic.functional import (
    OPTIMIZERS,
    AdamConfig,
    SGDConfig,
    TunerConfig,
    adam_init,
    adamw_step,
    loss_scaler,
    mechanize,
    schedules,
    sgd_init,
    sgd_step,
)
from manic.functional.tree import Number

STEPS, PUBLISHED_STEPS = 300, 120  # after 243 the default rule's scale follows noise and schedule


def same_bits(tree, other):
    return tree_structure(tree) == tree_structure(other) and all(
        torch.equal(*pair) for pair in zip(tree_leaves(tree), tree_leaves(other), strict=True)
    )


def spoiled(grads, t):
    """One bad gradient on the way, and then an infinite one."""
    bad = {20: math.nan, 21: math.inf}.get(t)
    return grads if bad is None else {name: g + bad * (name == "2.bias") for name, g in grads.items()}


def changed(params, t):
    """What somebody else does to the parameters on the way."""
    return {name: p * 0.9 if t == 60 and name == "0.weight" else p for name, p in params.items()}


SGD = {"lr": 1.0}
MOMENTUM = {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
ADAM = {"lr": 0.1, "weight_decay": 1e-2}
CASES = [
    ("sgd", torch.optim.SGD, SGD, {}),
    ("sgd", torch.optim.SGD, SGD, {"rule": "paper"}),
    ("sgd", torch.optim.SGD, SGD, {"rule": "optax", "s_decay": 0.0}),
    ("sgd", torch.optim.SGD, MOMENTUM, {"rule": "mechanic_pytorch", "s_init": 1e-4}),
    ("adam", torch.optim.Adam, ADAM, {"rule": "optax", "betas": (0.9, 0.99)}),
    ("adamw", torch.optim.AdamW, ADAM, {"steps_per_epoch": 12}),
    ("adamw", torch.optim.AdamW, ADAM, {"rule": "optax", "s_decay": 0.1}),
    ("adamw", torch.optim.AdamW, ADAM, {"s_init": 1e-4, "max_scale": 0.02}),  # below what is learned
    ("adamw", torch.optim.AdamW, ADAM, {"s_init": 1e-4, "max_scale": 0.62}),  # above it, until the schedule decays
]


@pytest.mark.parametrize(("name", "reference", "options", "tuner"), CASES)
def test_equals_mechanic_and_updater(name, reference, options, tuner):
    start, loss = make_problem()
    steps = PUBLISHED_STEPS if "rule" in tuner else STEPS

    theirs = {key: leaf.clone().requires_grad_() for key, leaf in start.items()}
    optimizer = reference(theirs.values(), **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1.5 * steps)
    updater = manic.Updater(optimizer, scheduler, internal_lr=None)
    log = []
    mechanic = manic.Mechanic(updater, **tuner, log_func=lambda row: log.append((float(row["s"]), float(row["h"]))))
    for t in range(steps):
        updater.zero_grad()
        loss(theirs, t).backward()
        grads = spoiled({key: leaf.grad for key, leaf in theirs.items()}, t)
        with torch.no_grad():
            for key, leaf in theirs.items():
                leaf.grad = grads[key]
        mechanic.step()
        updater.step()
        with torch.no_grad():
            for key, new in changed(theirs, t).items():
                if new is not theirs[key]:
                    theirs[key].copy_(new)
    theirs = {key: leaf.detach() for key, leaf in theirs.items()}
    scales, products = zip(*log, strict=True)
    assert distance(theirs, start) > 0.05
    assert loss(theirs, 0) < loss(start, 0)
    assert scales[-1] > 0
    if "rule" not in tuner:  # two steps were skipped
        learned = mechanic.learning_steps
        changes = [abs(scale / scales[learned] - 1) for scale in scales[learned:]]
        assert max(changes) > 0.1 or scales[244:] == pytest.approx((tuner.get("max_scale"),) * len(scales[244:]))
    if tuner.get("rule") != "paper":
        assert min(products) < 0 < max(products)

    config_class, base_init, base_step = OPTIMIZERS[name]
    config = config_class(**options)
    init, step = mechanize(base_step, TunerConfig(**tuner))
    ours = start
    state = init(ours, base_init(ours, config), config.lr)
    done = 0
    for t in range(steps):
        grads = spoiled(torch.func.grad(loss)(ours, t), t)
        lr = config.lr * schedules.cosine(done / (1.5 * steps))
        new, new_state = step(ours, grads, state, replace(config, lr=lr))
        if t in (20, 21):
            assert same_bits((new, new_state), (ours, state))
        else:
            done += 1
        ours, state = changed(new, t), new_state
        if t > 0 or "rule" in tuner or "s_init" in tuner:  # else Mechanic logs before the first update is known
            assert float(state.scale) == pytest.approx(scales[t], rel=1e-10, abs=1e-300)
    assert distance(ours, theirs) <= (1e-9 if name == "adam" else 1e-12)  # 9e-11: its steps bounce at this rate
    assert float(state.scale) == pytest.approx(scales[-1], rel=1e-12)


def make_training():
    """``begin(stretch)`` and ``train(params, state, lr, t)`` of one model."""
    start, loss = make_problem()
    config = AdamConfig(lr=1.0)
    init, step = mechanize(adamw_step)

    def begin(stretch):
        params = {name: p * stretch for name, p in start.items()}
        return params, init(params, adam_init(params, config))

    def train(params, state, lr, t, *, weight_decay: Number = 1e-2, noise: Number = 0.0):
        grads = tree_map(lambda g: g + noise, torch.func.grad(loss)(params, t))
        return step(params, grads, state, replace(config, lr=lr, weight_decay=weight_decay))

    return begin, train


def test_an_ensemble_equals_separate_runs():
    begin, train = make_training()
    stretches = torch.tensor([0.7, 1.0, 1.2, 1.3]).double()
    lrs = torch.tensor([0.1, 1.0, 3.0, 1.0]).double()
    decays = torch.tensor([0.0, 1e-3, 1e-2, 1e-1]).double()
    noise = torch.zeros(4, 30).double()
    noise[2, 10] = math.nan  # a bad gradient in one model only

    params, state = torch.func.vmap(begin)(stretches)
    for t in range(30):
        params, state = torch.func.vmap(
            lambda params, state, lr, decay, noise, t=t: train(params, state, lr, t, weight_decay=decay, noise=noise)
        )(params, state, lrs, decays, noise[:, t])
    assert state.scale.shape == (4,)

    for i in range(4):
        one, one_state = begin(stretches[i])
        start = one
        for t in range(30):
            one, one_state = train(one, one_state, lrs[i], t, weight_decay=decays[i], noise=noise[i, t])
        assert distance(one, start) > 0.02
        assert float(one_state.scale) > 0
        assert float(one_state.base.step) == (29 if i == 2 else 30)
        assert distance(tree_map(lambda leaf, i=i: leaf[i], params), one) <= 1e-12
        assert distance(tree_map(lambda leaf, i=i: leaf[i], state), one_state) <= 1e-12


def test_every_model_of_an_ensemble_is_the_same_whatever_its_rate():
    start, loss = make_problem()
    config = AdamConfig(lr=1.0, weight_decay=1e-2)
    init, step = mechanize(adamw_step)
    lrs = torch.tensor([1e-6, 1.0, 1e3]).double()

    def begin(lr):
        return start, init(start, adam_init(start, config), lr)

    params, state = torch.func.vmap(begin)(lrs)
    for t in range(300):
        params, state = torch.func.vmap(
            lambda params, state, lr, t=t: step(
                params, torch.func.grad(loss)(params, t), state, replace(config, lr=lr * schedules.cosine(t / 300))
            )
        )(params, state, lrs)
    models = [tree_map(lambda leaf, i=i: leaf[i], params) for i in range(3)]
    assert distance(models[1], start) > 0.05
    assert distance(models[0], models[1]) < 1e-7
    assert distance(models[2], models[1]) < 1e-7
    torch.testing.assert_close(state.scale * lrs, state.scale[1].expand(3), rtol=1e-6, atol=0)


def test_is_pure():
    begin, train = make_training()
    params, state = begin(1.0)
    for t in range(5):
        inputs = tree_leaves((params, state))
        before = [(leaf.clone(), leaf._version) for leaf in inputs]
        params, state = train(params, state, torch.tensor(1.0), t)
        for leaf, (old, version) in zip(inputs, before, strict=True):
            assert torch.equal(leaf, old)
            assert leaf._version == version
    assert float(state.scale) > 0


@pytest.mark.parametrize("rule", ["manic", "paper"])
def test_whatever_the_default_device(rule):
    """As ``torch.set_default_device`` sets it."""
    init, step = mechanize(sgd_step, TunerConfig(rule=rule))
    config = SGDConfig(lr=1.0)
    params = {"w": torch.ones(2)}
    with torch.device("meta"):
        state = init(params, sgd_init(params, config))
        moved, state = step(params, params, state, config)
    assert moved["w"].is_cpu


def test_weight_decay_alone_starts_nothing():
    init, step = mechanize(sgd_step)
    config = SGDConfig(lr=1.0, weight_decay=1e-4)
    params = {"w": torch.ones(2)}
    state = init(params, sgd_init(params, config))
    moved, state = step(params, {"w": torch.zeros(2)}, state, config)
    assert torch.equal(moved["w"], params["w"])
    moved, state = step(moved, {"w": torch.ones(2)}, state, config)
    assert distance(moved, params) == pytest.approx(0.003, rel=0.1)


def test_the_reference_is_a_copy():
    params = {"w": torch.ones(2)}
    init, _ = mechanize(sgd_step)
    state = init(params, sgd_init(params, SGDConfig(lr=1.0)))
    params["w"].zero_()
    assert state.reference["w"].tolist() == [1, 1]


@needs_recent_compiler
@pytest.mark.filterwarnings("ignore:`torch.jit")  # inductor's own use of it
def test_compiled_training_step_equals_eager():
    begin, train = make_training()
    compiled = torch.compile(train, fullgraph=True)
    (ours, ours_state), (theirs, theirs_state) = begin(1.0), begin(1.0)
    start = ours
    for t in range(20):
        lr = schedules.linear(t / 20)
        ours, ours_state = compiled(ours, ours_state, lr, 0)
        theirs, theirs_state = train(theirs, theirs_state, lr, 0)
    assert distance(theirs, start) > 0.05
    assert distance(ours, theirs) <= 1e-12


@needs_recent_compiler
def test_compiles_under_vmap_in_one_graph():
    begin, train = make_training()
    params, state = torch.func.vmap(begin)(torch.tensor([0.7, 1.0]).double())
    step = torch.func.vmap(train, in_dims=(0, 0, 0, None))
    lrs = torch.tensor([0.1, 1.0]).double()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(params, state, lrs, 0)
    assert distance(compiled, step(params, state, lrs, 0)) <= 1e-12


@needs_recent_compiler
def test_exports():
    start, loss = make_problem()
    config = AdamConfig(lr=1.0)
    init, step = mechanize(adamw_step)

    class Step(torch.nn.Module):
        def forward(self, params, grads, state):
            return step(params, grads, state, config)

    state = init(start, adam_init(start, config))
    grads = torch.func.grad(loss)(start, 0)
    program = torch.export.export(Step(), (start, grads, state)).module()
    ours, theirs = (start, state), (start, state)
    for t in range(5):
        ours = program(ours[0], torch.func.grad(loss)(ours[0], t), ours[1])
        theirs = step(theirs[0], torch.func.grad(loss)(theirs[0], t), theirs[1], config)
    assert distance(theirs[0], start) > 1e-3
    assert distance(ours, theirs) <= 1e-12


def test_the_rate_comes_with_the_config():
    start, loss = make_problem()
    ends = []
    for lr in (1.0, 1e-3):
        config = AdamConfig(lr=lr)
        init, step = mechanize(adamw_step)
        params, state = start, init(start, adam_init(start, config), config)
        for t in range(50):
            params, state = step(params, torch.func.grad(loss)(params, t), state, config)
        ends.append((params, lr * state.scale))
    assert distance(ends[0][0], start) > 1e-2
    assert distance(*ends) <= 1e-9


def test_bfloat16_parameters_train_with_a_float32_displacement():
    torch.manual_seed(0)
    params = {"w": torch.randn(50, dtype=torch.bfloat16), "zero": torch.zeros(3, dtype=torch.bfloat16)}
    config = AdamConfig(lr=1.0)
    init, step = mechanize(adamw_step)
    state = init(params, adam_init(params, config))

    def loss(params):
        return (params["w"].float() - 1).square().sum() + (params["zero"].float() + 1).square().sum()

    before = loss(params)
    for _ in range(200):
        params, state = step(params, torch.func.grad(loss)(params), state, config)
    assert loss(params) < 0.3 * before
    assert {leaf.dtype for leaf in tree_leaves(params)} == {torch.bfloat16}
    assert {leaf.dtype for leaf in tree_leaves((state.reference, state.delta))} == {torch.float32}
    assert state.scale.dtype == torch.float64


def test_any_stepper_and_any_tree():
    """A sign descent of the user's own, whose state is a plain dict, on a single tensor."""

    def sign_step(x, g, state, config):
        return x - config * g.sign(), {"count": state["count"] + 1}

    init, step = mechanize(sign_step)
    x = torch.tensor([3.0, -2.0])
    state = init(x, {"count": torch.zeros(())})
    for _ in range(300):
        x, state = step(x, 2 * x, state, 1.0)
    assert x.abs().max() < 0.5
    assert state.base["count"] == 300


def test_autocast_leaves_the_tuners_sums_alone():
    """They would be of float16, in which small gradients have no square and large ones an infinite one."""
    start, config = {"w": torch.tensor([3.0, -2.0])}, SGDConfig(lr=1.0)
    init, step = mechanize(sgd_step)

    def run(size, enabled):
        params, state = start, init(start, sgd_init(start, config))
        for _ in range(50):
            grads = {"w": size * params["w"]}
            with torch.autocast("cpu", torch.float16, enabled=enabled):
                params, state = step(params, grads, state, config)
        return params, state

    for size in (1e-6, 1.0, 1e3):
        plain = run(size, enabled=False)
        assert distance(plain[0], start) > 0.5
        assert same_bits(run(size, enabled=True), plain)


def test_the_loss_scalers_overflows_are_skipped():
    """Where the loss scale is too large at first, the same run as without one, some steps later."""
    start = {"w": torch.tensor([3.0, -2.0])}
    config, scaling = SGDConfig(lr=1.0), loss_scaler.LossScalerConfig(init_scale=2.0**127)
    init, step = mechanize(sgd_step, TunerConfig(s_init=1e-2))

    def loss(params):
        return params["w"].square().sum()

    params, state, scaler = start, init(start, sgd_init(start, config)), loss_scaler.init(scaling)
    skipped = 0
    for _ in range(30):
        scaled = torch.func.grad(lambda params, scaler=scaler: loss_scaler.scale(loss(params), scaler))(params)
        grads, found_inf = loss_scaler.unscale(scaled, scaler)
        params, state = step(params, grads, state, config)
        scaler = loss_scaler.update(scaler, found_inf, scaling)
        skipped += int(found_inf)
    assert 0 < skipped < 5

    plain, plain_state = start, init(start, sgd_init(start, config))
    for _ in range(30 - skipped):
        plain, plain_state = step(plain, torch.func.grad(loss)(plain), plain_state, config)
    assert distance(plain, start) > 0.05
    assert same_bits((params, state), (plain, plain_state))


ERRORS = [
    (lambda: mechanize(torch.optim.SGD), TypeError, r"step is <class .*SGD.*expected a function.*manic.mechanize"),  # pyright: ignore[reportArgumentType]
    (lambda: mechanize("adamw"), TypeError, r"step is 'adamw'; expected a function such as"),  # pyright: ignore[reportArgumentType]
    (lambda: run(state=sgd_init({"w": torch.ones(2)}, SGDConfig(lr=1.0))), TypeError, r"is of type SGDState; .*init\("),
    (
        lambda: mechanize(sgd_step, SGDConfig(lr=1.0)),
        TypeError,
        r"config is of type SGDConfig; expected a .*TunerConfig",
    ),  # pyright: ignore[reportArgumentType]
    (lambda: run(SGDConfig(lr=1.0, maximize=True)), ValueError, r"maximize=True.*expected False.*negative"),
    (lambda: run(grads={"w": torch.ones(3)}), ValueError, r"grads\['w'\].*\(3,\); expected a tensor of shape \(2,\)"),
    (lambda: run(delta={"v": torch.ones(2)}), ValueError, r"key"),
    (lambda: run(step=lambda p, g, s, c: p), TypeError, r"The stepper returned \{'w'.*expected \(params, state\)"),
    (lambda: run(step=lambda p, g, s, c: ({"w": p["w"].sum()}, s)), TypeError, r"returned .*like those that it got"),
    (lambda: run(step=lambda p, g, s, c: ({"v": p["w"]}, s)), TypeError, r"returned .*like those that it got"),
    (lambda: mechanize(sgd_step).init({}, ()), ValueError, r"params has no tensors"),
    (lambda: mechanize(sgd_step).init({"w": torch.ones(2)}, (), 0.0), ValueError, r"lr is 0.0; expected .* number > 0"),
    (lambda: mechanize(sgd_step).init({"w": torch.ones(2)}, (), "1"), ValueError, r"lr is '1'; expected .* number > 0"),
    (lambda: mechanize(sgd_step).init({"w": torch.ones(2)}, (), torch.ones(1)), ValueError, r"lr has shape \(1,\)"),
]


def run(config=None, grads=None, delta=None, state=None, step=sgd_step):
    config = config or SGDConfig(lr=1.0)
    params = {"w": torch.ones(2)}
    init, step = mechanize(step)
    state = state or init(params, sgd_init(params, config))
    step(params, grads or params, state if delta is None else state._replace(delta=delta), config)


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
