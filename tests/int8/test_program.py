"""Programs against their modules called one by one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QuantizationParameters, QuantizationScheme, kernels
from mlframework.quantization.int8.average_pooling import AveragePooling
from mlframework.quantization.int8.integer_operation import (
    Addition,
    Concatenation,
    IntegerOperation,
    Multiplication,
)
from mlframework.quantization.int8.lookup import Lookup
from mlframework.quantization.int8.operations import Dequantize, Int8Operation, Int8Selection, Quantize
from mlframework.quantization.int8.program import Program, Recipe, Step, compiled
from mlframework.quantization.int8.views import View
from mlframework.quantization.kernels import native

pytestmark = pytest.mark.skipif(kernels.active_path() != "native", reason="programs need the compiled kernels")

MODEL_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def grid(scale: float, zero_point: int, signed: bool = False) -> QuantizationParameters:
    scheme = QuantizationScheme(signed=signed, symmetric=False)
    return QuantizationParameters(torch.tensor([scale]), torch.tensor([zero_point]), scheme)


def program_of(recipe: Recipe, **modules: nn.Module) -> Program:
    program = compiled(recipe, nn.ModuleDict(modules))
    assert program is not None
    return program


def one_step(module: nn.Module, inputs: int = 1) -> Program:
    return program_of(Recipe(inputs, (Step("module", tuple(range(inputs))),), (inputs,)), module=module)


def codes(*shape: int, signed: bool = False) -> Tensor:
    ends = (-128, 128) if signed else (0, 256)
    return torch.randint(*ends, shape).to(torch.int8 if signed else torch.uint8)


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program falls back to its modules, but where a test says so."""
    monkeypatch.setattr(Program, "_run_modules", lambda self, inputs: pytest.fail("modules were called"))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize(signed: bool, dtype: torch.dtype) -> None:
    module = Quantize(grid(0.03, 5, signed))
    values = torch.randn(3, 40, dtype=dtype) * 4
    assert torch.equal(one_step(module).run(values), module(values))


@pytest.mark.parametrize("dtype", MODEL_DTYPES, ids=str)
def test_dequantize(dtype: torch.dtype) -> None:
    module = Dequantize(grid(0.03, 5)).to(dtype)
    given, expected = one_step(module).run(codes(3, 40)), module(codes(3, 40))
    assert given.dtype is expected.dtype is dtype
    given = codes(3, 40)
    assert torch.equal(one_step(module).run(given), module(given))


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (3, 9, 9)], ids=str)
def test_max_pooling(shape: tuple[int, ...]) -> None:
    module = Int8Selection(grid(0.1, 3), nn.MaxPool2d((3, 2), 2, (1, 0), (1, 2), ceil_mode=True))
    given = codes(*shape)
    assert torch.equal(one_step(module).run(given), module(given))


class _Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


OPERATIONS: dict[str, tuple[IntegerOperation, list[tuple[int, ...]]]] = {
    "sum": (Addition(), [(2, 3, 5), (2, 3, 5)]),
    "sum that broadcasts the left": (Addition(), [(2, 3, 1), (2, 3, 5)]),
    "sum that broadcasts the right": (Addition(), [(2, 3, 5), (5,)]),
    "sum of single values": (Addition(), [(1,), (1, 1)]),
    "table": (Lookup(_Sigmoid()), [(2, 70)]),
    "concatenation": (Concatenation(-2), [(2, 3, 5), (2, 4, 5), (2, 1, 5)]),
    "average": (AveragePooling(nn.AdaptiveAvgPool2d(1)), [(2, 3, 5, 4)]),
    "average of an image": (AveragePooling(nn.AdaptiveAvgPool2d((1, 1))), [(3, 5, 4)]),
    "average of a signal": (AveragePooling(nn.AdaptiveAvgPool1d(1)), [(2, 3, 7)]),
    "average of nothing": (AveragePooling(nn.AdaptiveAvgPool2d(1)), [(0, 3, 5, 4)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("signed", [False, True])
def test_operations(name: str, signed: bool) -> None:
    operation, shapes = OPERATIONS[name]
    grids = [grid(0.02 * (index + 1), 7 - index, signed) for index in range(len(shapes))]
    module = Int8Operation(operation, grids, grid(0.05, 11, not signed))
    given = [codes(*shape, signed=signed) for shape in shapes]
    result, expected = one_step(module, len(shapes)).run(*given), module(*given)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(result, expected)


VIEWS: dict[str, tuple[View, Callable[[Tensor], Tensor]]] = {
    "identity": (View("identity"), lambda x: x),
    "contiguous": (View("contiguous"), lambda x: x.contiguous()),
    "flatten": (View("flatten", (1, -1)), lambda x: x.flatten(1)),
    "transpose": (View("transpose", (-1, 0)), lambda x: x.transpose(0, 2)),
    "permute": (View("permute", (2, 0, 1)), lambda x: x.permute(2, 0, 1)),
    "reshape": (View("reshape", (6, -1)), lambda x: x.reshape(6, 8)),
    "unflatten": (View("unflatten", (-1, 2, -1)), lambda x: x.unflatten(2, (2, 4))),
    "select": (View("select", (1, -1)), lambda x: x[:, -1]),
    "part": (View("part", (1, 3, -1)), lambda x: x[..., 3:6]),
    "last part": (View("part", (2, 3, 2)), lambda x: x[..., 6:]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    view, expected = VIEWS[name]
    program = program_of(Recipe(1, (Step(view, (0,)),), (1,)))
    for given in (codes(2, 3, 8), codes(3, 2, 8).transpose(0, 1), codes(4, 5, 16)[1:3, 1:4, ::2]):
        for result in (program.run(given), view(given)):
            assert torch.equal(result, expected(given))
            assert result.stride() == expected(given).stride()


def test_a_part_that_is_not_there_is_refused() -> None:
    program = program_of(Recipe(1, (Step(View("part", (3, 4, 0)), (0,)),), (1,)))
    with pytest.raises(RuntimeError, match="chunk 3 must be there, of 6 in 4"):  # in parts of two there are three
        program.run(codes(6))


def test_values_are_read_in_any_order_and_returned_as_often_as_wished() -> None:
    quantize, dequantize = Quantize(grid(0.5, 0, True)), Dequantize(grid(0.5, 0, True))
    add = Int8Operation(Addition(), [grid(0.5, 0, True)] * 2, grid(1.0, 0, True))
    recipe = Recipe(
        2, (Step("quantize", (1,)), Step("add", (2, 0)), Step("dequantize", (2,)), Step("add", (3, 3))), (3, 0, 4, 5, 3)
    )
    program = program_of(recipe, quantize=quantize, add=add, dequantize=dequantize)
    given, values = codes(4, signed=True), torch.tensor([1.0, -2.0, 0.0, 3.5])
    results = program.run(given, values)
    total = add(quantize(values), given)
    for result, expected in zip(results, [total, given, values, add(total, total), total], strict=True):
        assert torch.equal(result, expected)


def test_a_scale_changed_in_place_counts_at_once() -> None:
    module = Quantize(grid(0.5, 0))
    program, values = one_step(module), torch.tensor([1.0, 2.0])
    assert program.run(values).tolist() == [2, 4]
    module.scale.mul_(2)
    assert program.run(values).tolist() == [1, 2]


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3, dtype=torch.float64),
        torch.ones(3, requires_grad=True),
        torch.ones(3, device="meta"),
        type("Subclass", (Tensor,), {})(torch.ones(3)),
    ],
    ids=["double", "gradient", "device", "subclass"],
)
def test_modules_are_called_with_what_kernels_do_not_read(value: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    program = one_step(Quantize(grid(0.5, 0)))
    monkeypatch.setattr(Program, "_run_modules", lambda self, inputs: "modules")
    assert program.run(value) == "modules"


def test_modules_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    recipe = Recipe(1, (Step("quantize", (0,)), Step(View("flatten", (0, -1)), (1,)), Step("dequantize", (2,))), (1, 3))
    program = program_of(recipe, quantize=Quantize(grid(0.5, 0)), dequantize=Dequantize(grid(0.5, 0)))
    values = torch.rand(3, 4) * 9
    for one, other in zip(program.run(values), program.run(values.double()), strict=True):
        assert torch.equal(one, other)


def test_what_has_no_instruction_makes_no_program() -> None:
    product = Int8Operation(Multiplication(), [grid(0.5, 0)] * 2, grid(1.0, 0))
    assert compiled(Recipe(2, (Step("module", (0, 1)),), (2,)), nn.ModuleDict({"module": product})) is None


def test_a_program_is_released_with_its_object() -> None:
    program = one_step(Quantize(grid(0.5, 0)))
    number = program._number
    native.library().run_program([torch.ones(1)], number)
    del program
    gc.collect()
    with pytest.raises(RuntimeError, match=f"program must come from make_program, got {number}"):
        native.library().run_program([torch.ones(1)], number)


def code(name: str, *numbers: int) -> list[int]:
    """Of one instruction, as programs are made of them."""
    return [len(name), *name.encode(), *numbers]


def test_a_program_may_be_released_while_another_is() -> None:
    """As the tensors of one go, Python may run, and what it runs may let go of another."""
    array = numpy.zeros(256, dtype=numpy.uint8)
    inner = native.library().make_program.default(1, code("identity", 1, 0, 0, 0), [], [1])
    table = torch.from_numpy(array)
    outer = native.library().make_program.default(1, code("lookup", 1, 0, 1, 0), [table], [1])
    weakref.finalize(array, native.library().release_program.default, inner)
    del array, table
    thread = threading.Thread(target=native.library().release_program.default, args=(outer,), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="program must come from make_program"):
        native.library().run_program([torch.ones(1)], inner)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1, code("nonsense", 1, 0, 0, 0), [], [1]), "names must be those of instructions, got nonsense"),
        ((1, code("identity", 1, 1, 0, 0), [], [1]), "code must name values below 1, got 1"),
        ((1, code("identity", 1, 0, 0, 0), [], [2]), "code must name values below 2, got 2"),
        ((1, code("identity", 1, 0, 0), [], [1]), "code must say of every instruction what it reads"),
        ((1, code("lookup", 1, 0, 1, 0), [], [1]), "tensors must be as many as code says"),
        ((1, code("lookup", 1, 0, 0, 0), [], [1]), "lookup must have at least 1 inputs, 1 tensors and 0 numbers"),
    ],
)
def test_programs_are_checked_when_they_are_made(arguments: tuple[Any, ...], error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        native.library().make_program(*arguments)


def test_the_number_of_inputs_is_checked() -> None:
    program = one_step(Quantize(grid(0.5, 0)))
    with pytest.raises(RuntimeError, match="inputs must be 1 tensors, got 2"):
        native.library().run_program([torch.ones(1), torch.ones(1)], program._number)


def test_a_program_that_is_forgotten_during_a_trace_leaves_no_trace() -> None:
    """Garbage is collected at any time."""
    programs = [one_step(Quantize(grid(0.03, 5)))]

    def forget(values: Tensor) -> Tensor:
        programs.clear()
        return values * 2

    class Forgets(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return forget(values)

    exported = torch.export.export(Forgets(), (torch.randn(3),), strict=False)
    assert not programs
    assert not [node for node in exported.graph.nodes if "release_program" in str(node.target)]
