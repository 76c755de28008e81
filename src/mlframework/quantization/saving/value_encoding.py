"""The values of attributes, as JSON."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.float_structure import holds_text
from ..qat.activation_observer import ActivationObserver
from . import classes
from .classes import NetworksRecords, fields_of, is_record
from .graph_data import constant_of, encode_float
from .unsavable import TRANSIENT, NotSavableError
from .vocabulary import NotAllowedError


class ValueEncoder:
    """Encodes values; :class:`.ValueDecoder` makes them again.

    Args:
        networks: the classes that the network's code names.
        number: returns the number of a module, of which the second argument says where it is.
        name: returns the name of a tensor in the file, likewise.

    Attributes:
        objects: the entries.
        records: those that hold numbers and text alone, each once.
    """

    def __init__(
        self, networks: NetworksRecords, number: Callable[[nn.Module, str], int], name: Callable[[Tensor, str], str]
    ) -> None:
        self.objects: list[dict[str, Any]] = []
        self.records: list[list[Any]] = []
        self._networks, self._number, self._tensor = networks, number, name
        self._object_numbers: dict[int, int] = {}
        self._record_numbers: dict[str, int] = {}
        self._kept: list[Any] = []  # whose ids are in use

    def encode(self, value: Any, where: str) -> Any:
        """The JSON of a value.

        Raises:
            NotSavableError: a file holds none such.
        """
        if value is None or (isinstance(value, (bool, int, str)) and type(value) in (bool, int, str)):
            return value
        if type(value) is float:
            return encode_float(value)
        if type(value) is tuple:
            return [self.encode(part, where) for part in value]
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, where)}
        if isinstance(value, nn.Module):
            return {"module": self._number(value, where)}
        return self._encode_other(value, where)

    def _encode_other(self, value: Any, where: str) -> Any:
        if type(value) is list:
            return {"list": [self.encode(part, where) for part in value]}
        if type(value) in (dict, OrderedDict):
            pairs = [[self.encode(key, where), self.encode(part, where)] for key, part in value.items()]
            return {"dict" if type(value) is dict else "ordered": pairs}
        if type(value) in (set, frozenset):
            return {type(value).__name__: sorted((self.encode(part, where) for part in value), key=repr)}
        if type(value) is slice:
            return {"slice": [self.encode(end, where) for end in (value.start, value.stop, value.step)]}
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
                name = self.name_of_record(kind)
            except NotAllowedError as error:
                raise NotSavableError(f"{where} cannot be kept in a file: {error}") from None
            text = next((field for field in fields_of(kind) if holds_text(getattr(value, field))), None)
            if text is not None:
                raise NotSavableError(
                    f"{where} holds a {kind.__qualname__} with text in {text}, which a file cannot hold"
                )
        parts = [self.encode(getattr(value, field), where) for field in fields_of(kind)]
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
        entry["set"] = {key: self.encode(part, f"{where}.{key}") for key, part in state.items() if key not in TRANSIENT}
        return number

    def name_of_record(self, kind: Any) -> str:
        """What a file calls a class of the network's own records.

        Raises:
            NotAllowedError: it is none.
        """
        name = getattr(kind, "__qualname__", str(kind))
        if self._networks.records.get(name) is not kind:
            module = str(getattr(kind, "__module__", None) or "torch")
            described = f"{'torch' if module.startswith('torch.') else module}.{getattr(kind, '__name__', name)}"
            raise NotAllowedError(
                f"it calls {described}, which a file cannot hold: it is neither one of PyTorch's functions that a file "
                "may call nor a record that the network's own code names"
            )
        return f"record:{name}"

    def _name_of_observer(self, kind: type[ActivationObserver], where: str) -> str:
        try:
            return classes.name_of_observer(kind)
        except NotAllowedError as error:
            raise NotSavableError(f"{where} cannot be kept in a file: {error}") from None


def _is_plain(encoded: Any) -> bool:
    """Whether an encoded value refers to nothing that can change."""
    if isinstance(encoded, dict):
        return "same" in encoded
    return all(map(_is_plain, encoded)) if isinstance(encoded, list) else True


def _attributes(kind: type) -> set[str]:
    return {name for base in kind.__mro__[:-1] for name in vars(base)}
