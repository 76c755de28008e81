"""From plain data and named tensors to a model, with a network's own modules in it.

Everything is made and checked beside the network first. What then changes it is assignments, which do not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..graph.float_structure import FLOAT_STRUCTURE, HOOKS, note_float_module
from ..graph.generated_forward import base_of_generated, generated_class
from ..int8.integer_module import IntegerModule, PackedModule
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.observer_synchronizer import ObserverSynchronizer
from ..qat.qat_module_wrapper import QATModuleWrapper
from . import classes
from .classes import NetworksRecords, would_shadow
from .module_contents import check_distinct, check_lengths, check_own, check_tensor_fits, is_hidden
from .source_decoding import SourceDecoder
from .unsavable import REGISTRIES, TRANSIENT
from .values import ValueDecoder
from .vocabulary import NotAllowedError, is_step, shortened

_PLAIN = frozenset({type(None), bool, int, float, str})
# The attributes of a module without any, with what makes each anew.
_BARE = [
    (key, type(value), None) if isinstance(value, (dict, set)) else (key, None, value)
    for key, value in vars(nn.Module()).items()
]


class Decoder:
    """Makes a model of what :class:`.Encoder` made of one.

    Args:
        content: the entries.
        tensors: by name.
        own: the modules of a network, by name, as its constructor made them.
    """

    def __init__(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor], own: Mapping[str, nn.Module]) -> None:
        self._content = content
        self._own = own
        self._loaded = tensors
        self._entries: list[dict[str, Any]] = content["modules"]
        self._named: dict[str, type[nn.Module]] = {}
        self._names: dict[type[nn.Module], set[str]] = {}  # that things in modules of a class may have
        self.modules = [self._module(entry) for entry in self._entries]
        self._bases = [base_of_generated(type(module)) for module in self.modules]
        if len({id(module) for module in self.modules}) != len(self.modules):
            raise NotAllowedError("two entries are one module of the network")
        self._objects = [object.__new__(_from(classes.OBJECTS, entry["class"])) for entry in content["objects"]]
        self._networks_tensors: set[str] = set()
        self._tensors = self._tensor_objects()
        self._children = [self._children_of(number) for number in range(len(self._entries))]
        self._check_tree()
        self._registries = [self._registries_of(number) for number in range(len(self._entries))]
        self._shared = [
            (module, self.modules[_shared_with(entry, module)])
            for entry, module in zip(self._entries, self.modules, strict=True)
            if "shares" in entry
        ]
        values = ValueDecoder(
            self.modules, self._objects, content["records"], self._tensors, NetworksRecords(own.values())
        )
        self._values = values
        self._settable: dict[tuple[type, bool], set[str]] = {}
        self._object_states = [
            self._attributes(type(made), entry["set"])
            for made, entry in zip(self._objects, content["objects"], strict=True)
        ]
        self.states = [
            self._attributes(base, entry["set"], "own" not in entry) if "set" in entry else {}
            for entry, base in zip(self._entries, self._bases, strict=True)
        ]
        for number, (module, state) in enumerate(zip(self.modules, self.states, strict=True)):
            check_distinct(self._children[number], *self._registries[number].values(), state)
            if state:
                check_lengths(module, state)
                if "own" in self._entries[number]:
                    check_own(self._bases[number], vars(module), state, self._children[number])
        self._hooks = [
            [(_registry(registry), _from(classes.HOOKS, name)) for registry, name in entry.get("hooks", ())]
            for entry in self._entries
        ]
        self._sources = SourceDecoder(content["sources"], values)
        self._classes: dict[tuple[type, int, int | None], type[nn.Module]] = {}
        self._kinds = [self._class_of(number) for number in range(len(self._entries))]

    # --- beside the network ---------------------------------------------------------------------------------------

    def _module(self, entry: Mapping[str, Any]) -> nn.Module:
        if "own" in entry:
            if "shares" in entry:
                raise NotAllowedError(f"{shortened(entry['own'])} of the network may not take another's tensors")
            return self._own[entry["own"]]
        name = entry["class"]
        kind = self._named[name] if name in self._named else self._named.setdefault(name, classes.module_named(name))
        module: nn.Module = kind.__new__(kind)
        if "shares" in entry and not isinstance(module, QATModuleWrapper):
            raise NotAllowedError(f"a {kind.__name__} may not take another module's tensors")
        attributes = vars(module)
        # What nn.Module's constructor makes, at a third of its time.
        for key, collection, value in _BARE:
            attributes[key] = value if collection is None else collection()
        if isinstance(module, PackedModule):
            attributes["_plan"] = None
        return module

    def _tensor_objects(self) -> dict[str, Tensor]:
        """What holds each tensor in the model: where the network has one of its own for it, that."""
        found: dict[str, Tensor] = {}
        taken: set[int] = set()
        for entry, module in zip(self._entries, self.modules, strict=True):
            if "own" not in entry:
                continue
            for kind, registry in (("parameters", module._parameters), ("buffers", module._buffers)):
                for name, key in entry.get(kind, {}).items():
                    present = registry.get(name)
                    if key is None or present is None:
                        continue
                    flag = self._content["tensors"][key][1].get("parameter")
                    check_tensor_fits(f"{entry['own']}.{name}", self._loaded[key], present, flag is not None)
                    if key in found or present.is_meta or present.is_inference() or id(present) in taken:
                        continue
                    if type(present) in (Tensor, nn.Parameter, nn.Buffer):
                        found[key] = present
                        taken.add(id(present))
                        self._networks_tensors.add(key)
        for key, (*_, entry) in self._content["tensors"].items():
            loaded, is_parameter = self._loaded[key], entry.get("parameter")
            is_known = is_parameter is None or type(is_parameter) is bool
            if not is_known or (is_parameter and not loaded.dtype.is_floating_point):
                raise NotAllowedError(f"{key} cannot be a parameter of {loaded.dtype}")
            if key not in found:
                found[key] = loaded if is_parameter is None else nn.Parameter(loaded, requires_grad=is_parameter)
        return found

    def _children_of(self, number: int) -> dict[str, nn.Module | None]:
        entry, module = self._entries[number], self.modules[number]
        found: dict[str, nn.Module | None] = {}
        if "children" in entry:
            self._check_names(number, entry["children"], module._modules)
            for name, child in entry["children"].items():
                found[name] = None if child is None else self.modules[_counted(child)]
        return found

    def _check_names(self, number: int, names: Iterable[str], registry: Mapping[str, Any]) -> None:
        """Refuses names under which something of the class's own would be found, or something else than what is
        there."""
        kind = self._bases[number]
        known = self._names.setdefault(kind, set())
        for name in names:
            if name in known:
                continue
            if not is_step(name):
                raise NotAllowedError(f"{shortened(name)!r} is no name of a module or a tensor")
            if name not in registry:
                if name in REGISTRIES or hasattr(kind, name):
                    raise NotAllowedError(f"{name} is no name for something in a {kind.__name__}")
                known.add(name)

    def _check_tree(self) -> None:
        """Refuses modules that hold themselves."""
        done: set[int] = set()

        def walk(number: int, around: tuple[int, ...]) -> None:
            if number in around:
                raise NotAllowedError("a module holds itself")
            if number not in done:
                for child in self._entries[number].get("children", {}).values():
                    if child is not None:
                        walk(child, (*around, number))
                done.add(number)

        for number in range(len(self._entries)):
            walk(number, ())

    def _registries_of(self, number: int) -> dict[str, dict[str, Tensor | None]]:
        entry, module = self._entries[number], self.modules[number]
        found: dict[str, dict[str, Tensor | None]] = {}
        for kind in ("parameters", "buffers"):
            if kind not in entry:
                continue
            named = found[f"_{kind}"] = {}
            self._check_names(number, entry[kind], vars(module)[f"_{kind}"])
            for name, key in entry[kind].items():
                tensor = None if key is None else self._tensors[key]
                if kind == "parameters" and tensor is not None and not isinstance(tensor, nn.Parameter):
                    raise NotAllowedError(f"{key} is no parameter")
                if key in self._networks_tensors and isinstance(module, (FakeQuantizeLayer, IntegerModule)):
                    raise NotAllowedError(f"{key} is the network's own, and none of a {type(module).__name__}")
                named[name] = tensor
        transient = entry.get("transient", [])
        if not all(isinstance(name, str) for name in transient):
            raise NotAllowedError("names must be text")
        return found

    def _attributes(self, kind: type, encoded: Mapping[str, Any], is_made: bool = True) -> dict[str, Any]:
        known = self._settable.setdefault((kind, is_made), set())
        if not encoded.keys() <= known:
            for key in encoded.keys() - known:
                is_made_anew = key in REGISTRIES or key in TRANSIENT or key == "training"
                is_kept = not is_made_anew and not (is_made and is_hidden(kind, key))
                if not is_step(key) or not is_kept or would_shadow(kind, key):
                    raise NotAllowedError(f"{shortened(key)} is no attribute that a file sets")
                known.add(key)
        decode = self._values.decode
        return {key: value if type(value) in _PLAIN else decode(value) for key, value in encoded.items()}

    def _class_of(self, number: int) -> type[nn.Module] | None:
        entry = self._entries[number]
        if "source" not in entry:
            return None
        base, index = self._bases[number], _counted(entry["source"])
        self._sources.check_targets(index, lambda path, is_module: self._leads_to(number, path, is_module))
        key = (base, index, number if self._sources.has_form(index) else None)
        if key not in self._classes:
            source = self._sources.source(index, base, lambda path: self._code_at(number, path))
            self._classes[key] = generated_class(base, source)
        return self._classes[key]

    def _code_at(self, part: int, path: str) -> Any:
        """The code of the generated forward of a module inside of another."""
        number = self._number_at(part, path.split(".") if path else [])
        if number is None:
            raise NotAllowedError(f"{path} is no module")
        return self._sources.code(self._entries[number]["source"]) if "source" in self._entries[number] else None

    def _number_at(self, number: int, steps: list[str]) -> int | None:
        for step in steps:
            child = self._entries[number].get("children", {}).get(step)
            if child is None:
                return None
            number = child
        return number

    def _leads_to(self, number: int, path: str, is_module: bool) -> bool:
        """Whether names lead from a module to another, or to a tensor."""
        if is_module and "." not in path:  # as most
            return self._entries[number].get("children", {}).get(path) is not None
        *steps, last = path.split(".")
        found = self._number_at(number, [*steps, last] if is_module else steps)
        if is_module or found is None:
            return found is not None
        entry = self._entries[self._entries[found].get("shares", found)]
        held = entry.get("parameters", {}).get(last) or entry.get("buffers", {}).get(last)
        return held is not None or isinstance(self.states[found].get(last), Tensor)

    # --- changes --------------------------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        """Puts the network's modules in place; all else is made."""
        for key, tensor in self._tensors.items():
            loaded = self._loaded[key]
            if tensor is not loaded and tensor.data_ptr() != loaded.data_ptr():
                tensor.data = loaded
            is_parameter = self._content["tensors"][key][1].get("parameter")
            if is_parameter is not None:
                tensor.requires_grad_(is_parameter)
        own = [number for number, entry in enumerate(self._entries) if "own" in entry]
        for number in own:
            self._assemble(number, self.modules[number])
        for module, layer in self._shared:  # which may be the network's
            for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
                vars(module)[registry] = vars(layer)[registry]
        for number in own:
            self._settle(number, self.modules[number])
        root = self.modules[0]
        vars(root)[FLOAT_STRUCTURE] = self._content["structure"]
        return root

    def make(self) -> None:
        """Assembles what is not the network's, which is the last that may fail."""
        for value, state in zip(self._objects, self._object_states, strict=True):
            if isinstance(value, ObserverSynchronizer):
                layers = state.pop("layers")
                if not all(isinstance(layer, FakeQuantizeLayer) for layer in layers):
                    raise NotAllowedError("statistics are of what quantizes")
                value.__init__(layers)  # type: ignore[misc]
            vars(value).update(state)
        made = [number for number, entry in enumerate(self._entries) if "own" not in entry]
        for number in made:
            self._assemble(number, self.modules[number])
        for module, layer in self._shared:
            for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
                vars(module)[registry] = vars(layer)[registry]
        for number in made:
            self._settle(number, self.modules[number])

    def _assemble(self, number: int, module: nn.Module) -> None:
        entry, own = self._entries[number], vars(module)
        if "own" in entry:
            for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
                own[registry].clear()
        own["_modules"].update(self._children[number])
        if "shares" not in entry:
            for kind, tensors in self._registries[number].items():
                own[kind].update(tensors)
            if "transient" in entry:
                own["_non_persistent_buffers_set"].update(entry["transient"])
        own.update(self.states[number])
        own["training"] = entry.get("training") is True
        if "own" in entry:
            note_float_module(module, entry["own"])
        generated = self._kinds[number]
        if generated is not None:
            module.__class__ = generated

    def _settle(self, number: int, module: nn.Module) -> None:
        for registry, function in self._hooks[number]:
            _REGISTER[registry](module, function)
        if "own" in self._entries[number]:
            if isinstance(module, nn.RNNBase):
                module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
            return
        if isinstance(module, FakeQuantizeLayer):
            module.__setstate__({})
        elif isinstance(module, QATModuleWrapper):
            vars(module)["_cached"] = None
        if isinstance(module, IntegerModule):
            module._note_change()


def _shared_with(entry: Mapping[str, Any], module: nn.Module) -> int:
    """The number of the layer that a module wraps, whose tensors are its own."""
    number = _counted(entry["shares"])
    is_alone = not {"parameters", "buffers", "transient"} & entry.keys()
    if not is_alone or entry.get("set", {}).get("layer") != {"module": number}:
        raise NotAllowedError(f"a {type(module).__name__} may not take another module's tensors")
    return number


def _from(table: Mapping[str, Any], name: Any) -> Any:
    if not isinstance(name, str) or name not in table:
        raise NotAllowedError(f"{shortened(name)} is no name that a file may have")
    return table[name]


def _counted(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise NotAllowedError(f"{shortened(value)} is no number of something")
    return value


def _registry(name: Any) -> str:
    if name not in _REGISTER:
        raise NotAllowedError(f"{shortened(name)} has no hooks that a file may register")
    return str(name)


_REGISTER: dict[str, Callable[[nn.Module, Any], Any]] = {
    "_forward_pre_hooks": lambda module, function: module.register_forward_pre_hook(function),
    "_forward_hooks": lambda module, function: module.register_forward_hook(function),
    "_load_state_dict_pre_hooks": lambda module, function: module.register_load_state_dict_pre_hook(function),  # type: ignore[no-untyped-call]
    "_load_state_dict_post_hooks": lambda module, function: module.register_load_state_dict_post_hook(function),  # type: ignore[no-untyped-call]
}
assert set(_REGISTER) <= set(HOOKS)
