"""Plain attributes that code reads while it is traced: their values are in the trace, and stay as they were then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, complex, str, type(None))


@contextmanager
def noting_reads(note: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Calls ``note`` with every plain attribute that is read of any module."""

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if isinstance(value, _PLAIN) and name != "training" and not name.startswith("_"):
            note(module, name)
        return value

    nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__  # that of object is what is left


def warn_of_change(module: nn.Module, name: str, value: Any) -> None:
    """For an attribute that a traced forward has read."""
    before = vars(module).get(name, value)
    if type(before) is not type(value) or before != value:
        warnings.warn(
            f"{type(module).__name__}.{name} is set to {value!r}, but its traced forward goes on with {before!r}: "
            "set it before prepare()",
            UserWarning,
            stacklevel=4,
        )
