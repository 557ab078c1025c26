"""Save and load: bit for bit, in new processes, and nothing half-loaded."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import assert_same_bits, backward, fit, flat, make_net, relative_difference
from resume import CASES, M, N, Run, path_of
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR

from manic import Mechanic, Updater, mechanize
from manic.checkpoint import STATE_VERSION


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that were saved after N steps and trained for M more by a new process."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        run = Run(*case)
        run.train(0, N)
        torch.save(run.state_dict(), path_of(folder, case))
    script = Path(__file__).parent / "resume.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_resume_in_a_new_process_is_the_same_run(case: tuple[Any, ...], resumed: Path) -> None:
    straight = Run(*case)
    start = flat(straight.model)
    straight.train(0, N)
    middle = flat(straight.model)
    straight.train(N, N + M)
    assert relative_difference(middle, start) > 1e-3
    assert relative_difference(flat(straight.model), middle) > 1e-3
    after = torch.load(path_of(resumed, case), weights_only=True)
    assert_same_bits(after, straight.state_dict())


def test_the_two_forms_are_the_same_run() -> None:
    for case in CASES:
        if case[0] == "drop-in":
            drop_in, pair = Run(*case), Run("two objects", *case[1:])
            start = flat(pair.model)
            for run in (drop_in, pair):
                run.train(0, N)
            assert relative_difference(flat(pair.model), start) > 1e-3
            assert torch.equal(flat(drop_in.model), flat(pair.model)), case


def test_the_published_recipe() -> None:
    """As written in the first README of the two-object form, ``mechanic.optimizer = …`` included."""
    model = make_net()

    def build() -> tuple[Updater, Mechanic]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        lr_scheduler = CosineAnnealingLR(optimizer, 50)
        updater = Updater(optimizer, lr_scheduler)
        return updater, Mechanic(updater)

    updater, mechanic = build()
    for step in range(5):
        backward(model, step)
        mechanic.step()
        updater.step()
    updater_state = updater.state_dict()
    mechanic_state = mechanic.state_dict()
    expected = float(mechanic.scale)

    updater, mechanic = build()
    updater.load_state_dict(updater_state)
    mechanic.load_state_dict(mechanic_state)
    mechanic.optimizer = updater.base_optimizer
    assert float(mechanic.scale) == expected > 0
    with pytest.raises(ValueError, match="can only be its updater's base optimizer"):
        mechanic.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_state_dicts_own_their_tensors(case: tuple[Any, ...]) -> None:
    run = Run(*case)
    run.train(0, N)
    states = {name: part.state_dict() for name, part in run.parts.items()}
    kept = copy.deepcopy(states)
    run.train(N, N + 5)
    assert_same_bits(states, kept)


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_a_state_that_was_loaded_stays_as_it_is(case: tuple[Any, ...]) -> None:
    """So that a run may go back to it again and again."""
    run = Run(*case)
    run.train(0, N)
    states = copy.deepcopy(run.state_dict())
    kept, ends = copy.deepcopy(states), []
    for _ in range(2):
        run.load_state_dict(states)
        run.train(N, N + 5)
        assert_same_bits(states, kept)
        ends.append(flat(run.model))
    assert torch.equal(*ends)


def test_a_save_between_the_two_steps_is_the_state_before_both() -> None:
    run = Run("two objects", "adamw", "cosine_warmup", True)
    run.train(0, 10)
    expected = run.state_dict()
    expected["model"] = copy.deepcopy(expected["model"])
    backward(run.model, 10)
    run.parts["mechanic"].step()
    assert_same_bits(run.state_dict(), expected)


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("store_delta", [True, False])
def test_the_model_may_be_loaded_before_or_after(model_first: bool, store_delta: bool) -> None:
    run = Run("two objects", "adamw", "none", store_delta)
    run.train(0, N)
    state = copy.deepcopy(run.state_dict())
    run.train(N, N + 10)
    other = Run("two objects", "adamw", "none", store_delta, seed=3)
    for name in ("model", "updater", "mechanic") if model_first else ("mechanic", "updater", "model"):
        (other.model if name == "model" else other.parts[name]).load_state_dict(state[name])
    other.train(N, N + 10)
    assert torch.equal(flat(other.model), flat(run.model))


def test_float32_state_stays_float32_under_bfloat16_parameters() -> None:
    model = make_net(dtype=torch.bfloat16)
    optimizer = mechanize(torch.optim.AdamW, s_init=1e-3)(model.parameters(), lr=0.1)
    for step in range(20):
        backward(model, step, torch.bfloat16)
        optimizer.step()
    state = optimizer.state_dict()
    deltas = [entry["delta"].clone() for entry in state["state"].values()]
    assert all(delta.dtype == torch.float32 for delta in deltas)
    assert any(not torch.equal(delta, delta.bfloat16().float()) for delta in deltas)
    fresh = mechanize(torch.optim.AdamW)(model.parameters(), lr=0.1)
    fresh.load_state_dict(state)
    for entry, delta in zip(fresh.state_dict()["state"].values(), deltas, strict=True):
        assert entry["delta"].dtype == torch.float32
        assert torch.equal(entry["delta"], delta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["two objects", "drop-in"])
def test_a_float32_run_goes_on_in_half_precision(form: str, dtype: torch.dtype) -> None:
    def build(dtype: torch.dtype) -> tuple[nn.Module, list[Any]]:
        model = make_net(dtype=dtype)
        if form == "drop-in":
            return model, [mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0, eps=1e-4)]
        updater = Updater(torch.optim.AdamW(model.parameters(), lr=1.0, eps=1e-4))
        return model, [Mechanic(updater), updater]

    def train(model: nn.Module, parts: list[Any], steps: range, dtype: torch.dtype) -> None:
        for step in steps:
            backward(model, step, dtype)
            for part in parts:
                part.step()

    model, parts = build(torch.float32)
    train(model, parts, range(40), torch.float32)
    other, other_parts = build(dtype)
    other.load_state_dict(model.state_dict())
    for part, saved in zip(other_parts, parts, strict=True):
        part.load_state_dict(saved.state_dict())
    start = flat(other).float()
    train(model, parts, range(40, 60), torch.float32)
    train(other, other_parts, range(40, 60), dtype)
    assert relative_difference(flat(model), start) > 5e-2
    assert relative_difference(flat(other).float(), flat(model)) < 2e-2


def test_a_mechanic_that_is_built_after_its_updater_was_loaded() -> None:
    run = Run("two objects", "adamw", "none", True)
    run.train(0, N)
    state = copy.deepcopy(run.state_dict())
    other = make_net(3)
    other.load_state_dict(state["model"])
    updater = Updater(torch.optim.AdamW(other.parameters(), lr=0.1))
    updater.load_state_dict(state["updater"])
    mechanic = Mechanic(updater)
    mechanic.load_state_dict(state["mechanic"])
    assert float(mechanic.scale) == float(run.parts["mechanic"].scale) > 0
    run.train(N, N + 10)
    for step in range(N, N + 10):
        backward(other, step)
        mechanic.step()
        updater.step()
    assert torch.equal(flat(other), flat(run.model))


@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("first", ["updater", "mechanic"])
def test_after_a_step_that_a_scaler_alone_has_refused(first: str, store_delta: bool) -> None:
    """What the tuner has found for it is forgotten."""

    def made(model: nn.Module) -> dict[str, Any]:
        updater = Updater(torch.optim.AdamW(model.parameters(), lr=0.1), store_delta=store_delta)
        return {"updater": updater, "mechanic": Mechanic(updater)}

    def train(model: Any, parts: dict[str, Any], steps: range) -> None:
        for step in steps:
            backward(model, step)
            parts["mechanic"].step()
            parts["updater"].found_inf = torch.full((), float(step == 14))
            parts["updater"].step()
            del parts["updater"].found_inf

    model, other = make_net(), make_net(3)
    parts, loaded = made(model), made(other)
    train(model, parts, range(15))
    assert float(parts["mechanic"].state_dict()["tuner"]["scales"].sum()) == float(
        parts["updater"].state_dict()["scale"]
    )
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for name in sorted(parts, reverse=first == "updater"):
        loaded[name].load_state_dict(copy.deepcopy(parts[name].state_dict()))
    before = flat(model)
    for net, its in ((model, parts), (other, loaded)):
        train(net, its, range(15, 20))
    assert relative_difference(flat(model), before) > 1e-6
    assert torch.equal(flat(other), flat(model))


@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_a_change_of_a_frozen_parameter_is_none_of_the_run_s(how: str) -> None:
    """Without a stored Δ what others did while a layer was frozen must not be taken for it, in a resumed run either."""

    def made() -> tuple[nn.ParameterList, Updater, Mechanic]:
        weights = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(40))])
        updater = Updater(torch.optim.AdamW(weights.parameters(), lr=1.0), store_delta=False)
        return weights, updater, Mechanic(updater)

    def train(run: tuple[nn.ParameterList, Updater, Mechanic], steps: int) -> None:
        weights, updater, mechanic = run
        for _ in range(steps):
            updater.zero_grad()
            sum((x - 3).square().sum() for x in weights if x.requires_grad).backward()
            mechanic.step()
            updater.step()

    def finish(run: tuple[nn.ParameterList, Updater, Mechanic]) -> list[float]:
        train(run, 2)
        with torch.no_grad():
            run[0][1].add_(10.0)
        train(run, 2)
        run[0][1].requires_grad_(True)
        train(run, 20)
        return [float(run[2].scale), *run[0][1].tolist()]

    run = made()
    train(run, 20)
    run[0][1].requires_grad_(False)
    train(run, 2)
    if how == "copied":
        other = copy.deepcopy(run)
    else:
        other = made()
        other[0].load_state_dict(run[0].state_dict())
        other[0][1].requires_grad_(False)
        for part, saved in zip(other[1:], run[1:], strict=True):
            part.load_state_dict(copy.deepcopy(saved.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the change
        assert finish(run) == finish(other)


@pytest.mark.parametrize("copied", [False, True])
def test_rebase_before_the_first_step_of_a_copy(copied: bool) -> None:
    """With a Δ that is not stored, it starts again from zero."""
    weight = nn.Parameter(torch.ones(4))
    updater = Updater(torch.optim.SGD([weight], lr=1.0), store_delta=False)
    mechanic = Mechanic(updater)
    for _ in range(20):
        weight.grad = weight.detach() - 3
        mechanic.step()
        updater.step()
    if copied:
        weight, updater, mechanic = copy.deepcopy((weight, updater, mechanic))
    weight.data.add_(10.0)
    updater.rebase()
    slot = updater.displacement.slots[weight]
    assert torch.equal(slot.reference, weight.detach())


def test_steps_that_raised_do_not_count() -> None:
    """So that a resumed run restarts its displacement at the same steps."""
    models = make_net(), make_net(seed=1)
    made = mechanize(torch.optim.AdamW, nonfinite="raise")
    optimizers = [made(model.parameters(), lr=1.0) for model in models]
    for step in range(30):
        backward(models[0], step)
        if step in (3, 4, 5):
            models[0].gain.grad.fill_(torch.nan)  # type: ignore
            with pytest.raises(FloatingPointError):
                optimizers[0].step()
        else:
            optimizers[0].step()
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for step in range(30, 90):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, step)
            optimizer.step()
    assert torch.equal(*map(flat, models))


def test_a_schedule_that_does_not_fit_leaves_all_as_it_was() -> None:
    def build(parts: int) -> Any:
        model = make_net()
        base = torch.optim.AdamW(model.parameters(), lr=1.0)
        schedules = [CosineAnnealingLR(base, 100) for _ in range(parts)]
        updater = Updater(base, SequentialLR(base, schedules, list(range(10, 10 * parts, 10))))
        mechanic = Mechanic(updater)
        return model, updater, mechanic

    states = []
    for parts, steps in ((3, 25), (2, 5)):
        model, updater, mechanic = build(parts)
        for step in range(steps):
            backward(model, step)
            mechanic.step()
            updater.step()
        states.append(copy.deepcopy(updater.state_dict()))
    with pytest.raises(ValueError, match=r"SequentialLR does not fit \(IndexError.*Build it as it was when saved"):
        updater.load_state_dict(states[0])
    assert_same_bits(updater.state_dict(), states[1])


@pytest.mark.parametrize("form", ["two objects", "drop-in"])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_load_that_fails_on_the_way_leaves_all_as_it_was(form: str, when: str) -> None:
    run = Run(form, "adamw", "cosine_warmup", True)
    run.train(0, 5)
    name = next(iter(run.parts))
    part = run.parts[name]
    saved = copy.deepcopy(part.state_dict())
    run.train(5, 15)
    before = copy.deepcopy(run.state_dict())

    def fail(*_: Any) -> None:
        raise KeyError("in the hook")

    base = part if form == "drop-in" else part.base_optimizer
    handle = getattr(base, f"register_load_state_dict_{when}_hook")(fail)
    with pytest.raises(KeyError, match="in the hook"):
        part.load_state_dict(saved)
    handle.remove()
    assert_same_bits(run.state_dict(), before)
    run.train(15, 20)


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("updater", {"scale": "x"}),
        ("updater", {"scale": torch.ones(2)}),
        ("updater", {"unit": None}),
        ("updater", {"steps": "5"}),
        ("updater", {"nominal_rates": 1.0}),
        ("updater", {"nominal_rates": []}),
        ("updater", {"nominal_rates": [None]}),
        ("updater", {"base_optimizer": None}),
        ("updater", {"kinds": None}),
        ("updater", {"dtypes": None}),
        ("mechanic", {"scale": "x"}),
        ("mechanic", {"skipped": 3}),
        ("mechanic", {"steps": 1.5}),
        ("mechanic", {"since": None}),
    ],
)
def test_a_state_with_an_entry_of_another_type_is_refused_whole(part: str, entry: dict[str, Any]) -> None:
    run = Run("two objects", "adamw", "cosine_warmup", True)
    run.train(0, 5)
    saved = copy.deepcopy(run.parts[part].state_dict())
    run.train(5, 15)
    before = copy.deepcopy(run.state_dict())
    with pytest.raises(
        ValueError, match=rf"state dict has {next(iter(entry))}=.*Load what {part.title()}.state_dict\(\)"
    ):
        run.parts[part].load_state_dict({**saved, **entry})
    assert_same_bits(run.state_dict(), before)


@pytest.mark.parametrize(("first", "second"), [("updater", "mechanic"), ("mechanic", "updater")])
def test_a_run_that_is_loaded_by_one_of_the_two_only(first: str, second: str) -> None:
    """After step 243 the scale would stay where a new Mechanic starts, and be learned once more with a new Updater."""
    run = Run("two objects", "adamw", "none", True)
    run.train(0, N)
    state = copy.deepcopy(run.state_dict())
    other = Run("two objects", "adamw", "none", True, seed=3)
    other.model.load_state_dict(state["model"])
    other.parts[first].load_state_dict(state[first])
    backward(other.model, N)
    with pytest.raises(RuntimeError, match=rf"state of another step.*Call {second}\.load_state_dict\(\) too"):
        other.parts["mechanic"].step()
    other.parts[second].load_state_dict(state[second])
    for one in (run, other):
        one.train(N, N + 10)
    assert torch.equal(flat(other.model), flat(run.model))
    other.parts[first].load_state_dict(other.parts[first].state_dict())  # of this very step: changes nothing
    other.train(N + 10, N + 11)


@pytest.mark.parametrize("store_delta", [True, False])
def test_a_mechanic_that_alone_takes_up_another_scale(store_delta: bool) -> None:
    """The parameters go on from where they are, as under one that has found this scale."""
    moves = []
    for factor in (1.0, 10.0):
        model = make_net()
        updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0), store_delta=store_delta)
        mechanic = Mechanic(updater, s_init=1e-3)
        for step in range(N):
            backward(model, step)
            mechanic.step()
            updater.step()
        state, before = mechanic.state_dict(), flat(model)
        tuner = {**state["tuner"], "scales": factor * state["tuner"]["scales"]}
        mechanic.load_state_dict({**state, "tuner": tuner, "scale": factor * state["scale"]})
        backward(model, N)
        mechanic.step(tune=False)
        updater.step()
        moves.append(flat(model) - before)
    assert relative_difference(10 * moves[0], moves[1]) < 1e-6


def test_a_loaded_run_writes_to_no_parameter_before_the_base_step() -> None:
    """Optimizers that differentiate the gradient again need the graph of the backward pass whole."""
    run = Run("two objects", "adamw", "none", True)
    run.train(0, 5)
    other = Run("two objects", "adamw", "none", True, seed=3)
    other.load_state_dict(copy.deepcopy(run.state_dict()))
    backward(other.model, 5)
    versions = [p._version for p in other.model.parameters()]
    other.parts["mechanic"].step()
    assert [p._version for p in other.model.parameters()] == versions


class Wider(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, width, dtype=torch.float64)
        self.out = nn.Linear(width, 1, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(x))


@pytest.mark.parametrize("form", ["two objects", "drop-in"])
def test_a_state_of_another_model_is_refused_whole(form: str) -> None:
    def build(width: int) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        model = Wider(width)
        groups = [{"params": list(model.parameters()), "param_names": [name for name, _ in model.named_parameters()]}]
        if form == "drop-in":
            optimizer = mechanize(torch.optim.AdamW)(groups, lr=0.1)
            return model, optimizer, optimizer.step
        updater = Updater(torch.optim.AdamW(groups, lr=0.1))
        mechanic = Mechanic(updater)

        def step() -> None:
            mechanic.step()
            updater.step()

        return model, updater, step

    saved_model, saved, step = build(8)
    for i in range(3):
        backward(saved_model, i)
        step()
    model, target, step = build(9)
    for i in range(3):
        backward(model, i)
        step()
    before = target.state_dict()
    with pytest.raises(
        ValueError, match=r"parameter 0 \(hidden.weight\) has shape \(8, 6\), the parameter has \(9, 6\)"
    ):
        target.load_state_dict(saved.state_dict())
    assert_same_bits(target.state_dict(), before)


def test_refused_states() -> None:
    model = make_net()

    def updater(**options: Any) -> Updater:
        return Updater(torch.optim.AdamW(model.parameters(), lr=0.1), **options)

    run = Run("two objects", "adamw", "cosine_warmup", True)
    run.train(0, 3)
    state, mechanic_state = run.parts["updater"].state_dict(), run.parts["mechanic"].state_dict()
    with pytest.raises(
        ValueError, match="saved with lr_scheduler=SequentialLR, and this Updater has lr_scheduler=None"
    ):
        updater().load_state_dict(state)
    sgd = Updater(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="saved with optimizer=AdamW, and this Updater has optimizer=SGD"):
        sgd.load_state_dict(state)
    plain = {**state, "lr_scheduler": None, "kinds": {"optimizer": "AdamW", "lr_scheduler": None}}
    with pytest.raises(
        ValueError, match="has delta and reference of parameter 0; expected reference with store_delta="
    ):
        updater(store_delta=False).load_state_dict(plain)
    del state["displacement"][0]["reference"]
    with pytest.raises(
        ValueError, match="has delta of parameter 0; expected delta and reference with store_delta=True"
    ):
        updater().load_state_dict(plain)
    with pytest.raises(ValueError, match="saved with optimizer=None, and this Updater has optimizer=AdamW"):
        updater().load_state_dict({**plain, "kinds": {}})
    with pytest.raises(ValueError, match="steps='x'; expected a whole number"):
        updater().load_state_dict({**plain, "steps": "x"})
    whole = {"model": model.state_dict(), "tuned": state, "mechanic": mechanic_state}
    with pytest.raises(ValueError, match=r"looks like a whole checkpoint.*load state\['tuned'\]"):
        updater().load_state_dict(whole)
    with pytest.raises(ValueError, match=r"looks like a whole checkpoint.*load state\['mechanic'\]"):
        Mechanic(updater()).load_state_dict(whole)
    with pytest.raises(
        ValueError, match=f"version 99; this release reads version {STATE_VERSION}. Load it with the release"
    ):
        updater().load_state_dict({**plain, "version": 99})
    with pytest.raises(ValueError, match=r"lacks version.*expected what Updater.state_dict\(\) returns"):
        updater().load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(ValueError, match=r"expected what Mechanic.state_dict\(\) returns"):
        Mechanic(updater()).load_state_dict(state)
    few = torch.optim.AdamW(list(model.parameters())[:3], lr=0.1)
    with pytest.raises(ValueError, match="of another model"):
        Updater(few).load_state_dict(plain)
    with pytest.raises(ValueError, match="displacement=None; expected a dict"):
        updater().load_state_dict({**plain, "displacement": None})
    for name in ("config", "tuner"):
        with pytest.raises(ValueError, match=f"{name}=None; expected a dict"):
            Mechanic(updater()).load_state_dict({**mechanic_state, name: None})
    fewer = {name: value for name, value in mechanic_state["config"].items() if name != "max_scale"}
    with pytest.raises(ValueError, match=r"a config of rule.*; expected all of rule.*, max_scale, steps_per_epoch"):
        Mechanic(updater()).load_state_dict({**mechanic_state, "config": fewer})
    broken = {**mechanic_state, "tuner": {name: t[:0] for name, t in mechanic_state["tuner"].items()}}
    with pytest.raises(ValueError, match=r"have shapes .*; expected \(1,\) each"):
        Mechanic(updater()).load_state_dict(broken)
    drop_in = mechanize(torch.optim.AdamW)(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected the state dict of a mechanized AdamW"):
        drop_in.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(ValueError, match="no param_groups; expected the state dict of a mechanized AdamW"):
        drop_in.load_state_dict({})
    with pytest.raises(ValueError, match="of a mechanized AdamW; expected that of a mechanized SGD"):
        mechanize(torch.optim.SGD)(model.parameters(), lr=0.1).load_state_dict(drop_in.state_dict())
    for tuner in (torch.zeros(4, 2), 5):
        broken = drop_in.state_dict()
        broken["param_groups"][0]["mechanic_tuner"] = tuner
        with pytest.raises(ValueError, match=r"have shapes .*; expected \(1,\) each"):
            drop_in.load_state_dict(broken)
    broken = drop_in.state_dict()
    broken["param_groups"][0]["mechanic_rates"] = []
    with pytest.raises(ValueError, match="expected one number for each of the 1 parameter groups"):
        drop_in.load_state_dict(broken)


def test_a_drop_in_state_of_another_version_is_refused() -> None:
    optimizer = mechanize(torch.optim.AdamW)(make_net().parameters(), lr=0.1)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["mechanic_version"] = 7
        del group["mechanic_scale"]
    with pytest.raises(ValueError, match=f"is of version 7; this release reads version {STATE_VERSION}"):
        optimizer.load_state_dict(state)


def test_the_options_come_with_the_state() -> None:
    model = make_net()
    saved = mechanize(torch.optim.AdamW, betas=(0.9, 0.99), s_decay=0.5, rule="optax")(model.parameters(), lr=0.1)
    other = mechanize(torch.optim.AdamW)(model.parameters(), lr=0.1)
    other.load_state_dict(saved.state_dict())
    assert other.mechanic.state_dict()["config"] == saved.mechanic.state_dict()["config"]
    assert other.state_dict()["param_groups"][0]["mechanic_config"]["rule"] == "optax"


def test_other_options_than_the_saved_ones_are_said_to_be_replaced() -> None:
    model = make_net()

    def made(**options: Any) -> Any:
        return mechanize(torch.optim.AdamW, **options)(model.parameters(), lr=0.1)

    state = made(steps_per_epoch=20, max_scale=3.0).state_dict()
    for silent in ({}, {"steps_per_epoch": 20}, {"steps_per_epoch": 20.0, "max_scale": 3}):
        made(**silent).load_state_dict(state)
    other = made(steps_per_epoch=10, s_init=1e-3, max_scale=3.0)
    said = "given s_init=0.001, steps_per_epoch=10.0, and the state was saved with s_init=None, steps_per_epoch=20.0"
    with pytest.warns(UserWarning, match=re.escape(said)):
        other.load_state_dict(state)
    assert other.mechanic.state_dict()["config"]["steps_per_epoch"] == 20


def test_where_that_is_an_error_nothing_is_loaded() -> None:
    model = make_net()
    saved = mechanize(torch.optim.AdamW)(model.parameters(), lr=0.1)
    other = mechanize(torch.optim.AdamW, max_scale=0.5)(model.parameters(), lr=0.1)
    for optimizer, steps in ((saved, 20), (other, 3)):
        for step in range(steps):
            backward(model, step)
            optimizer.step()
    before = other.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"given max_scale=0\.5"):
            other.load_state_dict(saved.state_dict())
    assert_same_bits(other.state_dict(), before)


def test_a_part_of_a_drop_in_loads_nothing_alone() -> None:
    optimizer = mechanize(torch.optim.AdamW)(make_net().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="state dict of the optimizer itself"):
        optimizer.mechanic.load_state_dict(optimizer.mechanic.state_dict())


@pytest.mark.parametrize("form", ["two objects", "drop-in"])
def test_passes_over_the_data_are_counted_on(form: str) -> None:
    case = form, "sgd_nesterov", "cosine_warmup", True
    straight, resumed, unknown = Run(*case, steps_per_epoch=20), Run(*case), Run(*case)
    straight.train(0, 260)
    resumed.load_state_dict(straight.state_dict())
    for one in (straight, resumed):
        one.train(260, 280)
    unknown.train(0, 280)
    assert relative_difference(flat(straight.model), flat(unknown.model)) > 3e-5
    assert_same_bits(resumed.state_dict(), straight.state_dict())


def test_numbers_of_numpy_are_saved_as_plain_ones() -> None:
    model, file = make_net(), io.BytesIO()
    number = np.float64(1e-3)
    updater = Updater(torch.optim.AdamW(model.parameters()), internal_lr=number)
    mechanic = Mechanic(
        updater,
        s_init=number,
        max_scale=number,
        s_decay=number,
        eps=number,
        steps_per_epoch=number,
    )
    torch.save([updater.state_dict(), mechanic.state_dict()], file)
    file.seek(0)
    assert torch.load(file, weights_only=True)[1]["config"]["max_scale"] == 1e-3


def test_torch_load_needs_no_trust() -> None:
    run = Run("drop-in", "sgd_nesterov", "cosine_warmup", True)
    run.train(0, 5)
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    assert_same_bits(torch.load(file, weights_only=True), run.state_dict())


def test_a_run_in_which_a_layer_was_frozen_resumes_as_the_same_run() -> None:
    """What is left in training was packed with the frozen layer before, at an address that sums are sensitive to."""

    def made() -> tuple[nn.Sequential, Updater, Mechanic]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 13, bias=False))
        updater = Updater(torch.optim.AdamW(model.parameters(), lr=1.0))
        return model, updater, Mechanic(updater)

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 7, generator=generator), torch.randn(64, 13, generator=generator)
    straight, resumed = made(), made()
    fit(*straight, x, y, 10)
    straight[0][0].requires_grad_(False)
    fit(*straight, x, y, 10)
    for part, state in zip(resumed, copy.deepcopy([part.state_dict() for part in straight]), strict=True):
        part.load_state_dict(state)
    resumed[0][0].requires_grad_(False)
    before = straight[0][2].weight.detach().clone()
    for run in (straight, resumed):
        fit(*run, x, y, 100)
    assert relative_difference(flat(straight[0][2]), before.flatten()) > 0.01
    assert_same_bits(straight[0].state_dict(), resumed[0].state_dict())
    memory = straight[1].displacement.slots[straight[0][2].weight].reference.untyped_storage()
    assert memory.nbytes() == 4 * before.numel()
