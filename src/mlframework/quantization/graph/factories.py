"""Functions that make tensors and facts from numbers: what a trace has to record although no tensor goes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .random_draws import RANDOM_FACTORIES

_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "finfo", "full", "iinfo", "linspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "tensor", "zeros",
)  # fmt: skip


@contextmanager
def recording_factories(tracer: fx.Tracer) -> Iterator[None]:
    """Has the trace record calls of PyTorch's factories that depend on what is traced (``torch.zeros(x.size(0), 4)``),
    and those that draw random numbers, which come out differently in every call."""
    own = {name: getattr(torch, name) for name in _FACTORIES}

    def recording(factory: Any) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            depends = any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves([_sequences(args), kwargs]))
            if depends or factory in RANDOM_FACTORIES:
                return tracer.create_proxy("call_function", factory, args, kwargs)
            return factory(*args, **kwargs)

        return record

    for name, factory in own.items():
        setattr(torch, name, recording(factory))
    try:
        yield
    finally:
        for name, factory in own.items():
            setattr(torch, name, factory)


def _sequences(args: tuple[Any, ...]) -> list[Any]:
    return [list(arg) if isinstance(arg, (tuple, list)) else arg for arg in args]
