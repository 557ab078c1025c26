"""What pytest does not collect: modules for extras that are not installed."""

import os
from importlib.util import find_spec

os.environ.setdefault("KERAS_BACKEND", "torch")
collect_ignore = [f"src/manic/opt_list/for_{extra}.py" for extra in ("keras", "optax") if find_spec(extra) is None]
