"""Resume every saved run of a folder in this process; `test_checkpoint.py` runs it as a new one."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from problems import OPTIMIZERS, SCHEDULERS, Net, backward, make_net

from manic import Mechanic, Updater, mechanize

N, M = 40, 35
CASES = list(itertools.product(["two objects", "drop-in"], OPTIMIZERS, SCHEDULERS, [True, False]))


def path_of(folder: Path, case: tuple[Any, ...]) -> Path:
    return folder / ("-".join(map(str, case)).replace(" ", "_") + ".pt")


class Run:
    """A model with either form of the tuner, and the recipe to save and load it."""

    def __init__(
        self, form: str, optimizer: str, scheduler: str, store_delta: bool, *, seed: int = 0, **options: Any
    ) -> None:
        self.model: Net = make_net(seed)
        base = OPTIMIZERS[optimizer]
        options = {"s_init": 1e-3, **options}
        if form == "drop-in":
            make = mechanize(base.cls, store_delta=store_delta, **options)
            self.parts: dict[str, Any] = {"optimizer": make(self.model.parameters(), lr=0.1, **base.options)}
            schedule = SCHEDULERS[scheduler](self.parts["optimizer"])
            if schedule is not None:
                self.parts["schedule"] = schedule
        else:
            inner = base(self.model.parameters(), lr=0.1)
            updater = Updater(inner, SCHEDULERS[scheduler](inner), store_delta=store_delta)
            self.parts = {"updater": updater, "mechanic": Mechanic(updater, **options)}

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            backward(self.model, step)
            if "mechanic" in self.parts:
                self.parts["mechanic"].step()
                self.parts["updater"].step()
            else:
                self.parts["optimizer"].step()
                if "schedule" in self.parts:
                    self.parts["schedule"].step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), **{name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.model.load_state_dict(state["model"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in CASES:
        run = Run(*case, seed=5)  # a new process starts from other weights
        run.load_state_dict(torch.load(path_of(folder, case), weights_only=True))
        run.train(N, N + M)
        torch.save(run.state_dict(), path_of(folder, case))
