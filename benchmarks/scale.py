"""What a step costs on many ranks: by formula, and the all-reduce measured on the ranks that are here.

python benchmarks/scale.py                                            # the table of docs/scale.md
torchrun --nproc-per-node 4 benchmarks/scale.py                       # and the latency of the one collective
"""

from __future__ import annotations

import os
import statistics
import time

import torch
import torch.distributed as dist

MODELS = {"7 B": 7e9, "70 B": 70e9, "400 B": 400e9}
RANKS = (8, 512, 16_384)
GIB = 2**30
BYTES = 4  # of an element in float32
BANDWIDTH = 4.0e12  # bytes a second that a step reaches on an H200's memory of 4.8e12
BUS = 64e9  # bytes a second each way: the limit of PCIe 5 with 16 lanes


def memory(parameters: float, ranks: int, copies: int) -> float:
    """GiB a rank of what manic keeps: x_ref, and Δ if it is stored, in float32, sharded as the parameters are."""
    return copies * parameters * BYTES / ranks / GIB


def seconds(parameters: float, ranks: int, words: int, bandwidth: float = BANDWIDTH) -> float:
    """Of a pass that moves so many float32 words per parameter, limited by bandwidth."""
    return words * parameters * BYTES / ranks / bandwidth


def table() -> None:
    """Print memory, memory time and bytes on the wire per rank."""
    print("a rank's share           x_ref     x_ref, Δ   passes of manic   of AdamW   bus, offloaded   all-reduce")
    for name, parameters in MODELS.items():
        for ranks in RANKS:
            one, two = (memory(parameters, ranks, copies) for copies in (1, 2))
            ours, base = (1e3 * seconds(parameters, ranks, words) for words in (8, 7))
            bus = 1e3 * seconds(parameters, ranks, 5, BUS)
            kept = f"{one:8.3f} GiB {two:8.3f} GiB"
            print(f"{name:>6} on {ranks:>6} ranks {kept} {ours:12.3f} ms {base:9.3f} ms {bus:12.3f} ms {4 * 8:9d} B")


def latency(repeats: int = 300) -> None:
    """Measure an all-reduce of four float64 numbers on the present ranks."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sums, times = torch.zeros(4, dtype=torch.float64, device=device), []
    for _ in range(repeats):
        start = time.perf_counter()
        dist.all_reduce(sums)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        median = 1e6 * statistics.median(times)
        print(
            f"\nall-reduce of four numbers on {dist.get_world_size()} {device.type} ranks: {median:.0f} µs, the median"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    if int(os.environ.get("RANK", "0")) == 0:
        table()
    if "RANK" in os.environ:
        latency()
