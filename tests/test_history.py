"""The recorder, its files and pictures."""

from __future__ import annotations

import csv
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import backward, make_net

from manic import History, Mechanic, Updater, mechanize
from manic import history as history_module
from manic.plotting import plot_histories


def recorded(steps: int = 30, **options: Any) -> tuple[History, list[float], list[float]]:
    model, history = make_net(), History()
    groups = [{"params": model.hidden.parameters()}, {"params": model.out.parameters(), "lr": 0.1}]
    updater = Updater(torch.optim.AdamW(groups, lr=0.2))
    mechanic = Mechanic(updater, log_func=history, s_init=1e-3, **options)
    losses, scales = [], []
    for step in range(steps):
        loss = backward(model, step)
        history.record(loss=loss)
        mechanic.step()
        updater.step()
        losses.append(float(loss))
        scales.append(float(updater.scale))
    return history, losses, scales


@pytest.mark.parametrize("chunk", [7, 1024])
def test_rows_are_what_happened(chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(history_module, "CHUNK", chunk)
    history, losses, scales = recorded()
    assert len(history) == 30
    assert history["step"] == list(range(1, 31))
    assert history["loss"] == losses
    assert history["scale"] == scales
    assert history["lr_0"] == [0.2 * scale for scale in scales]
    assert history["lr_1"] == [0.1 * scale for scale in scales]
    assert min(history["h"]) < 0 < max(history["h"])
    assert history["skipped"] == [0] * 30
    history.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["scale"]) for row in rows] == scales
    assert [float(row["loss"]) for row in rows] == losses


def test_log_every() -> None:
    history, losses, _ = recorded(log_every=10)
    assert history["step"] == [10, 20, 30]
    assert history["loss"] == losses[9::10]


def test_recording_reads_no_tensor_before_a_chunk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's value is what makes a step wait for an accelerator."""
    model, history = make_net(), History()
    updater = Updater(torch.optim.AdamW(model.parameters(), lr=0.2))
    mechanic = Mechanic(updater, log_func=history)
    loss = backward(model, 0)

    def read(*args: object) -> None:
        raise AssertionError("a tensor was read")

    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    history.record(loss=loss)
    mechanic.step()
    monkeypatch.undo()
    updater.step()
    assert history["loss"] == [float(loss)]


def test_a_step_that_is_done_again_has_one_row() -> None:
    """Also if the history was read in between."""
    history = History()
    model = make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater, log_func=history)
    for step in range(3):
        for attempt in range(2):
            backward(model, 10 * step + attempt)
            mechanic.step()
            last = history["h"][-1] if step == 1 else None
        updater.step()
        assert last is None or history["h"][-1] == last
    assert history["step"] == [1, 2, 3]


def test_nor_has_one_that_was_refused_in_between_two() -> None:
    history, model = History(), make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater, log_func=history)
    for step in range(3):
        backward(model, step)
        mechanic.step()
        assert model.gain.grad is not None
        kept, model.gain.grad = model.gain.grad, model.gain.grad.to_sparse()
        with pytest.raises(ValueError, match="expected a dense one"):
            mechanic.step()
        model.gain.grad = kept
        mechanic.step()
        updater.step()
    assert history["step"] == [1, 2, 3]


def test_two_tuners_may_share_one() -> None:
    history = History()
    nets = [make_net(), make_net()]
    optimizers = [mechanize(torch.optim.AdamW, log_func=history)(net.parameters(), lr=1.0) for net in nets]
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            backward(net, step)
            optimizer.step()
    assert history["step"] == [1, 1, 2, 2, 3, 3]


def test_a_first_call_that_logs_nothing_leaves_the_row_before() -> None:
    history, model = History(), make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater, log_func=history)
    for step in range(3):
        backward(model, step)
        mechanic.step(tune=False)
        mechanic.step()
        updater.step()
    assert history["step"] == [1, 2, 3]


def test_what_was_recorded_stays_when_a_step_is_done_again() -> None:
    history, model = History(), make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater, log_func=history)
    for step in range(3):
        history.record(loss=backward(model, step), accuracy=step)
        mechanic.step()
        assert step != 1 or len(history["loss"]) == 2  # also if it was read in between
        if step == 2:
            history.record(accuracy=9)
        mechanic.step()
        updater.step()
    assert None not in history["loss"]
    assert history["accuracy"] == [0, 1, 9]
    assert {type(value) for value in history["accuracy"]} == {float}


def test_a_value_is_one_number() -> None:
    for value in ("a", None, [1.0]):
        with pytest.raises(TypeError, match=r"loss is .*; expected a number, or a tensor of one element"):
            History().record(loss=value)  # type: ignore
    with pytest.raises(TypeError, match="loss is complex; expected a real number"):
        History().record(loss=torch.tensor(1j))
    spread = type("Spread", (torch.Tensor,), {"full_tensor": lambda self: self})  # as a DTensor is
    with pytest.raises(TypeError, match=r"norm is spread over ranks.*norm\.full_tensor\(\), called on every rank"):
        History().record(norm=torch.ones(()).as_subclass(spread))
    with pytest.raises(ValueError, match=r"loss has shape \(3,\); expected one number, such as its mean\(\)"):
        History().record(loss=torch.ones(3))
    history = recorded(2)[0]
    with pytest.raises(ValueError, match="'step' is recorded"):
        history.record(late=1.0, step=2)
    assert not history._next


@pytest.mark.parametrize("name", ["step", "scale", "h", "skipped", "lr_0"])
def test_what_is_recorded_already_is_not_replaced(name: str) -> None:
    history, _, _ = recorded(2)
    with pytest.raises(ValueError, match=f"'{name}' is recorded at every step already; expected another name"):
        history.record(**{name: 1.0})


def test_missing_column() -> None:
    history, _, _ = recorded(2)
    with pytest.raises(
        KeyError, match="The history has no 'accuracy'; it has step, scale, lr_0, lr_1, h, skipped, loss"
    ):
        history["accuracy"]


def test_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    model = make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=2.0))
    mechanic = Mechanic(updater, log_every=2, s_init=1e-3)
    with caplog.at_level(logging.INFO, logger="manic"):
        for step in range(4):
            backward(model, step)
            mechanic.step()
            updater.step()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 2", "step 4"]
    assert f"scale {float(updater.scale):.6g}" in caplog.records[-1].getMessage()


def test_pictures(tmp_path: Path) -> None:
    history, losses, _ = recorded()
    history.plot(tmp_path / "one.png")
    plain = {"step": list(range(30)), "loss": losses}
    plot_histories({"manic": history, "plain": plain, "not yet": History()}, tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"No run has a row.*Mechanic\(updater, log_func=history\)"):
        plot_histories({"nothing": History()}, tmp_path / "none.png")
    with pytest.raises(TypeError, match="is of type History; expected runs by name"):
        plot_histories(history, tmp_path / "none.png")  # type: ignore


@pytest.mark.parametrize("losses", [[1.0, -1.0], [-1.0, -2.0], [0.0, 0.0], [0.0, 1.0]])
def test_losses_that_are_not_positive(losses: list[float], tmp_path: Path) -> None:
    plot_histories({"run": {"step": [1, 2], "loss": losses}}, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    history, _, _ = recorded(2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=r"Plotting needs matplotlib, which is not installed: pip install 'manic\[plot\]'"
    ):
        history.plot(tmp_path / "run.png")
