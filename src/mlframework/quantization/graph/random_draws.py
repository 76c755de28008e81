"""What draws random numbers: PyTorch's functions, and the generators of Python and of NumPy."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor

_FACTORIES = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial}
_LIKE = {torch.rand_like, torch.randn_like, torch.randint_like, torch.poisson}
_METHODS = {
    getattr(Tensor, name)
    for name in (
        "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal_",
        "random_", "uniform_",
    )
}  # fmt: skip

# Factories among them, which take no tensor.
RANDOM_FACTORIES: frozenset[Any] = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal})
RANDOM_FUNCTIONS: frozenset[Any] = frozenset(_FACTORIES | _LIKE | _METHODS)


def draws_outside_torch() -> tuple[Any, ...]:
    """Something that is another after Python's or NumPy's own generator has drawn."""
    numpy = sys.modules.get("numpy")
    state = () if numpy is None else numpy.random.get_state()
    return (random.getstate(), *((state[1].tobytes(), *state[2:]) if state else ()))
