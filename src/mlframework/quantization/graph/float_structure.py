"""What a float network consists of, noted when it is prepared: what a file that was saved of it can be loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .generated_forward import base_of_generated
from .nodes import ADDED

# Attributes of the modules of a prepared model: the name that each had in the float one, and the text in its
# attributes; and of its root, the record.
FLOAT_NAME = "_float_name"
FLOAT_TEXTS = "_float_texts"
FLOAT_STRUCTURE = "_float_structure"

_LIBRARY = f"{__package__.rpartition('.')[0]}."
_PLAIN = (bool, int, float, str, type(None))
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

Record = dict[str, Any]


def note_float_structure(model: nn.Module) -> None:
    """Notes, in the model and its modules, what it consists of. Copies keep that."""
    structure = float_structure(model)
    for name, module in model.named_modules():
        note_float_module(module, name)
    vars(model)[FLOAT_STRUCTURE] = structure


def note_float_module(module: nn.Module, name: str) -> None:
    """Notes, in a module, what it is called in the float model, and its attributes of text."""
    vars(module)[FLOAT_NAME] = name
    vars(module)[FLOAT_TEXTS] = texts_of(module)


def texts_of(module: nn.Module) -> dict[str, str]:
    """The attributes of a module that are text or hold it, as text."""
    others = {*_USUAL, FLOAT_NAME, FLOAT_TEXTS, FLOAT_STRUCTURE, ADDED}
    return {key: _text(value) for key, value in vars(module).items() if key not in others and holds_text(value)}


def _text(value: Any) -> str:
    """A value as text that is the same for equal ones: copies of a set have orders of their own."""
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else f"({', '.join(map(_text, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(part)}' for key, part in value.items())}}}"
    return repr(value)


def holds_text(value: Any) -> bool:
    """Whether a value is text, or a collection with text in it."""
    if isinstance(value, Mapping):
        return any(map(holds_text, (*value, *value.values())))
    if isinstance(value, (tuple, list, set, frozenset)):
        return any(map(holds_text, value))
    return isinstance(value, str)


def move_float_structure(source: nn.Module, target: nn.Module) -> None:
    """Has the root that stands in the place of another keep what was noted of that."""
    if source is not target and FLOAT_STRUCTURE in vars(source):
        vars(target)[FLOAT_STRUCTURE] = vars(source)[FLOAT_STRUCTURE]


def float_structure(model: nn.Module) -> dict[str, Record]:
    """A record of each module by its name, of what JSON knows."""
    return {name: record_of(module) for name, module in model.named_modules()}


def record_of(module: nn.Module) -> Record:
    """The class of a module, the shapes of its parameters and persistent buffers, its hooks and the methods replaced on
    it; of PyTorch's classes also their settings, which they compute by."""
    own = vars(module)
    record: Record = {"class": class_name(base_of_generated(type(module)))}
    transient = own["_non_persistent_buffers_set"]
    if own["_parameters"] or own["_buffers"]:
        shapes = {name: _shape(tensor) for name, tensor in own["_parameters"].items()}
        shapes.update({name: _shape(tensor) for name, tensor in own["_buffers"].items() if name not in transient})
        if shapes:
            record["tensors"] = shapes
    hooks = user_hooks(module)
    if hooks:
        record["hooks"] = hooks
    added = [(name, value) for name, value in own.items() if name not in _USUAL]
    patched = sorted(name for name, value in added if callable(value) and is_replaced_method(module, name))
    if patched:
        record["methods"] = patched
    if is_pytorchs(type(module)):
        settings = {}
        for name, value in added:
            if name[0] != "_":
                if type(value) in _PLAIN:
                    settings[name] = value
                elif _is_plain(value):
                    settings[name] = _listed(value)
        if settings:
            record["settings"] = settings
    return record


# What every module has, and none of it a method.
_USUAL = frozenset(vars(nn.Module()))


def is_replaced_method(module: nn.Module, name: str) -> bool:
    """Whether an attribute stands in the way of a method of the module's class."""
    value = vars(module)[name]
    return callable(value) and not isinstance(value, (type, nn.Module)) and callable(getattr(type(module), name, None))


def class_name(kind: type) -> str:
    """Of a class that is not PyTorch's the name alone: a script that trains and one that loads are two modules."""
    return f"{kind.__module__}.{kind.__qualname__}" if is_pytorchs(kind) else kind.__qualname__


def is_pytorchs(kind: type) -> bool:
    """Whether PyTorch defines a class, which may be the base of one with a generated forward."""
    return kind.__module__.startswith("torch.")


def _shape(tensor: Any) -> list[int] | None:
    if tensor is None or nn.parameter.is_lazy(tensor):
        return None
    return list(tensor.shape)


def _name(hook: Any) -> str:
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _listed(value: Any) -> Any:
    """As JSON gives it back."""
    return [_listed(part) for part in value] if isinstance(value, (tuple, list)) else value


def user_hooks(module: nn.Module) -> list[str]:
    """The names of the hooks of a module that are not this library's."""
    own = vars(module)
    if not any([own[registry] for registry in HOOKS]):  # noqa: C419  (of every module, when a file is loaded)
        return []
    return [_name(hook) for registry in HOOKS for hook in own[registry].values() if not is_ours(hook)]


def is_ours(value: Any) -> bool:
    """Whether a class, a hook or a function is this library's."""
    return str(getattr(getattr(value, "hook", value), "__module__", "")).startswith(_LIBRARY)
