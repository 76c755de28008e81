"""What users call a batch, as the arguments of a forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


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
