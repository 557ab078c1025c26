"""Lightning: handwritten digits, with the drop-in optimizer or (``--two-objects``) with `Mechanic` and `Updater`.

Both log the effective learning rate, clip gradients, and resume from Lightning's own checkpoints with ``--resume``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from manic import Mechanic, Updater, mechanize


class Digits(lightning.LightningModule):
    """The drop-in: return it from ``configure_optimizers`` as you would its base."""

    def __init__(self, steps: int, lr: float = 1.0) -> None:
        super().__init__()
        self.steps, self.lr = steps, lr
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Mean cross-entropy of a batch of (images, labels)."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """A mechanized AdamW and a schedule that is stepped after every batch."""
        optimizer = mechanize(torch.optim.AdamW)(self.parameters(), lr=self.lr)
        schedule = CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss, logged."""
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


class EffectiveRates(lightning.Callback):
    """What ``LearningRateMonitor`` is for a plain optimizer: logs the rate of each group as tensors, read when due."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The rates in force, scale × lr, as ``lr_0``, ``lr_1`` and so on."""
        updater = trainer.optimizers[0].updater
        pl_module.log_dict({f"lr_{i}": updater.scale * group["lr"] for i, group in enumerate(updater.param_groups)})


class DigitsWithTwoObjects(Digits):
    """`Mechanic` and `Updater` in a loop of one's own, under manual optimization."""

    def __init__(self, steps: int, lr: float = 1.0) -> None:
        super().__init__(steps, lr)
        self.automatic_optimization = False
        self.saved: dict[str, Any] | None = None

    def configure_optimizers(self) -> Any:
        """A plain AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, self.steps)}

    def on_train_start(self) -> None:
        """Make the two objects on Lightning's optimizer, which counts the steps, and load what was saved."""
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        self.updater = Updater(optimizer, schedule)
        self.mechanic = Mechanic(self.updater)
        if self.saved is not None:
            self.updater.load_state_dict(self.saved["updater"])
            self.mechanic.load_state_dict(self.saved["mechanic"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the two objects to Lightning's checkpoint."""
        checkpoint["manic"] = {"updater": self.updater.state_dict(), "mechanic": self.mechanic.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was saved until the two objects are there."""
        self.saved = checkpoint["manic"]

    def training_step(self, batch: list[Tensor], _: int) -> None:  # type: ignore
        """The two calls, after whatever changes the gradients."""
        loss = self.loss(batch)
        self.updater.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(self.updater.base_optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        self.log_dict({"loss": loss, "lr_0": self.updater.scale * self.updater.param_groups[0]["lr"]})
        self.mechanic.step()
        self.updater.step()


def main() -> None:
    """Train, and print the last line of the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--two-objects", action="store_true")
    parser.add_argument("--epochs", type=int, default=10, help="of 28 batches")
    parser.add_argument("--stop-after", type=int, help="stop after this epoch, with the schedule of the whole run")
    parser.add_argument("--resume", type=Path, help="a checkpoint of Lightning's")
    parser.add_argument("--devices", type=int, default=1, help="processes, on the CPU")
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args()

    lightning.seed_everything(0)
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    batches = DataLoader(TensorDataset(x.float() / 16, y), batch_size=64 // options.devices, drop_last=True)
    module = (DigitsWithTwoObjects if options.two_objects else Digits)(steps=28 * options.epochs)
    logger = CSVLogger(options.folder, name=None, version="")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=options.devices,
        max_epochs=options.stop_after or options.epochs,
        logger=logger,
        callbacks=[] if options.two_objects else [EffectiveRates()],
        log_every_n_steps=1,
        default_root_dir=options.folder,
        gradient_clip_val=None if options.two_objects else 1.0,
        enable_model_summary=False,
    )
    trainer.fit(module, batches, ckpt_path=options.resume, weights_only=True)
    metrics = trainer.callback_metrics
    print(f"step {trainer.global_step}: loss {metrics['loss']:.4f}, effective learning rate {metrics['lr_0']:.3g}")


if __name__ == "__main__":
    main()
