"""The values of attributes, from JSON."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import classes
from .classes import NetworksRecords, observer_named
from .graph_data import constant
from .vocabulary import NotAllowedError


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
        for record in records:  # which may refer to earlier ones
            self._records.append(self._record(record))

    def decode(self, encoded: Any) -> Any:
        """The value of its JSON.

        Raises:
            NotAllowedError: it is none that a file may hold. Other exceptions come of other faults.
        """
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
            raise NotAllowedError(f"{name} is no record that the code of the network names")
        return found

    def fields_of_records(self) -> frozenset[str]:
        return self._networks.fields_of_records

    def _all(self, content: Any) -> list[Any]:
        if not isinstance(content, list):
            raise NotAllowedError(f"{content!r} is no list")
        return [self.decode(part) for part in content]

    def _pairs(self, content: Any) -> Any:
        return ((self.decode(key), self.decode(part)) for key, part in content)

    def _module(self, content: Any) -> nn.Module:
        return self._modules[_counted(content)]

    def _object(self, content: Any) -> Any:
        return self._objects[_counted(content)]

    def _record(self, content: Any) -> Any:
        name, *parts = content
        if name.startswith("record:"):
            kind = self.record_named(name[7:])
            fields = classes.fields_of(kind)
        else:
            kind, fields = classes.RECORDS.get(name), classes.FIELDS.get(name, ())
        if kind is None or len(parts) != len(fields):
            raise NotAllowedError(f"{name} is no record with {len(parts)} parts")
        return kind(**dict(zip(fields, map(self.decode, parts), strict=True)))

    def _same(self, content: Any) -> Any:
        return self._records[_counted(content)]


def _counted(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise NotAllowedError(f"{value!r} is no number of something")
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
