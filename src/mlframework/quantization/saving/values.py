"""The values of attributes, from JSON."""

from __future__ import annotations

import itertools
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
_MOST = 30 * _LARGEST  # parts of all records that values refer to: each may be gone through
_DEEPEST = 16  # records in records
_DEEPEST_COLLECTION = 64
_LARGEST_HASHED = 1 << 63  # of larger numbers, any number has the same hash


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
        self._nested = 0  # collections around the value that is made
        self._referred = 0  # parts of records, wherever they are referred to
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
        if of is not list and of is not dict:
            return encoded
        if not encoded and of is list:
            return ()
        self._nested += 1
        if self._nested > _DEEPEST_COLLECTION:
            raise NotAllowedError(f"a value may not have more than {_DEEPEST_COLLECTION} collections within each other")
        if of is list:
            decoded: Any = tuple([self.decode(part) for part in encoded])
        else:
            ((kind, content),) = encoded.items()
            found = _KINDS.get(kind)
            decoded = constant(kind, content) if found is None else found(self, content)
        self._nested -= 1
        return decoded

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
        return ((self._hashed(key), self.decode(part)) for key, part in content)

    def _hashed(self, encoded: Any) -> Any:
        if type(encoded) is int and not -_LARGEST_HASHED <= encoded < _LARGEST_HASHED:
            raise NotAllowedError(f"{shortened(encoded)} is no key, and in no set, that a file holds")
        return self.decode(encoded)

    def _set(self, content: Any) -> set[Any]:
        if not isinstance(content, list):
            raise NotAllowedError(f"{shortened(content)} is no list")
        return set(map(self._hashed, content))

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
        values = [self.decode(part) for part in parts]
        tests = itertools.repeat(_holds_no_text, len(values)) if is_networks else _tests_of(kind)
        for field, value, test in zip(fields, values, tests, strict=True):
            if not test(value):
                raise NotAllowedError(f"{field} of a {kind.__name__} may not be {shortened(value)}")
        return kind(**dict(zip(fields, values, strict=True)))

    def _same(self, content: Any) -> Any:
        number = _counted(content)
        found = self._records[number]
        if not self._is_making_records:
            self._refer_to(number)
            return found
        # Records of records of records are written in a few bytes, and compared and printed in years.
        self._size += self._sizes[number]
        self._depth = max(self._depth, self._depths[number])
        if self._size > _LARGEST or self._depth >= _DEEPEST:
            raise NotAllowedError(f"a record may not be of more than {_LARGEST} parts, {_DEEPEST} within each other")
        self._refer_to(number)
        return found

    def _refer_to(self, number: int) -> None:
        self._referred += self._sizes[number]
        if self._referred > _MOST:
            raise NotAllowedError(f"a file may not refer to records of more than {_MOST} parts")


Test = Callable[[Any], bool]


def _holds_no_text(value: Any) -> bool:
    return not holds_text(value)


@cache
def _tests_of(kind: type) -> tuple[Test, ...]:
    """For each field of one of this library's records, whether a value is of the type that it names."""
    hints = get_type_hints(kind)
    return tuple(_test_of(hints.get(field, Any)) for field in classes.fields_of(kind))


def _test_of(hint: Any) -> Test:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: True
    if origin is Callable:
        return callable
    if origin in (Union, UnionType):
        tests = [_test_of(each) for each in args]
        return lambda value: any(test(value) for test in tests)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in args
    if origin is tuple:
        return _test_of_tuples(args)
    if origin is Mapping:
        of_key, of_part = map(_test_of, args)
        return lambda value: (
            isinstance(value, Mapping) and all(of_key(key) and of_part(part) for key, part in value.items())
        )
    if origin is type:
        return lambda value: isinstance(value, type) and issubclass(value, args[0])
    if hint is float:
        return lambda value: type(value) in (int, float)
    if hint in (bool, int, str):
        return lambda value: type(value) is hint
    return lambda value: isinstance(value, hint)


def _test_of_tuples(args: tuple[Any, ...]) -> Test:
    if args[-1] is Ellipsis:
        of_part = _test_of(args[0])
        return lambda value: type(value) is tuple and all(map(of_part, value))
    tests = [_test_of(each) for each in args]
    return lambda value: (
        type(value) is tuple
        and len(value) == len(tests)
        and all(test(part) for test, part in zip(tests, value, strict=True))
    )


def _counted(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise NotAllowedError(f"{shortened(value)} is no number of something")
    return value


_KINDS: dict[str, Callable[[ValueDecoder, Any], Any]] = {
    "list": ValueDecoder._all,
    "dict": lambda decoder, content: dict(decoder._pairs(content)),
    "ordered": lambda decoder, content: OrderedDict(decoder._pairs(content)),
    "set": ValueDecoder._set,
    "frozenset": lambda decoder, content: frozenset(decoder._set(content)),
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
