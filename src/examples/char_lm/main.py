"""A small GPT on the text of Python's standard library, with checkpoints.

Kill it whenever you like and start it again with ``--resume``: nothing is lost but the steps since the last save.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from model import GPT, load_text, loss_of, sample
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from manic import Mechanic, Updater

BATCH, CONTEXT = 16, 64


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves either the old one or the new one whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=1e-6, help="anything: manic finds the scale")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/char_lm.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint if there is one")
    options = parser.parse_args()

    text, validation = load_text()
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    warmup = LinearLR(optimizer, 0.01, 1.0, options.warmup)
    cosine = CosineAnnealingLR(optimizer, max(1, options.steps - options.warmup))
    updater = Updater(optimizer, SequentialLR(optimizer, [warmup, cosine], [options.warmup]))
    mechanic = Mechanic(updater, steps_per_epoch=len(text) / (BATCH * CONTEXT))

    first = 0
    if options.resume and options.checkpoint.exists():
        state = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        updater.load_state_dict(state["updater"])
        mechanic.load_state_dict(state["mechanic"])
        first = state["step"]
        print(f"resumed after step {first}", flush=True)
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)

    progress = tqdm(range(first, options.steps), initial=first, total=options.steps)
    for step in progress:
        loss = loss_of(model, sample(text, seed=step, batch=BATCH, context=CONTEXT))
        updater.zero_grad()
        loss.backward()
        mechanic.step()
        updater.step()
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            parts = {"model": model, "updater": updater, "mechanic": mechanic}
            save(options.checkpoint, {"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}})
            progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{float(mechanic.scale):.3g}")
            tqdm.write(f"saved step {step + 1}: loss {loss.item():.4f}, learning rate {updater.get_last_lr()[0]:.3g}")

    with torch.no_grad():
        losses = [loss_of(model, sample(validation, seed=-1 - i, batch=BATCH, context=CONTEXT)) for i in range(20)]
    print(f"validation loss {float(torch.stack(losses).mean()):.6f} nats per byte", flush=True)


if __name__ == "__main__":
    main()
