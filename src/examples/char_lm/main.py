"""A small GPT on the text of Python's standard library, with checkpoints.

Kill it whenever you like and start it again with ``--resume``: nothing is lost but the steps since the last save.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from manic import Mechanic, Updater

VOCABULARY = 256  # bytes


def load_text(limit: int = 4_000_000) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's modules, in alphabetical order: (train, validation), nine to one."""
    data = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data += path.read_bytes()
    text = torch.frombuffer(data[:limit], dtype=torch.uint8)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def sample(text: Tensor, *, seed: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """A batch of (input, next byte), both of shape (batch, context); the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context - 1, (batch, 1), generator=generator)
    window = text[starts + torch.arange(context + 1)].long()
    return window[:, :-1], window[:, 1:]


class Block(nn.Module):
    """A transformer block, pre-norm, causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) to the same."""
        batch, context, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, context, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A byte-level language model."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Bytes of shape (batch, context) to logits of shape (batch, context, 256)."""
        embedded = self.token(x) + self.position.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(embedded)))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    x, y = batch
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


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
    mechanic = Mechanic(updater)

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
        loss = loss_of(model, sample(text, seed=step, batch=16, context=64))
        updater.zero_grad()
        loss.backward()
        mechanic.step()
        updater.step()
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            parts = {"model": model, "updater": updater, "mechanic": mechanic}
            save(options.checkpoint, {"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}})
            progress.set_postfix(loss=f"{float(loss):.3f}", scale=f"{float(mechanic.scale):.3g}")
            tqdm.write(f"saved step {step + 1}: loss {float(loss):.4f}, learning rate {updater.get_last_lr()[0]:.3g}")

    with torch.no_grad():
        losses = [loss_of(model, sample(validation, seed=-1 - i, batch=16, context=64)) for i in range(20)]
    print(f"validation loss {float(torch.stack(losses).mean()):.6f} nats per byte", flush=True)


if __name__ == "__main__":
    main()
