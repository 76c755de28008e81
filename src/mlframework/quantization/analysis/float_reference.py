"""The float network that a prepared model is compared with: its own graph, with the float model's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from .calls import Call, run
from .measures import Comparison
from .switching import in_analysis, switch

# Graphs compute bit for bit what modules do; what another device or a compiler makes of them may not.
_SAME = 1e-8


def was_trained_since(model: nn.Module, float_model: nn.Module, call: Call) -> bool:
    """Whether a prepared model computes something else than the float one when its nodes are off.

    It is tried out on one call, inside :func:`in_analysis`; the model's nodes are off afterwards.

    Raises:
        TypeError: ``float_model`` is no module.
        ValueError: ``float_model`` is prepared itself; shares Parameters with the model but computes something else
            (what was trained through the one changed the weights of the other, but not its buffers); or is another
            network.
    """
    if not isinstance(float_model, nn.Module):
        raise TypeError(f"float_model must be a torch.nn.Module, got {type(float_model).__name__}")
    if any(isinstance(module, FakeQuantizeLayer) for module in float_model.modules()):
        raise ValueError("float_model must be the float network, got a prepared one")
    switch(model, on=False)
    with in_analysis(float_model):
        expected = run(float_model, call)
    if _agree(run(model, call), expected):
        return False
    if {id(parameter) for parameter in float_model.parameters()} & {id(parameter) for parameter in model.parameters()}:
        raise ValueError(
            "float_model must have parameters of its own, or be as it was: it shares Parameters with model that were "
            "changed since, so that it computes neither what the float network did nor what model does without "
            "quantization. Make float_model = copy.deepcopy(model) before prepare"
        )
    with with_state_of(model, float_model):
        if not _agree(run(model, call), expected):
            raise ValueError(
                "float_model must be the network that model was prepared from, got one that computes something else"
            )
    return True


@contextmanager
def with_state_of(model: nn.Module, float_model: nn.Module) -> Iterator[None]:
    """The prepared model with the parameters and buffers that the float model has under the same names.

    So every module has a float counterpart of its own form: one that runs batch normalization and activation where the
    prepared one does.
    """
    tensors: dict[str, Any] = dict(float_model.named_parameters(remove_duplicate=False))
    tensors.update(float_model.named_buffers(remove_duplicate=False))
    exchanged: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for prefix, module in model.named_modules(remove_duplicate=False):
            for registry in (module._parameters, module._buffers):
                for name, tensor in list(registry.items()):
                    other = tensors.get(f"{prefix}.{name}" if prefix else name)
                    if tensor is not None and other is not None and other.shape == tensor.shape:
                        exchanged.append((registry, name, tensor))
                        registry[name] = other
        yield
    finally:
        for registry, name, tensor in reversed(exchanged):
            registry[name] = tensor


def _agree(outputs: Any, expected: Any) -> bool:
    comparison = Comparison()
    try:
        comparison.add(outputs, expected, None)
    except (ValueError, RuntimeError):  # others in number, or of other shapes
        return False
    return comparison.result().relative_error <= _SAME
