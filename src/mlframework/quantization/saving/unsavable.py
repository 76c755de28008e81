"""What a file cannot hold: found, and named, before one is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..graph.float_structure import (
    FLOAT_NAME,
    FLOAT_STRUCTURE,
    FLOAT_TEXTS,
    Record,
    class_name,
    is_ours,
    is_pytorchs,
    is_replaced_method,
    texts_of,
    user_hooks,
)
from ..graph.generated_forward import base_of_generated

REGISTRIES = frozenset(vars(nn.Module())) - {"training"}
# What is made anew where it is missing.
TRANSIENT = frozenset(
    {
        "_plan",
        "_plan_of_programs",
        "_cached",
        "changed",
        "history",
        "_join_config",
        "save_pretrained",
        "hf_quantizer",
        FLOAT_NAME,
        FLOAT_STRUCTURE,
        FLOAT_TEXTS,
    }
)
_DEPTH = 5  # of objects in objects


class NotSavableError(ValueError):
    """A model that a file cannot hold, with what and where."""


def check_unchanged(module: nn.Module, record: Record | None, name: str) -> None:
    """Refuses what was done to a module of the network after it was noted, and a file does not hold."""
    kind = base_of_generated(type(module))
    if record is None or record["class"] != class_name(kind):
        raise NotSavableError(
            f"{name} is a {kind.__name__}, which came into the model after prepare(): a file is of the network that "
            "was prepared"
        )
    hooks = user_hooks(module)
    if hooks != record.get("hooks", []):
        raise NotSavableError(
            f"{name} has the hooks {hooks}, and had {record.get('hooks', [])} when it was prepared: a file holds no "
            "hooks; remove those that came later"
        )
    noted = vars(module).get(FLOAT_TEXTS, {})
    for key, text in texts_of(module).items():
        if key in noted and noted[key] != text:
            raise NotSavableError(
                f"{name} has the {key} {text}, and had {noted[key]} when it was prepared: a file holds no text of the "
                "network's own; set it before preparing"
            )
    methods = sorted(
        key
        for key, value in vars(module).items()
        if not is_ours(value) and key not in REGISTRIES and is_replaced_method(module, key)
    )
    if methods != record.get("methods", []):
        raise NotSavableError(
            f"{name} has the methods {methods} replaced, and had {record.get('methods', [])} when it was prepared: a "
            "file holds no code"
        )


def check_hooks_of_tensors(tensor: Tensor, name: str) -> None:
    """Refuses hooks on a tensor that are not this library's."""
    for hooks in (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)):
        for hook in hooks.values() if isinstance(hooks, Mapping) else ():
            if not is_ours(hook):
                raise NotSavableError(f"{name} has a hook of its own, which a file does not hold: remove it first")


def check_nothing_hidden(module: nn.Module, keys: Collection[str], registered: Collection[int], name: str) -> None:
    """Refuses tensors and modules that the attributes of a module hold somewhere inside, unregistered: the network that
    a file is loaded into would go on with its own in silence.

    Args:
        keys: the attributes of the module that no file holds.
        registered: the ids of all tensors and modules that one does.
    """
    if is_pytorchs(base_of_generated(type(module))):
        return
    for key in keys:
        found = next(_held_by(vars(module)[key], registered, _DEPTH, set()), None)
        if found is not None:
            raise NotSavableError(
                f"{name} has a {type(found).__name__} inside of its attribute {key}, a "
                f"{type(vars(module)[key]).__name__}, where a file does not find it: register it (nn.ModuleList, "
                "nn.ParameterList, register_buffer) before preparing"
            )


def _held_by(value: Any, registered: Collection[int], depth: int, seen: set[int]) -> Iterator[Any]:
    if id(value) in registered or id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, (Tensor, nn.Module)):
        if isinstance(value, Tensor) or any(True for _ in (*value.parameters(), *value.buffers())):
            yield value
        return
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        yield value
        return
    for part in _parts_of(value):
        yield from _held_by(part, registered, depth - 1, seen)


def _parts_of(value: Any) -> Iterator[Any]:
    """What an object holds: the values of a collection, attributes and slots, and what a function refers to."""
    if isinstance(value, Mapping):
        yield from (*value.keys(), *value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from list(value)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # nothing is in it yet
                continue
    if isinstance(value, (type, ModuleType)):
        return
    if isinstance(getattr(value, "__dict__", None), dict):
        yield from list(vars(value).values())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and name[-2:] != "__" else name
            descriptor = vars(kind).get(private)
            if isinstance(descriptor, MemberDescriptorType):
                try:
                    yield descriptor.__get__(value)
                except AttributeError:  # nothing is in it
                    continue
