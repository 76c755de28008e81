"""The classes that a file may name: those of this library in a closed table, a few of PyTorch's, and records that the
code of the network given to ``load`` names itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import astuple, fields, is_dataclass
from functools import cache, cached_property
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ..conversion.planned_calls import Planned
from ..graph.dropouts import AttentionWithDropout, CalledByMode
from ..graph.generated_forward import Edge, base_of_generated
from ..graph.mode_differences import TrainingOnly
from ..graph.signatures import Anything, Given
from ..int8.average_pooling import Mean
from ..int8.layers import Int8Convolution, Int8ConvTranspose2d, Int8Embedding, Int8Linear
from ..int8.lookup import Lookup
from ..int8.operations import (
    Dequantize,
    Int8Operation,
    Int8ReLU,
    Int8Selection,
    Int8WithFloatEdges,
    OnGrid,
    Quantize,
)
from ..int8.program import Recipe, Step
from ..int8.views import View
from ..kernels import ConvolutionGeometry
from ..preparation.report import PreparationReport, ReportEntry, Share
from ..qat.activation_observer import ActivationObserver, BatchStatistics
from ..qat.batch_norms import EvaluationForm, Normalization, use_running_statistics
from ..qat.config import QATConfig
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.given_weight import GivenWeightWrapper
from ..qat.host_value import HostValue
from ..qat.moving_average_statistics import MovingAverageStatistics
from ..qat.observer_synchronizer import ObserverSynchronizer, commit_statistics, discard_statistics
from ..qat.qat_module_wrapper import QATModuleWrapper, _settle_loaded_scale
from ..qat.qat_operation import QATOperation
from ..qat.straight_through_estimator import StraightThroughEstimator
from ..scheme import QuantizationScheme
from ..state_check import check_state
from ..targets import TARGETS
from . import allowed_calls
from .vocabulary import NotAllowedError, is_identifier, shortened

LIBRARY = __package__.rpartition(".")[0]

_MODULES: tuple[type[nn.Module], ...] = (
    AttentionWithDropout, CalledByMode, Dequantize, FakeQuantizeLayer, GivenWeightWrapper, Int8ConvTranspose2d,
    Int8Convolution, Int8Embedding, Int8Linear, Int8Operation, Int8ReLU, Int8Selection, Int8WithFloatEdges, Mean,
    MovingAverageStatistics, Normalization, OnGrid, QATModuleWrapper, QATOperation, Quantize, TrainingOnly,
)  # fmt: skip
# Each engine's forms of operations are known by their engine.
_OPERATIONS = {kind for target in TARGETS.values() for kind in astuple(target.operations)}
_OBJECTS: tuple[type, ...] = (HostValue, Lookup, ObserverSynchronizer, *_OPERATIONS)
_RECORDS: tuple[type, ...] = (
    BatchStatistics, ConvolutionGeometry, Edge, EvaluationForm, Given, Planned, PreparationReport, QATConfig,
    QuantizationScheme, Recipe, ReportEntry, Share, Step, StraightThroughEstimator, View,
)  # fmt: skip

MODULES = {kind.__name__: kind for kind in _MODULES}
OBJECTS = {kind.__name__: kind for kind in _OBJECTS}
RECORDS = {kind.__name__: kind for kind in _RECORDS}
ANYTHING = Anything
HOOKS: dict[str, Any] = {
    function.__name__: function
    for function in (_settle_loaded_scale, check_state, commit_statistics, discard_statistics, use_running_statistics)
}


class NetworksRecords:
    """The classes of records that a network's own code names.

    Args:
        modules: of the network, which may be prepared or converted.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kinds = {base_of_generated(type(module)) for module in modules}

    @cached_property
    def records(self) -> dict[str, type]:
        """NamedTuples and dataclasses, by name."""
        found: dict[str, type] = {}
        for kind in self._kinds:
            if not kind.__module__.startswith(("torch.", f"{LIBRARY}.")):
                for value in _named_by_forward(kind):
                    if is_record(value):
                        found.setdefault(value.__qualname__, value)
        return found

    @cached_property
    def fields_of_records(self) -> frozenset[str]:
        """What records name their parts."""
        return frozenset(name for kind in self.records.values() for name in fields_of(kind) if is_identifier(name))


def is_record(value: Any) -> bool:
    """Whether a value is a class of records, which do nothing but hold values."""
    if not isinstance(value, type) or issubclass(value, nn.Module):
        return False
    return is_dataclass(value) or (issubclass(value, tuple) and hasattr(value, "_fields"))


def fields_of(kind: type) -> tuple[str, ...]:
    """The names of a record's parts."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else tuple(kind._fields)  # type: ignore[attr-defined]


FIELDS = {name: fields_of(kind) for name, kind in RECORDS.items()}


def _named_by_forward(kind: type) -> Iterator[Any]:
    """What a class's forward, and the methods that it calls, name in their code and annotations."""
    waiting, known = ["forward"], {"forward"}
    while waiting:
        found = inspect.getattr_static(kind, waiting.pop(), None)
        function = inspect.unwrap(found) if callable(found) else getattr(found, "__func__", None)
        if not isinstance(function, FunctionType):
            continue
        names: list[str] = []
        codes: list[CodeType] = [function.__code__]
        while codes:
            code = codes.pop()
            names += code.co_names
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        waiting += [name for name in names if name not in known]
        known.update(names)
        for annotation in function.__annotations__.values():
            if isinstance(annotation, str):
                names += re.findall(r"\w+", annotation)
            else:
                yield annotation
        for name in names:
            yield function.__globals__.get(name)
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # nothing is in it yet
                continue


def observer_named(name: str) -> type[ActivationObserver]:
    """A class of observers, of this library or of the process that loads.

    Raises:
        NotAllowedError: there is none of that name.
    """
    # Of a class that was defined twice in one place, the new one.
    by_module = {kind.__module__: kind for kind in _derived(ActivationObserver) if kind.__qualname__ == name}
    if not by_module:
        raise NotAllowedError(f"{shortened(name)} is no class of observers: define or import it before loading")
    if len(by_module) > 1:
        raise NotAllowedError(f"{shortened(name)} is a class of observers in {' and in '.join(sorted(by_module))}")
    return next(iter(by_module.values()))


def name_of_observer(kind: type[ActivationObserver]) -> str:
    """What a file calls a class of observers.

    Raises:
        NotAllowedError: one of another module has the same name.
    """
    observer_named(kind.__qualname__)
    return kind.__qualname__


def _derived(kind: type[Any]) -> Iterator[type[Any]]:
    for derived in kind.__subclasses__():
        if base_of_generated(derived) is derived:
            yield derived
            yield from _derived(derived)


def name_of_module(kind: type[nn.Module]) -> str:
    """What a file calls the class of a module that is not the network's own.

    Raises:
        NotAllowedError: it may not name it.
    """
    if MODULES.get(kind.__name__) is kind:
        return kind.__name__
    if issubclass(kind, ActivationObserver):
        return f"observer:{name_of_observer(kind)}"
    if vars(nn).get(kind.__name__) is kind and kind.__name__ in allowed_calls.MODULES:
        return f"torch:{kind.__name__}"
    raise NotAllowedError(f"{kind.__module__}.{kind.__qualname__} is not among the classes that one may name")


def module_named(name: Any) -> type[nn.Module]:
    """The class that :func:`name_of_module` gave the name of.

    Raises:
        NotAllowedError: there is none.
    """
    if not isinstance(name, str):
        raise NotAllowedError(f"{shortened(name)} is no name of a class")
    where, _, key = name.rpartition(":")
    if where == "observer":
        return observer_named(key)
    if where == "torch" and key in allowed_calls.MODULES:
        return module_of_torch(key)
    if name not in MODULES:
        raise NotAllowedError(f"{shortened(name)} is no class that a file may name")
    return MODULES[name]


def module_of_torch(name: str) -> type[nn.Module]:
    """One of PyTorch's classes of modules, as configurations select layers by.

    Raises:
        NotAllowedError: there is none of that name.
    """
    found = vars(nn).get(name) if is_identifier(name) else None
    if not isinstance(found, type) or not issubclass(found, nn.Module) or name.startswith("Lazy"):
        raise NotAllowedError(f"{shortened(name)} is no class of PyTorch's modules")
    return found


def would_shadow(kind: type, name: str) -> bool:
    """Whether an attribute of that name would stand in the way of what a class defines."""
    found = inspect.getattr_static(kind, name, None)
    return callable(found) or hasattr(found, "__get__") or hasattr(found, "__set__")


@cache
def names_in_code(kind: type) -> frozenset[str]:
    """What the methods of a class that is not PyTorch's name: attributes among them."""
    return frozenset(
        name
        for base in kind.__mro__[:-1]
        if not base.__module__.startswith("torch.")
        for value in vars(base).values()
        if isinstance(function := getattr(value, "fget", value), FunctionType)
        for name in function.__code__.co_names
    )
