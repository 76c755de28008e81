"""What the graph of a file may call: functions and methods that compute on tensors, from closed lists.

Nothing is imported for a file, and no value in it is callable.
"""

from __future__ import annotations

import inspect
import keyword
import math
import operator
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from ..graph.decisions import length

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
_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "finfo", "full", "iinfo", "linspace", "logspace", "normal", "ones", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "result_type", "tensor", "tril_indices",
    "triu_indices", "zeros",
)  # fmt: skip
_OTHERS: dict[str, Any] = {"getattr": getattr, "length": length, "OrderedDict": OrderedDict, "assert": torch._assert}

# Among what PyTorch has beside functions of tensors: memory of others, files, and what calls what it is given.
_NOT_OF_TENSORS = re.compile(
    r"from_|asarray|buffer|file|hook|handle_|boolean_dispatch|assert_|has_torch|sym_constrain|mkldnn|miopen|cudnn|"
    r"strided|sparse_\w+_tensor|empty_(permuted|quantized)|resize|is_vulkan|flatten_dense|with_distance"
)
_NO_METHODS = re.compile(
    r"hook|data_ptr|storage|share|dlpack|pin|record_stream|resize|strided|from_|backward|module_load|reinforce|"
    r"(numpy|new|set_|apply_|map_|map2_|as_subclass|requires_grad_|retain_grad|solve|eig|symeig|lstsq)$"
)
_METHODS_OF_OTHERS = frozenset({"__getitem__", "get", "items", "keys", "values", "index", "count"})
RUN = "run"  # of a program
ATTRIBUTES = frozenset(
    {"H", "T", "mH", "mT", "data", "device", "dtype", "imag", "is_cuda", "is_sparse", "itemsize", "layout", "nbytes"}
    | {"ndim", "real", "requires_grad", "shape"}
)
_ATTRIBUTES_OF_INFO = frozenset({"bits", "eps", "max", "min", "resolution", "smallest_normal", "tiny"})


class NotAllowedError(ValueError):
    """What a file may not say, or an object that it cannot name."""


def _functions_of_torch(name: str) -> Any:
    found = getattr(torch._C._VariableFunctions, name, None) or getattr(torch.functional, name, None)
    is_function = isinstance(found, (BuiltinFunctionType, FunctionType)) and getattr(torch, name, None) is not None
    if name in _FACTORIES or is_function:
        return getattr(torch, name)
    return None


def _functions_of(namespace: Any) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        found = vars(namespace).get(name)
        if isinstance(found, BuiltinFunctionType):
            return found
        is_own = isinstance(found, FunctionType) and found.__module__.startswith("torch.")
        return found if is_own else None

    return find


_NAMESPACES: dict[str, Callable[[str], Any]] = {
    "torch": _functions_of_torch,
    "F": _functions_of(F),
    "nn": _functions_of(torch._C._nn),
    "special": _functions_of(torch.special),
    "linalg": _functions_of(torch.linalg),
    "fft": _functions_of(torch.fft),
    "math": _functions_of(math),
    "operator": lambda name: getattr(operator, name) if name in _OPERATORS else None,
    "other": _OTHERS.get,
}


@cache
def function_named(name: str) -> Any:
    """The function of a name in a file.

    Raises:
        NotAllowedError: there is none that a file may call.
    """
    namespace, _, key = name.partition(":")
    if namespace in _NAMESPACES and _IDENTIFIER.fullmatch(key) and not key.startswith("_"):
        is_known = namespace == "other" or key in _FACTORIES or not _NOT_OF_TENSORS.search(key)
        found = _NAMESPACES[namespace](key) if is_known else None
        if found is not None:
            return found
    raise NotAllowedError(f"{name} is no function that a file may call")


@cache
def _names_of_functions() -> dict[int, str]:
    found: dict[int, str] = {}
    for namespace, names in _all_names():
        for name in names:
            try:
                found.setdefault(id(function_named(f"{namespace}:{name}")), f"{namespace}:{name}")
            except NotAllowedError:
                continue
    return found


def _all_names() -> Iterator[tuple[str, Any]]:
    yield "torch", (*dir(torch._C._VariableFunctions), *torch.functional.__all__, *_FACTORIES)
    for key, namespace in (("F", F), ("nn", torch._C._nn), ("special", torch.special), ("linalg", torch.linalg)):
        yield key, dir(namespace)
    yield from (("fft", dir(torch.fft)), ("math", dir(math)), ("operator", _OPERATORS), ("other", _OTHERS))


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
    if name in _METHODS_OF_OTHERS:
        return True
    is_public = bool(_IDENTIFIER.fullmatch(name)) and not name.startswith("_")
    return is_public and not _NO_METHODS.search(name) and callable(getattr(torch.Tensor, name, None))


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
