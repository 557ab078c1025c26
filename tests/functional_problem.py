"""What the tests of `manic.functional` train, and how they compare."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

# torch 2.4's compiler follows neither dataclasses.replace nor functional_call, and 2.8's fails at a product of vectors.
needs_recent_compiler = pytest.mark.skipif(torch.__version__ < "2.13", reason="an old torch.compile")


def make_problem():
    """A small net in float64 with a zero bias, its parameters as a dict, and a loss of (params, step)."""
    torch.manual_seed(0)
    first = torch.nn.Linear(5, 7)
    torch.nn.init.zeros_(first.bias)
    net = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    x, y = torch.randn(4, 16, 5, dtype=torch.float64), torch.randint(0, 3, (4, 16))

    def loss(params, step):
        logits = torch.func.functional_call(net, params, (x[step % 4],))
        return torch.nn.functional.cross_entropy(logits, y[step % 4])

    return {name: p.detach().clone() for name, p in net.named_parameters()}, loss


def distance(tree, other):
    """‖tree - other‖ / ‖other‖."""
    new, old = (torch.cat([leaf.flatten() for leaf in tree_leaves(one)]) for one in (tree, other))
    return float((new - old).norm() / old.norm())
