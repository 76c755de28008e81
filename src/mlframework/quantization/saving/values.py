"""The values of attributes, from JSON."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ..graph.float_structure import holds_text
from . import classes
from .classes import NetworksRecords, observer_named
from .graph_data import constant
from .vocabulary import NotAllowedError, shortened

_LARGEST = 300_000  # parts of a record, those of records in it counted: a report of a model has tens of thousands
_DEEPEST = 16  # records in records


class ValueDecoder:
    """Makes values.

    Args:
        modules, objects: by their numbers.
        records: encoded, which values refer to by numbers.
        tensors: by name.
        networks: the classes that the network's code names.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        objects: Sequence[Any],
        records: Sequence[Any],
        tensors: Mapping[str, Tensor],
        networks: NetworksRecords,
    ) -> None:
        self._modules, self._objects, self._tensors, self._networks = modules, objects, tensors, networks
        self._records: list[Any] = []
        self._sizes: list[int] = []
        self._depths: list[int] = []
        self._size, self._depth = 0, 0  # of the record that is made
        self._is_making_records = True
        for record in records:  # which may refer to earlier ones
            self._size, self._depth = 0, 0
            self._records.append(self._record(record))
            self._sizes.append(self._size)
            self._depths.append(self._depth + 1)
        self._is_making_records = False

    def decode(self, encoded: Any) -> Any:
        """The value of its JSON.

        Raises:
            NotAllowedError: it is none that a file may hold. Other exceptions come of other faults.
        """
        self._size += 1
        of = type(encoded)
        if of is list:
            return tuple([self.decode(part) for part in encoded]) if encoded else ()
        if of is not dict:
            return encoded
        ((kind, content),) = encoded.items()
        found = _KINDS.get(kind)
        return constant(kind, content) if found is None else found(self, content)

    def record_named(self, name: str) -> Any:
        """A class of records that the network's own code names.

        Raises:
            NotAllowedError: it names none of that name.
        """
        found = self._networks.records.get(name) if isinstance(name, str) else None
        if found is None:
            raise NotAllowedError(f"{shortened(name)} is no record that the code of the network names")
        return found

    def fields_of_records(self) -> frozenset[str]:
        return self._networks.fields_of_records

    def _all(self, content: Any) -> list[Any]:
        if not isinstance(content, list):
            raise NotAllowedError(f"{shortened(content)} is no list")
        return [self.decode(part) for part in content]

    def _pairs(self, content: Any) -> Any:
        return ((self.decode(key), self.decode(part)) for key, part in content)

    def _module(self, content: Any) -> nn.Module:
        return self._modules[_counted(content)]

    def _object(self, content: Any) -> Any:
        return self._objects[_counted(content)]

    def _record(self, content: Any) -> Any:
        name, *parts = content
        is_networks = name.startswith("record:")
        kind = self.record_named(name[7:]) if is_networks else classes.RECORDS.get(name)
        fields = () if kind is None else classes.fields_of(kind) if is_networks else classes.FIELDS[name]
        if kind is None or len(parts) != len(fields):
            raise NotAllowedError(f"{shortened(name)} is no record with {len(parts)} parts")
        values = dict(zip(fields, map(self.decode, parts), strict=True))
        hints = {} if is_networks else _hints_of(kind)
        for field, value in values.items():
            if (is_networks and holds_text(value)) or not _is_of(value, hints.get(field, Any)):
                raise NotAllowedError(f"{field} of a {kind.__name__} may not be {shortened(value)}")
        return kind(**values)

    def _same(self, content: Any) -> Any:
        number = _counted(content)
        found = self._records[number]
        # Records of records of records are written in a few bytes, and compared and printed in years.
        self._size += self._sizes[number]
        self._depth = max(self._depth, self._depths[number])
        if self._is_making_records and (self._size > _LARGEST or self._depth >= _DEEPEST):
            raise NotAllowedError(f"a record may not be of more than {_LARGEST} parts, {_DEEPEST} within each other")
        return found


@cache
def _hints_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as the fields of this library's records name theirs."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or origin is Callable:
        return hint is Any or callable(value)
    if origin in (Union, UnionType):
        return any(_is_of(value, each) for each in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        if type(value) is not tuple:
            return False
        if args[-1] is Ellipsis:
            return all(_is_of(part, args[0]) for part in value)
        return len(value) == len(args) and all(map(_is_of, value, args))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _is_of(key, args[0]) and _is_of(part, args[1]) for key, part in value.items()
        )
    if origin is type:
        return isinstance(value, type) and issubclass(value, args[0])
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (bool, int, str) else isinstance(value, hint)


def _counted(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise NotAllowedError(f"{shortened(value)} is no number of something")
    return value


_KINDS: dict[str, Callable[[ValueDecoder, Any], Any]] = {
    "list": ValueDecoder._all,
    "dict": lambda decoder, content: dict(decoder._pairs(content)),
    "ordered": lambda decoder, content: OrderedDict(decoder._pairs(content)),
    "set": lambda decoder, content: set(decoder._all(content)),
    "frozenset": lambda decoder, content: frozenset(decoder._all(content)),
    "size": lambda decoder, content: torch.Size(map(_counted, content)),
    "slice": lambda decoder, content: slice(*decoder._all(content)),
    "anything": lambda decoder, content: classes.ANYTHING,
    "observer": lambda decoder, content: observer_named(content),
    "tensor": lambda decoder, content: decoder._tensors[content],
    "module": ValueDecoder._module,
    "object": ValueDecoder._object,
    "record": ValueDecoder._record,
    "same": ValueDecoder._same,
}
