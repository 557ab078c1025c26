"""`History`: what happened at each step, to pass as ``log_func``."""

from __future__ import annotations

import csv
import numbers
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manic.kernels.plain import scale_dtype

CHUNK = 1024  # rows kept on their device before they are read in one transfer


class History:
    """Records scale, h, effective learning rates and whatever else is given, one row a step.

    Tensors are kept where they are and read in chunks, so recording does not wait for the device at each step.

    Example:
        >>> import torch
        >>> from manic import History, Mechanic, Updater
        >>> model = torch.nn.Linear(3, 1)
        >>> history = History()
        >>> updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
        >>> mechanic = Mechanic(updater, log_func=history)
        >>> for _ in range(3):
        ...     updater.zero_grad()
        ...     loss = model(torch.ones(4, 3)).square().mean()
        ...     loss.backward()
        ...     history.record(loss=loss)
        ...     mechanic.step()
        ...     updater.step()
        >>> list(history.columns)
        ['step', 'scale', 'lr_0', 'h', 'skipped', 'loss']
        >>> history["step"]
        [1, 2, 3]
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []
        self._next: dict[str, Any] = {}

    def __call__(self, data: dict[str, Any]) -> None:
        """Add a row; `Mechanic` calls this."""
        rates = {f"lr_{i}": rate for i, rate in enumerate(data["lr"])}
        row = {"step": data["iter_count"], "scale": data["s"], **rates, "h": data["h"], "skipped": data["skipped"]}
        rows = self._waiting or self._rows
        again = data.get("again") and rows and rows[-1]["step"] == row["step"]
        before = rows.pop() if again else {}
        self._waiting.append({**before, **row, **self._next})
        self._next = {}
        if len(self._waiting) >= CHUNK:
            self._read()

    def record(self, **values: Tensor | float) -> None:
        """Give values (a loss, an accuracy) for the row of the coming ``mechanic.step()``.

        Args:
            values: numbers, or tensors of one element.

        Raises:
            ValueError: a tensor has more, or the name is that of a column which is there already.
            TypeError: a value is neither.
        """
        given: dict[str, Any] = {}
        for name, value in values.items():
            if name in ("step", "scale", "h", "skipped") or (name[:3] == "lr_" and name[3:].isdigit()):
                raise ValueError(f"{name!r} is recorded at every step already; expected another name.")
            if not isinstance(value, numbers.Real | Tensor):
                raise TypeError(f"{name} is {value!r:.60}; expected a number, or a tensor of one element.")
            if hasattr(value, "full_tensor"):
                raise TypeError(
                    f"{name} is spread over ranks, as the norm of clip_grad_norm_ is under FSDP2; expected a number, "
                    f"or a tensor of one element. Record {name}.full_tensor(), called on every rank."
                )
            if isinstance(value, Tensor) and value.is_complex():
                raise TypeError(f"{name} is complex; expected a real number, such as its abs().")
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected one number, such as its mean().")
            given[name] = value.detach().clone() if isinstance(value, Tensor) else float(value)
        self._next |= given

    def __len__(self) -> int:
        return len(self._rows) + len(self._waiting)

    @property
    def columns(self) -> dict[str, list[Any]]:
        """All rows by name; ``None`` where a row lacks a value. ``step`` and ``skipped`` are ints, the rest floats."""
        self._read()
        names = dict.fromkeys(name for row in self._rows for name in row)
        return {name: [row.get(name) for row in self._rows] for name in names}

    def __getitem__(self, name: str) -> list[Any]:
        """One column, for example ``history["scale"]``."""
        columns = self.columns
        if name not in columns:
            raise KeyError(f"The history has no {name!r}; it has {', '.join(columns) or 'no rows yet'}.")
        return columns[name]

    def to_csv(self, path: str | Path) -> None:
        """Write all rows to a file, with a header."""
        columns = self.columns
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    def plot(self, path: str | Path) -> None:
        """Write a picture of loss (if recorded), scale and the first group's rate; needs the extra ``manic[plot]``."""
        from manic.plotting import plot_histories

        plot_histories({"manic": self}, path)

    def _read(self) -> None:
        by_device: dict[torch.device, list[tuple[dict[str, Any], str]]] = {}
        for row in self._waiting:
            for name, value in row.items():
                if isinstance(value, Tensor):
                    by_device.setdefault(value.device, []).append((row, name))
        for device, places in by_device.items():
            values = torch.stack([row[name].reshape(()).to(scale_dtype(device)) for row, name in places]).tolist()
            for (row, name), value in zip(places, values, strict=True):
                row[name] = int(value) if name == "skipped" else value
        self._rows += self._waiting
        self._waiting = []
