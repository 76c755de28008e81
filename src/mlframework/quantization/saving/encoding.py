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
from ..graph.float_structure import HOOKS, Record, holds_text, is_ours, is_pytorchs
from ..graph.generated_forward import Source, base_of_generated, has_generated_forward, source_of
from ..graph.nodes import ADDED
from . import classes
from .classes import LIBRARY, NetworksRecords
from .graph_data import encode_nodes
from .names_in_network import NamesInNetwork, joined
from .saved_file import NAMES
from .unsavable import (
    REGISTRIES,
    TRANSIENT,
    NotSavableError,
    check_hooks_of_tensors,
    check_nothing_hidden,
    check_unchanged,
)
from .value_encoding import ValueEncoder
from .vocabulary import NotAllowedError, is_step


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
        self.sources: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.tensor_entries: dict[str, dict[str, Any]] = {}
        self._network = NamesInNetwork(model)
        self.structure = self._network.structure
        self._module_numbers: dict[int, int] = {}
        self._tensor_names: dict[int, str] = {}
        self._source_numbers: dict[int, int] = {}
        self._numbers_of_sources: dict[str, int] = {}
        self._kept: list[Any] = []  # whose ids are in use
        self._queue: deque[nn.Module] = deque()
        self._networks = NetworksRecords(model.modules())
        self._storages: dict[int, tuple[str, bool]] = {}
        self._values = ValueEncoder(self._networks, self._number, self._tensor)
        self.objects, self.records = self._values.objects, self._values.records
        self._registered = {id(each) for module in model.modules() for each in _registered_with(module)}
        for module in model.modules():
            self._number(module)
        while self._queue:
            self._encode_module(self._queue.popleft())

    def _number(self, module: nn.Module, name: str = "") -> int:
        if id(module) not in self._module_numbers:
            self._network.names.setdefault(id(module), name)
            self._module_numbers[id(module)] = len(self.modules)
            self.modules.append({})
            self._kept.append(module)
            self._queue.append(module)
        return self._module_numbers[id(module)]

    def _encode_module(self, module: nn.Module) -> None:
        name = self._network.names[id(module)]
        where = name or "the model"
        entry = self.modules[self._module_numbers[id(module)]]
        own_name = self._network.name_of(module)
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
                values[key] = self._values.encode(value, joined(name, key))
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
            key: None if child is None else self._number(child, joined(name, key))
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
                key: None if tensor is None else self._tensor(tensor, joined(name, key))
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
                "graphs": [encode_nodes(graph, fields, self._values.name_of_record) for graph in nodes.graphs],
                "given": self._values.encode(source.given, where),
                "on_codes": self._values.encode(source.on_codes, where),
                "flags": [source.runs_own_code, source.is_part],
                "reads": sorted(source.reads),
            }
            if nodes.flat is not None and isinstance(form, Planned):
                entry["flat"] = encode_nodes(nodes.flat, fields, self._values.name_of_record)
                code = [container for container, _ in form.code]
                entry["form"] = self._values.encode((form.programs, form.containers, form.modules, tuple(code)), where)
        except NotAllowedError as error:
            raise NotSavableError(f"{where} cannot be kept in a file: {error}") from None
        self._kept.append(source)
        # Blocks of one kind have forwards of their own that say the same.
        number = self._numbers_of_sources.setdefault(json.dumps(entry), len(self.sources))
        if number == len(self.sources):
            self.sources.append(entry)
        self._source_numbers[id(source)] = number
        return number


def _registered_with(module: nn.Module) -> Iterator[Any]:
    """What a file holds of a module: itself, its tensors, and the layer that it wraps."""
    layer = vars(module).get("layer")
    for each in (module, layer) if isinstance(layer, nn.Module) else (module,):
        yield each
        yield from each._parameters.values()
        yield from each._buffers.values()


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
