"""A model as plain data and named tensors.

Every module is an entry in a list; what one refers to in another is its number. The network's own modules are named by
their place in it and say what is new about them; those that quantization has added say all that they consist of.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.planned_calls import Planned
from ..graph.float_structure import (
    FLOAT_NAME,
    FLOAT_STRUCTURE,
    FLOAT_TEXTS,
    HOOKS,
    Record,
    holds_text,
    is_ours,
    is_pytorchs,
    record_of,
)
from ..graph.generated_forward import Source, base_of_generated, has_generated_forward, source_of
from ..graph.nodes import ADDED
from ..qat.activation_observer import ActivationObserver
from . import classes
from .classes import LIBRARY, NetworksRecords, fields_of, is_record
from .graph_data import constant_of, encode_float, encode_nodes
from .saved_file import NAMES
from .unsavable import REGISTRIES, NotSavableError, check_hooks_of_tensors, check_nothing_hidden, check_unchanged
from .vocabulary import NotAllowedError, is_step

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


class Encoder:
    """Encodes a model.

    Args:
        model: to be encoded.
        prefix: of the names of tensors.

    Attributes:
        modules, objects, sources: the entries.
        records: those that hold numbers and text alone, each once.
        tensors: by the names that they have in the file.
        structure: of the float network that the file can be loaded into.
    """

    def __init__(self, model: nn.Module, prefix: str = "") -> None:
        self._prefix = prefix
        self.modules: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []
        self.records: list[list[Any]] = []
        self.sources: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.tensor_entries: dict[str, dict[str, Any]] = {}
        self.structure: dict[str, Record] = {}
        self._model = model
        self._module_numbers: dict[int, int] = {}
        self._object_numbers: dict[int, int] = {}
        self._record_numbers: dict[str, int] = {}
        self._tensor_names: dict[int, str] = {}
        self._source_numbers: dict[int, int] = {}
        self._numbers_of_sources: dict[str, int] = {}
        self._kept: list[Any] = []  # whose ids are in use
        self._names: dict[int, str] = {}
        self._own: dict[int, str] = {}
        self._queue: deque[nn.Module] = deque()
        self._networks = NetworksRecords(model.modules())
        self._storages: dict[int, tuple[str, bool]] = {}
        self._note_names()
        self._registered = {id(each) for module in model.modules() for each in _registered_with(module)}
        for module in model.modules():
            self._number(module)
        while self._queue:
            self._encode_module(self._queue.popleft())

    def _note_names(self) -> None:
        """What modules are called in the model, and which of them are the network's, by their names there."""
        prefixes: dict[int, str] = {}
        structures: dict[str, Record] = {}
        for name, module in self._model.named_modules():
            self._names[id(module)] = name
            layer = vars(module).get("layer")
            if isinstance(layer, nn.Module) and layer._parameters is module._parameters:
                self._names[id(layer)] = name
            structure = vars(module).get(FLOAT_STRUCTURE)
            if structure is not None and not any(_is_inside(name, outer) for outer in prefixes.values()):
                prefixes[id(module)] = name
                structures.update({_joined(name, inner): record for inner, record in structure.items()})
        for name, module in self._model.named_modules():
            if not any(_is_inside(name, outer) for outer in prefixes.values()):
                if is_ours(type(module)) or has_generated_forward(module):
                    raise NotSavableError(
                        f"{name or 'the model'} is a {type(module).__name__} that belongs to no model which prepare() "
                        "returned: save the whole of what it returned, or of what was converted from that"
                    )
                self._own[id(module)] = name
                structures[name] = record_of(module)
        self.structure = structures
        self._prefixes = list(prefixes.values())

    def _name_in_network(self, module: nn.Module, name: str) -> str | None:
        """Where the network has a module of the model; None for what quantization has added."""
        if id(module) in self._own:
            return self._own[id(module)]
        noted = vars(module).get(FLOAT_NAME)
        if noted is None:
            return None
        prefix = next((outer for outer in self._prefixes if _is_inside(name, outer)), "")
        return _joined(prefix, str(noted))

    def _number(self, module: nn.Module, name: str = "") -> int:
        if id(module) not in self._module_numbers:
            self._names.setdefault(id(module), name)
            self._module_numbers[id(module)] = len(self.modules)
            self.modules.append({})
            self._kept.append(module)
            self._queue.append(module)
        return self._module_numbers[id(module)]

    def _encode_module(self, module: nn.Module) -> None:
        name = self._names[id(module)]
        where = name or "the model"
        entry = self.modules[self._module_numbers[id(module)]]
        own_name = self._name_in_network(module, name)
        if own_name is None:
            entry["class"] = self._module_class(base_of_generated(type(module)), where)
        else:
            check_unchanged(module, self.structure.get(own_name), where)
            entry["own"] = own_name
        if module.training:
            entry["training"] = True
        if has_generated_forward(module):
            entry["source"] = self._source(source_of(module), where)
        self._encode_registries(module, entry, name)
        hooks = self._hooks(module, where, own_name is not None)
        if hooks:
            entry["hooks"] = hooks
        state = self._state_of(module)
        record = self.structure.get(own_name or "", {}) if own_name is not None else {}
        values = {}
        left: list[str] = []
        for key, value in state.items():
            if key in REGISTRIES or key in TRANSIENT or key == "training":
                continue
            is_left = _belongs_to_network(module, key, value) or _is_setting(record, key, value)
            if own_name is not None and (is_left or (holds_text(value) and key != ADDED)):
                left.append(key)
                continue
            self._check_name(key, where)
            if isinstance(value, nn.Module) and key == "layer":
                values[key] = {"module": self._number(value, name)}
            else:
                values[key] = self._encode(value, _joined(name, key))
        if own_name is not None:
            check_nothing_hidden(module, left, self._registered, where)
        if values:
            entry["set"] = values

    def _check_name(self, name: str, where: str) -> None:
        if not is_step(name):
            raise NotSavableError(f"{where} has something called {name!r}, a name that a file does not hold: rename it")

    def _module_class(self, kind: type[nn.Module], where: str) -> str:
        try:
            return classes.name_of_module(kind)
        except NotAllowedError as error:
            raise NotSavableError(f"{where} cannot be kept in a file: {error}") from None

    def _encode_registries(self, module: nn.Module, entry: dict[str, Any], name: str) -> None:
        for registry in (module._modules, module._parameters, module._buffers):
            for key in registry:
                self._check_name(key, name or "the model")
        children = {
            key: None if child is None else self._number(child, _joined(name, key))
            for key, child in module._modules.items()
        }
        if children:
            entry["children"] = children
        layer = vars(module).get("layer")
        if isinstance(layer, nn.Module) and layer._parameters is module._parameters:
            entry["shares"] = self._number(layer, name)
            return
        for kind, registry in (("parameters", module._parameters), ("buffers", module._buffers)):
            named = {
                key: None if tensor is None else self._tensor(tensor, _joined(name, key))
                for key, tensor in registry.items()
            }
            if named:
                entry[kind] = named
        if module._non_persistent_buffers_set:
            entry["transient"] = sorted(module._non_persistent_buffers_set)

    def _state_of(self, module: nn.Module) -> dict[str, Any]:
        own: dict[str, Any] = vars(module)
        kept = getattr(type(module), "__getstate__", None)
        if getattr(kept, "__module__", "").startswith(f"{LIBRARY}."):
            return dict(kept(module))  # type: ignore[misc]
        return own

    def _hooks(self, module: nn.Module, where: str, is_own: bool) -> list[list[str]]:
        """The library's own."""
        found = []
        for registry in HOOKS:
            for hook in vars(module)[registry].values():
                function = getattr(hook, "hook", hook)
                if is_ours(function) and not hasattr(function, "__self__"):
                    name = getattr(function, "__name__", "")
                    if classes.HOOKS.get(name) is function:
                        found.append([registry, name])
                    else:
                        raise NotSavableError(f"{where} has the hook {name}, which a file does not hold")
                elif not is_ours(function) and not is_own:
                    raise NotSavableError(
                        f"{where} has a hook of {type(function).__name__}, which a file does not hold: remove it, or "
                        "what computes a parameter (weight normalization, pruning), first"
                    )
        return found

    def _tensor(self, tensor: Tensor, wanted: str) -> str:
        known = self._tensor_names.get(id(tensor))
        if known is not None:
            return known
        check_hooks_of_tensors(tensor, wanted)
        if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.dtype not in NAMES:
            what = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} of {tensor.dtype}"
            raise NotSavableError(f"{wanted} is {what}, which a file does not hold")
        name, number = f"{self._prefix}{wanted}", 0
        while name in self.tensors:
            number += 1
            name = f"{self._prefix}{wanted}_{number}"
        self._check_memory(tensor, wanted)
        self._tensor_names[id(tensor)] = name
        self._kept.append(tensor)
        self.tensors[name] = tensor.detach()
        entry: dict[str, Any] = {}
        if isinstance(tensor, nn.Parameter):
            entry["parameter"] = tensor.requires_grad
        if not tensor.is_contiguous() and is_order(tensor.stride(), tensor.shape):
            entry["strides"] = list(tensor.stride())
        self.tensor_entries[name] = entry
        return name

    def _check_memory(self, tensor: Tensor, wanted: str) -> None:
        """Refuses parameters that share memory with another tensor: they would go apart."""
        if not tensor.numel():
            return
        memory, is_parameter = tensor.untyped_storage().data_ptr(), isinstance(tensor, nn.Parameter)
        name, other_is_parameter = self._storages.setdefault(memory, (wanted, is_parameter))
        if name is not wanted and (is_parameter or other_is_parameter):
            raise NotSavableError(
                f"{wanted} shares its memory with {name}, which a file does not hold: tie them by one parameter, and "
                "not by data"
            )

    def _source(self, source: Source, name: str) -> int:
        if id(source) in self._source_numbers:
            return self._source_numbers[id(source)]
        where = f"the forward of {name}"
        form, nodes = source.form, source.nodes
        if nodes is None:
            raise NotSavableError(f"{where} was made by an earlier version of this library: prepare the model again")
        fields = self._networks.fields_of_records
        try:
            entry: dict[str, Any] = {
                "graphs": [encode_nodes(graph, fields, self._name_of_record) for graph in nodes.graphs],
                "given": self._encode(source.given, where),
                "on_codes": self._encode(source.on_codes, where),
                "flags": [source.runs_own_code, source.is_part],
                "reads": sorted(source.reads),
            }
            if nodes.flat is not None and isinstance(form, Planned):
                entry["flat"] = encode_nodes(nodes.flat, fields, self._name_of_record)
                code = [container for container, _ in form.code]
                entry["form"] = self._encode((form.programs, form.containers, form.modules, tuple(code)), where)
        except NotAllowedError as error:
            raise NotSavableError(f"{where} cannot be kept in a file: {error}") from None
        self._kept.append(source)
        # Blocks of one kind have forwards of their own that say the same.
        number = self._numbers_of_sources.setdefault(json.dumps(entry), len(self.sources))
        if number == len(self.sources):
            self.sources.append(entry)
        self._source_numbers[id(source)] = number
        return number

    def _name_of_observer(self, kind: type[ActivationObserver], where: str) -> str:
        try:
            return classes.name_of_observer(kind)
        except NotAllowedError as error:
            raise NotSavableError(f"{where} cannot be kept in a file: {error}") from None

    def _name_of_record(self, kind: Any) -> str:
        name = getattr(kind, "__qualname__", str(kind))
        if self._networks.records.get(name) is not kind:
            module = str(getattr(kind, "__module__", None) or "torch")
            described = f"{'torch' if module.startswith('torch.') else module}.{getattr(kind, '__name__', name)}"
            raise NotAllowedError(
                f"it calls {described}, which a file cannot hold: it is neither one of PyTorch's functions that a file "
                "may call nor a record that the network's own code names"
            )
        return f"record:{name}"

    def _encode(self, value: Any, where: str) -> Any:
        if value is None or (isinstance(value, (bool, int, str)) and type(value) in (bool, int, str)):
            return value
        if type(value) is float:
            return encode_float(value)
        if type(value) is tuple:
            return [self._encode(part, where) for part in value]
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, where)}
        if isinstance(value, nn.Module):
            return {"module": self._number(value, where)}
        return self._encode_other(value, where)

    def _encode_other(self, value: Any, where: str) -> Any:
        if type(value) is list:
            return {"list": [self._encode(part, where) for part in value]}
        if type(value) in (dict, OrderedDict):
            pairs = [[self._encode(key, where), self._encode(part, where)] for key, part in value.items()]
            return {"dict" if type(value) is dict else "ordered": pairs}
        if type(value) in (set, frozenset):
            return {type(value).__name__: sorted((self._encode(part, where) for part in value), key=repr)}
        if type(value) is slice:
            return {"slice": [self._encode(end, where) for end in (value.start, value.stop, value.step)]}
        found = constant_of(value)
        if found is not None:
            return found
        if value is classes.ANYTHING:
            return {"anything": None}
        if isinstance(value, type) and issubclass(value, ActivationObserver):
            return {"observer": self._name_of_observer(value, where)}
        if is_record(type(value)):
            return self._record(value, where)
        return {"object": self._object(value, where)}

    def _record(self, value: Any, where: str) -> Any:
        kind = type(value)
        if classes.RECORDS.get(kind.__name__) is kind:
            name = kind.__name__
        else:
            try:
                name = self._name_of_record(kind)
            except NotAllowedError as error:
                raise NotSavableError(f"{where} cannot be kept in a file: {error}") from None
            text = next((field for field in fields_of(kind) if holds_text(getattr(value, field))), None)
            if text is not None:
                raise NotSavableError(
                    f"{where} holds a {kind.__qualname__} with text in {text}, which a file cannot hold"
                )
        parts = [self._encode(getattr(value, field), where) for field in fields_of(kind)]
        if name != kind.__name__ or not all(map(_is_plain, parts)):
            return {"record": [name, *parts]}
        number = self._record_numbers.setdefault(json.dumps([name, *parts]), len(self.records))
        if number == len(self.records):
            self.records.append([name, *parts])
        return {"same": number}

    def _object(self, value: Any, where: str) -> int:
        """An object of this library that is neither a module nor a value."""
        if id(value) in self._object_numbers:
            return self._object_numbers[id(value)]
        kind = type(value)
        if classes.OBJECTS.get(kind.__name__) is not kind:
            raise NotSavableError(f"{where} is a {kind.__qualname__}, which a file does not hold")
        entry: dict[str, Any] = {"class": kind.__name__}
        number = self._object_numbers[id(value)] = len(self.objects)
        self.objects.append(entry)
        self._kept.append(value)
        state = value.__getstate__() if "__getstate__" in _attributes(type(value)) else vars(value)
        entry["set"] = {
            key: self._encode(part, f"{where}.{key}") for key, part in state.items() if key not in TRANSIENT
        }
        return number


def _registered_with(module: nn.Module) -> Iterator[Any]:
    """What a file holds of a module: itself, its tensors, and the layer that it wraps."""
    layer = vars(module).get("layer")
    for each in (module, layer) if isinstance(layer, nn.Module) else (module,):
        yield each
        yield from each._parameters.values()
        yield from each._buffers.values()


def _is_plain(encoded: Any) -> bool:
    """Whether an encoded value refers to nothing that can change."""
    if isinstance(encoded, dict):
        return "same" in encoded
    return all(map(_is_plain, encoded)) if isinstance(encoded, list) else True


def _attributes(kind: type) -> set[str]:
    return {name for base in kind.__mro__[:-1] for name in vars(base)}


def _is_setting(record: Record, key: str, value: Any) -> bool:
    """Whether an attribute of one of PyTorch's modules is what the record says, which loading compares."""
    settings = record.get("settings", {})
    return key in settings and settings[key] == _as_in_json(value)


def _as_in_json(value: Any) -> Any:
    return [_as_in_json(part) for part in value] if isinstance(value, (tuple, list)) else value


def _belongs_to_network(module: nn.Module, key: str, value: Any) -> bool:
    """Whether an attribute of a module of the network is what the network's own constructor makes, rather than a value
    or what this library has added."""
    if is_ours(type(value)) or key == ADDED:
        return False
    return not is_value(value) or (key.startswith("_") and is_pytorchs(type(module)))


def is_value(value: Any) -> bool:
    """Numbers, text, tensors and what holds them."""
    if value is None or isinstance(value, (Tensor, torch.dtype, torch.device, torch.Size)):
        return True
    if type(value) in (bool, int, float, str):
        return True
    if type(value) in (list, tuple, set):
        return all(map(is_value, value))
    return type(value) in (dict, OrderedDict) and all(map(is_value, (*value, *value.values())))


def is_order(strides: Any, shape: Sequence[int]) -> bool:
    """Whether elements with these strides lie one after the other, in whatever order of the axes."""
    if len(strides) != len(shape) or not all(type(stride) is int and stride >= 0 for stride in strides):
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
