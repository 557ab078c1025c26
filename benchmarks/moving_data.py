"""Where the data depend on the model: a GAN, whose two nets are each other's loss, and a policy that draws its own.

Both are of scikit-learn's digits, under Adam at each constant rate of a grid, and with manic. The GAN is scored by how
far its images are from held-out ones (the kernel two-sample distance of Gretton et al. 2012, times 100), the policy,
trained by REINFORCE to name the digit that it sees, by how often it is wrong.

    python benchmarks/moving_data.py [--seeds N]
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import binary_cross_entropy_with_logits

from manic import Mechanic, Updater

BATCH = 64
RATES = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
OPTIONS: dict[str, dict[str, Any]] = {
    "manic": {},
    "manic, no row comes twice": {"steps_per_epoch": math.inf},
    "manic, max_scale=1e-2": {"max_scale": 1e-2},
    "manic, max_scale=3e-3": {"max_scale": 3e-3},
}
GAN_STEPS, POLICY_STEPS = 800, 1500


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 64 pixels in [0, 1] and labels, of 1,400 rows to train on and of the others."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 16, labels[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def stepper(parameters: Iterable[nn.Parameter], lr: float | None, options: dict[str, Any], **adam: Any) -> Any:
    """A function that takes a step of Adam at a rate, or of manic if there is none."""
    optimizer = torch.optim.Adam(parameters, lr=lr or 1.0, **adam)
    if lr is not None:
        return optimizer.step
    updater = Updater(optimizer)
    mechanic = Mechanic(updater, **options)
    return lambda: (mechanic.step(), updater.step())


def distance(first: Tensor, second: Tensor) -> float:
    """The squared distance of two samples' means under Gaussian kernels of three widths, times 100."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = torch.cdist(a, b).square()
        return torch.stack([(-square / width).exp() for width in (2.0, 8.0, 32.0)]).mean()

    return 100 * float(kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))


def gan(seed: int, lr: float | None, options: dict[str, Any], together: bool = False) -> float:
    """Train one; with a step for each net, or one for both ``together``."""
    torch.manual_seed(seed)
    train, _, valid, _ = digits()
    generator = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid()
    )
    critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    nets = [[*generator.parameters()], [*critic.parameters()]]
    parts = [[*chain(*nets)]] if together else nets
    steps = [stepper(part, lr, options, betas=(0.5, 0.999)) for part in parts]
    real, fake = torch.ones(BATCH, 1), torch.zeros(BATCH, 1)
    for _ in range(GAN_STEPS):
        rows, made = train[torch.randint(len(train), (BATCH,))], generator(torch.randn(BATCH, 16))
        losses = [
            binary_cross_entropy_with_logits(critic(made), real),
            binary_cross_entropy_with_logits(critic(rows), real)
            + binary_cross_entropy_with_logits(critic(made.detach()), fake),
        ]
        for net, loss in zip(nets, losses, strict=True):
            for parameter, gradient in zip(net, torch.autograd.grad(loss, net), strict=True):
                parameter.grad = gradient
        for step in steps:
            step()
    with torch.no_grad():
        return distance(generator(torch.randn(400, 16)), valid)


def policy(seed: int, lr: float | None, options: dict[str, Any]) -> float:
    """Train one."""
    torch.manual_seed(seed)
    train, labels, valid, valid_labels = digits()
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    step, usual = stepper(net.parameters(), lr, options), 0.1
    for _ in range(POLICY_STEPS):
        rows = torch.randint(len(train), (BATCH,))
        choice = Categorical(logits=net(2 * train[rows] - 1))
        chosen = choice.sample()
        reward = (chosen == labels[rows]).float()
        net.zero_grad()
        (-((reward - usual) * choice.log_prob(chosen)).mean() - 0.01 * choice.entropy().mean()).backward()
        usual += 0.05 * (float(reward.mean()) - usual)
        step()
    with torch.no_grad():
        right = net(2 * valid - 1).softmax(-1).gather(1, valid_labels[:, None])
    return 1 - float(right.mean())


def run(
    train: Callable[..., float], seed: int, lr: float | None, options: dict[str, Any], more: dict[str, Any]
) -> float:
    """Of one thread: nets are small."""
    torch.set_num_threads(1)
    return train(seed, lr, options, **more)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    seeds = range(parser.parse_args().seeds)
    kinds: dict[str, tuple[Callable[..., float], dict[str, Any]]] = {
        "GAN, two optimizers": (gan, {}),
        "GAN, one for both": (gan, {"together": True}),
        "policy": (policy, {}),
    }
    rows: dict[str, tuple[float | None, dict[str, Any]]] = {f"Adam, lr = {rate:.0e}": (rate, {}) for rate in RATES}
    rows |= {name: (None, options) for name, options in OPTIONS.items()}
    print(f"| median, and worst, of {len(seeds)} seeds | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = {
            row: [[pool.submit(run, train, seed, *how, more) for seed in seeds] for train, more in kinds.values()]
            for row, how in rows.items()
        }
        for row, of_kinds in jobs.items():
            found = [[job.result() for job in of_seeds] for of_seeds in of_kinds]
            cells = [f"{statistics.median(scores):.3g}, {max(scores):.3g}" for scores in found]
            print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
