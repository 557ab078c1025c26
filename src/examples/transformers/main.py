"""Hugging Face Trainer: a small GPT-2 made on the spot, on sequences that count upwards modulo 64.

The Trainer makes its own parameter groups and schedule, or, with ``--optimizers``, gets ours; ``--resume`` goes on from
its newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from manic import mechanize


class TrainerWithRate(Trainer):
    """Logs the effective learning rate where the Trainer logs the one given."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called every ``logging_steps`` steps; only then is the scale read from its device."""
        if "learning_rate" in logs:
            optimizer: Any = self.optimizer
            logs["learning_rate"] = getattr(optimizer, "optimizer", optimizer).get_last_lr()[0]
        super().log(logs, start_time)


def sequences(count: int, length: int = 16) -> list[dict[str, Any]]:
    """Rows of tokens, each one more than the last, modulo 64."""
    starts = torch.randint(64, (count, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(length)) % 64]


def main() -> None:
    """Train, and print the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--optimizers", action="store_true", help="hand an optimizer and a schedule over, not a class")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/transformers"))
    options = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    arguments = TrainingArguments(
        output_dir=str(options.folder),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        save_steps=options.save_every,
        logging_steps=min(10, options.steps),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = GPT2LMHeadModel(config)
    kind = mechanize(torch.optim.AdamW)
    if options.optimizers:
        optimizer = kind(model.parameters(), lr=1.0)
        ours: dict[str, Any] = {"optimizers": (optimizer, CosineAnnealingLR(optimizer, options.steps))}
    else:
        ours = {"optimizer_cls_and_kwargs": (kind, {"lr": 1.0})}
    trainer = TrainerWithRate(model=model, args=arguments, train_dataset=sequences(640), **ours)
    trainer.train(resume_from_checkpoint=options.resume)
    logs = [row for row in trainer.state.log_history if "learning_rate" in row]
    highest = max(row["learning_rate"] for row in logs)
    print(f"step {logs[-1]['step']}: loss {logs[-1]['loss']:.4f}, highest effective learning rate {highest:.3g}")


if __name__ == "__main__":
    main()
