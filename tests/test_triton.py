"""The kernels in Triton against the plain form: on a GPU if there is one, else under Triton's interpreter.

The interpreter takes milliseconds a program, so tensors are few and small, and so are the kernels' blocks.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import backward, flat, make_net, relative_difference
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from manic import Mechanic, Updater, mechanize
from manic.kernels import in_tables, plain
from manic.tuner import WATCHED

pytest.importorskip("triton", minversion="3.2")
from manic.kernels import fused
from manic.kernels import triton as passes

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU")
pytestmark = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="neither a GPU nor Triton's interpreter"
)
SIZES = [0, 1, 17, 32, 33, 70]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks so small that every way through the kernels is taken."""
    monkeypatch.setattr(passes, "CHUNK", 32)
    monkeypatch.setattr(passes, "BLOCK", 16)


@pytest.fixture
def one_pass_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step that is taken in one pass."""
    steps: list[int] = []
    run = fused.OnePass.run

    def counted(*arguments: Any) -> None:
        steps.append(len(steps))
        run(*arguments)

    monkeypatch.setattr(fused.OnePass, "run", counted)
    return steps


def tensors(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor]]:
    """x, g, x_ref and Δ with x = x_ref + 0.1 Δ; one without a gradient, one of each misaligned."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    sets: tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor]] = ([], [], [], [])
    for i, size in enumerate(SIZES):
        reference, delta, g = (torch.randn(size + 1, generator=generator, dtype=wide)[i % 2 :] for _ in range(3))
        x = plain.point(reference, delta, torch.tensor(0.1, dtype=torch.float64)).to(dtype)
        for part, tensor in zip(sets, (x, g.to(dtype), reference, delta), strict=True):
            part.append(torch.cat([tensor[:1], tensor]).to(DEVICE)[1:] if i == 4 else tensor.to(DEVICE))
    sets[1][2] = None
    return sets


def weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-6)])
def test_sums_and_move(dtype: torch.dtype, tolerance: float, stored: bool) -> None:
    """The sums within rounding, and every bit of x, x_ref and Δ; the move carries the sums of a fresh pass."""
    x, g, reference, delta = tensors(dtype)
    table = passes.Table(x, reference, delta if stored else None)
    for step in range(3):
        fresh = passes.Table(x, reference, delta if stored else None)
        got, again = table.sums(g), fresh.sums(g)
        assert table.carried == (stored and step > 0)
        assert torch.equal(got, again)
        moved = delta if stored else [a.to(d) - r.to(d) for a, r, d in zip(x, reference, delta, strict=True)]
        together = [torch.cat([t.double() for t in each]) for each in (moved, x)]
        together.insert(
            1, torch.cat([torch.zeros_like(a) if b is None else b for a, b in zip(x, g, strict=True)]).double()
        )
        d, gradient, point = together
        pairs = [(d, gradient), (d, point), (gradient, gradient), (point, point)]
        for value, (a, b) in zip(got, pairs, strict=True):
            assert abs(float(value - a @ b)) <= tolerance * float(a.norm() * b.norm())

        before, numbers = table.copy(), weights(0.1 + 0.2 * step, 0.3 + 0.4 * step, 0.2)
        restart = torch.tensor(step == 1, device=DEVICE)
        assert all(torch.equal(a, b) for a, b in zip(table.parts(before), x, strict=True))
        was = [a.clone() for a in x]
        for a, b in zip(x, g, strict=True):
            a += 0 if b is None else b  # what a base step would do
        expected = [tuple(map(torch.clone, row)) for row in zip(x, reference, delta, strict=True)]
        for (a, r, b), start in zip(expected, was, strict=True):
            if a.numel():
                plain.move([a], [r], [b] if stored else None, None if stored else [start], numbers, restart)
        points = [r.clone() for r in reference]
        table.move(None if stored else before, numbers, restart=restart)
        for row, got in zip(expected, zip(x, reference, delta, strict=True), strict=True):
            assert all(map(torch.equal, row, got))
        assert not torch.equal(x[-1], was[-1])
        assert not torch.equal(reference[-1], points[-1])
        if restart:
            assert all(torch.equal(a, r.to(a.dtype)) for a, r in zip(x, reference, strict=True))
            assert not stored or not torch.cat(delta).any()


def test_a_move_that_is_not_finite_puts_back_the_copy() -> None:
    x, _, reference, delta = tensors(torch.float32)
    kept = [a.clone() for a in x]
    table = passes.Table(x, reference, None)
    before = table.copy()
    for a in x:
        a.fill_(torch.nan)
    table.move(before, weights(0.1, 0.1, 0.1), False)
    assert all(torch.equal(a, b) for a, b in zip(x, kept, strict=True))
    assert delta


def test_bfloat16() -> None:
    """Δ exact, x within a last digit: the interpreter rounds to bfloat16 towards zero, GPUs to nearest."""
    x, g, reference, delta = tensors(torch.bfloat16)
    expected = [tuple(map(torch.clone, row)) for row in zip(x, reference, delta, strict=True)]
    table = passes.Table(x, reference, delta)
    table.move(None, weights(0.1, 0.3, 0.3))
    for (a, r, d), got in zip(expected, x, strict=True):
        if a.numel():
            plain.move([a], [r], [d], None, weights(0.1, 0.3, 0.3))
        torch.testing.assert_close(got, a, rtol=2**-7, atol=2**-7)
    sums = table.sums(g)
    assert float(sums[3]) == pytest.approx(sum(float(a.double().square().sum()) for a in x), rel=1e-5)


def test_offsets_beyond_two_to_the_31() -> None:
    """A tensor of 2^33 elements of which only a stretch past 2^31, and one past 2^32, exist."""
    x, g, reference, delta = (torch.randn(32, device=DEVICE) for _ in range(4))
    table = passes.Table([x], [reference], [delta])
    expected = passes.Table([x], [reference], [delta]).sums([g])
    for start in (1 << 31, 3 << 31):
        table.take_gradients([g])
        table.chunks.copy_(torch.tensor([0, start]))
        table.sizes.fill_(1 << 33)
        for column in (table.x, table.gradient, table.reference, table.delta):
            column.addresses.sub_(4 * start)
        columns = (table.x, table.gradient, table.reference, table.delta)
        table.launch(passes._sums, *columns, X=passes.tl.float32, G=passes.tl.float32, CARRIED=False)
        assert torch.equal(table.partial.sum(1), expected)
        for column in (table.x, table.gradient, table.reference, table.delta):
            column.addresses.add_(4 * start)


def test_gradients_of_several_dtypes() -> None:
    x, g, reference, delta = tensors(torch.float16)
    one = [None if b is None else b.float() for b in g]
    several = [b if i % 2 else a for i, (a, b) in enumerate(zip(one, g, strict=True))]
    table = passes.Table(x, reference, delta)
    expected = table.sums(g)
    assert torch.equal(table.sums(one), expected)
    assert torch.equal(table.sums(several), expected)
    assert torch.equal(table.sums(g), expected)


def test_addresses_are_sent_only_when_a_tensor_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g, reference, delta = tensors(torch.float32)
    table = passes.Table(x, reference, delta)
    expected = table.sums(g)
    sent = []
    upload = passes.upload
    monkeypatch.setattr(passes, "upload", lambda *arguments: sent.append(1) or upload(*arguments))
    assert torch.equal(table.sums(g), expected)
    assert not sent
    again = [None if b is None else b.clone() for b in g]
    assert torch.equal(table.sums(again), expected)
    assert sent == [1]


def parameters(dtype: torch.dtype, *, gaps: bool) -> list[nn.Parameter]:
    """0-d, empty, transposed, misaligned, one that never has a gradient, and with ``gaps`` one that is strided."""
    torch.manual_seed(0)
    made = [torch.randn(5, 3).T, torch.tensor(2.0), torch.zeros(0, 3), torch.ones(5), torch.randn(21)]
    made = [tensor.to(DEVICE, dtype) for tensor in made]
    made[4] = made[4][1:]
    if gaps:
        made.append(torch.randn(20, 2, device=DEVICE, dtype=dtype)[:, 0])
    return [nn.Parameter(tensor) for tensor in made]


def train(
    form: str,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: int = 6,
    dtype: torch.dtype = torch.float64,
    gaps: bool = False,
    only_last: bool = False,
    s_init: float | None = 1e-3,
    between: Callable[[int, list[nn.Parameter], Updater], None] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Updater]:
    """The parameters before and after some steps, and the updater."""
    monkeypatch.setenv("MANIC_KERNELS", form)
    params = parameters(dtype, gaps=gaps)[-1 if only_last else 0 :]
    start = values(params)
    updater = Updater(make(params), **options)
    mechanic = Mechanic(updater, s_init=s_init)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            noise = 0.3 * torch.randn(p.shape, generator=generator).to(p)
            p.grad = None if i == 3 or (i == 1 and step == 3) else p.detach() + noise
        mechanic.step()
        updater.step()
        if between is not None:
            between(step, params, updater)
    return start, values(params), updater


def values(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in params])


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"), [("fused", torch.float64, 1e-12), ("triton", torch.float32, 3e-6)]
)
def test_a_hundred_steps(
    form: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]
) -> None:
    """float64: 1e-15 was measured; float32, where the sums differ by rounding: 6e-7, the median element by 3 ulp."""
    start, expected, _ = train("plain", AdamW, monkeypatch, steps=100, dtype=dtype, only_last=True)
    _, got, _ = train(form, AdamW, monkeypatch, steps=100, dtype=dtype, only_last=True)
    assert relative_difference(expected, start) > 0.1
    assert relative_difference(got, expected) < tolerance
    assert len(one_pass_steps) == (99 if form == "fused" else 0)  # the base sets up its state in the first


def with_hook(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = AdamW(params, lr=1.0)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


COVERED = {
    "adamw": lambda params: AdamW(params, lr=1.0),
    "adamw, fused, a group of its own": lambda params: AdamW(
        [{"params": params[:2], "lr": 3.0, "weight_decay": 0.0}, {"params": params[2:], "betas": (0.8, 0.95)}],
        lr=1.0,
        fused=True,
    ),
    "adam": lambda params: Adam(params, lr=1.0, weight_decay=0.1),
    "adamw, lr in a tensor": lambda params: AdamW(params, lr=torch.tensor(1.0, device=DEVICE), fused=True),
    "adamw, a hook": with_hook,  # which `Updater` calls
    "sgd": lambda params: SGD(params, lr=1.0),
    "sgd, momentum": lambda params: SGD(params, lr=1.0, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "sgd, nesterov": lambda params: SGD(params, lr=1.0, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("base", COVERED)
def test_the_base_step_and_the_move_in_one_pass(
    base: str, store_delta: bool, monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]
) -> None:
    """As the two steps do, and the base's state is what it would be, in the same layout."""
    start, expected, two = train("plain", COVERED[base], monkeypatch, store_delta=store_delta)
    _, got, one = train("fused", COVERED[base], monkeypatch, store_delta=store_delta)
    assert len(one_pass_steps) == 5
    assert relative_difference(expected, start) > 1e-3
    assert relative_difference(got, expected) < 1e-12
    ours, theirs = one.base_optimizer.state_dict(), two.base_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for i, entry in theirs["state"].items():
        assert list(ours["state"][i]) == list(entry)
        for name, tensor in entry.items():
            assert tensor is None or ours["state"][i][name].stride() == tensor.stride()
            torch.testing.assert_close(ours["state"][i][name], tensor, rtol=1e-12, atol=1e-14)


class Subclass(AdamW):
    """One that may do anything in its step."""


def with_another_step(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer: Any = AdamW(params, lr=1.0)
    step = optimizer.step
    optimizer.step = lambda closure=None: step(closure)
    return optimizer


NOT_COVERED = {
    "amsgrad": lambda params: AdamW(params, lr=1.0, amsgrad=True),
    "subclass": lambda params: Subclass(params, lr=1.0),
    "step replaced": with_another_step,
    "other class": lambda params: torch.optim.RMSprop(params, lr=1.0),
    "groups that differ": lambda params: SGD([{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}], lr=1.0),
}


@pytest.mark.parametrize("base", NOT_COVERED)
def test_what_is_not_covered_takes_two_steps(
    base: str, monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]
) -> None:
    start, expected, _ = train("plain", NOT_COVERED[base], monkeypatch, steps=4)
    _, got, _ = train("fused", NOT_COVERED[base], monkeypatch, steps=4)
    assert not one_pass_steps
    assert relative_difference(expected, start) > 1e-5
    assert relative_difference(got, expected) < 1e-12


def test_parameters_of_several_dtypes(monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]) -> None:
    """A launch for each. In half precision two steps round the update to x's digits, and one pass does not."""

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        for p, dtype in zip(params, (torch.float32, torch.float16, torch.float16), strict=False):
            p.data = p.data.to(dtype)
        return AdamW(params, lr=1.0, eps=1e-4)

    start, expected, two = train("plain", make, monkeypatch)
    _, got, one = train("fused", make, monkeypatch)
    assert len(one_pass_steps) == 3 * 5
    assert relative_difference(expected, start) > 1e-3
    assert relative_difference(got, expected) < 1e-3
    assert [t.dtype for t in one.base_optimizer.state[one.param_groups[0]["params"][1]].values()] == [
        torch.float32,
        torch.float16,
        torch.float16,
    ]
    assert float(one.scale) == pytest.approx(float(two.scale), rel=1e-2)


def test_a_parameter_with_gaps_takes_two_steps(monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]) -> None:
    start, expected, _ = train("plain", AdamW, monkeypatch, steps=4, gaps=True)
    _, got, _ = train("fused", AdamW, monkeypatch, steps=4, gaps=True)
    assert not one_pass_steps
    assert relative_difference(expected, start) > 1e-5
    assert relative_difference(got, expected) < 1e-12


@pytest.mark.parametrize("base", ["adamw, fused, a group of its own", "sgd, momentum"])
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(
    base: str, store_delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel is told on the device."""
    _, before, updater = train("fused", COVERED[base], monkeypatch, steps=3, store_delta=store_delta)
    params = [p for group in updater.param_groups for p in group["params"]]
    state = [{n: v.clone() for n, v in updater.base_optimizer.state[p].items()} for p in params]
    displacement = updater.displacement.state(params, updater.scale)
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    step = updater.displacement.plan(updater.base_optimizer)
    if step is None:  # the parameter that never had a gradient has no state yet
        params[3].grad = None
        step = updater.displacement.plan(updater.base_optimizer)
    assert step is not None
    sums = updater.displacement._buckets[0].table.partial.clone()
    step(updater._scale, updater._scale, torch.zeros((), dtype=torch.bool, device=DEVICE), False)
    assert torch.equal(values(params), before)
    for i, p in enumerate(params):
        assert all(torch.equal(v, state[i][n]) for n, v in updater.base_optimizer.state[p].items())
        assert all(
            torch.equal(v, displacement[i][n]) for n, v in updater.displacement.state(params, updater.scale)[i].items()
        )
    assert torch.equal(updater.displacement._buckets[0].table.partial[1::2], sums[1::2])


def test_changes_by_others_between_steps(monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]) -> None:
    """What the move carries over for the next sums is dropped then."""

    @torch.no_grad()
    def between(step: int, params: list[nn.Parameter], updater: Updater) -> None:
        if step % 3 == 1:
            params[0].mul_(0.5)

    start, expected, _ = train("plain", AdamW, monkeypatch, between=between)
    _, got, _ = train("fused", AdamW, monkeypatch, between=between)
    assert one_pass_steps
    assert relative_difference(expected, start) > 1e-3
    assert relative_difference(got, expected) < 1e-12


@pytest.mark.parametrize("fused_base", [True, False])
def test_whatever_the_default_device(
    fused_base: bool, monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]
) -> None:
    """As ``torch.set_default_device`` sets it."""
    monkeypatch.setenv("MANIC_KERNELS", "fused")

    def run(device: str | torch.device) -> Tensor:
        params = parameters(torch.float64, gaps=False)
        updater = Updater(AdamW(params, lr=1.0, fused=fused_base))
        mechanic = Mechanic(updater)
        for step in range(WATCHED + 2):
            for p in params:
                p.grad = p.detach().clone()
            with torch.device(device if step > 1 else DEVICE):  # AdamW sets up its state there
                mechanic.step()
                updater.step()
        return values(params)

    expected = run(DEVICE)
    del one_pass_steps[:]
    assert torch.equal(run("meta"), expected)
    assert one_pass_steps


@pytest.mark.parametrize("store_delta", [True, False])
def test_the_default_rule(store_delta: bool, monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]) -> None:
    """It looks at the base's first steps, which are steps of their own then, and re-centres."""
    start, expected, _ = train("plain", AdamW, monkeypatch, steps=WATCHED + 2, s_init=None, store_delta=store_delta)
    _, got, _ = train("fused", AdamW, monkeypatch, steps=WATCHED + 2, s_init=None, store_delta=store_delta)
    assert one_pass_steps
    assert relative_difference(expected, start) > 1e-5
    assert relative_difference(got, expected) < 1e-12


def test_autograd_sees_that_parameters_have_changed(monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]) -> None:
    monkeypatch.setenv("MANIC_KERNELS", "fused")
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    updater = Updater(SGD([weight], lr=1.0))
    mechanic = Mechanic(updater, s_init=1e-3)
    for _ in range(3):
        weight.grad = None
        loss = weight.square().sum()
        loss.backward(retain_graph=True)
        mechanic.step()
        updater.step()
    assert one_pass_steps
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_resume_in_one_pass(monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]) -> None:
    """N + M steps and N, save, load, M have the same bits, though the resumed run has no sums carried over."""
    monkeypatch.setenv("MANIC_KERNELS", "fused")

    def make() -> tuple[nn.Module, Updater, Mechanic]:
        model = make_net().to(DEVICE)
        optimizer = AdamW(model.parameters(), lr=1.0)
        updater = Updater(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20))
        return model, updater, Mechanic(updater, s_init=1e-3)

    def go(model: nn.Module, updater: Updater, mechanic: Mechanic, steps: range) -> None:
        for step in steps:
            backward(model, step)
            mechanic.step()
            updater.step()

    model, *_ = made = make()
    go(*made, range(4))
    between = flat(model)
    saved = copy.deepcopy([part.state_dict() for part in made])
    go(*made, range(4, 6))
    again, *_ = resumed = make()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    count = len(one_pass_steps)
    go(*resumed, range(4, 6))
    assert len(one_pass_steps) == count + 2
    assert not torch.equal(flat(again), between)
    assert torch.equal(flat(again), flat(model))


def test_the_drop_in_class_in_one_pass(monkeypatch: pytest.MonkeyPatch, one_pass_steps: list[int]) -> None:
    def run(form: str) -> tuple[Tensor, Any]:
        monkeypatch.setenv("MANIC_KERNELS", form)
        model = make_net().to(DEVICE)
        del model.unused
        optimizer = mechanize(AdamW, s_init=1e-3)(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for step in range(4):
            backward(model, step)
            optimizer.step()
            scheduler.step()
        return flat(model), optimizer.state_dict()

    expected, state = run("plain")
    got, our_state = run("fused")
    assert len(one_pass_steps) == 3
    assert relative_difference(got, expected) < 1e-12
    torch.testing.assert_close(our_state["state"], state["state"], rtol=1e-11, atol=1e-13)


def test_where_triton_fails_the_plain_form_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setenv("MANIC_KERNELS", "triton")
    x = torch.zeros(3, device=DEVICE)
    passes.works.cache_clear()
    assert in_tables(x)
    passes.works.cache_clear()
    monkeypatch.setattr(passes.Table, "copy", fail)
    assert not in_tables(x)
    passes.works.cache_clear()


def test_code_for_gpus() -> None:
    """What decides the speed: four float32 at a time; and the bits: no product is fused into a sum."""
    script = Path(__file__).with_name("triton_code.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, script], check=False, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    code = json.loads(done.stdout)
    loads = {"sums": 3, "carried sums": 2, "move": 3, "adamw": 5, "sgd": 4}
    for case, tensors in loads.items():
        assert code[case]["ld.global.v4.b32"] == 2 * tensors  # a thread has eight elements of each
    assert {case: code[case].get("st.global.v4.b32", 0) for case in ("sums", "move", "adamw", "sgd")} == {
        "sums": 0,
        "move": 6,
        "adamw": 10,
        "sgd": 8,
    }
    for case, instructions in code.items():
        assert not [name for name in instructions if name.startswith("fma.") and "f32" in name], case
    assert code["adamw, bfloat16"]["cvt.rn.bf16.f32"] > 0


@pytest.mark.parametrize("form", ["plain", "triton", "fused"])
@pytest.mark.parametrize("learns", [243, 5])
@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("captured_to", [7, 11])
def test_steps_that_the_device_counts(
    captured_to: int, store_delta: bool, learns: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capturing a CUDA graph, every step has to be the same program, and x_ref moves at the same steps all the same.

    So it does in steps that are not captured, as one with the few rows that end a pass, after those that are.
    """

    monkeypatch.setattr("manic.tuner.LEARNS", (learns,) * 3)  # after them the scale falls
    monkeypatch.setattr("manic.tuner.SHORT", 3)

    def run(captured: range) -> tuple[Tensor, dict[str, Any], Mechanic]:
        monkeypatch.setenv("MANIC_KERNELS", form)
        monkeypatch.setattr("manic.mechanic._counts", lambda scale: len(captured) > 0)
        params = parameters(torch.float64, gaps=False)
        updater = Updater(AdamW(params, lr=1.0), store_delta=store_delta)
        mechanic = Mechanic(updater, steps_per_epoch=2.5)
        for step in range(1, 11):
            monkeypatch.setattr("manic.mechanic._is_captured", lambda scale, now=step in captured: now)
            for p in params:
                p.grad = (p.detach() - step % 2).clone()
            if step in captured:
                updater._steps = 0  # as in a replay, of which the host sees nothing
            mechanic.step()
            updater.step()
        return values(params), updater.state_dict(), mechanic

    (expected, state, mechanic), (got, same, _) = run(range(0)), run(range(4, captured_to))
    assert relative_difference(got, expected) < 1e-12
    assert state["steps"] == same["steps"] == 10
    assert (mechanic._state.sum_squares > 0).all()
    assert (mechanic._state.noise > 0).all() == (learns == 5)
    for ours, theirs in zip(same["displacement"].values(), state["displacement"].values(), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-15)
    assert relative_difference(got, values(parameters(torch.float64, gaps=False))) > 1e-3


@needs_gpu
def test_no_step_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANIC_KERNELS", raising=False)
    made = (lambda p: AdamW(p, lr=1.0, fused=True)), (lambda p: SGD(p, lr=1.0))
    options: list[dict[str, Any]] = [
        {"rule": "mechanic_pytorch"},
        {"s_init": 1e-3},
        {"s_init": 1e-3, "steps_per_epoch": 2},
    ]
    for make, option in product(made, options):
        params = parameters(torch.float32, gaps=False)
        updater = Updater(make(params))
        mechanic = Mechanic(updater, **option)
        for step in range(4):
            for p in params:
                p.grad = torch.ones_like(p)
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
            try:
                mechanic.step()
                updater.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("rule", ["manic", "mechanic_pytorch"])
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_step_in_a_cuda_graph(store_delta: bool, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are replayed are those that are taken; the default rule moves x_ref after the eighth."""
    monkeypatch.delenv("MANIC_KERNELS", raising=False)

    def run(steps: int, replays: int) -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(1000, device=DEVICE))
        weight.grad = torch.zeros_like(weight)
        updater = Updater(AdamW([weight], lr=1.0, fused=True), store_delta=store_delta)
        options: dict[str, Any] = {"steps_per_epoch": 2} if rule == "manic" else {"s_init": 1e-3}
        mechanic = Mechanic(updater, rule=rule, **options)

        def step() -> None:
            weight.grad.copy_(weight.detach())
            mechanic.step()
            updater.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(steps):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if replays:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for _ in range(replays):
                graph.replay()
        return weight.detach().clone()

    assert relative_difference(run(3, 0), run(10, 0)) > 1e-3
    assert relative_difference(run(3, 7), run(10, 0)) < 1e-6
