"""What the graph of a file calls in the place of functions that trust the lengths they are given: these may be computed
in the graph, so that no check of the file sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from torch import Tensor

from .. import kernels
from .allowed_calls import FUNCTIONS, WITH_WINDOWS
from .vocabulary import NotAllowedError, function_named

_LONGEST = 1 << 28  # two of which multiply to what 64 bits hold
# Pooling multiplies a dilation and a length with 32 bits.
LONGEST_POOLED = 1 << 20
LARGEST_DILATION = 1 << 10
_PLACE_OF_DILATION = 4

Check = Callable[[tuple[Any, ...], dict[str, Any]], None]


def guarded(function: Any) -> Any:
    """The function, or one that checks the lengths that it is given first."""
    return _guards().get(id(function), function)


@cache
def _guards() -> dict[int, Any]:
    found: dict[int, Any] = {}
    for namespace in ("torch", "F", "nn"):
        for name in sorted((WITH_WINDOWS | {"repeat_interleave"}) & FUNCTIONS[namespace]):
            try:
                function = function_named(f"{namespace}:{name}")
            except NotAllowedError:  # this version of PyTorch has none of that name
                continue
            found[id(function)] = _with(function, _check_of(name))
    return found


def _check_of(name: str) -> Check:
    if name == "repeat_interleave":
        return _check_repeats
    if name.startswith("max_pool"):
        return _check_max_pool
    return lambda args, kwargs: _require_below(_LONGEST, (*args, *kwargs.values()))


def _with(function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not kernels.is_traced():
            check(args, kwargs)
        return function(*args, **kwargs)

    # The module stays this one: the text of a forward names those of PyTorch's by their names there.
    checked.__name__ = checked.__qualname__ = function.__name__
    return checked


def _check_repeats(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for repeats in (*(args[1:] or args), *kwargs.values()):
        if _holds_integers(repeats) and repeats.numel():
            _require_below(_LONGEST, (int(repeats.max()),))


def _check_max_pool(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _require_below(LONGEST_POOLED, (*args, *kwargs.values()))
    _require_below(LARGEST_DILATION, (args[_PLACE_OF_DILATION:][:1], kwargs.get("dilation")))


def _require_below(limit: int, values: Iterable[Any]) -> None:
    for number in _integers_in(values):
        if not -limit < number < limit:
            raise ValueError(f"lengths that a saved graph computes must be below {limit}, got {number}")


def _integers_in(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if type(value) in (list, tuple):
            yield from _integers_in(value)
        elif type(value) is int:
            yield value
        elif _holds_integers(value) and value.dim() == 0:
            yield int(value)


def _holds_integers(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
