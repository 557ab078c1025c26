"""Optimizers, schedules, the loss scaler and the tuner as pure functions of trees of tensors, for ``torch.func``."""

from manic.functional import loss_scaler, schedules
from manic.functional.mechanize import Mechanized, MechanizeState, mechanize
from manic.functional.optimizers import (
    OPTIMIZERS,
    AdamConfig,
    AdamState,
    LARSConfig,
    LARSState,
    NAdamWConfig,
    Optimizer,
    SGDConfig,
    SGDState,
    adam_decoupled_step,
    adam_init,
    adam_step,
    adamw_step,
    lars_init,
    lars_step,
    nadamw_init,
    nadamw_step,
    sgd_init,
    sgd_step,
)
from manic.functional.tree import tree_where
from manic.tuner import TunerConfig

__all__ = [
    "OPTIMIZERS",
    "AdamConfig",
    "AdamState",
    "LARSConfig",
    "LARSState",
    "MechanizeState",
    "Mechanized",
    "NAdamWConfig",
    "Optimizer",
    "SGDConfig",
    "SGDState",
    "TunerConfig",
    "adam_decoupled_step",
    "adam_init",
    "adam_step",
    "adamw_step",
    "lars_init",
    "lars_step",
    "loss_scaler",
    "mechanize",
    "nadamw_init",
    "nadamw_step",
    "schedules",
    "sgd_init",
    "sgd_step",
    "tree_where",
]
