"""Accelerate: handwritten digits, with gradient accumulation, clipping, and ``save_state`` and ``load_state``.

The drop-in goes through ``prepare`` like any optimizer; ``--two-objects`` builds `Mechanic` and `Updater` on a prepared
one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from manic import Mechanic, Updater, mechanize


def main() -> None:
    """Train, and print the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--two-objects", action="store_true")
    parser.add_argument("--epochs", type=int, default=10, help="of 28 batches, two to a step")
    parser.add_argument("--stop-after", type=int, help="stop after this epoch, with the schedule of the whole run")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    options = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    batches: Any = DataLoader(TensorDataset(x.float() / 16, y), batch_size=64, drop_last=True)
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    make = torch.optim.AdamW if options.two_objects else mechanize(torch.optim.AdamW)
    optimizer: Any = make(model.parameters(), lr=1.0)
    schedule: Any = CosineAnnealingLR(optimizer, 14 * options.epochs)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
    if options.two_objects:
        updater = Updater(optimizer)
        mechanic = Mechanic(updater)
        accelerator.register_for_checkpointing(updater, mechanic)
    else:
        updater, mechanic = optimizer.optimizer.updater, optimizer.optimizer.mechanic
    if options.resume:
        accelerator.load_state(str(options.folder))

    epochs = options.stop_after or options.epochs
    loss = torch.zeros(())
    done = schedule.scheduler.last_epoch // 14
    for _ in range(done, epochs):
        for image, label in batches:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(image), label)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                if not options.two_objects:
                    optimizer.step()
                elif accelerator.sync_gradients:  # not after every batch: the tuner wants the whole gradient
                    mechanic.step()
                    updater.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.4f}, effective learning rate {updater.get_last_lr()[0]:.3g}")
    accelerator.save_state(str(options.folder))


if __name__ == "__main__":
    main()
