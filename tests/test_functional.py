"""The functional optimizers, against torch.optim and oracles in plain floats that import nothing of ours."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from functional_problem import distance, make_problem, needs_recent_compiler
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from manic import functional
from manic.functional import OPTIMIZERS, AdamConfig, LARSConfig, NAdamWConfig, SGDConfig

STEPS = 200


def run(name, config, params, loss, *, steps=STEPS, sign=1.0):
    _, init, step = OPTIMIZERS[name]
    state = init(params, config)
    for t in range(steps):
        grads = torch.func.grad(lambda params, t=t: sign * loss(params, t))(params)
        params, state = step(params, grads, state, config)
    return params


SGD_CASES = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.8, "dampening": 1.0, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"maximize": True},
]
ADAM_CASES = [
    {},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.0), "eps": 1e-3},
    {"eps": 0.1},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    {"maximize": True},
]
CASES = [("sgd", torch.optim.SGD, case) for case in SGD_CASES]
CASES += [("adam", torch.optim.Adam, case) for case in ADAM_CASES]
CASES += [("adamw", torch.optim.AdamW, {"weight_decay": 0.0, **case}) for case in ADAM_CASES]


@pytest.mark.parametrize(("name", "reference", "options"), CASES, ids=lambda value: str(value)[:60])
def test_equals_torch(name, reference, options):
    start, loss = make_problem()
    config = OPTIMIZERS[name].config(lr=0.03, **options)
    sign = -1.0 if config.maximize else 1.0

    theirs = {key: leaf.clone().requires_grad_() for key, leaf in start.items()}
    optimizer = reference(theirs.values(), lr=0.03, **options)
    for t in range(STEPS):
        optimizer.zero_grad()
        (sign * loss(theirs, t)).backward()
        optimizer.step()
    theirs = {key: leaf.detach() for key, leaf in theirs.items()}
    assert distance(theirs, start) > 0.02
    assert loss(theirs, 0) < loss(start, 0)

    assert distance(run(name, config, start, loss, sign=sign), theirs) <= 1e-12
    tensors = {"lr": torch.tensor(0.03, dtype=torch.float64)}
    assert distance(run(name, replace(config, **tensors), start, loss, sign=sign), theirs) <= 1e-12


# Oracles. Two layers of plain floats; the gradient is that of a quadratic bowl that shakes.

LAYERS = [[1.5, -2.0, 0.5], [0.0, 0.0]]


def bowl(x, t):
    curvature = (0.3, 1.0, 3.0)
    return [
        [curvature[j] * v + 0.5 * math.sin(1.7 * t + i + j) for j, v in enumerate(layer)] for i, layer in enumerate(x)
    ]


def lars_oracle(x, *, lr, m, wd, trust):
    x = [list(layer) for layer in x]
    velocity = [[0.0] * len(layer) for layer in x]
    for t in range(STEPS):
        for layer, g, v in zip(x, bowl(x, t), velocity, strict=True):
            size = math.sqrt(sum(a * a for a in layer))
            divisor = math.sqrt(sum(a * a for a in g)) + wd * size
            local = trust * size / divisor if size > 0 and divisor > 0 else 1.0
            for j in range(len(layer)):
                v[j] = m * v[j] + lr * local * (g[j] + wd * layer[j])
            for j in range(len(layer)):
                layer[j] -= v[j]
    return x


def nadamw_oracle(x, *, l2, decay, nesterov, lr=0.02, b1=0.8, b2=0.95, eps=1e-3):
    x = [list(layer) for layer in x]
    mean = [[0.0] * len(layer) for layer in x]
    square = [[0.0] * len(layer) for layer in x]
    for t in range(STEPS):
        rate = lr * math.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        for layer, gradient, m, v in zip(x, bowl(x, t), mean, square, strict=True):
            for j, raw in enumerate(gradient):
                g = raw - l2 * layer[j]
                m[j] = b1 * m[j] + (1 - b1) * g
                v[j] = b2 * v[j] + (1 - b2) * g * g
                top = b1 * m[j] + (1 - b1) * g if nesterov else m[j]
                layer[j] -= rate * top / (math.sqrt(v[j]) + eps) + rate * decay * layer[j]
    return x


def adam_decoupled_oracle(x, *, lr, decay, b1=0.8, b2=0.95, eps=1e-3):
    x = [list(layer) for layer in x]
    mean = [[0.0] * len(layer) for layer in x]
    square = [[0.0] * len(layer) for layer in x]
    for t in range(STEPS):
        for layer, gradient, m, v in zip(x, bowl(x, t), mean, square, strict=True):
            for j, g in enumerate(gradient):
                m[j] = b1 * m[j] + (1 - b1) * g
                v[j] = b2 * v[j] + (1 - b2) * g * g
                unbiased = m[j] / (1 - b1 ** (t + 1)), v[j] / (1 - b2 ** (t + 1))
                layer[j] -= lr * unbiased[0] / (math.sqrt(unbiased[1]) + eps) + decay * layer[j]
    return x


def tensors(x):
    return [torch.tensor(layer, dtype=torch.float64) for layer in x]


def on_the_bowl(name, config):
    _, init, step = OPTIMIZERS[name]
    params = tensors(LAYERS)
    state = init(params, config)
    for t in range(STEPS):
        grads = tensors(bowl([layer.tolist() for layer in params], t))
        params, state = step(params, grads, state, config)
    return params


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_lars_equals_the_oracle(momentum, weight_decay):
    oracle = tensors(lars_oracle(LAYERS, lr=0.5, m=momentum, wd=weight_decay, trust=0.05))
    undecayed = tensors(lars_oracle(LAYERS, lr=0.5, m=momentum, wd=0.0, trust=0.05))
    assert distance(oracle, tensors(LAYERS)) > 0.1
    if weight_decay:
        assert distance(oracle, undecayed) > 1e-3
    config = LARSConfig(lr=0.5, momentum=momentum, weight_decay=weight_decay, trust_coefficient=0.05)
    assert distance(on_the_bowl("lars", config), oracle) <= 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("l2", "decay"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.1, 0.1)])
def test_nadamw_equals_the_oracle(nesterov, l2, decay):
    oracle = tensors(nadamw_oracle(LAYERS, l2=l2, decay=decay, nesterov=nesterov))
    assert distance(oracle, tensors(LAYERS)) > 0.1
    for changed in ((0.0, 0.0, nesterov), (l2, decay, not nesterov)):
        if changed != (l2, decay, nesterov):
            other = tensors(nadamw_oracle(LAYERS, l2=changed[0], decay=changed[1], nesterov=changed[2]))
            assert distance(oracle, other) > 1e-3
    config = NAdamWConfig(
        lr=0.02, betas=(0.8, 0.95), eps=1e-3, l2_weight_decay=l2, decoupled_weight_decay=decay, nesterov=nesterov
    )
    assert distance(on_the_bowl("nadamw", config), oracle) <= 1e-12


@pytest.mark.parametrize("lr", [0.0, 0.02])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adam_decoupled_equals_the_oracle(lr, decay):
    oracle = tensors(adam_decoupled_oracle(LAYERS, lr=lr, decay=decay))
    assert (distance(oracle, tensors(LAYERS)) > 0.1) == (lr + decay > 0)
    config = AdamConfig(lr=lr, betas=(0.8, 0.95), eps=1e-3, weight_decay=decay)
    assert distance(on_the_bowl("adam_decoupled", config), oracle) <= 1e-12


# What all of them share.

ALL = {
    "sgd": SGDConfig(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "adam": AdamConfig(lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": AdamConfig(lr=0.1, weight_decay=0.1),
    "adam_decoupled": AdamConfig(lr=0.1, weight_decay=0.1),
    "lars": LARSConfig(lr=1.0, weight_decay=0.1, trust_coefficient=0.1),
    "nadamw": NAdamWConfig(lr=0.1, decoupled_weight_decay=0.1, l2_weight_decay=0.1),
}


def test_the_table_of_cases_is_complete():
    assert ALL.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", ALL)
def test_is_pure(name):
    params, loss = make_problem()
    _, init, step = OPTIMIZERS[name]
    state = init(params, ALL[name])
    for t in range(3):
        grads = torch.func.grad(loss)(params, t)
        inputs = tree_leaves((params, grads, state))
        before = [(leaf.clone(), leaf._version) for leaf in inputs]
        new_params, new_state = step(params, grads, state, ALL[name])
        assert all(torch.equal(leaf, old) and leaf._version == version
                   for leaf, (old, version) in zip(inputs, before, strict=True))  # fmt: skip
        assert distance(new_params, params) > 1e-4
        params, state = new_params, new_state


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_tree_in_its_own_dtype(name, dtype):
    params = {"b": [torch.ones(2, 3, dtype=dtype), (torch.ones((), dtype=dtype),)], "a": torch.ones(4, dtype=dtype)}
    grads = {"a": params["a"] * 2, "b": tree_map(lambda leaf: leaf * 2, params["b"])}  # the keys in another order
    _, init, step = OPTIMIZERS[name]
    config = replace(ALL[name], lr=torch.tensor(0.1, dtype=torch.float64))
    state = init(params, config)
    new_params, new_state = step(params, grads, state, config)
    assert distance(new_params, params) > 5e-3
    for new, old in ((new_params, params), (new_state, state)):
        assert tree_structure(new) == tree_structure(old)
        assert [leaf.dtype for leaf in tree_leaves(new)] == [leaf.dtype for leaf in tree_leaves(old)]


@needs_recent_compiler
@pytest.mark.parametrize("name", ALL)
def test_compiles_once_in_one_graph(name):
    params, loss = make_problem()
    grads = torch.func.grad(loss)(params, 0)
    _, init, step = OPTIMIZERS[name]
    state = init(params, ALL[name])
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(params, state, lr):
        return step(params, grads, state, replace(ALL[name], lr=lr))

    ours, theirs, ours_state, theirs_state = params, params, state, state
    for t in range(3):
        lr = torch.tensor(0.1 / (1 + t), dtype=torch.float64)
        ours, ours_state = compiled(ours, ours_state, lr)
        theirs, theirs_state = step(theirs, grads, theirs_state, replace(ALL[name], lr=lr))
    assert distance(theirs, params) > 1e-3
    assert distance(ours, theirs) <= 1e-12
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ALL)
def test_vmap_over_models_and_hyperparameters(name):
    params, loss = make_problem()
    _, init, step = OPTIMIZERS[name]
    lrs, stretches = torch.tensor([0.01, 0.1, 0.3]).double(), torch.tensor([0.5, 1.0, 1.5]).double()
    decay = "decoupled_weight_decay" if name == "nadamw" else "weight_decay"
    decays = torch.tensor([0.0, 0.1, 0.2]).double()

    def train(stretch, lr, weight_decay):
        model = {key: leaf * stretch for key, leaf in params.items()}
        config = replace(ALL[name], lr=lr, **{decay: weight_decay})
        state = init(model, config)
        for t in range(10):
            model, state = step(model, torch.func.grad(loss)(model, t), state, config)
        return model

    together = torch.func.vmap(train)(stretches, lrs, decays)
    for i in range(3):
        alone = train(stretches[i], lrs[i], decays[i])
        assert distance(alone, params) > 1e-3
        assert distance({key: leaf[i] for key, leaf in together.items()}, alone) <= 1e-12


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_differentiates_with_respect_to_the_learning_rate(name):
    params, loss = make_problem()

    def final_loss(lr):
        return loss(run(name, replace(ALL[name], lr=lr), params, loss, steps=3), 0)

    lr, h = torch.tensor(0.1).double(), 1e-6
    slope = (final_loss(lr + h) - final_loss(lr - h)) / (2 * h)
    assert abs(slope) > 1e-4
    torch.testing.assert_close(torch.func.grad(final_loss)(lr), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_lars_has_derivatives_where_a_layer_is_zero_and_has_no_gradient(name):
    params = {"weight": torch.tensor([3.0, 4.0]).double(), "bias": torch.zeros(2).double()}
    grads = {"weight": torch.tensor([0.5, 1.0]).double(), "bias": torch.zeros(2).double()}

    def length(value):
        config = replace(ALL["lars"], **{name: value})
        after, _ = functional.lars_step(params, grads, functional.lars_init(params, config), config)
        return after["weight"].square().sum() + after["bias"].sum()

    value, h = torch.tensor(0.1).double(), 1e-6
    slope = (length(value + h) - length(value - h)) / (2 * h)
    assert abs(slope) > 1e-4
    torch.testing.assert_close(torch.func.grad(length)(value), slope, rtol=1e-6, atol=0)


def test_state_survives_a_file(tmp_path: Path):
    params, loss = make_problem()
    config = ALL["adam"]
    state = functional.adam_init(params, config)
    params, state = functional.adam_step(params, torch.func.grad(loss)(params, 0), state, config)
    torch.save(tree_leaves(state), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = tree_unflatten(loaded, tree_structure(functional.adam_init(params, config)))
    assert isinstance(loaded, functional.AdamState)
    assert all(torch.equal(*pair) for pair in zip(tree_leaves(loaded), tree_leaves(state), strict=True))


ONES, W = torch.ones(2), {"w": torch.ones(2)}
HEAVY = SGDConfig(lr=1, momentum=0.9)
ERRORS = [
    (lambda: SGDConfig(lr=-1), ValueError, r"lr is -1; expected a finite number >= 0"),
    (lambda: AdamConfig(lr="1"), TypeError, r"lr is '1'; expected a finite number >= 0"),  # pyright: ignore[reportArgumentType]
    (lambda: AdamConfig(lr=True), TypeError, r"lr is True; expected a finite number >= 0"),
    (lambda: SGDConfig(lr=math.nan), ValueError, r"lr is nan"),
    (lambda: SGDConfig(lr=torch.ones(64)), ValueError, r"lr has shape \(64,\).*0-d tensor.*vmap"),
    (lambda: SGDConfig(lr=1, momentum=1.0), ValueError, r"momentum is 1.0; expected a number in \[0, 1\)"),
    (lambda: SGDConfig(lr=1, dampening=2.0), ValueError, r"dampening is 2.0"),
    (lambda: SGDConfig(lr=1, nesterov=True), ValueError, r"nesterov=True with momentum=0.0"),
    (lambda: SGDConfig(lr=1, momentum=0.9, dampening=0.1, nesterov=True), ValueError, r"expected .*dampening 0"),
    (lambda: AdamConfig(betas=(0.9, 1.0)), ValueError, r"betas\[1\] is 1.0"),
    (lambda: AdamConfig(betas=(0.9,)), ValueError, r"expected two numbers"),  # pyright: ignore[reportArgumentType]
    (lambda: AdamConfig(eps=-1e-8), ValueError, r"eps is -1e-08"),
    (lambda: LARSConfig(lr=1, trust_coefficient=0.0), ValueError, r"trust_coefficient is 0.0; expected a number > 0"),
    (lambda: NAdamWConfig(l2_weight_decay=-1), ValueError, r"l2_weight_decay is -1"),
    (lambda: init({}), ValueError, r"params has no tensors"),
    (lambda: init({"w": 3}), TypeError, r"params\['w'\] is of type int; expected a real floating-point tensor"),
    (
        lambda: init([torch.ones(2, dtype=torch.int64)]),
        TypeError,
        r"params\[0\] is a torch.int64 tensor of shape \(2,\)",
    ),
    (lambda: init([torch.ones(2, dtype=torch.complex64)]), TypeError, r"view_as_real"),
    (lambda: step({"w": torch.ones(1)}), ValueError, r"grads\['w'\].*\(1,\); expected a tensor of shape \(2,\)"),
    (lambda: step({"w": None}), TypeError, r"grads\['w'\] is None;.*zeros"),
    (lambda: step({"v": torch.ones(2)}), ValueError, r"grads is not a tree like params"),
    (lambda: step(W, {"v": torch.ones(2)}), ValueError, r"state is not a tree like params"),
    (
        lambda: step(W, {"w": torch.ones(1)}),
        ValueError,
        r"state of params\['w'\] is .* \(1,\); expected tensors of shape \(2,\)",
    ),
    (
        lambda: functional.sgd_step(ONES, ONES, functional.sgd_init(ONES, SGDConfig(lr=1)), HEAVY),
        ValueError,
        r"of params is of type tuple; .*options",
    ),
    (
        lambda: functional.sgd_step(W, W, init(W), HEAVY),
        TypeError,
        r"state is of type AdamState; expected the SGDState",
    ),
    (lambda: functional.lars_step(W, W, init(W), LARSConfig(lr=1)), TypeError, r"expected the LARSState"),
    (
        lambda: functional.adam_step(W, W, functional.sgd_init(W, HEAVY), AdamConfig()),
        TypeError,
        r"expected the AdamState",
    ),
    (lambda: AdamConfig(betas=0.9), ValueError, r"betas is 0.9; expected two numbers"),  # pyright: ignore[reportArgumentType]
    (lambda: AdamConfig(betas=None), ValueError, r"betas is None; expected two numbers"),  # pyright: ignore[reportArgumentType]
    (
        lambda: functional.adam_init(W, SGDConfig),  # pyright: ignore[reportArgumentType]
        TypeError,
        r"config is the class SGDConfig; expected an object of AdamConfig, as in AdamConfig\(lr=1.0\)",
    ),
    (lambda: functional.lars_init(W, HEAVY), TypeError, r"of type SGDConfig; expected an object of LARSConfig"),  # pyright: ignore[reportArgumentType]
    (lambda: functional.nadamw_init(W, HEAVY), TypeError, r"of type SGDConfig; expected an object of NAdamWConfig"),  # pyright: ignore[reportArgumentType]
]


def init(params):
    return functional.adam_init(params, AdamConfig())


def step(grads, state_for=None):
    functional.adam_step(W, grads, init(state_for or W), AdamConfig())


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", functional.OPTIMIZERS)
def test_a_step_refuses_the_class_of_its_config_and_the_config_of_another(name):
    kind, init, step = functional.OPTIMIZERS[name]
    state = init(W, kind(lr=1))
    other = AdamConfig() if kind is SGDConfig else SGDConfig(lr=1)
    for config, given in ((kind, f"the class {kind.__name__}"), (other, f"of type {type(other).__name__}")):
        with pytest.raises(TypeError, match=f"config is {given}; expected an object of {kind.__name__}"):
            step(W, W, state, config)


@needs_recent_compiler
def test_the_documentation_runs(tmp_path: Path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "functional.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block, names)
    loss, scale = map(float, capsys.readouterr().out.split()[:2])
    assert loss < 0.05
    assert scale > 1e-4
