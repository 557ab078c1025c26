"""Two ranks of Lightning's DDP, which `test_frameworks.py` starts as a user would and compares with one process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

EXAMPLE = Path(__file__).parents[1] / "src" / "examples" / "lightning" / "main.py"


class Record(lightning.Callback):
    """The effective rate and the weights after every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        updater = getattr(pl_module, "updater", None) or trainer.optimizers[0].updater
        self.rates += updater.get_last_lr()
        self.weights.append(torch.cat([p.detach().reshape(-1).clone() for p in pl_module.parameters()]))


def main(folder: Path, kind: str, epochs: int) -> None:
    torch.manual_seed(0)
    module = runpy.run_path(str(EXAMPLE))[kind](steps=28 * epochs)
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    record = Record()
    trainer = lightning.Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        precision="64-true",
        max_epochs=epochs,
        gradient_clip_val=1.0 if kind == "Digits" else None,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,  # Lightning's would shuffle
        default_root_dir=folder,
    )
    mine = slice(trainer.global_rank, None, trainer.world_size)
    trainer.fit(module, DataLoader(TensorDataset(x[mine].double() / 16, y[mine]), batch_size=32, drop_last=True))
    result = {"rates": record.rates, "weights": torch.stack(record.weights), "ranks": trainer.world_size}
    torch.save(result, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
