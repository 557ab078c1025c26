"""A small byte-level GPT, and the text of Python's standard library to train it on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

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
