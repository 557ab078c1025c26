"""Which base optimizers work: the tables of ``docs/optimizers.md`` say what is found here, name by name.

An optimizer works if, mechanized and given ``lr=1e-6``, it brings the loss of a small network below a tenth, and if a
run that is saved and loaded goes on bit for bit. It can be handed off if its plain steps go on as they would have.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import backward, flat, make_net
from torch import Tensor, nn

from manic import Mechanic, Updater, mechanize, rates

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
PACKAGES = ("torch.optim", "pytorch_optimizer", "timm.optim", "torchao.optim", "schedulefree")
TAKES_A_MODEL = {"AdaLOMO", "AdamMini", "LOMO"}
TAKES_MARKED_GROUPS = {"AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon"}
DIFFERENTIATES_THE_GRADIENT = {"Adahessian", "AdaHessian", "SophiaH"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "BSAM": {"num_data": 128},
    "Ranger21": {"num_iterations": 200},
    "RMSpropTF": {"momentum": 0.9},
}
STEPS, FEWER_STEPS = 200, {"LBFGS": 30, "SpectralSphere": 60}  # these take 20 and 5 times as long


class Run:
    """A network of matrices only, as Muon wants it; for torchao one of the 4,096 elements from which it quantizes."""

    def __init__(self, cls: Any, wrap: Callable[[Any], Any] = mechanize) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(128, 8)
        teacher = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 1, bias=False))
        self.y = 3 * teacher(self.x).detach()
        width = 64 if cls.__module__.startswith("torchao") else 16
        shapes = ((8, width), (width, width), (width, 1))
        self.model = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes))
        self.model.insert(2, nn.Tanh())
        parameters: Any = self.model if cls.__name__ in TAKES_A_MODEL else list(self.model.parameters())
        if cls.__module__.startswith("pytorch_optimizer") and cls.__name__ in TAKES_MARKED_GROUPS:
            parameters = [{"params": parameters, "use_muon": True}]
        self.differentiates = cls.__name__ in DIFFERENTIATES_THE_GRADIENT
        self.optimizer = wrap(cls)(parameters, lr=1e-6, **ARGUMENTS.get(cls.__name__, {}))
        self.step: Callable[..., Any] = self.optimizer.step

    def loss(self, rows: Any = slice(None)) -> Tensor:
        return (self.model(self.x[rows]) - self.y[rows]).square().mean()

    def train(self, steps: range) -> None:
        for step in steps:
            torch.default_generator.manual_seed(step)  # not for CUDA too, which takes longer than the step
            np.random.seed(step)  # Kron's
            rows = (torch.arange(32) + 32 * step) % 128

            def closure(rows: Tensor = rows) -> Tensor:
                self.optimizer.zero_grad()
                loss = self.loss(rows)
                loss.backward(create_graph=self.differentiates)
                return loss

            self.step(closure)


def fault(cls: Any) -> str:
    """Why an optimizer does not work, or nothing."""
    try:
        run = Run(cls)
        start = float(run.loss())
        run.train(range(20))
        resumed = Run(cls)
        resumed.model.load_state_dict(run.model.state_dict())
        resumed.optimizer.load_state_dict(run.optimizer.state_dict())
        for one in (run, resumed):
            one.train(range(20, 30))
        if any(not torch.equal(*pair) for pair in zip(run.model.parameters(), resumed.model.parameters(), strict=True)):
            return "a resumed run differs"
        run.train(range(30, FEWER_STEPS.get(cls.__name__, STEPS)))
        return "" if float(run.loss()) < 0.1 * start else f"the loss went from {start:.3g} to {float(run.loss()):.3g}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def five_steps(cls: Any, *, hand_off: bool) -> Tensor:
    """What those after a hundred add to the weights: plain ones at the rates handed off, or tuned ones at the scale."""
    run = Run(cls, wrap=lambda plain: plain)
    updater = Updater(run.optimizer)
    mechanic = Mechanic(updater)
    learns, plain = True, run.optimizer.step

    def step(closure: Any) -> None:
        closure()
        if hand_off and not learns:
            plain()
        else:
            mechanic.step(tune=learns)
            updater.step()

    run.step = step
    run.train(range(100))
    before, learns = flat(run.model), False
    if hand_off:
        mechanic.hand_off()
    run.train(range(100, 105))
    return flat(run.model) - before


def classes(module: Any) -> dict[str, Any]:
    if hasattr(module, "get_supported_optimizers"):  # leaves out the classes that wrap another optimizer
        kinds = {module.load_optimizer(name) for name in module.get_supported_optimizers()}
    else:
        kinds = {kind for kind in vars(module).values() if isinstance(kind, type)}
    kinds = {kind for kind in kinds if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer}
    return {
        kind.__name__: kind
        for kind in kinds
        if re.fullmatch(r"[A-Z].*(?<!Closure)(?<!Reference)(?<!Paper)", kind.__name__)
    }


def load(package: str) -> Any:
    """A package; of timm only the optimizers, since the rest needs a torchvision that fits torch."""
    if package != "timm.optim":
        return pytest.importorskip(package, exc_type=ImportError)
    spec = find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed")
    folder = Path(str(spec.origin)).parent / "optim"
    with pytest.MonkeyPatch.context() as patch:
        for name, place in {"timm": folder.parent, package: folder}.items():
            bare: Any = ModuleType(name)
            bare.__path__ = [str(place)]
            patch.setitem(sys.modules, name, bare)
        files = [path.stem for path in folder.glob("*.py") if "factory" not in path.stem and path.stem[0] != "_"]
        return SimpleNamespace(
            **{
                name: kind
                for file in files
                for name, kind in vars(import_module(f"{package}.{file}")).items()
                if getattr(kind, "__module__", "").startswith(package)
            }
        )


def names(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def tables(package: str) -> list[str]:
    """What the page says of a package that works, and of what does not."""
    section = PAGE.read_text().split(f"\n## {package}")[1].split("\n## ")[0]
    described, installed = re.findall(r"Version ([\d.]+)\.", section)[0], version(package.split(".", maxsplit=1)[0])
    if not installed.startswith(f"{described}."):
        pytest.skip(f"{package} is {installed}, and the page is about {described}")
    return section.split("| does not work |")


@pytest.mark.filterwarnings("ignore")  # theirs: deprecations, experimental features, advice
@pytest.mark.parametrize("package", PACKAGES)
def test_the_tables_say_what_works(package: str) -> None:
    module = load(package)
    works, fails = tables(package)
    faults = {name: fault(kind) for name, kind in sorted(classes(module).items())}
    wrong = {name: why or "works" for name, why in faults.items() if name not in names(fails if why else works)}
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())
    assert names(works) | names(re.sub(r"(?m)^\|( .*? )\|.*", r"\1", fails)) == set(faults)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", PACKAGES)
def test_hand_off_refuses_those_that_would_not_go_on_as_before(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their five steps would differ by more than half. Of those that find their own rate nothing is said."""
    kinds = classes(load(package))
    works = {name for name in names(tables(package)[0]) if not name.startswith(("DAdapt", "Prodigy"))}
    if package == "torch.optim":
        works.remove("Adafactor")  # refused for another reason
    listed = works & rates.NOT_IN_PROPORTION
    monkeypatch.setattr(rates, "NOT_IN_PROPORTION", set())
    differ = set()
    for name in works:
        kept, plain = (five_steps(kinds[name], hand_off=hand_off) for hand_off in (False, True))
        if (plain - kept).norm() > kept.norm() / 2:
            differ.add(name)
    assert differ | works & {"AdaMod"} == listed  # which remembers rates: by a fifth here, where they changed little


def test_the_page_names_those_that_hand_off_refuses() -> None:
    (sentence,) = re.findall(r"So `hand_off\(\)` refuses (.*?)\. With these", PAGE.read_text())
    assert set(re.findall(r"`(\w+)`", sentence)) == rates.NOT_IN_PROPORTION | {"Adafactor"}


def test_an_optimizer_with_two_sets_of_weights_is_refused() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="AdamWScheduleFree, which keeps two sets of weights"):
        mechanize(schedulefree.AdamWScheduleFree)
    with pytest.raises(TypeError, match="AdamWScheduleFree, which keeps two sets of weights"):
        Updater(schedulefree.AdamWScheduleFree([weight], lr=1.0))


class Rebinding(torch.optim.Optimizer):
    """Puts its parameters into new memory, as examples in textbooks do, once some steps are over."""

    def __init__(self, params: Any, lr: float = 1e-3, after: int = 0) -> None:
        super().__init__(params, {"lr": lr})
        self.to_come = after

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moved = p.data - group["lr"] * p.grad
                    p.data = p.copy_(moved).data if self.to_come else moved
        self.to_come = max(0, self.to_come - 1)


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("store_delta", [True, False])
def test_an_optimizer_that_does_not_write_in_place_is_refused(store_delta: bool, after: int) -> None:
    """It would train at the rate given, out of the scale's reach."""
    model = make_net()
    updater = Updater(Rebinding(model.parameters(), lr=1.0, after=after), store_delta=store_delta)
    mechanic = Mechanic(updater)
    for _ in range(after):
        backward(model, 0)
        mechanic.step()
        updater.step()
    before = flat(model)
    for _ in range(2):
        backward(model, 0)
        mechanic.step()
        with pytest.raises(TypeError, match=r"p\.data\.copy_"):
            updater.step()
        assert torch.equal(flat(model), before)
