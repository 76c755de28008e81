"""A model's graph on example inputs: what its values are, and whether it computes what the model computes."""

from __future__ import annotations

import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .containers import ends, is_mark
from .nodes import owner_of
from .values import parts_of, tensors_of, with_tensors


class TensorInfo(NamedTuple):
    """What a node's value was when the example inputs ran: ``node.meta["tensor"]``, absent where it is no tensor.

    ``extent`` is the largest magnitude among floating-point values, 0 where there are none.
    """

    dtype: torch.dtype
    shape: torch.Size
    extent: float


class Recorder(fx.Interpreter):
    """Notes what every value is (where it ``measures``), and what containers return.

    Attributes:
        running: the node that runs, or was running when an error ended the run.
        ended: marks of containers' ends, with the tensors that they returned.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, *, measures: bool = False) -> None:
        super().__init__(model, graph=graph)
        self.measures = measures
        self.tensors: dict[fx.Node, TensorInfo] = {}
        self.running: fx.Node | None = None
        self.ended: list[tuple[fx.Node, Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        self.running = n
        result = super().run_node(n)
        if is_mark(n) and n.target is ends:
            parts = self.fetch_args_kwargs_from_env(n)[0][1]
            self.ended.append((n, [part.detach().clone() for part in parts if isinstance(part, Tensor)]))
        if self.measures and isinstance(result, Tensor):
            measurable = result.is_floating_point() and result.numel() > 0
            extent = float(result.detach().abs().max()) if measurable else 0.0
            self.tensors[n] = TensorInfo(result.dtype, result.shape, extent)
        return result


class StorageRecorder(Recorder):
    """Notes, too, which storages every value lies in: references that are unique and keep no memory."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph)
        self.storages: dict[fx.Node, set[StorageWeakRef]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        tensors = [tensor for tensor in tensors_of(result) if tensor.layout is torch.strided]
        self.storages[n] = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}  # type: ignore[no-untyped-call]
        return result


def placeholder_values(graph: fx.Graph, arguments: Mapping[str, Any]) -> list[Any]:
    """What a run of the graph takes, of arguments by name."""
    return [arguments[str(node.target)] for node in graph.nodes if node.op == "placeholder"]


def failure(recorder: Recorder, error: Exception) -> tuple[str, str]:
    """The module whose code was taken down for something else than what runs, where the graph fails; and the reason."""
    owner = "" if recorder.running is None else owner_of(recorder.running)
    return owner, f"its trace fails ({(str(error).splitlines() or [''])[0]})"


def agree(expected: Any, actual: Any) -> bool:
    """Whether a model's result and its interpreted graph's are the same, bit for bit."""
    actual = plain(actual)
    parts, others = dict(parts_of(expected)), dict(parts_of(actual))
    return (
        type(expected) is type(actual)
        and parts.keys() == others.keys()
        and all(values_agree(part, others[path]) for path, part in parts.items())
    )


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """No gradients, and what modules hold and the random generators are as before afterwards."""
    with torch.no_grad(), random_state_kept(), modules_kept(model):
        yield


@contextmanager
def modules_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, attributes and hooks are as before afterwards, and so is what is in lists, dictionaries and sets."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    held = [(registry, dict(registry)) for module in model.modules() for registry in (vars(module), module._buffers)]
    collections = [
        (value, value.copy())
        for _, attributes in held
        for name, value in attributes.items()
        if type(value) in (list, dict, set, OrderedDict) and (name.endswith("_hooks") or not name.startswith("_"))
    ]
    try:
        yield
    finally:
        for registry, attributes in held:
            registry.clear()
            registry.update(attributes)
        for value, before in collections:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        with torch.no_grad():
            for buffer, tensor in buffers:
                if buffer.shape != tensor.shape:
                    buffer.data = tensor
                elif not torch.equal(buffer, tensor):  # else autograd need not hear of it
                    buffer.copy_(tensor)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """The random generators, PyTorch's, Python's and NumPy's, are as before afterwards."""
    numpy = sys.modules.get("numpy")
    outside = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(outside[0])
        if numpy is not None:
            numpy.random.set_state(outside[1])


def copies(values: Any) -> Any:
    """In-place operations of a forward must not reach the caller's examples."""
    return with_tensors(values, lambda tensor: tensor.detach().clone())


def requiring_grad(values: Any) -> Any:
    """Copies that autograd follows, and that in-place operations may change."""

    def follow(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return copied.requires_grad_().clone() if copied.is_floating_point() else copied

    return with_tensors(values, follow)


def plain(value: Any) -> Any:
    """Results as a generated forward returns them: an interpreter returns fx's own dictionaries and lists."""
    if type(value) in (dict, fx.immutable_collections.immutable_dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, fx.immutable_collections.immutable_list)):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        items = tuple(plain(item) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else items
    return value


def values_agree(one: Any, other: Any) -> bool:
    """Whether two parts of results are the same, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
    return bool(operator.eq(one, other))
