"""The learned list of hyperparameters: what to try first, second, third, … when nothing is known of a task.

A hundred settings of NAdamW, in the order in which they are worth trying, learned from a thousand tasks. Say how many
steps you will train for, then try the first few entries: `optimizer_for_idx` builds the optimizer of one of them with
its schedule, `sweep` tries the first k on your own training function, `learn_list` orders settings of your own.

For JAX see ``manic.opt_list.for_optax``, for Keras ``manic.opt_list.for_keras``; both are left to you to import.

Source:
    Metz, Maheswaranathan, Sun, Freeman, Poole, Sohl-Dickstein, *Using a thousand optimization tasks to learn
    hyperparameter search strategies*, arXiv:2002.11887. The figures are those of the list published with it
    (github.com/google-research/google-research, directory ``opt_list``, Apache-2.0).
"""

from manic.opt_list.configs import Config, config_for_idx
from manic.opt_list.learner import LearnedList, learn_list
from manic.opt_list.nadamw import NAdamW, optimizer_for_idx
from manic.opt_list.trials import Sweep, Trial, sweep

__all__ = [
    "Config",
    "LearnedList",
    "NAdamW",
    "Sweep",
    "Trial",
    "config_for_idx",
    "learn_list",
    "optimizer_for_idx",
    "sweep",
]
