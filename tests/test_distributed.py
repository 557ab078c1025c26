"""Models spread over processes take the run of one process, and so do their checkpoints on other numbers of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from problems import relative_difference
from ranks import FORMS, SAVE_AT, STEPS, WAYS, Model, Run
from torch import nn

from manic import Mechanic, Updater

TESTS = Path(__file__).parent
TASKS = [("train", 2), ("train", 4), ("resume", 4), ("resume", 1)]
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("FSDP2 is public from torch 2.6 on", allow_module_level=True)


def torchrun(ranks: int, *arguments: str | Path, options: tuple[str, ...] = (), **kwargs: Any) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    return subprocess.Popen([*launch, *map(str, arguments)], stdout=subprocess.PIPE, text=True, **kwargs)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for task, ranks in TASKS:
        with torchrun(ranks, TESTS / "ranks.py", folder, task, stderr=subprocess.PIPE) as process:
            errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
        found[task, ranks] = torch.load(folder / f"{task} {ranks}.pt")
    return found


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    run = Run("two objects", "alone")
    run.train(range(STEPS))
    return {name: p.detach() for name, p in run.model.named_parameters()}, run.mechanic.scale


def assert_same_run(result: dict[str, Any], alone: tuple[dict[str, torch.Tensor], torch.Tensor]) -> None:
    expected, scale = alone
    for name, start in Model().named_parameters():
        assert relative_difference(expected[name], start.detach() + 1e-3) > 1e-2
        assert relative_difference(result["parameters"][name].reshape(-1), expected[name].reshape(-1)) < 1e-10, name
    assert float(result["scale"]) == pytest.approx(float(scale), rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("ranks", "way"), [(ranks, way) for ranks, ways in WAYS.items() for way in ways])
def test_trajectory(form: str, ranks: int, way: str, results: Any, alone: Any) -> None:
    if (form, way) == ("drop-in", "zero"):
        pytest.skip("ZeroRedundancyOptimizer wraps an optimizer class itself")
    result = results["train", ranks][form, way]
    assert_same_run(result, alone)
    ours = [size for size in result["reduced"] if size == 4]
    assert len(ours) == (0 if way in ("ddp", "zero") else STEPS - SAVE_AT)  # one all-reduce of four numbers a step


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [4, 1])
def test_resume_on_another_number_of_ranks(form: str, ranks: int, results: Any, alone: Any) -> None:
    assert_same_run(results["resume", ranks][form], alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_without_a_gradient_reach_the_collective(form: str, ranks: int, results: Any) -> None:
    """Plain parameters, a different one on every rank, against one process that has them all."""
    weights = [nn.Parameter(torch.arange(3.0, dtype=torch.float64) + 3 * rank - 2) for rank in range(ranks)]
    start = torch.cat([w.detach().clone() for w in weights])
    updater = Updater(torch.optim.AdamW(weights, lr=1.0))
    mechanic = Mechanic(updater, s_init=1e-3)
    for i in range(STEPS):
        for rank, weight in enumerate(weights):
            weight.grad = None if i % 4 == rank else weight.detach() - 0.3 * (i % 5)
        mechanic.step()
        updater.step()
    result = results["train", ranks][form, "by hand"]
    expected = torch.cat([w.detach() for w in weights])
    assert relative_difference(expected, start) > 1e-2
    assert relative_difference(result["weight"], expected) < 1e-10
    assert float(result["scale"]) == pytest.approx(float(mechanic.scale), rel=1e-10)


def test_init_state_changes_nothing() -> None:
    def run(init: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        updater = Updater(optimizer)
        mechanic = Mechanic(updater, s_init=1e-3)
        if init:
            updater.init_state()
            assert len(updater.state_dict()["displacement"]) == len(list(model.parameters()))
            assert optimizer.param_groups[0]["lr"] == 0.1
        for step in range(10):
            updater.zero_grad()
            torch.manual_seed(step)
            model(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
            mechanic.step()
            updater.step()
        updater.init_state()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), mechanic.scale

    with_it, without = run(True), run(False)
    assert float(without[1]) > 0
    assert torch.equal(with_it[0], without[0])
    assert torch.equal(with_it[1], without[1])
