"""What an optimizer step costs: time, memory and host syncs beside fused AdamW, in one process.

Steps are interleaved, in an order that changes, and medians taken, so that a busy machine disturbs all alike; steadier
there is the time that the process has the processor (``OMP_NUM_THREADS=1 … --processor-time``; of optax, all threads').
On CUDA the time is the device's, with the host ahead of it; a step that waits for the device pays for the wait. Peers
are measured if they are installed (``pip install "manic[benchmarks]"``): mechanic-pytorch, Prodigy, D-Adaptation, DoG,
schedule-free, optax.

    python benchmarks/step_time.py [--shapes gpt-4m small ...] [--json FILE] [--figure FILE] [--repeats 15]
    python benchmarks/step_time.py --from FILE --figure FILE     # draw what was measured before
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import random
import statistics
import time
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from manic import Mechanic, Updater

Step = Callable[[], Any]


def gpt(width: int, layers: int, vocabulary: int, context: int) -> list[tuple[int, ...]]:
    """Shapes of a GPT-2 style transformer."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (context, width), *((norm + attention + norm + mlp) * layers), *norm]


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "gpt-1m": gpt(128, 4, 1024, 128),
    "gpt-4m": gpt(256, 4, 2048, 128),
    "gpt-15m": gpt(384, 8, 1024, 128),
    "gpt-50m": gpt(640, 10, 1024, 128),
    "gpt-124m": gpt(768, 12, 50257, 1024),
    "gpt-355m": gpt(1024, 24, 50257, 1024),
    "gpt-1.3b": gpt(2048, 24, 50257, 1024),
    "small": [(256,)] * 2000,
    "tiny": [(1, 10), (1,)],
    **{f"split-{count}": [(2**20 // count,)] * count for count in (1, 16, 256, 2048)},
}


def parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    made = [nn.Parameter(0.02 * torch.randn(shape, generator=generator, device=device)) for shape in shapes]
    for p in made:
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator, device=device)
    return made


def manic(params: list[nn.Parameter], *, form: str | None = None, **options: Any) -> Step:
    """``mechanic.step(); updater.step()`` around fused AdamW, with options of `Updater`, on one form of kernels."""
    updater = Updater(AdamW(params, lr=1.0, fused=True), **options)
    mechanic = Mechanic(updater)

    def step() -> None:
        if form is not None:
            os.environ["MANIC_KERNELS"] = form
        try:
            mechanic.step()
            updater.step()
        finally:
            os.environ.pop("MANIC_KERNELS", None)

    return step


def peer(module: str, name: str, **options: Any) -> Callable[[list[nn.Parameter]], Step]:
    """The step of an optimizer of another package."""

    def make(params: list[nn.Parameter]) -> Step:
        optimizer = getattr(importlib.import_module(module), name)(params, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer.step

    return make


def mechanic_pytorch(params: list[nn.Parameter]) -> Step:
    """The published package around fused AdamW."""
    return importlib.import_module("mechanic_pytorch").mechanize(AdamW)(params, lr=1.0, fused=True).step


def optax_step(name: str) -> Callable[[list[nn.Parameter]], Step]:
    """A jitted optax update of the same arrays, on JAX's default device."""

    def make(params: list[nn.Parameter]) -> Step:
        jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
        if len(params) > 1000:
            raise RuntimeError("compiling that many arrays takes minutes")
        x = [jax.numpy.asarray(p.detach().cpu().numpy()) for p in params]
        g = [jax.numpy.asarray(p.grad.cpu().numpy()) for p in params if p.grad is not None]
        base = optax.adamw(1.0)
        optimizer = optax.contrib.mechanize(base) if name == "mechanize" else base

        def update(x: Any, state: Any) -> Any:
            updates, state = optimizer.update(g, state, x)
            return optax.apply_updates(x, updates), state

        jitted = jax.jit(update)
        held = [x, optimizer.init(x)]

        def step() -> None:
            held[:] = jitted(*held)
            jax.block_until_ready(held)

        return step

    return make


SUBJECTS: dict[str, Callable[[list[nn.Parameter]], Step]] = {
    "AdamW, fused": lambda params: AdamW(params, fused=True).step,
    "AdamW, foreach": lambda params: AdamW(params, foreach=True).step,
    "manic": manic,
    "manic, store_delta=False": lambda params: manic(params, store_delta=False),
    "manic, cpu_offload": lambda params: manic(params, cpu_offload=True),  # on the CPU, the same as without
    "mechanic-pytorch": mechanic_pytorch,
    "optax adamw, jitted": optax_step("adamw"),
    "optax mechanize, jitted": optax_step("mechanize"),
    "Prodigy": peer("prodigyopt", "Prodigy"),
    "D-Adaptation": peer("dadaptation", "DAdaptAdam"),
    "DoG": peer("dog", "DoG"),
    "schedule-free": peer("schedulefree", "AdamWScheduleFree"),
}

ON_CUDA: dict[str, Callable[[list[nn.Parameter]], Step]] = {
    "manic, two steps": lambda params: manic(params, store_delta=True, form="triton"),
    "manic, two steps, store_delta=False": lambda params: manic(params, store_delta=False, form="triton"),
    "manic, plain": lambda params: manic(params, store_delta=True, form="plain"),
}


def measure(
    shapes: list[tuple[int, ...]], device: torch.device, repeats: int, timer: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Time of a step in milliseconds for every subject that can run, and on CUDA memory and syncs."""
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    steps: dict[str, Step] = {}
    results: dict[str, dict[str, float]] = {}
    for name, make in {**SUBJECTS, **(ON_CUDA if device.type == "cuda" else {})}.items():
        gc.collect()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        try:
            step = make(parameters(shapes, device))
            for _ in range(3):
                step()
        except (ImportError, RuntimeError) as error:
            print(f"{name}: left out ({error})")
            continue
        steps[name], results[name] = step, {}
        if device.type == "cuda":
            results[name] = cuda_facts(step, before, size)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(repeats):
        for name, step in order.sample(list(steps.items()), len(steps)):  # what ran before decides what is in cache
            times[name].append(
                device_time(step) if device.type == "cuda" else 1e3 * timeit.timeit(step, number=1, timer=timer)
            )
    for name, taken in times.items():
        results[name]["ms"] = statistics.median(taken)
    return results


def cuda_facts(step: Step, before: int, size: int) -> dict[str, float]:
    """Copies of the model held and at peak, beside x and g, and host syncs a step."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    return {"copies": held / size - 2, "peak copies": peak / size - 2, "syncs": len(caught)}


def device_time(step: Step) -> float:
    """Milliseconds on the device; it sleeps first, so that all launches wait in its queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def draw(report: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """The cost beside fused AdamW, against the number of parameters and against the number of tensors."""
    from manic.plotting import new_figure

    figure = new_figure(10, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(name for results in report.values() for name in results))
    names.remove("AdamW, fused")
    for axis, kind, label in zip(panels, ("gpt", "split"), ("parameters", "tensors, 2^20 parameters"), strict=True):
        shapes = [name for name in report if name.startswith(kind)]
        for i, name in enumerate(names):
            known = [shape for shape in shapes if name in report[shape]]
            sizes = [(sum(map(math.prod, SHAPES[s])) if kind == "gpt" else len(SHAPES[s])) for s in known]
            ratios = [report[shape][name]["ms"] / report[shape]["AdamW, fused"]["ms"] for shape in known]
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
            if name == "manic":
                style = {"linewidth": 2.2, "color": "black"}
            axis.plot(sizes, ratios, marker="o", markersize=3, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    panels[0].set_ylabel("time of a step / fused AdamW")
    panels[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["gpt-4m", "gpt-50m", "small"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--from", type=Path, dest="measured")
    options = parser.parse_args()
    device = torch.device(options.device)
    timer = time.process_time if options.processor_time else time.perf_counter
    report: dict[str, dict[str, dict[str, float]]] = {}
    if options.measured:
        report, options.shapes = json.loads(options.measured.read_text()), []
    for shapes in options.shapes:
        count = sum(torch.Size(shape).numel() for shape in SHAPES[shapes])
        print(f"\n{shapes}: {count / 1e6:.1f} M parameters in {len(SHAPES[shapes])} tensors, {device.type}")
        report[shapes] = results = measure(SHAPES[shapes], device, options.repeats, timer)
        base = results["AdamW, fused"]["ms"]
        for name, facts in results.items():
            more = "".join(f"   {key} {value:.1f}" for key, value in facts.items() if key != "ms")
            print(f"{name:36}{facts['ms']:10.2f} ms {facts['ms'] / base:8.2f}×{more}")
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
    if options.figure:
        draw(report, options.figure)


if __name__ == "__main__":
    main()
