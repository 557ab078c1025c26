"""The table of cases that the tests run over: base optimizers, schedules, and a problem to train on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from manic import Mechanic, Updater


class Lion(torch.optim.Optimizer):
    """A custom optimizer of the kind people write: no foreach, no capturable, a `step` that returns nothing useful."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(m.lerp(p.grad, 1 - group["betas"][0]).sign_(), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])
        return loss


class Calls(TorchDispatchMode):
    """Counts how often each of torch's operations is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def failing_step(optimizer: torch.optim.Optimizer, error: type[BaseException]) -> Callable[[], None]:
    """A step that does the optimizer's, and then fails."""

    def step() -> None:
        type(optimizer).step(optimizer)  # type: ignore
        raise error

    return step


@dataclass(frozen=True)
class Base:
    """A base optimizer with its options."""

    cls: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Iterable[Any], lr: float) -> torch.optim.Optimizer:
        return self.cls(params, lr=lr, **self.options)


OPTIMIZERS = {
    "sgd": Base(torch.optim.SGD),
    "sgd_nesterov": Base(torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    "adam_amsgrad": Base(torch.optim.Adam, {"amsgrad": True}),
    "adamw": Base(torch.optim.AdamW),
    "rmsprop": Base(torch.optim.RMSprop, {"momentum": 0.5}),
    "adagrad": Base(torch.optim.Adagrad),
    "nadam": Base(torch.optim.NAdam),
    "lion": Base(Lion),
}

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda optimizer: None,
    "cosine_warmup": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10), lr_scheduler.CosineAnnealingLR(optimizer, 200)],
        [10],
    ),
}


class Net(nn.Module):
    """Weights, zero biases, a 0-d parameter, and one parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 1)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(3))
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.out(torch.tanh(self.hidden(x)))


def make_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Noisy, and contrary in two early steps, so that h takes both signs: else the paper's rule never leaves s = 0."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(16, 1, generator=generator, dtype=torch.float64)
    y = x[:, :1] * x[:, 1:2] + x[:, 2:3] + 0.3 * noise
    if step in (2, 3):
        y = -5 * y
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = batch(step, dtype)
    return (model(x) - y).square().mean()


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    model.zero_grad()
    loss = loss_of(model, step, dtype)
    loss.backward()
    return loss.detach()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def leaves(state: Any, prefix: str = "") -> dict[str, Any]:
    """The entries of nested containers, by their path."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    found = {}
    for key, value in items:
        found |= leaves(value, f"{prefix}.{key}")
    return found or {prefix: state}


def assert_same_bits(a: Any, b: Any) -> None:
    """Of nested containers such as state dicts."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def pair(model: nn.Module, lr: float = 1.0, scheduler: str = "none", **options: Any) -> tuple[Updater, Mechanic]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    s_init = options.pop("s_init", 1e-3)
    updater = Updater(optimizer, SCHEDULERS[scheduler](optimizer), **options)
    return updater, Mechanic(updater, s_init=s_init)


def train(model: nn.Module, updater: Updater, mechanic: Mechanic, steps: range, **kwargs: Any) -> float:
    loss = math.nan
    for step in steps:
        loss = float(backward(model, step, **kwargs))
        mechanic.step()
        updater.step()
    return loss


def fit(
    model: nn.Module, updater: Updater, mechanic: Mechanic, x: torch.Tensor, y: torch.Tensor, steps: int
) -> list[float]:
    """The loss, a mean squared error, before each step."""
    losses = []
    for _ in range(steps):
        updater.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        mechanic.step()
        updater.step()
    return losses


def pending(**options: Any) -> tuple[Net, Updater, Mechanic, torch.Tensor]:
    """A run of which only ``updater.step()`` of step 31 is missing, and its parameters."""
    model = make_net()
    updater, mechanic = pair(model, **options)
    train(model, updater, mechanic, range(30))
    backward(model, 30)
    mechanic.step()
    return model, updater, mechanic, flat(model)


def evaluate(model: nn.Module, dtype: torch.dtype = torch.float64) -> float:
    with torch.no_grad():
        return sum(float(loss_of(model, step, dtype)) for step in range(500, 520)) / 20
