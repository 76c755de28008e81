"""What the graph of a file may call: functions and methods that compute on tensors, from closed lists.

Nothing is imported for a file, and no value in it is callable.
"""

from __future__ import annotations

import inspect
import keyword
import math
import operator
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ..graph.decisions import length
from .allowed_calls import FUNCTIONS, METHODS, METHODS_OF_OTHERS

# Letters, digits, underscores: what text that is made of a graph may hold unquoted.
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Between dots, in the names of modules and tensors. They stand between quotes in the text of a forward.
_STEP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ :+/@-]*")
# Words as functions of tensors take them: modes, equations of einsum, names of fields.
_WORD = re.compile(r"[A-Za-z0-9_ .,:;=>+/-]{0,400}")

_OPERATORS = (
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "iadd", "iand", "ifloordiv", "ilshift", "imatmul",
    "imod", "imul", "index", "inv", "invert", "ior", "ipow", "irshift", "is_", "is_not", "isub", "itruediv", "ixor",
    "le", "lshift", "lt", "matmul", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "setitem", "sub",
    "truediv", "truth", "xor",
)  # fmt: skip
_LONGEST = 200  # letters of what a message quotes of a file
_OTHERS: dict[str, Any] = {"getattr": getattr, "length": length, "OrderedDict": OrderedDict, "assert": torch._assert}

RUN = "run"  # of a program
ATTRIBUTES = frozenset(
    {"H", "T", "mH", "mT", "data", "device", "dtype", "imag", "is_cuda", "is_sparse", "itemsize", "layout", "nbytes"}
    | {"ndim", "real", "requires_grad", "shape"}
)
_ATTRIBUTES_OF_INFO = frozenset({"bits", "eps", "max", "min", "resolution", "smallest_normal", "tiny"})


class NotAllowedError(ValueError):
    """What a file may not say, or an object that it cannot name."""


class _Shortening(reprlib.Repr):
    """The text of a value with an end, which a file has not to have: its records may hold each other."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_instance(self, x: Any, level: int) -> str:
        is_small = x is None or isinstance(x, (bool, float, torch.dtype, torch.device))
        return repr(x) if is_small else f"a {type(x).__name__}"


_SHORTENING = _Shortening()


def shortened(value: Any) -> str:
    """What a file says, as a message quotes it."""
    text = value if isinstance(value, str) else _SHORTENING.repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _functions_of(namespace: Any, allowed: Collection[str]) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        return getattr(namespace, name, None) if name in allowed else None

    return find


_NAMESPACES: dict[str, Callable[[str], Any]] = {
    "torch": _functions_of(torch, FUNCTIONS["torch"]),
    "F": _functions_of(F, FUNCTIONS["F"]),
    "nn": _functions_of(torch._C._nn, FUNCTIONS["nn"]),
    "special": _functions_of(torch.special, FUNCTIONS["special"]),
    "linalg": _functions_of(torch.linalg, FUNCTIONS["linalg"]),
    "fft": _functions_of(torch.fft, FUNCTIONS["fft"]),
    "math": _functions_of(math, FUNCTIONS["math"]),
    "operator": _functions_of(operator, _OPERATORS),
    "other": _OTHERS.get,
}


@cache
def function_named(name: str) -> Any:
    """The function of a name in a file.

    Raises:
        NotAllowedError: there is none that a file may call.
    """
    namespace, _, key = name.partition(":")
    found = _NAMESPACES[namespace](key) if namespace in _NAMESPACES else None
    if found is None:
        raise NotAllowedError(f"{shortened(name)} is no function that a file may call")
    return found


@cache
def _names_of_functions() -> dict[int, str]:
    found: dict[int, str] = {}
    for namespace, names in _all_names():
        for name in sorted(names):
            try:
                found.setdefault(id(function_named(f"{namespace}:{name}")), f"{namespace}:{name}")
            except NotAllowedError:  # this version of PyTorch has none of that name
                continue
    return found


def _all_names() -> Iterator[tuple[str, Collection[str]]]:
    yield from FUNCTIONS.items()
    yield from (("operator", _OPERATORS), ("other", _OTHERS))


def name_of_function(function: Any) -> str | None:
    """The name of a function in a file; None where a file may not call it."""
    return _names_of_functions().get(id(function))


@cache
def operands_of(function: Any) -> int:
    """How many values an operator takes: they are written around it in the text of a forward."""
    return len(inspect.signature(function).parameters)


@cache
def is_method(name: str) -> bool:
    """Whether a graph may call a method of that name."""
    return name in METHODS_OF_OTHERS or (name in METHODS and callable(getattr(torch.Tensor, name, None)))


@cache
def fields_of_results() -> frozenset[str]:
    """What results of PyTorch's functions name their parts, and attributes of tensors and of facts about dtypes."""
    kinds = [kind for kind in vars(torch.return_types).values() if isinstance(kind, type) and issubclass(kind, tuple)]
    fields = {name for kind in kinds for name in getattr(kind, "__match_args__", ())}
    return ATTRIBUTES | _ATTRIBUTES_OF_INFO | frozenset(name for name in fields if is_identifier(name))


@lru_cache(4096)
def is_identifier(name: Any) -> bool:
    """Whether a name may be that of an argument or a field."""
    return (
        isinstance(name, str)
        and _IDENTIFIER.fullmatch(name) is not None
        and not name.startswith("_")
        and not keyword.iskeyword(name)
    )


@lru_cache(4096)
def is_step(name: Any) -> bool:
    """Whether a name, between dots, may be that of a module or a tensor."""
    return isinstance(name, str) and _STEP.fullmatch(name) is not None and not name.startswith("__")


def is_word(text: str) -> bool:
    """Whether text may be an argument of a call in a graph."""
    return _WORD.fullmatch(text) is not None


def as_word(text: str) -> str:
    """A message without what :func:`is_word` does not allow."""
    return "".join(letter if is_word(letter) else " " for letter in text[:400])
