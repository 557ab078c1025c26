"""Every form of the two passes against the plain one, and the plain one against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from problems import OPTIMIZERS, backward, batch, flat, make_net, relative_difference
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from manic import Mechanic, Updater, mechanize
from manic.kernels import choose, compiled, plain
from manic.mechanic import _tune
from manic.tuner import Sums, TunerConfig, init, update

SIZES = [1, 2, 17, 1000, (1 << 18) - 1, 1 << 18, (1 << 18) + 5]
WEIGHTS = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
needs_compiler = pytest.mark.skipif(not compiled.can_take(torch.zeros(2)), reason="no compiler")


@pytest.fixture(autouse=True)
def _compiles() -> Iterator[None]:
    """What is said of the compiled form is said of the compiled form: where compiling fails, the plain one goes on."""
    yield
    assert not compiled._failed


def tensors(numel: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, g, x_ref and Δ with x = x_ref + 0.1 Δ as the passes leave it."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    reference = torch.randn(numel, generator=generator, dtype=wide)
    delta = torch.randn(numel, generator=generator, dtype=wide)
    g = torch.randn(numel, generator=generator, dtype=wide).to(dtype)
    x = plain.point(reference, delta, torch.tensor(0.1, dtype=torch.float64)).to(dtype)
    return x, g, reference, delta


def sums(form: Any, *row: Tensor | None) -> Tensor:
    """``form.sums`` of one part."""
    x, g, reference, delta = row
    return form.sums(None if x is None else [x], [g], [reference], None if delta is None else [delta])


def move(form: Any, x: Tensor, reference: Tensor, delta: Tensor | None, before: Tensor | None, *rest: Any) -> None:
    """``form.move`` of one part."""
    form.move([x], [reference], None if delta is None else [delta], None if before is None else [before], *rest)


FORMS = [plain, pytest.param(compiled, marks=needs_compiler)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_sums(form: Any, numel: int, dtype: torch.dtype, tolerance: float) -> None:
    """A float32 dot product over a block of 2**18 elements was up to 7e-6 off; the compiled sums, 1e-13."""
    x, g, reference, delta = tensors(numel, dtype)
    for given, d in ((delta, delta.double()), (None, x.double() - reference.double())):
        if given is None and dtype == torch.float32:
            d = (x - reference).double()
        exact = [d @ g.double(), d @ x.double(), g.double() @ g.double(), x.double() @ x.double()]
        sizes = [d.norm() * g.double().norm(), d.norm() * x.double().norm(), exact[2], exact[3]]
        for got, want, size in zip(sums(form, x, g, reference, given), exact, sizes, strict=True):
            assert abs(float(got - want)) <= tolerance * max(float(size), 1e-30)
    assert sums(form, x, None, reference, delta)[0] == sums(form, x, None, reference, delta)[2] == 0
    first, *others = sums(form, None, g, reference, delta)
    torch.testing.assert_close(first, sums(form, x, g, reference, delta)[0], rtol=0, atol=tolerance * float(sizes[0]))
    assert first != 0
    assert others == [0, 0, 0]


@pytest.mark.parametrize("restart", [False, True, torch.tensor(False), torch.tensor(True)], ids=str)
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_move(numel: int, dtype: torch.dtype, stored: bool, restart: bool | Tensor) -> None:
    """Δ and x_ref grow by what was done to x since the recomputed point; x is a rounded product and a rounded sum."""
    x, g, reference, delta = tensors(numel, dtype)
    old, new, final = WEIGHTS.unbind()
    after, before = x + g, x.clone()
    u = after.to(delta.dtype) - before.to(delta.dtype)
    start = reference + u * final
    grown = (delta if stored else (before - reference) / old) + u
    end = grown * new + start
    assert not torch.equal(end.to(dtype), before)
    moved = after.clone()
    move(plain, moved, reference, delta if stored else None, None if stored else before, WEIGHTS, restart)
    assert torch.equal(moved, end.to(dtype))
    if not stored and dtype == torch.bfloat16:  # x_ref fits the rounded x
        end = moved.to(end.dtype)
        start = end - grown * new
    assert torch.equal(reference, end if restart else start)
    assert not stored or torch.equal(delta, torch.zeros_like(delta) if restart else grown)


@needs_compiler
@pytest.mark.parametrize("sizes", [[1], [2], SIZES, [1000] * 8, [1 << 18, 17, 1 << 18]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_the_compiled_move_has_the_same_bits(sizes: list[int], dtype: torch.dtype, stored: bool, restart: bool) -> None:
    results = []
    for form in (plain, compiled):
        x, g, reference, delta = map(list, zip(*(tensors(size, dtype) for size in sizes), strict=True))
        moved = [a + b for a, b in zip(x, g, strict=True)]
        assert not any(torch.equal(a, b) for a, b in zip(moved, x, strict=True))
        form.move(moved, reference, delta if stored else None, None if stored else x, WEIGHTS, restart)
        results.append(moved + reference + delta)
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("stored", [True, False])
def test_whatever_the_default_device(stored: bool, form: Any) -> None:
    """As ``torch.set_default_device`` sets it."""
    results = []
    for device in ("cpu", "meta"):
        compiled._spare.cache_clear()
        x, g, reference, delta = tensors(1000, torch.float32)
        moved, kept = x + g, delta if stored else None
        with torch.device(device):
            total = sums(form, x, g, reference, kept)
            move(form, moved, reference, kept, None if stored else x, WEIGHTS)
        results.append([total, moved, reference, delta])
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@needs_compiler
def test_one_compiled_move_serves_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shapes and number of the parameters, and whether some are equal."""
    monkeypatch.setenv("MANIC_KERNELS", "compiled")
    monkeypatch.setattr("manic.displacement.PACK", 64)  # so that some are packed
    torch._dynamo.reset()
    compiled._spare.cache_clear()

    def train(shapes: list[tuple[int, ...]]) -> None:
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        updater = Updater(torch.optim.SGD(params, lr=1.0))
        mechanic = Mechanic(updater)
        for _ in range(2):
            for p in params:
                p.grad = p.detach().clone()
            mechanic.step()
            updater.step()
        assert all(bool((p < 1).all()) for p in params)

    train([(64, 2)])
    with torch._dynamo.config.patch(error_on_recompile=True):
        train([(4, 4, 3, 3), (8, 10), (100,), (7,), (5, 2)] + [(9, 9)] * 20)
    assert compiled.can_take(torch.zeros(2))


@needs_compiler
def test_a_resumed_run_on_the_compiled_form_takes_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first steps, which look for s_init, are made otherwise than the later ones."""
    monkeypatch.setenv("MANIC_KERNELS", "compiled")
    model, twin = make_net(dtype=torch.float32), make_net(1, dtype=torch.float32)
    start = flat(model)
    optimizer, resumed = (mechanize(torch.optim.AdamW)(net.parameters(), lr=1.0) for net in (model, twin))

    def train(net: nn.Module, steps: range) -> None:
        for step in steps:
            backward(net, step, torch.float32)
            (optimizer if net is model else resumed).step()

    train(model, range(12))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for net in (model, twin):
        train(net, range(12, 40))
    assert relative_difference(flat(model), start) > 1e-3
    assert torch.equal(flat(model), flat(twin))


@needs_compiler
@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_a_run_on_the_compiled_form(
    dtype: torch.dtype, tolerance: float, store_delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 steps with every kind of tensor: large, small, 0-d, empty, transposed, sliced, without a gradient.

    The float32 tolerance is that of rounding in the sums carried through 100 steps; 3e-6 was measured.
    """

    def run(form: str) -> Tensor:
        monkeypatch.setenv("MANIC_KERNELS", form)
        torch.manual_seed(0)
        base = torch.randn(300, 90, dtype=dtype)
        storage = torch.randn(40, 2, dtype=dtype)
        parameters = [base, base.T.contiguous().T, storage[:, 0], torch.zeros(0, 3, dtype=dtype), torch.tensor(2.0)]
        params = [nn.Parameter(t.clone().to(dtype)) for t in (*parameters, torch.ones(5))]
        params[2] = nn.Parameter(storage[:, 0])
        start = torch.cat([p.detach().reshape(-1).clone() for p in params])
        updater = Updater(OPTIMIZERS["adamw"](params, lr=1.0), store_delta=store_delta)
        mechanic = Mechanic(updater, s_init=1e-3)
        for step in range(100):
            generator = torch.Generator().manual_seed(step)
            for p in params[:-1]:
                p.grad = p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=dtype)
            mechanic.step()
            updater.step()
        end = torch.cat([p.detach().reshape(-1) for p in params])
        assert relative_difference(end, start) > 1e-2
        return end

    assert relative_difference(run("compiled"), run("plain")) < tolerance


def test_the_form_is_chosen_by_size_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4)
    assert choose(x, 10) is plain
    assert choose(x.bfloat16(), 1 << 30) is plain
    if compiled.can_take(x):
        assert choose(x, 1 << 30) is compiled
    monkeypatch.setenv("MANIC_KERNELS", "plain")
    assert choose(x, 1 << 30) is plain
    monkeypatch.setenv("MANIC_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'; expected plain, compiled, triton, fused, or not to be set"):
        choose(x, 1)


def test_without_a_working_compiler_the_plain_form_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object, dynamic: bool) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "_failed", set())
    monkeypatch.setattr(compiled, "_compile", fail)
    x, g, reference, delta = tensors(100, torch.float32)
    assert torch.equal(sums(compiled, x, g, reference, delta), sums(plain, x, g, reference, delta))
    assert not compiled.can_take(x)


class Watching(TorchDispatchMode):
    """Sees all operations, as a ``FlopCounterMode`` does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


NOT_COMPILING = {"watched": Watching, "switched off": lambda: torch.compiler.set_stance("force_eager")}


@needs_compiler
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="an older torch")
@pytest.mark.parametrize("off", NOT_COMPILING.values(), ids=NOT_COMPILING)
@pytest.mark.parametrize("stored", [True, False])
def test_where_torch_does_not_compile_nothing_moves_twice(off: Any, stored: bool) -> None:
    results = []
    for form, where in ((plain, nullcontext), (compiled, off), (compiled, nullcontext)):
        x, g, reference, delta = tensors(1000, torch.float32)
        moved, kept = x + g, delta if stored else None
        with where():
            total = sums(form, x, g, reference, kept)
            move(form, moved, reference, kept, None if stored else x, WEIGHTS)
        results.append((total, moved, reference, delta))
    for got in results[1:]:
        assert relative_difference(got[0], results[0][0]) < 1e-5
        assert all(map(torch.equal, got[1:], results[0][1:]))
    assert compiled.can_take(x)


@pytest.mark.parametrize("drop_in", [False, True])
def test_a_loop_under_torch_compile(drop_in: bool) -> None:
    """torch.compile makes one graph, the forward pass, and none of the steps; the result is that of a plain loop."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def run(compiles: bool) -> Tensor:
        model = make_net()
        if drop_in:
            optimizer = mechanize(torch.optim.AdamW, s_init=1e-3)(model.parameters(), lr=1.0)
        else:
            optimizer = Updater(torch.optim.AdamW(model.parameters(), lr=1.0))
            mechanic = Mechanic(optimizer, s_init=1e-3)

        def train_step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            if not drop_in:
                mechanic.step()
            optimizer.step()

        step = torch.compile(train_step, backend=backend) if compiles else train_step
        for i in range(8):
            step(*batch(i))
        return flat(model)

    torch._dynamo.reset()
    expected = run(False)
    assert relative_difference(expected, flat(make_net())) > 1e-4
    assert relative_difference(run(True), expected) < 1e-12
    assert len(graphs) == 1
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.parametrize("h", [0.3, torch.nan])
def test_the_tuner_in_one_launch(h: float) -> None:
    """As it runs on accelerators; here the compiled function is compared with the plain one."""
    torch._dynamo.reset()  # torch compiles a function eight times at most
    config = TunerConfig(max_scale=1.0, s_init=1e-3)
    betas = torch.tensor(config.betas, dtype=torch.float64)
    state = init(config)
    for before, learning in ((0.1, True), (-0.2, True), (-0.3, True), (-0.2, False), (0.1, False)):
        state = update(state, torch.tensor(before, dtype=torch.float64), betas, config, learning)
    factor = torch.tensor(2.0, dtype=torch.float64)
    told = torch.tensor(300.0, dtype=torch.float64)
    for since, count in product((8, 300, torch.tensor(8), torch.tensor(243), torch.tensor(300)), (None, told)):
        sums = Sums(*torch.tensor([h, 0.2, 0.3, 0.4], dtype=torch.float64))
        scale, known = torch.tensor(0.5, dtype=torch.float64), replace(config, steps_per_epoch=count and 2.0)
        arguments = (sums, scale, state, betas, known, since, factor, known, count)
        got, want = compiled.one_launch(_tune, *arguments), _tune(*arguments)
        assert bool(got[1]) == (h == 0.3)
        assert torch.equal(want[2].scales, state.scales) == (h != 0.3)
        for a, b in zip(got[2], want[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
        torch.testing.assert_close(got[3], want[3], rtol=1e-14, atol=0)
        assert bool(got[4]) == bool(want[4]) == (int(since) in (8, 243))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
