"""The benchmark with larger nets: that every kind of run trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("sklearn")
pytest.importorskip("PIL")  # with which scikit-learn reads its photos

import larger


@pytest.mark.parametrize("by", [0.003, "manic", larger.TOLD])
@pytest.mark.parametrize(("task", "steps"), [("gpt", 12), ("denoiser", 60)])
def test_every_kind_of_run_trains(task: str, steps: int, by: float | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(larger, "CHECKED", 4)
    before, after = (larger.train(larger.Run(task, by, count, 0)) for count in (0, steps))
    assert after < before
