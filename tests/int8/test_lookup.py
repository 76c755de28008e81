"""Functions of one tensor as tables: every entry is the code nearest to the function's float64 value."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mlframework.quantization import QuantizationParameters, QuantizationScheme
from mlframework.quantization.graph.subgraph import module_of_nodes
from mlframework.quantization.int8.lookup import Lookup
from mlframework.quantization.int8.operations import Int8Operation
from mlframework.quantization.preparation import pointwise

Function = Callable[[np.ndarray], np.ndarray]


def grid(scale: float, zero_point: int, signed: bool = False, bits: int = 8) -> QuantizationParameters:
    scheme = QuantizationScheme(bits, signed, symmetric=False)
    return QuantizationParameters(torch.tensor([scale]), torch.tensor([zero_point]), scheme)


# Input and output; the last makes ties of whatever is linear.
GRIDS = {
    "uint8": (grid(0.047, 131), grid(0.0213, 90)),
    "int8": (grid(0.031, -7, signed=True), grid(0.0287, 3, signed=True)),
    "uint8 to int8": (grid(0.09, 60), grid(0.05, -100, signed=True)),
    "4 bits": (grid(0.7, 9, bits=4), grid(0.6, -2, signed=True, bits=4)),
    "from 4 to 8 bits": (grid(0.7, 2, signed=True, bits=4), grid(0.03, 55)),
    "ties": (grid(0.125, 128), grid(0.25, 33)),
}
EVERY_GRID = pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def expm1_below(x: np.ndarray, steepness: float = 1.0) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0) * steepness))


SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
erf = np.vectorize(math.erf, otypes=[np.float64])


class Activation(NamedTuple):
    module: nn.Module
    reference: Function


# Each module that a table may hold, and its definition in NumPy's float64.
ACTIVATIONS = {
    "celu": Activation(nn.CELU(0.7), lambda x: np.where(x > 0, x, 0.7 * np.expm1(np.minimum(x, 0) / 0.7))),
    "elu": Activation(nn.ELU(1.3), lambda x: np.where(x > 0, x, 1.3 * np.expm1(np.minimum(x, 0)))),
    "gelu": Activation(nn.GELU(), lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2)))),
    "gelu tanh": Activation(
        nn.GELU(approximate="tanh"), lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "hardsigmoid": Activation(nn.Hardsigmoid(), lambda x: np.clip(x + 3, 0, 6) / 6),
    "hardswish": Activation(nn.Hardswish(), lambda x: x * np.clip(x + 3, 0, 6) / 6),
    "hardtanh": Activation(nn.Hardtanh(-0.6, 1.7), lambda x: np.clip(x, -0.6, 1.7)),
    "leaky relu": Activation(nn.LeakyReLU(0.1), lambda x: np.where(x > 0, x, 0.1 * x)),
    "log sigmoid": Activation(nn.LogSigmoid(), lambda x: -np.logaddexp(0, -x)),
    "mish": Activation(nn.Mish(), lambda x: x * np.tanh(np.logaddexp(0, x))),
    "relu": Activation(nn.ReLU(), lambda x: np.maximum(x, 0)),
    "relu6": Activation(nn.ReLU6(), lambda x: np.clip(x, 0, 6)),
    "selu": Activation(nn.SELU(), lambda x: SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * np.expm1(np.minimum(x, 0)))),
    "sigmoid": Activation(nn.Sigmoid(), sigmoid),
    "silu": Activation(nn.SiLU(), lambda x: x * sigmoid(x)),
    "softplus": Activation(nn.Softplus(2.0), lambda x: np.logaddexp(0, 2 * x) / 2),
    "softshrink": Activation(nn.Softshrink(0.3), lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.3, 0)),
    "softsign": Activation(nn.Softsign(), lambda x: x / (1 + np.abs(x))),
    "tanh": Activation(nn.Tanh(), np.tanh),
    "tanhshrink": Activation(nn.Tanhshrink(), lambda x: x - np.tanh(x)),
}
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def all_codes(parameters: QuantizationParameters) -> Tensor:
    scheme = parameters.scheme
    return torch.arange(scheme.quant_min, scheme.quant_max + 1).to(scheme.dtype)


def nearest(reference: Function, input: QuantizationParameters, output: QuantizationParameters) -> list[int]:
    """The output's code of the reference's float64 value, rounded to float32, at every code of the input's grid."""
    offsets = all_codes(input).numpy().astype(np.float32) - np.float32(input.zero_point.item())
    values = offsets * np.float32(input.scale.item())
    results = reference(values.astype(np.float64)).astype(np.float32)
    codes = np.rint(results / np.float32(output.scale.item())) + output.zero_point.item()
    return np.clip(codes, output.scheme.quant_min, output.scheme.quant_max).astype(int).tolist()


def test_every_module_has_its_definition_here() -> None:
    assert {type(activation.module) for activation in ACTIVATIONS.values()} == set(pointwise._MODULES)


@EVERY_ACTIVATION
@EVERY_GRID
def test_every_entry_is_the_nearest_code(
    activation: Activation, grids: tuple[QuantizationParameters, QuantizationParameters]
) -> None:
    codes = Int8Operation(Lookup(activation.module), grids[:1], grids[1])(all_codes(grids[0]))
    assert codes.tolist() == nearest(activation.reference, *grids)
    assert codes.dtype is grids[1].scheme.dtype


@EVERY_GRID
@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.ELU, nn.LeakyReLU], ids=lambda kind: kind.__name__)
def test_functions_in_place(
    kind: type[nn.Module], grids: tuple[QuantizationParameters, QuantizationParameters]
) -> None:
    codes = all_codes(grids[0])
    (expected, actual) = (
        Int8Operation(Lookup(kind(inplace=inplace)), grids[:1], grids[1])(codes) for inplace in (False, True)
    )
    assert torch.equal(actual, expected)
    assert torch.equal(codes, all_codes(grids[0]))


def region(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Nodes of a graph as a module, as preparation makes it."""
    graph = fx.symbolic_trace(function).graph
    (source,) = (node for node in graph.nodes if node.op == "placeholder")
    return module_of_nodes([node for node in graph.nodes if node.op.startswith("call")], (source,), {})


REGIONS: dict[str, tuple[Callable[[Tensor], Tensor], Function]] = {
    "silu": (lambda x: x * torch.sigmoid(x), lambda x: x * sigmoid(x)),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, lambda x: x * np.clip(x + 3, 0, 6) / 6),
    "line": (lambda x: 0.75 - 0.25 * x, lambda x: 0.75 - 0.25 * x),
    "polynomial": (lambda x: x**3 - 2 * x.square() + x / 3, lambda x: x**3 - 2 * x**2 + x / 3),
    "in place": (lambda x: F.silu(x, inplace=True) * 2, lambda x: x * sigmoid(x) * 2),
    "overflow": (lambda x: torch.exp(x * 50), lambda x: np.exp(x * 50)),
}


@EVERY_GRID
@pytest.mark.parametrize(("function", "reference"), REGIONS.values(), ids=REGIONS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_several_functions_in_a_row_round_once(
    function: Callable[[Tensor], Tensor],
    reference: Function,
    grids: tuple[QuantizationParameters, QuantizationParameters],
) -> None:
    codes = Int8Operation(Lookup(region(function)), grids[:1], grids[1])(all_codes(grids[0]))
    assert codes.tolist() == nearest(reference, *grids)


def test_any_shape_and_memory_format() -> None:
    operation = Int8Operation(Lookup(nn.Tanh()), GRIDS["uint8"][:1], GRIDS["uint8"][1])
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    expected = operation(images.flatten()).view(images.shape)
    assert torch.equal(operation(images), expected)
    assert torch.equal(operation(images.to(memory_format=torch.channels_last)), expected)
    for shape in ((), (0, 3), (1, 1)):
        assert operation(torch.zeros(shape, dtype=torch.uint8)).shape == shape


def test_hooks_of_the_users_module_see_no_table() -> None:
    module, calls = nn.SiLU(), []
    module.register_forward_hook(lambda module, args, output: calls.append("after"))
    module.register_forward_pre_hook(lambda module, args: calls.append("before"))
    lookup = Lookup(module, (module,))
    codes = all_codes(GRIDS["uint8"][0])
    result = Int8Operation(lookup, GRIDS["uint8"][:1], GRIDS["uint8"][1])(codes)
    assert result.tolist() == nearest(ACTIVATIONS["silu"].reference, *GRIDS["uint8"])
    assert not calls
    lookup.on_values(torch.randn(3))
    assert calls == ["before", "after"]
    assert lookup.modules() == (module,)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("function", [nn.GELU(), region(REGIONS["hardswish"][0])], ids=["module", "region"])
def test_copies_hold_the_same_table(duplicate: Callable[[nn.Module], nn.Module], function: nn.Module) -> None:
    operation = Int8Operation(Lookup(function), GRIDS["int8"][:1], GRIDS["int8"][1])
    codes = all_codes(GRIDS["int8"][0])
    expected = operation(codes)
    assert torch.equal(duplicate(operation)(codes), expected)


def test_a_table_follows_the_grids_that_are_loaded() -> None:
    operation, other = (
        Int8Operation(Lookup(nn.SiLU()), (grid(scale, 128),), GRIDS["uint8"][1]) for scale in (0.05, 0.02)
    )
    codes = all_codes(GRIDS["uint8"][0])
    assert not torch.equal(operation(codes), other(codes))
    operation.load_state_dict(other.state_dict())
    assert torch.equal(operation(codes), other(codes))
