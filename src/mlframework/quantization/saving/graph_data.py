"""Graphs as JSON and back: every node is checked when it is written and when it is read, by the same rules."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from ..graph.graph_nodes import NodeValue, PlainNode
from .allowed_calls import METHODS_OF_OTHERS, REFUSED_ARGUMENTS
from .vocabulary import (
    RUN,
    NotAllowedError,
    as_word,
    fields_of_results,
    function_named,
    is_identifier,
    is_method,
    is_step,
    is_word,
    name_of_function,
    operands_of,
    shortened,
)

Record = Callable[[Any], Any]  # between the class of a record and its name

_PROGRAM = re.compile(r"program_\d+")
_TAKES_KEY = ("__getitem__", "get")  # after the dictionary
_DEEPEST = 64  # collections in collections
_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_DTYPES = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    }
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128}
    | {torch.float8_e4m3fn, torch.float8_e5m2}
)
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encode_float(value: float) -> Any:
    """A float as JSON has it."""
    if math.isfinite(value):
        return value
    return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}


def decode_float(name: Any) -> float:
    return _FLOATS[name]


def dtype_named(name: Any) -> torch.dtype:
    """The dtype of a name.

    Raises:
        NotAllowedError: there is none.
    """
    found: torch.dtype = _constant(name, torch.dtype)
    if found not in _DTYPES:
        raise NotAllowedError(f"{name} is no dtype that a file may name")
    return found


def _constant(name: Any, kind: Any) -> Any:
    found = vars(torch).get(name) if isinstance(name, str) else None
    if not isinstance(found, kind):
        raise NotAllowedError(f"{shortened(name)} is no {kind.__name__}")
    return found


def encode_nodes(nodes: Sequence[PlainNode], fields: Collection[str], record: Record) -> list[Any]:
    """A graph as lists of ``[op, target, args, kwargs]``.

    Args:
        fields: what records name their parts.
        record: returns the name of a class of records, or raises.

    Raises:
        NotAllowedError: there is a node that a file may not have.
    """
    encoded = []
    placeholders: set[str] = set()
    for index, node in enumerate(nodes):
        target, args = node.target, node.args
        if node.op == "call_method" and not is_method(target) and not _is_of_program(node, nodes):
            raise NotAllowedError(f"it calls the method {target} of a tensor, which a file cannot hold")
        _check(node, index, placeholders, nodes, fields)
        if target is torch._assert and isinstance(args[-1], str):
            args = (*args[:-1], as_word(args[-1]))
        if node.op == "call_function":
            target = name_of_function(target) or record(target)
        encoded.append([_OPS.index(node.op), target, [_encode(arg) for arg in args], _encode_named(node.kwargs)])
    return encoded


def decode_nodes(encoded: Any, fields: Collection[str], record: Record) -> tuple[PlainNode, ...]:
    """The graph that :func:`encode_nodes` gave.

    Args:
        fields: what records name their parts.
        record: returns the class of records of a name, or raises.

    Raises:
        NotAllowedError: there is a node that a file may not have.
    """
    nodes: list[PlainNode] = []
    placeholders: set[str] = set()
    for index, (op, target, args, kwargs) in enumerate(encoded):
        if op == 2:
            target = record(target[7:]) if target.startswith("record:") else function_named(target)
        named = {key: _decode(value, index) for key, value in kwargs.items()}
        node = PlainNode(_OPS[_counted(op)], target, tuple([_decode(arg, index) for arg in args]), named)
        _check(node, index, placeholders, nodes, fields)
        nodes.append(node)
    if not nodes or nodes[-1].op != "output":
        raise NotAllowedError("a graph must end with its result")
    return tuple(nodes)


def _counted(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise NotAllowedError(f"{shortened(value)} is no number of something")
    return value


def _check(
    node: PlainNode, index: int, placeholders: set[str], nodes: Sequence[PlainNode], fields: Collection[str]
) -> None:
    """Refuses what the text of a forward could not say safely, or a function could misuse.

    Args:
        index: of the node.
        placeholders: the names of those before it, to which its own is added.
        nodes: those before it, at the least.
        fields: what records name their parts.
    """
    op, target, args, kwargs = node
    if kwargs:
        if not all(map(is_identifier, kwargs)):
            raise NotAllowedError(f"arguments may not be called {shortened(', '.join(map(str, kwargs)))}")
        if kwargs.get("rounding_mode") == "trunc":  # of the lowest integer and -1, the processor makes a trap
            raise NotAllowedError("a graph may not divide with the rounding mode trunc, which a file cannot hold")
    if op == "call_function":
        if target is getattr:
            _check_attribute(args, kwargs, fields)
        elif target is OrderedDict and len(args) == 1 and isinstance(args[0], (list, tuple)):
            values = [pair[1:] if isinstance(pair, (list, tuple)) else pair for pair in args[0]]
            _refuse_words(True, target.__name__, values, kwargs)
        elif isinstance(target, type):
            _refuse_words(True, target.__name__, args, kwargs)
        elif getattr(target, "__module__", None) == "_operator" and (kwargs or len(args) != operands_of(target)):
            raise NotAllowedError(f"{target.__name__} takes {operands_of(target)} values, got {len(args)}")
        elif getattr(target, "__module__", None) == "_operator":
            has_key = target.__name__ in ("getitem", "setitem", "eq", "ne")
            _refuse_words(True, target.__name__, args[:1] + args[2:] if has_key else args, kwargs)
        elif not REFUSED_ARGUMENTS.isdisjoint(kwargs):
            _refuse_arguments(target.__name__, kwargs)
    elif op == "call_method":
        is_of_value = bool(args) and isinstance(args[0], NodeValue)
        if not is_of_value or not (_is_of_program(node, nodes) or is_method(target)):
            raise NotAllowedError(f"a graph may not call the method {shortened(target)}")
        if not REFUSED_ARGUMENTS.isdisjoint(kwargs):
            _refuse_arguments(f"the method {target}", kwargs)
        if target == "repeat_interleave" and any(isinstance(each, NodeValue) for each in (*args[1:], *kwargs.values())):
            raise NotAllowedError(
                "a graph may not call the method repeat_interleave with lengths that it computes: call "
                "torch.repeat_interleave"
            )
        if target in _TAKES_KEY:
            args = args[:1] + args[2:]
        _refuse_words(target in METHODS_OF_OTHERS, target, args, kwargs)
    elif op in ("call_module", "get_attr"):
        if not isinstance(target, str) or not all(map(is_step, target.split("."))):
            raise NotAllowedError(f"{shortened(target)!r} is no name of a module or a tensor")
        if op == "get_attr" and (args or kwargs):
            raise NotAllowedError(f"{target} takes no arguments")
        _refuse_words(True, f"the module {target}", args, kwargs)
    elif op == "placeholder":
        # All before it are placeholders, where there are as many names as nodes.
        is_next = len(placeholders) == index and target not in placeholders if is_identifier(target) else False
        if args or kwargs or not is_next:
            raise NotAllowedError(f"{shortened(target)!r} is no argument of a forward")
        placeholders.add(target)
    elif target != "output" or kwargs or len(args) != 1:
        raise NotAllowedError("a graph must have one result, which is its last node")
    else:
        _refuse_words(True, "who called it", args, kwargs)
    if index and nodes[index - 1].op == "output":
        raise NotAllowedError("a graph must have one result, which is its last node")


def _refuse_words(is_refused: bool, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses text where it would go on to modules of the network, whose code may do anything with it: what PyTorch's
    functions compute on tensors ends with them."""
    if is_refused and _holds_words((*args, *kwargs.values())):
        raise NotAllowedError(f"a graph may not give text to {name}, which a file cannot hold")


def _holds_words(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_words, value))
    if isinstance(value, dict):  # keys name what a dictionary holds
        return any(map(_holds_words, value.values()))
    if isinstance(value, slice):
        return any(map(_holds_words, (value.start, value.stop, value.step)))
    return isinstance(value, str)


def _is_of_program(node: PlainNode, nodes: Sequence[PlainNode]) -> bool:
    """Whether a call is that of a program, which a flat graph is given as an argument."""
    owner = nodes[node.args[0]] if node.args and isinstance(node.args[0], NodeValue) else None
    is_program = owner is not None and owner.op == "placeholder" and _PROGRAM.fullmatch(owner.target)
    return node.target == RUN and bool(is_program)


def _refuse_arguments(name: str, kwargs: Mapping[str, Any]) -> None:
    refused = ", ".join(sorted(REFUSED_ARGUMENTS.intersection(kwargs)))
    raise NotAllowedError(f"a graph may not call {name} with the argument {refused}")


def _check_attribute(args: Sequence[Any], kwargs: Mapping[str, Any], fields: Collection[str]) -> None:
    is_pair = len(args) == 2 and not kwargs and isinstance(args[0], NodeValue) and isinstance(args[1], str)
    if not is_pair or (args[1] not in fields and args[1] not in fields_of_results()):
        raise NotAllowedError(f"a graph may not read the attribute {shortened(args[1:])}")


def _encode_named(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _encode(value) for key, value in kwargs.items()}


def _encode(value: Any) -> Any:
    if isinstance(value, NodeValue):
        return {"v": int(value)}
    if value is None or type(value) in (bool, int):
        return value
    if type(value) is float:
        return encode_float(value)
    if type(value) is str and is_word(value):
        return value
    if type(value) is list:
        return [_encode(part) for part in value]
    if type(value) in (tuple, torch.Size):
        return {"t": [_encode(part) for part in value]}
    if type(value) is dict:
        return {"d": [[_encode(key), _encode(part)] for key, part in value.items()]}
    if type(value) is slice:
        return {"s": [_encode(end) for end in (value.start, value.stop, value.step)]}
    found = constant_of(value)
    if found is not None:
        return found
    raise NotAllowedError(f"{value!r} of {type(value).__name__} is no argument that a file holds")


def _decode(value: Any, index: int, depth: int = 0) -> Any:
    """``index``: of the node, which only reads earlier ones; ``depth``: of collections around the value."""
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        if not is_word(value):
            raise NotAllowedError(f"{value[:80]!r} is no text that a call takes")
        return value
    depth += 1
    if depth > _DEEPEST:
        raise NotAllowedError(f"an argument may not have more than {_DEEPEST} collections within each other")
    if type(value) is list:
        return [_decode(part, index, depth) for part in value]
    ((kind, content),) = value.items()
    if kind == "v":
        if _counted(content) >= index:
            raise NotAllowedError(f"a node may not read {content}, which is not before it")
        return NodeValue(content)
    if kind == "t":
        return tuple([_decode(part, index, depth) for part in content])
    if kind == "s":
        start, stop, step = (_decode(end, index, depth) for end in content)
        return slice(start, stop, step)
    if kind == "d":
        return {_key(key): _decode(part, index, depth) for key, part in content}
    return constant(kind, content)


def _key(key: Any) -> Any:
    if not (type(key) in (bool, int) or key is None or (type(key) is str and is_word(key))):
        raise NotAllowedError(f"{shortened(key)} is no key of a dictionary in a graph")
    return key


def constant_of(value: Any) -> dict[str, Any] | None:
    """What :func:`constant` reads; None for a value of another kind."""
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, torch.device):
        return {"device": [value.type, value.index]}
    for name, kind in (("dtype", torch.dtype), ("format", torch.memory_format), ("layout", torch.layout)):
        if isinstance(value, kind):
            if (kind is torch.layout and value != torch.strided) or (kind is torch.dtype and value not in _DTYPES):
                raise NotAllowedError(f"{value} is a {name} that a file cannot hold")
            return {name: str(value).removeprefix("torch.")}
    return None


def constant(kind: str, content: Any) -> Any:
    """A value of a kind that JSON has no form for, and that refers to nothing else.

    Raises:
        NotAllowedError: it is none.
    """
    if kind == "float":
        return decode_float(content)
    if kind == "dtype":
        return dtype_named(content)
    if kind == "format":
        return _constant(content, torch.memory_format)
    if kind == "layout":
        if content != "strided":  # others keep indices beside the elements, which a graph could change
            raise NotAllowedError(f"{shortened(content)!r} is no layout that a file may name")
        return torch.strided
    if kind == "ellipsis":
        return Ellipsis
    if kind == "device":
        name, index = content
        if not is_identifier(name):
            raise NotAllowedError(f"{shortened(name)!r} is no device")
        return torch.device(name) if index is None else torch.device(name, _counted(index))
    raise NotAllowedError(f"{shortened(kind)!r} is no kind of value")
