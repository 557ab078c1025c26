"""What pytest does not collect, and the environment that the tests run in, with the processes that they start."""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads would only wait for each other
os.environ.setdefault("KERAS_BACKEND", "torch")
collect_ignore = [f"src/manic/opt_list/for_{extra}.py" for extra in ("keras", "optax") if find_spec(extra) is None]
