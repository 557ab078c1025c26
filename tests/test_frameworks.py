"""Inside frameworks training goes as in a plain loop, resumes, and shows the rate."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Calls, relative_difference
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from manic import Mechanic, Updater, mechanize

EXAMPLES = Path(__file__).parents[1] / "src" / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # Lightning, of our tiny data
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning, of a run resumed into another folder
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),  # Lightning, with torch 2.13
]


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    script = EXAMPLES / name / "main.py"
    monkeypatch.setattr("sys.argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def digits(
    epochs: int, *, accumulate: int = 1, clip: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], list[float]]:
    """The same training without a framework: the weights, and the effective rate after every step."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    updater = Updater(optimizer, CosineAnnealingLR(optimizer, 28 // accumulate * epochs))
    mechanic = Mechanic(updater)
    rates = []
    for i in range(28 * epochs):
        rows = slice(64 * (i % 28), 64 * (i % 28 + 1))
        loss = nn.functional.cross_entropy(model(x[rows].to(dtype) / 16), y[rows])
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            mechanic.step()
            updater.step()
            updater.zero_grad()
            rates += updater.get_last_lr()
    return model.state_dict(), rates


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    a, b = ({name.removeprefix("net."): tensor for name, tensor in weights.items()} for weights in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", [(), ("--two-objects",)], ids=["drop-in", "two objects"])
def test_lightning(form: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    whole, half, rest = (tmp_path / name for name in ("whole", "half", "rest"))
    run("lightning", monkeypatch, *form, "--epochs", 4, "--folder", whole)
    run("lightning", monkeypatch, *form, "--epochs", 4, "--stop-after", 2, "--folder", half)
    (saved,) = half.glob("checkpoints/*.ckpt")
    run("lightning", monkeypatch, *form, "--epochs", 4, "--folder", rest, "--resume", saved)

    checkpoints = [torch.load(next(folder.glob("checkpoints/*.ckpt")), weights_only=True) for folder in (whole, rest)]
    assert [checkpoint["global_step"] for checkpoint in checkpoints] == [112, 112]
    assert same(*(checkpoint["state_dict"] for checkpoint in checkpoints))
    plain, rates = digits(4)
    assert same(checkpoints[0]["state_dict"], plain)
    assert not same(plain, digits(4, clip=1e9)[0])  # so the clipped gradient is what reached the tuner

    for folder, first in ((whole, 0), (rest, 56)):
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        assert float(rows[-1]["loss"]) < 1.0  # 2.3 at the start
        logged = [float(row["lr_0"]) for row in rows]
        # What is logged before a step is the rate in force after the step before.
        assert logged[1:] == pytest.approx(rates[first : first + len(rows) - 1], rel=1e-5)
        assert max(logged) > 5e-4


def test_lightning_accumulates_gradients(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    module = runpy.run_path(str(EXAMPLES / "lightning" / "main.py"))["Digits"](steps=28)
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(TensorDataset(x.float() / 16, y), batch_size=64, drop_last=True))
    assert trainer.global_step == 28
    assert same(module.state_dict(), digits(2, accumulate=2)[0])


def test_lightning_logs_the_rate_in_force_of_every_group(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader, TensorDataset

    example = runpy.run_path(str(EXAMPLES / "lightning" / "main.py"))
    x, y = torch.randn(320, 64), torch.randint(10, (320,))
    batches = DataLoader(TensorDataset(x, y), batch_size=16)

    class TwoGroups(example["Digits"]):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 4.0}]
            optimizer = mechanize(torch.optim.AdamW)(groups, lr=1.0)
            return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 80), "interval": "step"}]

    class Probe(lightning.Callback):
        def __init__(self) -> None:
            self.rates: list[list[float]] = []
            self.scales: list[float] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.rates.append(trainer.optimizers[0].get_last_lr())
            self.scales.append(float(trainer.optimizers[0].updater.scale))

    def fit(callbacks: list[Any], log_every: int) -> int:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=4,
            logger=CSVLogger(tmp_path, name=None),
            callbacks=callbacks,
            log_every_n_steps=log_every,
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        with Calls() as calls:
            trainer.fit(TwoGroups(80), batches)
        return calls.of["_local_scalar_dense.default"]

    probe = Probe()
    fit([probe, example["EffectiveRates"](), LearningRateMonitor("step")], 5)
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    ours = {int(row["step"]): (row["lr_0"], row["lr_1"]) for row in rows if "lr_0" in row}
    given = {int(row["step"]): row["lr-MechanizedAdamW/pg2"] for row in rows if "lr-MechanizedAdamW/pg2" in row}
    assert list(ours) == list(given) == list(range(4, 80, 5))
    for step, rates in ours.items():
        assert rates == pytest.approx(probe.rates[step], rel=1e-6)
        assert rates[1] == pytest.approx(given[step] * probe.scales[step], rel=1e-6)
        assert rates[1] == pytest.approx(4 * rates[0])
    assert len({rates[0] for rates in ours.values()}) == len(ours)
    for every in (5, 20):
        lines = 80 // every
        assert fit([example["EffectiveRates"]()], every) - fit([], every) == 2 * lines  # one read a group and line


@pytest.mark.parametrize("kind", ["Digits", "DigitsWithTwoObjects"], ids=["drop-in", "two objects"])
def test_lightning_on_two_ranks_is_one_process_with_the_whole_batch(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    script = Path(__file__).with_name("lightning_ranks.py")
    command = [sys.executable, str(script), str(tmp_path), kind, "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["ranks"] == 2
    assert torch.equal(first["weights"], second["weights"])
    assert first["rates"] == second["rates"]
    plain, rates = digits(2, dtype=torch.float64)
    assert len(set(rates)) == len(rates)
    assert first["rates"] == pytest.approx(rates, rel=1e-9)
    expected = torch.cat([weight.reshape(-1) for weight in plain.values()])
    assert relative_difference(first["weights"][0], expected) > 1e-2
    assert relative_difference(first["weights"][-1], expected) < 1e-9


@pytest.mark.parametrize("form", [(), ("--optimizers",)], ids=["class", "optimizer and schedule"])
def test_transformers(form: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    whole, rest = tmp_path / "whole", tmp_path / "rest"
    run("transformers", monkeypatch, *form, "--steps", 40, "--save-every", 20, "--folder", whole)
    shutil.copytree(whole / "checkpoint-20", rest / "checkpoint-20")
    run("transformers", monkeypatch, *form, "--steps", 40, "--save-every", 20, "--folder", rest, "--resume")
    weights = [load_file(folder / "checkpoint-40" / "model.safetensors") for folder in (whole, rest)]
    assert same(*weights)
    assert not same(weights[0], load_file(whole / "checkpoint-20" / "model.safetensors"))

    for folder in (whole, rest):
        logs = json.loads((folder / "checkpoint-40" / "trainer_state.json").read_text())["log_history"]
        assert logs[-1]["loss"] < logs[0]["loss"] - 0.2
        group = torch.load(folder / "checkpoint-20" / "optimizer.pt", weights_only=True)["param_groups"][0]
        rate = float(group["mechanic_tuner"][0].sum()) * group["mechanic_unit"] * group["lr"]
        assert logs[1]["step"] == 20
        assert logs[1]["learning_rate"] == pytest.approx(rate)
        assert 1e-6 < rate < 0.5  # the rate given goes up to 1


@pytest.mark.parametrize("form", [(), ("--two-objects",)], ids=["drop-in", "two objects"])
def test_accelerate(
    form: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    whole, rest = tmp_path / "whole", tmp_path / "rest"
    run("accelerate", monkeypatch, *form, "--epochs", 4, "--folder", whole)
    shown = capsys.readouterr().out
    run("accelerate", monkeypatch, *form, "--epochs", 4, "--stop-after", 2, "--folder", rest)
    run("accelerate", monkeypatch, *form, "--epochs", 4, "--resume", "--folder", rest)
    assert capsys.readouterr().out == shown
    assert len(shown.splitlines()) == 4
    weights = [load_file(folder / "model.safetensors") for folder in (whole, rest)]
    assert same(*weights)
    plain, rates = digits(4, accumulate=2)
    assert same(weights[0], plain)
    assert [float(line.split()[-1]) for line in shown.splitlines()] == pytest.approx(rates[13::14], rel=1e-2)


def linear_regression() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(320, 8)
    return nn.Linear(8, 1), x, x.sum(1, keepdim=True)


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, cosine: bool) -> list[float]:
    """Four epochs with the two objects: the effective rate after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    updater = Updater(optimizer, CosineAnnealingLR(optimizer, 80) if cosine else None)
    mechanic = Mechanic(updater)
    rates = []
    for i in range(80):
        rows = slice(16 * (i % 20), 16 * (i % 20 + 1))
        updater.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        mechanic.step()
        updater.step()
        rates += updater.get_last_lr()
    return rates


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated")  # Ignite's import of torch's
def test_ignite(tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    from ignite.engine import Engine, Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver
    from torch.utils.data import DataLoader, TensorDataset

    model, x, y = linear_regression()
    rates = plain_loop(model, x, y, cosine=True)

    def build(folder: str) -> tuple[nn.Module, Engine, dict[str, Any], list[float]]:
        one, *_ = linear_regression()
        optimizer = mechanize(torch.optim.AdamW)(one.parameters(), lr=1.0)
        schedule = CosineAnnealingLR(optimizer, 80)
        trainer = create_supervised_trainer(one, optimizer, nn.functional.mse_loss)
        seen: list[float] = []

        @trainer.on(Events.ITERATION_COMPLETED)
        def step() -> None:
            schedule.step()
            seen.extend(optimizer.get_last_lr())

        to_save = {"model": one, "optimizer": optimizer, "schedule": schedule, "trainer": trainer}
        saver = DiskSaver(str(tmp_path / folder), create_dir=True)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, saver, n_saved=None))
        return one, trainer, to_save, seen

    batches = DataLoader(TensorDataset(x, y), batch_size=16)
    whole, trainer, _, seen = build("whole")
    trainer.run(batches, max_epochs=4)
    assert same(whole.state_dict(), model.state_dict())
    assert seen == rates
    rest, trainer, to_save, seen = build("rest")
    Checkpoint.load_objects(to_save, torch.load(tmp_path / "whole" / "checkpoint_40.pt", weights_only=True))
    assert not same(rest.state_dict(), model.state_dict())
    trainer.run(batches, max_epochs=4)
    assert same(rest.state_dict(), model.state_dict())
    assert seen == rates[40:]


def test_keras() -> None:
    keras = pytest.importorskip("keras")
    model, x, y = linear_regression()

    class Tuned(keras.Sequential):
        def train_step(self, data: Any) -> dict[str, Any]:
            image, target = data
            self.zero_grad()
            loss = self.compute_loss(y=target, y_pred=self(image, training=True))
            loss.backward()
            self.tuned.step()
            rates.extend(self.tuned.get_last_lr())
            return {"loss": loss, "lr": self.tuned.updater.scale}

    rates: list[float] = []
    tuned: Any = Tuned([keras.Input((8,)), keras.layers.Dense(1)])
    tuned.set_weights([parameter.detach().t().numpy() for parameter in model.parameters()])
    tuned.tuned = mechanize(torch.optim.AdamW)(tuned.parameters(), lr=1.0)
    tuned.compile(loss="mse")
    shown = tuned.fit(x.numpy(), y.numpy(), batch_size=16, epochs=4, shuffle=False, verbose=0).history["lr"]
    assert shown == pytest.approx(rates[19::20])
    assert rates == pytest.approx(plain_loop(model, x, y, cosine=False), rel=1e-3)
    for theirs, ours in zip(tuned.trainable_variables, model.parameters(), strict=True):
        torch.testing.assert_close(theirs.value.detach().t(), ours.detach(), rtol=1e-3, atol=1e-4)


class Wrapper(torch.optim.Optimizer):
    """As Lightning and Accelerate wrap an optimizer: the groups are the wrapped one's, and steps go through here."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return self.optimizer.step(closure)


@pytest.mark.parametrize("of_the_wrapper", [False, True])
def test_a_wrapped_optimizer_keeps_its_state_where_it_was(of_the_wrapper: bool) -> None:
    weight = nn.Parameter(torch.ones(3))
    base = torch.optim.AdamW([weight], lr=1e-3)
    wrapper = Wrapper(base)
    updater = Updater(wrapper, CosineAnnealingLR(wrapper if of_the_wrapper else base, 10))
    mechanic = Mechanic(updater)
    for _ in range(3):
        weight.grad = weight.detach().clone()
        mechanic.step()
        updater.step()
        updater.load_state_dict(updater.state_dict())
    assert wrapper.steps == 3
    assert updater.base_optimizer is base
    assert updater.param_groups is base.param_groups
    with pytest.raises(TypeError, match="tunes itself"):
        Updater(Wrapper(mechanize(torch.optim.SGD)([weight], lr=1.0)))


def test_loading_before_the_first_step_leaves_the_rate_open() -> None:
    """Accelerate's `prepare` saves and loads; a scheduler made after it sets the rates."""

    def run(load: bool) -> Tensor:
        weight = nn.Parameter(torch.ones(3))
        optimizer = mechanize(torch.optim.SGD)([weight], lr=1e-12)
        if load:
            optimizer.load_state_dict(optimizer.state_dict())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 100.0, total_steps=10)
        for _ in range(5):
            weight.grad = weight.detach().clone()
            optimizer.step()
            schedule.step()
        return weight.detach()

    assert not torch.equal(run(load=False), torch.ones(3))
    assert torch.equal(run(load=True), run(load=False))
