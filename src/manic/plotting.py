"""Pictures of what happened; needs matplotlib, which the extra ``manic[plot]`` installs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manic.history import History

PANELS = (("loss", "loss"), ("scale", "scale"), ("lr_0", "effective learning rate"))


def plot_histories(histories: Mapping[str, History | Mapping[str, list[float]]], path: str | Path) -> None:
    """Write a picture of runs side by side: loss, scale and effective learning rate against the step.

    Args:
        histories: the runs by name; each a `History`, or a mapping from ``"step"``, ``"loss"``, ``"scale"`` and
            ``"lr_0"`` to lists of numbers, of which all but ``"step"`` may be missing. Empty panels are left out.
        path: the file to write; its ending decides the format, for example ``.png``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
        TypeError: the runs are not given by name.
    """
    if not isinstance(histories, Mapping):
        given = type(histories).__name__
        raise TypeError(f"histories is of type {given}; expected runs by name, as in {{'manic': history}}.")
    runs = {name: run.columns if isinstance(run, History) else dict(run) for name, run in histories.items()}
    panels = [(key, label) for key, label in PANELS if any(key in run for run in runs.values())]
    if not panels:
        raise ValueError(
            "No run has a row with a loss, a scale or a learning rate; expected at least one. Train first, with the "
            "History as the log_func of a Mechanic: Mechanic(updater, log_func=history)."
        )
    figure = new_figure(4.2 * len(panels), 3.2)
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, label) in zip(axes, panels, strict=True):
        for i, (name, run) in enumerate(runs.items()):
            column = zip(run.get("step", ()), run.get(key, ()), strict=False)
            points = [(step, y) for step, y in column if y is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=max(0.8, 2.8 - 0.5 * i), color=f"C{i}")
        axis.set_xlabel("step")
        axis.set_title(label, fontsize="medium")
        values = [y for line in axis.get_lines() for y in line.get_ydata()]
        if any(y > 0 for y in values) and not any(y < 0 for y in values):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    if panels[0][0] == "loss":
        starts = [run["loss"][0] for run in runs.values() if run.get("loss") and run["loss"][0] is not None]
        if starts and min(starts) > 0:  # a run that diverges leaves the picture instead of flattening the others
            axes[0].set_ylim(top=min(axes[0].get_ylim()[1], 10 * min(starts)))
    if len(runs) > 1:
        lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(runs), fontsize="small")
    figure.savefig(path, dpi=120)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, or an ImportError that says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib, which is not installed: pip install 'manic[plot]'.") from error
    return Figure(figsize=(width, height), layout="constrained")
