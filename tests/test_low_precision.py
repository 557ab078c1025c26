"""A language model whose parameters are in bfloat16 ends where its float32 twin does."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from manic import mechanize

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from low_precision import final_loss

STEPS = 150


def test_language_model() -> None:
    expected = final_loss(mechanize, torch.float32, STEPS)
    assert expected < 3.2  # 5.5 before training
    assert final_loss(mechanize, torch.bfloat16, STEPS) < 1.05 * expected
