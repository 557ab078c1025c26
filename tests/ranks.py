"""One rank of the runs that `test_distributed.py` looks at, started by torchrun."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import batch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from manic import Mechanic, Updater, mechanize

STEPS, SAVE_AT = 50, 25
FORMS = ["two objects", "drop-in"]
WAYS = {  # number of ranks: ways to spread the model
    2: [
        *("ddp", "fsdp2", "tensor parallel", "zero", "fsdp1"),
        *("fsdp2 offloaded", "ddp in two parts", "fsdp2 in two parts"),
        *("ddp, held-out rows", "fsdp2, held-out rows", "fsdp1, held-out rows"),
    ],
    4: ["fsdp2", "hybrid", "fsdp2 and tensor parallel"],
}


class Model(nn.Module):
    """Rows that two and four ranks share unevenly, and tensors so small that some ranks get none of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(5)
        self.middle = nn.Linear(10, 5)
        self.out = nn.Linear(5, 1)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.middle(torch.tanh(self.hidden(x)))))


def spread(model: nn.Module, way: str) -> tuple[nn.Module, Any, bool]:
    """The model on this rank, the process group to name, and whether each rank takes a part of the batch."""
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    if way == "tensor parallel":
        plan: dict[str, Any] = {"hidden": ColwiseParallel(), "middle": RowwiseParallel()}
        return parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan), None, False
    if way == "fsdp2 and tensor parallel":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "model"))
        parallelize_module(model, mesh["model"], {"hidden": ColwiseParallel(), "middle": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["data"]), None, False
    if way == "hybrid":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=mesh), None, True
    if way in ("fsdp2", "fsdp2 offloaded", "fsdp2 in two parts"):
        fully_shard(model.hidden)  # type: ignore[arg-type]
        return fully_shard(model), None, True
    if way == "fsdp1":
        return (
            FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
            dist.group.WORLD,
            True,
        )
    return DistributedDataParallel(model, gradient_as_bucket_view=True), None, True


class Run:
    """A model spread in some way, with either form of the tuner."""

    def __init__(self, form: str, way: str) -> None:
        way, _, rows = way.partition(", ")
        self.held_out = rows == "held-out rows"
        self.model, group, self.split = spread(Model(), way) if way != "alone" else (Model(), None, False)
        self.form, self.parts = form, 2 if way.endswith("in two parts") else 1
        options: dict[str, Any] = {"s_init": 1e-3}
        shared: dict[str, Any] = {"process_group": group, "cpu_offload": way == "fsdp2 offloaded"}
        if form == "drop-in":
            make = mechanize(torch.optim.AdamW, **shared, **options)
            self.optimizer = make(self.model.parameters(), lr=1e-3)
            self.updater, self.mechanic = self.optimizer.updater, self.optimizer.mechanic
            return
        if way == "zero":
            from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported

            base: Any = ZeroRedundancyOptimizer(self.model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3)
        else:
            base = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.updater = Updater(base, **shared)
        self.mechanic = Mechanic(self.updater, **options)

    def train(self, steps: range) -> None:
        for step in steps:
            if self.held_out:
                self.mechanic.held_out = partial(self.backward, 500 + step)
            self.updater.zero_grad() if self.form == "two objects" else self.optimizer.zero_grad()
            self.backward(step)
            if self.form == "two objects":
                self.mechanic.step()
                self.updater.step()
            else:
                self.optimizer.step()

    def backward(self, step: int) -> None:
        x, y = batch(step)
        if self.split:
            rows = len(x) // dist.get_world_size()
            mine = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
            x, y = x[mine], y[mine]
        for part in range(self.parts):
            rows = slice(part * len(x) // self.parts, (part + 1) * len(x) // self.parts)
            with self.exchange(part == self.parts - 1):
                ((self.model(x[rows]) - y[rows]).square().mean() / self.parts).backward()

    @contextmanager
    def exchange(self, now: bool) -> Iterator[None]:
        """Whether a backward pass exchanges gradients with the other ranks."""
        model: Any = self.model
        sharded = hasattr(model, "set_requires_gradient_sync")
        if sharded:
            model.set_requires_gradient_sync(now)
        with nullcontext() if now or sharded else model.no_sync():
            yield

    def whole(self) -> dict[str, torch.Tensor]:
        """All parameters whole, by name."""
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model):
                return {
                    n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in self.model.named_parameters()
                }
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))

    def state(self) -> dict[str, Any]:
        if self.form == "drop-in":
            model, optimizer = get_state_dict(self.model, self.optimizer)
            return {"model": model, "optimizer": optimizer}
        self.updater.init_state()
        return {"model": get_model_state_dict(self.model), "updater": self.updater, "mechanic": self.mechanic}

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        if self.form == "drop-in":
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        else:
            set_model_state_dict(self.model, state["model"])


class Counter:
    """Counts the collectives that the tuner itself starts."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._all_reduce = dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sizes.append(tensor.numel())
        return self._all_reduce(tensor, *args, **kwargs)


def resumed_zero(run: Run, folder: Path) -> dict[str, Any]:
    """A run that goes on from what rank 0 saved."""
    try:
        run.updater.state_dict()
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    base: Any = run.updater.base_optimizer
    base.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        parts = {"model": run.model, "updater": run.updater, "mechanic": run.mechanic}
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "zero.pt")
    dist.barrier()
    state = torch.load(folder / "zero.pt", weights_only=True)
    for _ in range(2):  # loading leaves the state dict as it was
        run = Run("two objects", "zero")
        run.model.load_state_dict(state["model"])
        run.updater.load_state_dict(state["updater"])
        run.mechanic.load_state_dict(state["mechanic"])
    run.train(range(SAVE_AT, STEPS))
    return {"parameters": run.whole(), "scale": run.mechanic.scale, "error": error}


def shards_by_hand(form: str) -> dict[str, Any]:
    """Plain parameters of which every rank has its own; some ranks have no gradient at some steps."""
    rank = dist.get_rank()
    weight = nn.Parameter(torch.arange(3.0, dtype=torch.float64) + 3 * rank - 2)
    if form == "drop-in":
        optimizer = mechanize(torch.optim.AdamW, s_init=1e-3, process_group=dist.group.WORLD)([weight], lr=1.0)
        step, mechanic = optimizer.step, optimizer.mechanic
    else:
        updater = Updater(torch.optim.AdamW([weight], lr=1.0), process_group=dist.group.WORLD)
        mechanic = Mechanic(updater, s_init=1e-3)

        def step() -> None:
            mechanic.step()
            updater.step()

    for i in range(STEPS):
        weight.grad = None if i % 4 == rank else weight.detach() - 0.3 * (i % 5)
        step()
    gathered = [torch.empty_like(weight.data) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, weight.data)
    return {"weight": torch.cat(gathered), "scale": mechanic.scale}


def resumed(form: str, folder: Path) -> dict[str, Any]:
    """A run that goes on from what two ranks saved, on this number of ranks."""
    run = Run(form, "fsdp2" if dist.is_initialized() else "alone")
    run.load(folder / f"checkpoint {form}")
    run.train(range(SAVE_AT, STEPS))
    return {"parameters": run.whole(), "scale": run.mechanic.scale}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    results: dict[Any, Any] = {}
    for form in FORMS:
        for way in WAYS[ranks]:
            if way == "zero" and form == "drop-in":
                continue  # it wraps an optimizer class itself
            counter = Counter()
            run = Run(form, way)
            run.train(range(SAVE_AT))
            if way == "fsdp2" and ranks == 2:
                dcp.save(run.state(), checkpoint_id=folder / f"checkpoint {form}")
                if form == "two objects":
                    dcp.async_save(run.state(), checkpoint_id=folder / "checkpoint async").result()
            if way == "zero":
                results[form, "zero resumed"] = resumed_zero(run, folder)
            dist.all_reduce = counter
            run.train(range(SAVE_AT, STEPS))
            dist.all_reduce = counter._all_reduce
            parameters, scale = run.whole(), run.mechanic.scale
            results[form, way] = {"parameters": parameters, "scale": scale, "reduced": counter.sizes}
        results[form, "by hand"] = shards_by_hand(form)
        if ranks == 4:
            results[form, "resumed"] = resumed(form, folder)
    if dist.get_rank() == 0:
        torch.save(results, folder / f"{ranks}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may be dropping Python objects while the interpreter is taken down, and abort then
