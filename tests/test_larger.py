"""The benchmarks with larger nets and with many kinds of them: that every run trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("sklearn")
pytest.importorskip("PIL")  # with which scikit-learn reads its photos

import larger
import many_nets


@pytest.mark.parametrize("by", [0.003, "manic", larger.TOLD])
@pytest.mark.parametrize(("task", "steps"), [("gpt", 12), ("gpt2", 12), ("denoiser", 60)])
def test_every_kind_of_run_trains(task: str, steps: int, by: float | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(larger, "CHECKED", 4)
    before, after = (larger.train(larger.Run(task, by, count, 0)) for count in (0, steps))
    assert after < before


@pytest.mark.parametrize("net", many_nets.NETS)
def test_every_kind_of_net_trains(net: str) -> None:
    before, after = (many_nets.train(many_nets.Run(net, "AdamW", by, 60, 0)) for by in (0.0, "manic"))
    assert after < before
