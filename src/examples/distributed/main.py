"""The character-level GPT under FSDP2, with checkpoints that any number of ranks can go on from.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 src/examples/distributed/main.py

uses GPUs and nccl where there are, else the CPU and gloo. Kill a rank, or all of them: torchrun starts the ranks again,
or you do, and training goes on from the last checkpoint. The variable gives restarted ranks a store of their own; in
torchrun's, they may read the addresses of dead ranks, and wait for them (github.com/pytorch/pytorch/issues/135712).
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed.checkpoint does not list save and load in its __all__.

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR

from manic import Mechanic, Updater

sys.path.append(str(Path(__file__).parents[1] / "char_lm"))
from model import GPT, load_text, loss_of, sample


def newest(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end: torch writes the metadata last."""
    whole = [path.parent for path in folder.glob("step_*/.metadata")]
    return max(whole, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def check_restarts() -> None:
    """Refuse a launch whose restarted ranks would look for each other at the addresses of dead ones."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        sys.exit("torchrun was given --max-restarts; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment too.")


def main() -> None:
    """Train on this rank, from the newest checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=1e-6, help="anything: manic finds the scale")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/distributed"))
    options = parser.parse_args()
    check_restarts()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=2))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank} is process {os.getpid()}", flush=True)

    torch.manual_seed(0)
    model = GPT().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    updater = Updater(optimizer, CosineAnnealingLR(optimizer, options.steps))
    mechanic = Mechanic(updater)

    first = 0
    if folder := newest(options.checkpoint):
        updater.init_state()  # tensors for the checkpoint to be read into
        state = {"model": get_model_state_dict(model), "updater": updater, "mechanic": mechanic}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        first = int(folder.name.removeprefix("step_"))
        if rank == 0:
            print(f"resumed after step {first}", flush=True)

    text, validation = load_text()
    for step in range(first, options.steps):
        x, y = sample(text, seed=step * ranks + rank, batch=16 // ranks, context=64)
        loss = loss_of(model, (x.to(device), y.to(device)))
        updater.zero_grad()
        loss.backward()
        mechanic.step()
        updater.step()
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            state = {"model": get_model_state_dict(model), "updater": updater, "mechanic": mechanic}
            dcp.save(state, checkpoint_id=options.checkpoint / f"step_{step + 1}")
            if rank == 0:
                print(f"saved step {step + 1}: learning rate {updater.get_last_lr()[0]:.3g}", flush=True)

    losses = []
    with torch.no_grad():
        for i in range(20):
            x, y = sample(validation, seed=-1 - i, batch=16, context=64)
            losses.append(loss_of(model, (x.to(device), y.to(device))))
    if rank == 0:
        print(f"validation loss {float(torch.stack(losses).mean()):.6f} nats per byte", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
