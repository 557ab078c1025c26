"""What pytest does not collect, and the environment that the tests run in, with the processes that they start."""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads would only wait for each other
os.environ.setdefault("KERAS_BACKEND", "torch")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
modules = {
    "keras": ["src/manic/opt_list/for_keras.py", "tests/opt_list_keras.py"],
    "lightning": ["tests/lightning_ranks.py"],
    "optax": ["src/manic/opt_list/for_optax.py"],
    "triton": ["src/manic/kernels/triton.py", "src/manic/kernels/fused.py", "tests/triton_code.py"],
}
collect_ignore = [path for extra, paths in modules.items() if find_spec(extra) is None for path in paths]
