"""Thirteen small tasks on real data that comes with scikit-learn and with Python itself; nothing is downloaded.

Each is a model, a loss and data in two parts. Rules were chosen on the seven tasks of `CHOOSING` and are reported on
the six of `REPORTED`, the test tasks, on which nothing was chosen.
"""

from __future__ import annotations

import functools
import itertools
import math
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Data = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """A model to train: `make()` gives it with fresh weights, `loss(output, target)` a scalar.

    `train` and `valid` are pairs (inputs, targets); a batch is `batch` rows of `train`, shuffled anew for every epoch,
    or with `replacement` drawn at random. `augment` changes its inputs at random; then no row comes twice, unless
    `recognized`, for those who count epochs all the same.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Data
    valid: Data
    batch: int = 64
    replacement: bool = False
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    recognized: bool = False

    @property
    def steps_per_epoch(self) -> float:
        """Rows over those of a batch; infinite if no row comes twice."""
        repeats = self.augment is None or self.recognized
        return len(self.train[0]) / self.batch if repeats else math.inf


def split(inputs: Tensor, targets: Tensor, valid: float = 0.3) -> tuple[Data, Data]:
    """Training and validation rows, the same ones whatever the seed of the run."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    cut = int(len(order) * (1 - valid))
    return (inputs[order[:cut]], targets[order[:cut]]), (inputs[order[cut:]], targets[order[cut:]])


def standardized(array: Tensor) -> Tensor:
    """Columns of mean 0 and standard deviation 1."""
    return (array - array.mean(0)) / array.std(0).clamp(min=1e-6)


def tokens_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over all places, in nats."""
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over all elements; ``mse_loss`` does not run under the nested vmap."""
    return (outputs - targets).square().mean()


def fine_tuned(
    make: Callable[[], nn.Module], source: Data, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], nn.Module]:
    """A maker of models whose weights come from 300 steps of Adam on other data; the head starts afresh."""

    @functools.cache
    def trained() -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make()
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(300):
                rows = torch.randint(len(source[0]), (64,))
                optimizer.zero_grad()
                loss(model(source[0][rows]), source[1][rows]).backward()
                optimizer.step()
        return {name: value.detach() for name, value in model.state_dict().items() if not name.startswith("head")}

    def fresh() -> nn.Module:
        model = make()
        model.load_state_dict(trained(), strict=False)
        return model

    return fresh


# --- models -------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Pre-norm residual blocks whose last layers, and the head, start at zero."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        branches = [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        ]
        self.blocks = nn.ModuleList(branches)
        self.head = nn.Linear(width, outputs)
        for layer in (*(branch[-1] for branch in branches), self.head):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Transformer(nn.Module):
    """A causal transformer over bytes: (batch, time) -> (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int = 128, width: int = 32, layers: int = 2, heads: int = 2, time: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "mix": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "feed": nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                    ),
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:  # noqa: D102
        x = self.token(ids) + self.place.weight[: ids.shape[-1]]
        mask = torch.ones(ids.shape[-1], ids.shape[-1], dtype=torch.bool).triu(1)
        layer: Any
        for layer in self.layers:
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
                for part in layer["mix"](layer["norm"](x)).chunk(3, -1)
            )
            weights = (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(mask, -torch.inf).softmax(-1)
            x = x + layer["out"]((weights @ v).transpose(-2, -3).flatten(-2))
            x = x + layer["feed"](x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """A gated recurrent net over bytes: (batch, time) -> (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int = 128, width: int = 48) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.input, self.state = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:  # noqa: D102
        inputs = self.input(self.token(ids))
        state, states = torch.zeros_like(inputs[..., 0, : inputs.shape[-1] // 3]), []
        for step in range(ids.shape[-1]):
            (r, z, n), (r2, z2, n2) = inputs[..., step, :].chunk(3, -1), self.state(state).chunk(3, -1)
            gate = torch.sigmoid(z + z2)
            state = gate * state + (1 - gate) * torch.tanh(n + torch.sigmoid(r + r2) * n2)
            states.append(state)
        return self.head(torch.stack(states, -2))


class Factors(nn.Module):
    """The entry (row, column) of a matrix as a product of two vectors of `rank` and two biases."""

    def __init__(self, rows: int, columns: int, rank: int = 8) -> None:
        super().__init__()
        self.row, self.column = nn.Embedding(rows, rank + 1), nn.Embedding(columns, rank + 1)
        for embedding in (self.row, self.column):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, pairs: Tensor) -> Tensor:  # noqa: D102
        row, column = self.row(pairs[..., 0]), self.column(pairs[..., 1])
        return (row[..., 1:] * column[..., 1:]).sum(-1) + row[..., 0] + column[..., 0]


class Waves(nn.Module):
    """Coordinates (batch, 2) -> colours (batch, 3), through fixed sines of several frequencies."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        angles = torch.arange(8) * torch.pi / 8
        self.frequencies = torch.cat([torch.stack([angles.cos(), angles.sin()]) * 2**k for k in range(5)], 1)
        features = 2 * self.frequencies.shape[1]
        self.net = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        phase = x @ self.frequencies
        return self.net(torch.cat([phase.sin(), phase.cos()], -1))


# --- data ---------------------------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Data, Data]:
    """Images of 64 pixels in [-1, 1], and what they show."""
    images, labels = datasets.load_digits(return_X_y=True)
    return split(torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels))


@functools.cache
def module_text(*names: str) -> bytes:
    """Source text of modules of Python's library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"".join((folder / f"{name}.py").read_bytes() for name in names)


def windows(text: bytes, time: int) -> Data:
    """Every window of the text that starts on a multiple of `time`: inputs and the bytes that follow them."""
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)
    count = (len(ids) - 1) // time
    return ids[: count * time].view(count, time), ids[1 : count * time + 1].view(count, time)


# --- tasks --------------------------------------------------------------------------------------------------------


def diabetes() -> Task:
    """Regression on ten columns, with few rows."""
    inputs, targets = datasets.load_diabetes(return_X_y=True)
    train, valid = split(
        standardized(torch.tensor(inputs)).float(), standardized(torch.tensor(targets)).float()[:, None]
    )
    make = lambda: nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))  # noqa: E731
    return Task("diabetes", make, squared_error, train, valid, batch=32)


def convolution() -> Task:
    """Digits by a convolutional net with batch normalization."""

    def make() -> nn.Module:
        def norm(width: int) -> nn.Module:
            return nn.BatchNorm2d(width, track_running_stats=False)

        return nn.Sequential(
            nn.Unflatten(-1, (1, 8, 8)),
            *(nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), norm(16), nn.ReLU()),
            *(nn.Flatten(-3), nn.Linear(256, 10)),
        )

    return Task("convolution", make, cross_entropy, *digits())


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits, each moved by up to a pixel either way, brighter or darker by up to a fifth, and noisy."""
    rows, columns = torch.randint(3, (2, len(images), 1), generator=generator) + torch.arange(8)
    padded = nn.functional.pad(images.view(-1, 8, 8), (1, 1, 1, 1), value=-1.0)
    moved = padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)
    bright = 0.8 + 0.4 * torch.rand(len(images), 1, generator=generator)
    return (moved + 1) * bright - 1 + 0.1 * torch.randn(images.shape, generator=generator)


def augmented() -> Task:
    """The same, with images that are augmented anew whenever they come."""
    return replace(convolution(), name="augmented", augment=shifted)


def transformer() -> Task:
    """The next byte of source code, by a causal transformer."""
    train, valid = windows(module_text("argparse", "ast", "inspect", "pydoc"), 32), windows(module_text("typing"), 32)
    return Task("transformer", Transformer, tokens_loss, train, tuple(part[:256] for part in valid), batch=8)


def autoencoder() -> Task:
    """Digits through a waist of 8 numbers."""
    (train, _), (valid, _) = digits()
    make = lambda: nn.Sequential(  # noqa: E731
        *(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8), nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64))
    )
    return Task("autoencoder", make, squared_error, (train, train), (valid, valid))


def lines() -> Task:
    """Which module does a line of code come from? A bag of hashed words."""
    names = ("argparse", "_pydecimal", "typing", "turtle", "tarfile", "doctest")
    rows, labels = [], []
    for label, name in enumerate(names):
        for line in module_text(name).decode(errors="replace").splitlines():
            words = line.replace("(", " ").replace(".", " ").replace(")", " ").replace(",", " ").split()
            if len(words) >= 3:
                row = torch.zeros(256)
                for word in words:
                    row[sum(ord(c) * 31**i for i, c in enumerate(word)) % 256] += 1
                rows.append(row)
                labels.append(label)
    train, valid = split(torch.stack(rows), torch.tensor(labels))
    make = lambda: nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, len(names)))  # noqa: E731
    return Task("lines", make, cross_entropy, train, valid)


def new_digits() -> Task:
    """A net that knows the digits 0 to 4 learns 5 to 9."""
    (images, labels), (valid, valid_labels) = digits()
    make = lambda: Perceptron(64, 48, 5)  # noqa: E731
    source = (images[labels < 5], labels[labels < 5])
    train, new = labels >= 5, valid_labels >= 5
    return Task(
        "new digits",
        fine_tuned(make, source, cross_entropy),
        cross_entropy,
        (images[train], labels[train] - 5),
        (valid[new], valid_labels[new] - 5),
        batch=32,
    )


class Perceptron(nn.Module):
    """Two hidden layers and a head."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.body(x))


def tumours() -> Task:
    """Malignant or benign, from thirty columns."""
    inputs, labels = datasets.load_breast_cancer(return_X_y=True)
    train, valid = split(standardized(torch.tensor(inputs)).float(), torch.tensor(labels))
    return Task("tumours", lambda: Perceptron(30, 24, 2), cross_entropy, train, valid, batch=32)


def residual() -> Task:
    """Digits by a residual net whose blocks start at zero."""
    return Task("residual", lambda: Residual(64, 32, 10, blocks=3), cross_entropy, *digits())


def recurrent() -> Task:
    """The next byte of source code, by a gated recurrent net."""
    text = module_text("tarfile", "subprocess", "decimal", "optparse")
    train, valid = windows(text, 24), windows(module_text("mailbox"), 24)
    return Task("recurrent", Recurrent, tokens_loss, train, tuple(part[:256] for part in valid), batch=8)


def factorization(name: str, counts: Tensor) -> Task:
    """The entries of log(1 + counts), shape (rows, columns), from their places."""
    pairs = torch.cartesian_prod(*(torch.arange(size) for size in counts.shape))
    train, valid = split(pairs, counts.log1p().flatten())
    return Task(name, lambda: Factors(*counts.shape), squared_error, train, valid, batch=256)


def factors() -> Task:
    """How often does one word follow another? log(1 + count) over the commonest words of the library's texts."""
    words = module_text("argparse", "typing", "turtle", "tarfile", "doctest", "inspect", "pydoc").decode().split()
    common = {word: index for index, (word, _) in enumerate(Counter(words).most_common(150))}
    counts = torch.zeros(150, 150)
    for first, second in itertools.pairwise(words):
        if first in common and second in common:
            counts[common[first], common[second]] += 1
    return factorization("factors", counts)


def picture() -> Task:
    """The colours of a photograph as a function of the place."""
    image = torch.tensor(datasets.load_sample_image("china.jpg"))[::4, ::4].float() / 128 - 1
    height, width, _ = image.shape
    places = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
    train, valid = split(places, image.flatten(0, 1))
    return Task("picture", Waves, squared_error, train, tuple(part[:2000] for part in valid))


def new_text() -> Task:
    """A byte model that has read one module goes on with others."""
    source = windows(module_text("_pydecimal"), 32)
    train, valid = windows(module_text("turtle"), 32), windows(module_text("tkinter/__init__"), 32)
    make = functools.partial(Transformer, layers=1)
    return Task(
        "new text", fine_tuned(make, source, tokens_loss), tokens_loss, train, tuple(p[:256] for p in valid), batch=8
    )


def deep() -> Task:
    """Digits by a net of six hidden layers and no normalization, which starts on a plateau."""
    hidden = lambda: [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())]  # noqa: E731
    return Task("deep", lambda: nn.Sequential(*hidden(), nn.Linear(64, 10)), cross_entropy, *digits())


def residual_lines() -> Task:
    """`lines` by a residual net whose blocks start at zero."""
    return replace(lines(), name="residual lines", make=lambda: Residual(256, 32, 6, blocks=3))


def residual_autoencoder() -> Task:
    """`autoencoder` with such a net behind the waist."""
    make = lambda: nn.Sequential(nn.Linear(64, 8), Residual(8, 32, 64, blocks=3))  # noqa: E731
    return replace(autoencoder(), name="residual autoencoder", make=make)


def parities() -> Task:
    """An odd digit or an even one, from 400 rows."""
    (images, labels), (valid, valid_labels) = digits()
    few, odd = (images[:400], labels[:400] % 2), (valid, valid_labels % 2)
    return Task("parities", lambda: Perceptron(64, 24, 2), cross_entropy, few, odd, batch=32)


def few_lines() -> Task:
    """`lines` from 400 rows."""
    whole = lines()
    return replace(whole, name="few lines", train=tuple(part[:400] for part in whole.train), batch=32)


def usage() -> Task:
    """How often does a module use a word? log(1 + count) over large modules and their 200 commonest words."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    names = [file.stem for file in files if file.stat().st_size > 40_000]
    used = [Counter(module_text(name).decode(errors="replace").split()) for name in names]
    common = [word for word, _ in sum(used, Counter()).most_common(200)]
    return factorization("usage", torch.tensor([[float(one[word]) for word in common] for one in used]))


CHOOSING = (diabetes, convolution, augmented, transformer, autoencoder, lines, new_digits)
REPORTED = (tumours, residual, recurrent, factors, picture, new_text)
APART = (deep, residual_lines, residual_autoencoder, parities, few_lines, usage)  # for ideas
TASKS = {function.__name__: functools.cache(function) for function in CHOOSING + REPORTED + APART}
CHEAP = ("diabetes", "autoencoder", "lines", "new_digits", "tumours", "factors", "picture")
