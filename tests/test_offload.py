"""x_ref and Δ in host memory: the same run, bit for bit, and what it takes in memory and over the bus.

Without an accelerator the host is the device, and nothing has to be moved; here the moves are made all the same.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from problems import failing_step, flat, relative_difference
from torch import Tensor, nn

from manic import Mechanic, Updater, mechanize
from manic.distributed import spread
from manic.kernels import plain

BLOCK = 1 << 10
FORMS = ["two objects", "drop-in"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Bus:
    """Copies, as fetching from host memory to a device does, and keeps count."""

    def __init__(self) -> None:
        self.used = False
        self.fetched: list[Tensor] = []

    def __call__(self, kept: Tensor, x: Tensor) -> Tensor:
        if not self.used:
            return kept
        self.fetched.append(kept)
        return kept.clone()


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Bus:
    made = Bus()
    monkeypatch.setattr(plain, "fetch", made)
    monkeypatch.setattr(plain, "BLOCK", BLOCK)
    return made


class Layers(nn.Module):
    """A parameter of many blocks, one that is transposed, one with gaps, and small ones that are packed."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(6, 3000)
        self.out = nn.Linear(3000, 3)
        self.out.weight = nn.Parameter(self.out.weight.detach().T.contiguous().T)
        self.gain = nn.Parameter(torch.ones(3, 2)[:, 0])
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.out(torch.tanh(self.wide(x)))


class Run:
    def __init__(
        self, form: str, dtype: torch.dtype = torch.float32, device: str = "cpu", fused: bool = False, **options: Any
    ) -> None:
        self.model = Layers(dtype).to(device)
        self.dtype, self.device = dtype, device
        if form == "drop-in":
            made = mechanize(torch.optim.AdamW, s_init=1e-3, **options)(self.model.parameters(), lr=0.1, fused=fused)
            self.updater, self.parts = made.updater, [made]
        else:
            base = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=fused)
            self.updater = Updater(base, **options)
            self.parts = [Mechanic(self.updater, s_init=1e-3), self.updater]

    def backward(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator).to(self.device, self.dtype)
        self.model.zero_grad()
        (self.model(x) - x[:, :3] * x[:, 3:]).square().mean().backward()

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.backward(step)
            for part in self.parts:
                part.step()

    def skip(self, step: int) -> None:
        """A step with a gradient that is infinite, which changes nothing."""
        self.backward(step)
        assert self.model.gain.grad is not None
        self.model.gain.grad.fill_(math.inf)
        before = flat(self.model)
        for part in self.parts:
            part.step()
        assert torch.equal(flat(self.model), before)

    def kept(self) -> list[Tensor]:
        slots = self.updater.displacement.slots.values()
        return [tensor for slot in slots for tensor in (slot.reference, slot.delta) if tensor is not None]


def assert_same(a: Run, b: Run) -> None:
    assert torch.equal(flat(a.model), flat(b.model))
    assert torch.equal(a.updater.scale, b.updater.scale)
    for one, other in zip(a.kept(), b.kept(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_run_is_the_same(
    form: str, store_delta: bool, dtype: torch.dtype, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what may come between: changes by others, a step that is skipped, one that fails, a parameter that joins."""
    runs = []
    for offload in (False, True):
        bus.used = offload
        run = Run(form, dtype, store_delta=store_delta, cpu_offload=offload)
        start = flat(run.model)
        run.model.gain.requires_grad_(False)
        run.train(0, 10)
        if store_delta:
            with torch.no_grad():
                run.model.wide.weight[:5] += 0.1
        run.model.gain.requires_grad_(True)
        run.train(10, 20)
        run.skip(20)
        if form == "two objects":
            run.backward(20)
            run.parts[0].step()
            before = flat(run.model)
            base = run.updater.base_optimizer
            monkeypatch.setattr(base, "step", failing_step(base, ZeroDivisionError))
            with pytest.raises(ZeroDivisionError):
                run.updater.step()
            monkeypatch.delattr(base, "step")
            assert torch.equal(flat(run.model), before)
        run.train(21, 40)
        assert relative_difference(flat(run.model), start) > 1e-2
        runs.append(run)
        assert bool(bus.fetched) == offload
    assert_same(*runs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_a_run_goes_on_with_the_other_choice(form: str, store_delta: bool, saved: bool, bus: Bus) -> None:
    """State dicts do not say where the tensors were."""
    straight, other = (Run(form, store_delta=store_delta, cpu_offload=offload) for offload in (saved, not saved))
    bus.used = saved
    straight.train(0, 20)
    state = [copy.deepcopy(part.state_dict()) for part in straight.parts]
    other.model.load_state_dict(copy.deepcopy(straight.model.state_dict()))
    for part, one in zip(other.parts, state, strict=True):
        part.load_state_dict(one)
    middle = flat(straight.model)
    straight.train(20, 40)
    bus.used = not saved
    other.train(20, 40)
    assert relative_difference(flat(straight.model), middle) > 1e-3
    assert_same(straight, other)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("store_delta", [True, False])
def test_bytes_over_the_bus(dtype: torch.dtype, size: int, store_delta: bool, bus: Bus) -> None:
    """To the device 3 copies a step; as many bytes as docs/scale.md says, and never more than a block at once."""
    run = Run("two objects", dtype, store_delta=store_delta, cpu_offload=True)
    run.train(0, 1)
    bus.used = True
    run.train(1, 2)
    numel = sum(p.numel() for p in run.model.parameters())
    per_parameter = 4 + (4 + 4) if store_delta else 4 + (4 + size)
    assert sum(tensor.nbytes for tensor in bus.fetched) == per_parameter * numel
    assert max(tensor.numel() for tensor in bus.fetched) <= BLOCK


def test_the_first_sizes_are_found_block_by_block(bus: Bus) -> None:
    run = Run("two objects", cpu_offload=True)
    run.train(0, 1)
    bus.used = True
    run.updater._first_sizes(None)
    sizes = [tensor.numel() for tensor in bus.fetched]
    assert sum(sizes) == 2 * sum(p.numel() for p in run.model.parameters())  # x_ref and Δ
    assert max(sizes) <= BLOCK


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("dtype", "store_delta", "size"),
    [
        (torch.float64, True, 16),
        (torch.float32, True, 8),
        (torch.float32, False, 4),
        (torch.bfloat16, True, 8),
        (torch.bfloat16, False, 4),
        (torch.float16, False, 4),
    ],
)
def test_bytes_kept_per_parameter(form: str, offload: bool, dtype: torch.dtype, store_delta: bool, size: int) -> None:
    """x_ref and Δ are of at least float32."""
    run = Run(form, dtype, store_delta=store_delta, cpu_offload=offload)
    run.train(0, 3)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in run.kept()}
    assert sum(storages.values()) == size * sum(p.numel() for p in run.model.parameters())


def test_shards_in_host_memory_stay_there() -> None:
    """Of a `DTensor` whose mesh is of GPUs, as with `cpu_offload` or FSDP2's own: nothing goes back to the device."""
    pytest.importorskip("torch", "2.5", reason="DTensor is public from torch 2.5 on")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        part = torch.ones(4, 3, dtype=torch.bfloat16)
        parameter: Any = DTensor.from_local(part, DeviceMesh("cpu", [0]), [Replicate()])
        parameter._spec.mesh._device_type = "cuda"
        delta: Any = spread(torch.ones(4, 3), parameter)
        assert delta.device.type == "cpu"
        assert delta._local_tensor.dtype == delta.dtype == torch.float32
        assert torch.equal(delta.clone()._local_tensor, torch.ones(4, 3))
    finally:
        torch.distributed.destroy_process_group()


@needs_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("store_delta", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_on_a_gpu(form: str, store_delta: bool, fused: bool) -> None:
    runs = [Run(form, device="cuda", fused=fused, store_delta=store_delta, cpu_offload=o) for o in (False, True)]
    start = flat(runs[0].model)
    for run in runs:
        run.train(0, 10)
        run.skip(10)
        run.train(11, 30)
        run.parts[-1].state_dict()
    assert all(tensor.is_pinned() for tensor in runs[1].kept())
    assert relative_difference(flat(runs[0].model), start) > 1e-2
    assert relative_difference(flat(runs[1].model), flat(runs[0].model)) < 1e-4  # the sums' blocks differ


@needs_gpu
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_gpu_carries_no_extra_copy(store_delta: bool) -> None:
    weight = nn.Parameter(torch.randn(1 << 27, device="cuda"))
    weight.grad = weight.detach().clone()
    base = torch.optim.SGD([weight], lr=1.0, foreach=False)
    updater = Updater(base, store_delta=store_delta, cpu_offload=True)
    mechanic = Mechanic(updater)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        mechanic.step()
        updater.step()
    assert torch.cuda.max_memory_allocated() - held < weight.nbytes // 2
    updater.state_dict()
    assert torch.cuda.max_memory_allocated() - held < weight.nbytes // 2
