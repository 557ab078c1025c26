"""The list in JAX and in Keras against the list in torch."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from manic.opt_list import config_for_idx, optimizer_for_idx

# Entries with and without: warmup, look-ahead, l2, decay, a last rate above 0, β2 near 1, a huge ε.
IDXS = [0, 1, 13, 15, 26, 35, 54, 82]
STEPS = 120
START = [3.0, -2.0, 0.5]


def gradients(step):
    return np.sin(0.7 * step + np.arange(3)) + 0.3 * np.arange(1, 4)


def torch_points(idx, training_steps=STEPS):
    weight = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = optimizer_for_idx([weight], idx, training_steps)
    points = []
    for step in range(training_steps):
        weight.grad = torch.from_numpy(gradients(step))
        optimizer.step()
        points.append(weight.tolist())
    return np.array(points)


def optax_points(idx, dtype, steps=STEPS):
    import jax
    import jax.numpy as jnp

    from manic.opt_list import for_optax

    optimizer = for_optax.optimizer_for_idx(idx, STEPS)

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = params + updates
        return (params, state), params

    params = jnp.asarray(START, dtype)
    all_gradients = jnp.asarray(np.stack([gradients(step) for step in range(steps)]), dtype)
    _, points = jax.jit(lambda p, g: jax.lax.scan(step, (p, optimizer.init(p)), g))(params, all_gradients)
    assert points.dtype == dtype
    return np.asarray(points)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("idx", IDXS)
def test_optax_takes_the_steps_of_torch(idx):
    pytest.importorskip("optax")
    expected = torch_points(idx)
    assert (np.abs(expected[-1] - START) > 1e-5).all()  # it moved
    np.testing.assert_allclose(optax_points(idx, "float64"), expected, rtol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.05)])
def test_optax_is_as_exact_as_its_arrays(dtype, tolerance):
    pytest.importorskip("optax")
    assert config_for_idx(82).betas[1] > 0.99998  # 1 - β2^t is small
    points = optax_points(82, dtype).astype("float64")
    first = slice(0, 1) if dtype == "bfloat16" else slice(None)  # later bfloat16 steps are below its resolution
    np.testing.assert_allclose(points[first], torch_points(82)[first], rtol=tolerance)


def test_optax_stays_at_its_last_rate():
    pytest.importorskip("optax")
    points = optax_points(0, "float32", STEPS + 10)
    assert not (points[0] == points[STEPS - 1]).any()
    assert (points[STEPS] == points[-1]).all()


def test_optax_takes_trees_and_refuses_to_go_without_parameters():
    optax = pytest.importorskip("optax")
    import jax.numpy as jnp

    from manic.opt_list import for_optax

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), for_optax.optimizer_for_idx(7, 10))
    params = {"layer": [jnp.ones((2, 3)), jnp.zeros(3)], "scale": jnp.ones(())}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["layer"][0].shape == (2, 3)
    alone = for_optax.optimizer_for_idx(7, 10)
    with pytest.raises(ValueError, match="given no parameters"):
        alone.update(params, alone.init(params))


def test_optax_gives_up_its_state_to_a_compiled_step():
    """No two parts of it are the same array."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")

    from manic.opt_list import for_optax

    optimizer = for_optax.optimizer_for_idx(7, 10)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    ends = []
    for take in (step, jax.jit(step, donate_argnums=(0, 1))):
        params = {"weight": jax.numpy.ones(3)}
        state = optimizer.init(params)
        for _ in range(5):
            params, state = take(params, state)
        ends.append(params["weight"])
    assert (ends[0] != 1).all()
    np.testing.assert_allclose(*ends, rtol=1e-6)


@pytest.mark.parametrize(("idx", "training_steps"), [(100, 10), (0, 0)])
def test_optax_refuses_what_torch_refuses(idx, training_steps):
    pytest.importorskip("optax")
    from manic.opt_list import for_optax

    with pytest.raises(ValueError, match="expected"):
        for_optax.optimizer_for_idx(idx, training_steps)


@pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_takes_the_steps_of_torch(backend, tmp_path):
    """In a process of its own: Keras takes its backend from the environment, once."""
    pytest.importorskip(backend)
    script = Path(__file__).with_name("opt_list_keras.py")
    environment = {**os.environ, "KERAS_BACKEND": backend, "KERAS_HOME": str(tmp_path), "JAX_ENABLE_X64": "1"}
    run = subprocess.run(
        [sys.executable, script, backend, tmp_path / "model.keras", *map(str, IDXS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
