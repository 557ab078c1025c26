# pyright: strict
"""Every public name in use, under the strictest type checking: `make check` reads this file, and pytest runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, StepLR
from typing_extensions import assert_type

import manic
from manic import History, Mechanic, Updater, is_mechanized, mechanize
from manic.plotting import plot_histories


def test_two_objects() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule: LRScheduler = StepLR(optimizer, 10)
    updater = Updater(optimizer, schedule, store_delta=True, internal_lr=None, nonfinite="raise", process_group=None)
    history = History()
    mechanic = Mechanic(
        updater,
        rule="manic",
        betas=None,
        s_decay=0.0,
        s_init=1e-3,
        eps=1e-8,
        max_scale=1.0,
        steps_per_epoch=100,
        log_func=history,
        log_every=1,
    )
    assert_type(mechanic.step(), None)
    updater.step(lambda: torch.zeros(()))
    assert_type(updater.zero_grad(set_to_none=True), None)
    assert_type(updater.scale, Tensor)
    assert_type(updater.get_last_lr(), list[float])
    assert_type(updater.param_groups, list[dict[str, Any]])
    assert_type(updater.base_optimizer, torch.optim.Optimizer)
    assert_type(updater.init_state(), None)
    assert_type(updater.rebase(), None)
    assert_type(mechanic.scale, Tensor)
    assert_type(mechanic.get_last_lr(), list[float])
    assert_type(mechanic.optimizer, torch.optim.Optimizer)
    assert_type(mechanic.updater, Updater)
    mechanic.optimizer = updater.base_optimizer
    updater.load_state_dict(assert_type(updater.state_dict(), dict[str, Any]))
    mechanic.load_state_dict(assert_type(mechanic.state_dict(), dict[str, Any]))
    plain, _ = mechanic.hand_off()
    assert assert_type(plain, torch.optim.Optimizer) is optimizer
    assert assert_type(manic.__version__, str)


def test_drop_in() -> None:
    optimizer = mechanize(torch.optim.SGD, rule="optax", store_delta=False)([nn.Parameter(torch.ones(2))], lr=1.0)
    assert assert_type(is_mechanized(optimizer), bool)


def test_history(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = History()
    assert_type(history.record(loss=1.0, accuracy=torch.ones(())), None)
    history({"iter_count": 1, "s": torch.ones(()), "h": torch.ones(()), "lr": [torch.ones(())], "skipped": 0})
    assert assert_type(len(history), int) == 1
    assert assert_type(history["loss"], list[Any]) == [1.0]
    assert "accuracy" in assert_type(history.columns, dict[str, list[Any]])
    history.to_csv(tmp_path / "run.csv")
    history.plot(str(tmp_path / "run.png"))
    plot_histories({"one": history, "other": {"step": [1.0], "loss": [2.0]}}, tmp_path / "both.png")
