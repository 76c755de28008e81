"""What users call a batch, as the arguments of a forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def iterated(batches: Iterable[Any]) -> Iterable[Any]:
    """``batches``, unless it is a single one, whose rows would pass for batches.

    Raises:
        TypeError: it is a tensor or a mapping.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches must be an iterable of batches (a list, a loader), got one {type(batches).__name__}")
    return batches


def arguments_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for ``model``: a batch is a tensor, a tuple or list of positional arguments, or
    a mapping of keyword arguments.

    Raises:
        TypeError: it does not fit the model's forward.
    """
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    args = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            "batches must hold a tensor, a tuple of positional arguments, or a mapping of keyword arguments each; "
            f"drop the labels. One does not fit the model's forward{signature}: {error}"
        ) from error
    return args, kwargs
