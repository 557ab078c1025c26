"""The Keras form of the list against the torch one; run by test_opt_list_extras.py, once per backend."""

# pyright: reportMissingImports=false

import sys
from dataclasses import asdict

import keras
import numpy as np
import torch

from manic.opt_list import config_for_idx, optimizer_for_idx
from manic.opt_list.for_keras import NAdamW
from manic.opt_list.for_keras import optimizer_for_idx as keras_optimizer_for_idx

STEPS = 120
START = [3.0, -2.0, 0.5]
# Largest differences measured: 4e-14 on torch; on JAX 7e-8, where keras.ops.cos of a float64 is a float32.
TOLERANCE = {"torch": 1e-12, "jax": 2e-7}


def gradients(step):
    return np.sin(0.7 * step + np.arange(3)) + 0.3 * np.arange(1, 4)


def points(idx, training_steps):
    """The points of both forms after every step."""
    weight = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    expected = optimizer_for_idx([weight], idx, training_steps)
    variable = keras.Variable(START, dtype="float64")
    optimizer = keras_optimizer_for_idx(idx, training_steps)
    pairs = []
    for step in range(training_steps):
        weight.grad = torch.from_numpy(gradients(step))
        expected.step()
        optimizer.apply([keras.ops.convert_to_tensor(gradients(step))], [variable])
        pairs.append((weight.tolist(), keras.ops.convert_to_numpy(variable.value).tolist()))
    return np.array(pairs)


def test_parity(idxs):
    for idx in idxs:
        ours, theirs = points(idx, STEPS).swapaxes(0, 1)
        assert (np.abs(ours[-1] - START) > 1e-5).all(), idx  # it moved
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE[keras.backend.backend()], err_msg=str(idx))


def test_fit_save_load(path):
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    y = x @ np.array([[1.0], [-2.0], [0.5]], dtype="float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(loss="mse", optimizer=keras_optimizer_for_idx(33, 140, clipnorm=10.0))
    losses = model.fit(x, y, epochs=50, batch_size=32, verbose=0, shuffle=False).history["loss"]
    assert losses[-1] < 0.2 * losses[0], losses
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert isinstance(loaded.optimizer, NAdamW)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    first, second = (
        each.fit(x, y, epochs=20, batch_size=32, verbose=0, shuffle=False).history["loss"] for each in (model, loaded)
    )
    np.testing.assert_allclose(second, first, rtol=1e-5)


def test_numbers_for_the_rate():
    entry = asdict(config_for_idx(15))
    options = {name: entry[name] for name in ("betas", "eps", "nesterov", "l2_weight_decay", "decoupled_weight_decay")}
    variable = keras.Variable(START)
    NAdamW(0.1, **options).apply([keras.ops.ones(3)], [variable])
    assert (keras.ops.convert_to_numpy(variable.value) < START).all()


if __name__ == "__main__":
    assert keras.backend.backend() == sys.argv[1]
    test_fit_save_load(sys.argv[2])
    test_numbers_for_the_rate()
    keras.config.set_floatx("float64")
    test_parity([int(idx) for idx in sys.argv[3:]])
