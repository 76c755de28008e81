"""Implementations are the operators' own: names, arguments, devices."""

from __future__ import annotations

import inspect

import pytest
import torch

from example_operators import samples
from mlframework.quantization.kernels.operators.declaration import DECLARED
from mlframework.quantization.kernels.triton_gpu.availability import is_installed
from mlframework.quantization.kernels.triton_gpu.registration import IMPLEMENTED, function_of

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not is_installed(), reason="needs triton"),
]

IMPLEMENTATIONS = [(module, name) for module, operators in IMPLEMENTED.items() for name in operators]


@pytest.mark.parametrize(("module", "name"), IMPLEMENTATIONS)
def test_an_implementation_takes_what_the_schema_says(module: str, name: str) -> None:
    schema = [argument.name for argument in DECLARED[name].overload._schema.arguments]
    own = list(inspect.signature(function_of(module, name)).parameters)
    # The first argument may go by the name that it has in other kernels.
    assert own[1:] == schema[1:]
    assert len(own) == len(schema)


@pytest.mark.parametrize("name", [name for _, name in IMPLEMENTATIONS])
def test_it_is_what_runs_on_a_gpu(name: str) -> None:
    operator = DECLARED[name]
    assert operator.on_gpu is not None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.overload.name(), "CUDA")


def test_tensors_on_two_devices_are_refused_as_pytorch_does() -> None:
    operator = DECLARED["dequantize"]
    assert operator.on_gpu is not None
    codes, scale, *others = samples("dequantize")["contiguous"]
    with pytest.raises(RuntimeError, match=r"device|meta"):
        operator.on_gpu(codes, scale.to("meta"), *others)
