"""Misuse gets an error that says what was given, what was expected and what to do; and nothing is changed by it."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import backward, flat, make_net
from torch import nn
from torch.optim import lr_scheduler

from manic import History, Mechanic, Updater, mechanize


class PerEpoch:
    """A schedule such as timm's."""

    def step(self, epoch: int, metric: float | None = None) -> None: ...


def sgd(lr: Any = 1.0, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(make_net().parameters(), lr=lr, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule is 'best'; expected one of manic, paper, mechanic_pytorch, optax"),
        ({"betas": ()}, r"betas is \(\); expected at least one number, each in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"betas": (-0.1,)}, r"betas is \(-0.1,\)"),
        ({"betas": (0.9, 0.99)}, r"betas is \(0.9, 0.99\) with rule='manic'; expected None.*Leave it out"),
        ({"s_init": 0.0}, "s_init is 0.0; expected a finite number > 0.*Leave it out"),
        ({"s_init": -1.0}, "s_init is -1.0"),
        ({"eps": 0.0}, "eps is 0.0; expected a finite number > 0"),
        ({"s_decay": -1e-3}, "s_decay is -0.001; expected a finite number >= 0"),
        ({"s_decay": math.nan}, "s_decay is nan"),
        ({"max_scale": 0.0}, "max_scale is 0.0"),
        ({"steps_per_epoch": 0}, r"steps_per_epoch is 0; expected a number > 0.*len\(loader\)"),
        (
            {"rule": "optax", "steps_per_epoch": 9},
            "steps_per_epoch is 9 with rule='optax'; expected None.*Leave it out",
        ),
        ({"log_every": -1}, "log_every is -1; expected a whole number of steps, 0 or more"),
    ],
)
def test_mechanic_options(options: dict[str, Any], message: str) -> None:
    updater = Updater(sgd())
    with pytest.raises(ValueError, match=message):
        Mechanic(updater, **options)
    Mechanic(updater)  # a refused Mechanic has not taken the Updater
    with pytest.raises(ValueError, match=message):
        mechanize(torch.optim.SGD, **options)


def test_the_paper_s_rule_needs_a_stored_displacement() -> None:
    """Its first scale is 0."""
    message = "rule is 'paper'.*expected store_delta=True: the paper's first scale is 0.*Leave store_delta out"
    updater = Updater(sgd(), store_delta=False)
    with pytest.raises(ValueError, match=message):
        Mechanic(updater, rule="paper")
    Mechanic(updater)
    with pytest.raises(ValueError, match=message):
        mechanize(torch.optim.SGD, rule="paper", store_delta=False)(make_net().parameters(), lr=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore'; expected 'skip' or 'raise'"),
        ({"internal_lr": 0.0}, "internal_lr is 0.0; expected a finite number > 0, or None"),
        ({"internal_lr": math.inf}, "internal_lr is inf"),
    ],
)
def test_updater_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Updater(sgd(), **options)
    with pytest.raises(ValueError, match=message):
        mechanize(torch.optim.SGD, **options)


def test_options_of_a_type_that_cannot_be_hashed() -> None:
    with pytest.raises(TypeError, match=r"internal_lr is \[1.0\]; expected a finite number > 0, or None"):
        mechanize(torch.optim.SGD, internal_lr=[1.0])  # pyright: ignore[reportArgumentType]


def test_what_is_not_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"optimizer is of type generator; expected a torch.optim.Optimizer"):
        Updater(make_net().parameters())
    with pytest.raises(TypeError, match=r"updater is of type SGD; expected a manic.Updater"):
        Mechanic(sgd())
    with pytest.raises(TypeError, match="base is of type SGD; expected a plain optimizer class"):
        mechanize(sgd())
    with pytest.raises(TypeError, match=r"base is of type partial.*The options of the optimizer go there as well"):
        mechanize(partial(torch.optim.SGD, momentum=0.9))
    with pytest.raises(ValueError, match="lr_scheduler schedules another optimizer, of type SGD"):
        Updater(sgd(), lr_scheduler.StepLR(sgd(), 1))
    with pytest.raises(TypeError, match="optimizer is the class AdamW; expected an object of it, as in"):
        Updater(torch.optim.AdamW)
    with pytest.raises(TypeError, match="is of type StepLR, and lr_scheduler of type SGD; the two seem swapped"):
        Updater(lr_scheduler.StepLR(sgd(), 1), sgd())
    with pytest.raises(TypeError, match="optimizer is an Updater already; expected a plain optimizer"):
        Updater(Updater(sgd()))


def test_options_of_the_tuner_are_checked_when_the_class_is_made() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch is -1; expected a number > 0"):
        mechanize(torch.optim.AdamW, steps_per_epoch=-1)
    with pytest.raises(TypeError, match=r"betas is 0.9; expected several numbers"):
        mechanize(torch.optim.SGD, betas=0.9)


def test_options_of_manic_given_to_the_optimizer() -> None:
    with pytest.raises(TypeError, match=r"steps_per_epoch=10 was given.*go to mechanize\(AdamW, steps_per_epoch="):
        mechanize(torch.optim.AdamW)(make_net().parameters(), lr=1.0, steps_per_epoch=10)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        mechanize(torch.optim.AdamW)(make_net().parameters(), rate=1.0)


@pytest.mark.parametrize("lr", [None, "relative"])
def test_an_lr_that_is_not_a_number(lr: Any) -> None:
    class Adaptive(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1.0)
            self.param_groups[0]["lr"] = lr

    with pytest.raises(
        TypeError, match=f"group 0 of Adaptive has lr={lr!r}, which cannot be scaled; expected a number"
    ):
        Updater(Adaptive(make_net().parameters()))


def test_tuning_twice() -> None:
    tuned = mechanize(torch.optim.SGD)(make_net().parameters(), lr=1.0)
    with pytest.raises(TypeError, match="is of type MechanizedSGD, which tunes itself; expected a plain optimizer"):
        Updater(tuned)
    with pytest.raises(TypeError, match="expected a plain optimizer class"):
        mechanize(type(tuned))


def test_parameters_added_between_the_steps() -> None:
    model = make_net()
    updater = Updater(torch.optim.SGD(model.hidden.parameters(), lr=1.0))
    mechanic = Mechanic(updater)
    backward(model, 0)
    mechanic.step()
    updater.base_optimizer.add_param_group({"params": model.out.parameters()})
    before = flat(model)
    with pytest.raises(
        RuntimeError, match=r"not those that mechanic.step\(\) saw: some were added.*Call mechanic.step\(\) again"
    ):
        updater.step()
    assert torch.equal(flat(model), before)
    mechanic.step()
    updater.step()


def test_hand_off_of_step_sizes_in_the_state() -> None:
    model = make_net()
    updater = Updater(torch.optim.ASGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater)
    for step in range(3):
        backward(model, step)
        mechanic.step()
        updater.step()
    with pytest.raises(ValueError, match="cannot rescale ASGD: its state, or its step, is not in proportion"):
        mechanic.hand_off()


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="torch 2.5 is the first with Adafactor")
def test_hand_off_of_a_rate_that_is_not_the_lr() -> None:
    model = make_net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1.0)
    updater = Updater(optimizer)
    mechanic = Mechanic(updater)
    for step in range(3):
        backward(model, step)
        mechanic.step()
        updater.step()
    with pytest.raises(ValueError, match=r"cannot rescale torch's Adafactor: it steps at min\(lr, 1/√t\).*Keep tuning"):
        mechanic.hand_off()
    assert optimizer.param_groups[0]["lr"] == 1.0
    mechanic.step()
    updater.step()


def test_no_lr_to_start_from() -> None:
    torch.set_flush_denormal(False)  # old compiled code sets it for the whole process
    with pytest.raises(ValueError, match=r"The largest initial lr is 1e-310; expected a finite number > 0"):
        Updater(sgd(lr=1e-310))
    Updater(sgd(lr=np.float32(0.1)))
    with pytest.raises(ValueError, match=r"The largest initial lr is 0.0; expected a finite number > 0"):
        Updater(sgd(lr=0.0))
    Updater(sgd(lr=0.0), internal_lr=None)


def test_order_of_calls() -> None:
    model = make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"without a mechanic.step\(\) before it. Call mechanic.step\(\), then"):
        updater.step()
    mechanic.step()
    with pytest.raises(RuntimeError, match=r"before it.*Was the Mechanic built on another Updater\?"):
        Updater(torch.optim.SGD(model.parameters(), lr=1.0)).step()
    mechanic.step()
    updater.step()
    before = flat(model)
    with pytest.raises(RuntimeError, match="without a mechanic"):
        updater.step()
    mechanic.step()
    for part in (updater, mechanic):  # a state that is loaded is that of a complete step
        part.load_state_dict(part.state_dict())
    with pytest.raises(RuntimeError, match="without a mechanic"):
        updater.step()
    mechanic.step()
    mechanic.load_state_dict(mechanic.state_dict())
    with pytest.raises(RuntimeError, match="without a mechanic"):
        updater.step()
    assert torch.equal(flat(model), before)
    with pytest.raises(ValueError, match="This Updater has a Mechanic already"):
        Mechanic(updater)


def test_differentiable() -> None:
    with pytest.raises(ValueError, match=r"group 0 has differentiable=True.*those of manic.functional"):
        Updater(sgd(differentiable=True))


def test_maximize() -> None:
    with pytest.raises(ValueError, match=r"group 0 has maximize=True.*Minimize the negative of the objective"):
        Updater(sgd(maximize=True))
    model = make_net()
    updater = Updater(torch.optim.SGD(model.hidden.parameters(), lr=1.0))
    mechanic = Mechanic(updater)
    updater.base_optimizer.add_param_group({"params": model.out.parameters(), "maximize": True})
    backward(model, 0)
    with pytest.raises(ValueError, match="group 1 has maximize=True"):
        mechanic.step()


def test_sparse_gradients() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    updater = Updater(torch.optim.SGD(embedding.parameters(), lr=1.0))
    mechanic = Mechanic(updater)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"shape \(5, 3\) has layout torch.sparse_coo; expected a dense one. .*sparse=False"
    ):
        mechanic.step()
    assert torch.equal(embedding.weight, before)
    assert embedding.weight.grad is not None
    embedding.weight.grad = embedding.weight.grad.to_dense()
    mechanic.step()
    updater.step()


def test_hand_off_that_cannot_be() -> None:
    class Odd(lr_scheduler.StepLR):
        pass

    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(optimizer, Odd(optimizer, 10))
    mechanic = Mechanic(updater)
    with pytest.raises(
        RuntimeError, match=r"scale is 0.0, so there is no learning rate to hand off yet. Train for more"
    ):
        mechanic.hand_off()
    for step in range(3):
        backward(model, step)
        mechanic.step()
        updater.step()
    with pytest.raises(
        ValueError,
        match=r"cannot rescale Odd.*Note float\(mechanic.scale\), set updater.lr_scheduler = None, call hand_",
    ):
        mechanic.hand_off()
    assert optimizer.param_groups[0]["lr"] == 1.0
    mechanic.step()
    updater.step()


def test_hand_off_of_a_mechanized_optimizer() -> None:
    model = make_net()
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    with pytest.raises(TypeError, match=r"a mechanized optimizer has neither.*Train with Updater"):
        optimizer.mechanic.hand_off()
    for step in range(3):
        backward(model, step)
        optimizer.step()
    rates = [optimizer.param_groups[0]["lr"], optimizer.get_last_lr()]
    with pytest.raises(TypeError, match=r"a mechanized optimizer has neither.*Train with Updater"):
        optimizer.mechanic.hand_off()
    assert rates == [optimizer.param_groups[0]["lr"], optimizer.get_last_lr()]
    before = flat(model)
    optimizer.step()
    assert not torch.equal(before, flat(model))


def test_a_step_of_the_base_optimizer_that_was_left_in_the_loop() -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(base)
    mechanic = Mechanic(updater)

    def step(number: int) -> None:
        backward(model, number)
        mechanic.step()
        updater.step()

    step(0)
    before = flat(model)
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"steps are taken by updater.step\(\): leave it out.*Nothing was changed"):
        base.step()
    assert torch.equal(flat(model), before)
    step(1)
    assert not torch.equal(flat(model), before)

    _, twin_updater, _ = copy.deepcopy((model, updater, mechanic))
    with pytest.raises(RuntimeError, match=r"steps are taken by updater.step\(\): leave it out"):
        twin_updater.base_optimizer.step()

    updaters = [updater, Updater(base)]  # the first lives on, and the second takes its place
    mechanic.step()
    with pytest.raises(RuntimeError, match=r"Of several Updaters on one optimizer only the last may step"):
        updaters[0].step()
    updater = updaters[1]
    mechanic = Mechanic(updater)
    step(2)
    mechanic.hand_off()
    assert not base._optimizer_step_pre_hooks
    assert not copy.deepcopy(updater).base_optimizer._optimizer_step_pre_hooks
    before = flat(model)
    base.step()
    assert not torch.equal(flat(model), before)


def test_a_base_optimizer_that_outlives_its_updater_is_a_plain_one() -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = Updater(base)
    mechanic = Mechanic(updater)
    backward(model, 0)
    mechanic.step()
    updater.step()
    del updater, mechanic
    before = flat(model)
    base.step()
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("chained", [False, True])
def test_a_schedule_that_is_stepped_twice(chained: bool) -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    cosine = lr_scheduler.CosineAnnealingLR(base, 100)
    schedule: Any = lr_scheduler.ChainedScheduler([cosine]) if chained else cosine
    updater = Updater(base, schedule)
    mechanic = Mechanic(updater)
    said = []
    for step in range(4):
        backward(model, step)
        mechanic.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            updater.step()
        said += [(step, str(warning.message), warning.filename) for warning in caught]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()
    cosine.load_state_dict({**cosine.state_dict(), "last_epoch": 1})  # going back is no fault
    backward(model, 4)
    mechanic.step()
    updater.step()
    ((when, message, filename),) = said
    assert when == 1
    assert "went from step 1 to 2. updater.step() steps it: leave out lr_scheduler.step()" in message
    assert filename == __file__


def test_a_schedule_that_is_chained_on_the_way() -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(base, lr_scheduler.StepLR(base, 10))
    mechanic = Mechanic(updater)
    for step in range(4):
        if step == 2:
            updater.lr_scheduler = lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(base, 0.5)])
        backward(model, step)
        mechanic.step()
        updater.step()
    assert base.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_between_the_two_steps(copied: Any) -> None:
    """What `mechanic.step` saw is not in it, so it wants that again, and goes on as the run that it is of."""
    model = make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    run = [model, updater, Mechanic(updater)]
    backward(model, 0)
    run[2].step()
    other = copied(run)
    with pytest.raises(RuntimeError, match=r"or this is a copy. Call mechanic.step\(\) again"):
        other[1].step()
    run[1].step()
    backward(other[0], 0)
    other[2].step()
    other[1].step()
    for step in range(1, 5):
        for one in (run, other):
            backward(one[0], step)
            one[2].step()
            one[1].step()
    assert torch.equal(flat(run[0]), flat(other[0]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Updater(sgd(), lr_scheduler.CosineAnnealingLR), "lr_scheduler is <class .*CosineAnnealingLR.*or None"),
        (lambda: Updater(sgd(), "cosine"), "lr_scheduler is 'cosine'; expected a scheduler"),
        (lambda: Updater(sgd(), sgd()), "lr_scheduler is of type SGD; expected a scheduler"),
        (
            lambda: Updater(sgd(), PerEpoch()),
            r"type PerEpoch, whose step\(\) cannot be called without arguments \(.*'epoch'\).* after updater.step",
        ),
        (lambda: Updater(sgd(), internal_lr="auto"), "internal_lr is 'auto'; expected a finite number > 0, or None"),
        (lambda: Mechanic(Updater(sgd()), betas=0.9), r"betas is 0.9; expected several numbers in \[0, 1\)"),
        (lambda: Mechanic(Updater(sgd()), s_init="auto"), "s_init is 'auto'; expected a finite number > 0"),
        (lambda: Mechanic(Updater(sgd()), max_scale="1"), "max_scale is '1'; expected a finite number > 0"),
        (lambda: Mechanic(Updater(sgd()), steps_per_epoch=[1]), r"is \[1\]; expected a number > 0.*len\(loader\)"),
        (lambda: Mechanic(Updater(sgd()), steps_per_epoch=True), "steps_per_epoch is True; expected a number > 0"),
        (lambda: Mechanic(Updater(sgd()), s_init=True), "s_init is True; expected a finite number > 0"),
        (lambda: Mechanic(Updater(sgd()), betas="0.9"), "betas is '0.9'; expected several numbers"),
        (
            lambda: Mechanic(Updater(sgd()), betas=torch.tensor(0.9)),
            r"betas is tensor\(0.9.*\); expected several numbers",
        ),
        (
            lambda: Mechanic(Updater(sgd()), betas=torch.ones(2, 2)),
            r"(?s)betas is tensor\(.*; expected several numbers",
        ),
        (lambda: Mechanic(Updater(sgd()), betas=["a"]), r"betas is \['a'\]; expected several numbers"),
        (lambda: Mechanic(Updater(sgd()), log_every=1.5), "log_every is 1.5; expected a whole number of steps"),
        (lambda: Mechanic(Updater(sgd()), log_every=None), "log_every is None; expected a whole number of steps"),
        (lambda: Updater(sgd(), store_delta="no"), "store_delta is 'no'; expected True or False"),
        (lambda: Updater(sgd(), internal_lr=True), "internal_lr is True; expected a finite number > 0, or None"),
        (lambda: Updater(sgd(), process_group="x"), "process_group is 'x'; expected a torch.distributed.ProcessGroup"),
        (lambda: mechanize(torch.optim.SGD, process_group=[0]), r"process_group is \[0\]; expected a torch.distr"),
        (lambda: Mechanic(Updater(sgd()), log_func=History), r"log_func is <class .*History.*such as History\(\)"),
        (
            lambda: Mechanic(Updater(sgd()), log_func="run.csv"),
            "log_func is 'run.csv'; expected a function of one dict",
        ),
        (
            lambda: Updater(sgd()).load_state_dict("checkpoint.pt"),
            r"is 'checkpoint.pt'; expected what Updater.state_di",
        ),
    ],
)
def test_arguments_of_another_type(build: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build()


def test_a_loop_that_never_calls_the_updater_is_told() -> None:
    """Nothing would train, and nothing else would say so. Two calls are well."""
    model = make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater)
    for step in range(20):
        backward(model, step)
        mechanic.step()
        mechanic.step(tune=False)
        updater.step()
    before = flat(model)
    for step in range(10):
        backward(model, step)
        mechanic.step()
    with pytest.warns(UserWarning, match=r"called 11 times without updater\.step\(\), which moves the weights"):
        mechanic.step()
    assert torch.equal(flat(model), before)


def test_a_loss_is_no_closure() -> None:
    model = make_net()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0))
    mechanic = Mechanic(updater)
    loss = backward(model, 0)
    mechanic.step()
    before = flat(model)
    with pytest.raises(TypeError, match=r"closure is tensor.*A loss goes to a ReduceLROnPlateau"):
        updater.step(loss)
    with pytest.raises(TypeError, match=r"closure is tensor.*A loss goes to a ReduceLROnPlateau"):
        mechanize(torch.optim.SGD)(make_net().parameters(), lr=1.0).step(loss)
    assert torch.equal(flat(model), before)
    updater.step()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda optimizer: lr_scheduler.StepLR(optimizer, 2), True),
        (lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.3), True),
        (lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 37), False),
        (lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 37), False),
        (lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 37, 3.0), False),
        (lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=40), False),
    ],
)
def test_a_schedule_for_epochs_that_is_stepped_at_every_step_is_told(make: Any, told: bool) -> None:
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = Updater(base, make(base))
    mechanic = Mechanic(updater)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(39):
            backward(model, step)
            mechanic.step()
            updater.step()
    messages = [str(one.message) for one in caught]
    assert len(messages) == told
    assert all("initial value. Is it meant to be stepped once an epoch?" in message for message in messages)
