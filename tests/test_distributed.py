"""Models spread over processes take the run of one process, and so do their checkpoints on other numbers of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from problems import assert_same_bits, relative_difference
from ranks import FORMS, SAVE_AT, STEPS, WAYS, Model, Run, resumed
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from manic import Mechanic, Updater

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "src" / "examples" / "distributed" / "main.py"
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("FSDP2 is public from torch 2.6 on", allow_module_level=True)


def torchrun(
    ranks: int,
    *arguments: str | Path,
    log: Path,
    options: tuple[str, ...] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> str:
    """Run a script on so many ranks, and return what they print; no run outlives its time limit.

    Args:
        log: the file that they print to.
        meanwhile: called again and again until the run has ended.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    environment = {
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see the example
        "PYTHONFAULTHANDLER": "1",
    }
    deadline = time.monotonic() + 300
    with log.open("w") as out:
        process = subprocess.Popen(
            [*launch, *map(str, arguments)], stdout=out, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                assert time.monotonic() < deadline, f"not at its end after 300 s:\n{log.read_text()}"
                meanwhile()
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks
                process.wait(60)
    assert process.returncode == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Of two and four ranks, and of one that goes on from the checkpoint of the two, as the four do."""
    folder = tmp_path_factory.mktemp("ranks")
    found: dict[int, Any] = {}
    for ranks in WAYS:
        torchrun(ranks, TESTS / "ranks.py", folder, log=folder / f"{ranks}.log")
        found[ranks] = torch.load(folder / f"{ranks}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed.checkpoint says that there is one process
        return {**found, 1: {(form, "resumed"): resumed(form, folder) for form in FORMS}}


def run_alone(way: str = "alone") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    run = Run("two objects", way)
    run.train(range(STEPS))
    return {name: p.detach() for name, p in run.model.named_parameters()}, run.mechanic.scale


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return run_alone()


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
    if way == "fsdp2 and tensor parallel":
        pytest.importorskip("torch", "2.13", reason="torch 2.8 gathers rows in the wrong order")
    result, held_out = results[ranks][form, way], way.endswith("held-out rows")
    expected = run_alone("alone, held-out rows") if held_out else alone
    assert not held_out or abs(float(expected[1] / alone[1]) - 1) > 1e-2
    assert_same_run(result, expected)
    ours = [size for size in result["reduced"] if size == 4]
    if way.startswith("ddp") or way == "zero":
        assert not ours
    else:  # one all-reduce of four numbers for each set of gradients
        assert len(ours) == (STEPS - SAVE_AT) * (1 + held_out)


def test_resume_with_a_zero_optimizer(results: Any, alone: Any) -> None:
    """Its state is gathered first, on the rank that saves; an error says so."""
    result = results[2]["two objects", "zero resumed"]
    assert_same_run(result, alone)
    assert "Call updater.base_optimizer.consolidate_state_dict(to=0) on every rank" in result["error"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [4, 1])
def test_resume_on_another_number_of_ranks(form: str, ranks: int, results: Any, alone: Any) -> None:
    assert_same_run(results[ranks][form, "resumed"], alone)


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
    result = results[ranks][form, "by hand"]
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
            calls = []
            hooks = [
                optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
                optimizer.register_step_post_hook(lambda *_: calls.append("after")),
            ]
            updater.init_state()
            assert not calls
            for hook in hooks:
                hook.remove()
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


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the example that nobody killed."""
    folder = tmp_path_factory.mktemp("straight")
    example(folder)
    return folder


def example(folder: Path, meanwhile: Callable[[], None] = lambda: None) -> str:
    arguments = (EXAMPLE, "--steps", "40", "--save-every", "10", "--checkpoint", folder / "run")
    return torchrun(2, *arguments, options=("--max-restarts", "2"), log=folder / "log", meanwhile=meanwhile)


@pytest.mark.parametrize("when", ["after a checkpoint", "while one is written"])
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(when: str, straight: Path, tmp_path: Path) -> None:
    """torchrun starts the ranks again, from the checkpoint; the end is that of the run that nobody killed."""
    killed = []

    def kill() -> None:
        text = (tmp_path / "log").read_text()
        ready = (tmp_path / "run" / "step_20").exists() if when == "while one is written" else "saved step 20" in text
        if ready and not killed:
            killed.append(int(re.findall(r"rank 1 is process (\d+)", text)[0]))
            os.kill(killed[0], signal.SIGKILL)

    logs = [(straight / "log").read_text(), example(tmp_path, kill)]
    assert killed
    assert ["resumed after step" in log for log in logs] == [False, True]
    losses = [re.findall(r"validation loss [\d.]+", log) for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1
    states = []
    for folder in (straight, tmp_path):
        dcp_to_torch_save(folder / "run" / "step_40", folder / "whole.pt")
        states.append(torch.load(folder / "whole.pt"))
    assert_same_bits(*states)
    assert states[0]["mechanic"]["steps"] == 40


def test_restarts_on_torchruns_own_store_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr
