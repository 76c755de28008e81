"""Codes beside fake-quantized values: there as long as both say the same, and made anew where they are not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from example_codes import layouts
from example_steps import count_operators
from mlframework.quantization import FakeQuantizeLayer, QuantizationScheme, kernels
from mlframework.quantization.kernels import native

SCHEME = QuantizationScheme(signed=False, symmetric=False)


def node_for(scheme: QuantizationScheme = SCHEME, **options: bool) -> FakeQuantizeLayer:
    node = FakeQuantizeLayer(scheme, **options)
    node(torch.randn(1000) + 0.4)
    node.serves_integers = True
    return node.eval()


def quantized_anew(node: FakeQuantizeLayer, values: Tensor) -> Tensor:
    return node.to_codes(values.detach())


@pytest.mark.skipif(not native.is_available(), reason="needs compiled kernels")
def test_codes_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_for()
    values = node(torch.randn(4, 3, 5, 5, requires_grad=True))
    calls = count_operators(monkeypatch, "fake_quantize", "quantize")
    codes = node.codes_on_grid(values)
    assert not calls
    assert codes.codes.dtype is SCHEME.dtype
    assert torch.equal(codes.codes, quantized_anew(node, values))
    assert codes.codes.stride() == values.stride()


@pytest.mark.parametrize("native_path", [True, False], ids=["native", "reference"])
def test_any_layout_has_its_codes(native_path: bool) -> None:
    node = node_for()
    for name, values in layouts(torch.randn(2, 3, 5, 6)).items():
        if native_path:
            on_grid = node(values)
        else:
            with kernels.reference_kernels():
                on_grid = node(values)
        codes = node.codes_on_grid(on_grid)
        assert torch.equal(codes.codes, quantized_anew(node, on_grid)), name


def test_a_node_that_serves_no_integers_keeps_none() -> None:
    node = node_for()
    node.serves_integers = False
    values = node(torch.randn(7))
    assert not hasattr(values, "_quantized_codes")
    codes = node.codes_on_grid(values)
    assert torch.equal(codes.codes, quantized_anew(node, values))


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda values: values.neg_(),
    "an element": lambda values: values.view(-1)[3:4].fill_(values.max().item()),
    "through a view": lambda values: values.flatten().mul_(-1),
    "through detach": lambda values: values.detach().mul_(-1),
    "in-place activation": lambda values: F.relu(values, inplace=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_is_noticed(change: Callable[[Tensor], object]) -> None:
    node = node_for(QuantizationScheme())
    values = node(torch.randn(6, 7))
    before = node.codes_on_grid(values)
    change(values)
    codes = node.codes_on_grid(values)
    assert before is not None
    assert torch.equal(codes.codes, quantized_anew(node, values))
    assert not torch.equal(codes.codes, before.codes)


@pytest.mark.parametrize(
    "move",
    [
        lambda values: values.permute(0, 2, 1, 3),
        lambda values: values[1:, ::2],
        lambda values: F.max_pool2d(values, 2),
        lambda values: values.flatten(1),
        lambda values: values.detach(),
        lambda values: values.clone(),
    ],
    ids=["permute", "slice", "max pool", "flatten", "detach", "clone"],
)
def test_moved_values_have_codes_too(move: Callable[[Tensor], Tensor]) -> None:
    node = node_for()
    values = move(node(torch.randn(4, 3, 6, 6)))
    codes = node.codes_on_grid(values)
    assert torch.equal(codes.codes, quantized_anew(node, values))


def test_they_outlast_a_change_of_the_grid() -> None:
    node = node_for()
    values = node(torch.randn(50))
    scale, zero_point = node.scale.clone(), node.zero_point.clone()
    node.scale.mul_(3)
    node.zero_point.add_(20)
    codes = node.codes_on_grid(values)
    assert torch.equal(codes.grid, torch.stack([scale, zero_point]))
    assert torch.equal(kernels.dequantize(codes.codes, *codes.grid, None), values)


@pytest.mark.parametrize("attached", [True, False])
def test_a_learned_zero_point_is_the_code_that_it_stands_for(attached: bool) -> None:
    node = node_for(learnable=True)
    with torch.no_grad():
        node.zero_point.copy_(torch.tensor([97.7]))
    values = node(torch.randn(50))
    codes = node.codes_on_grid(values if attached else values.clone())
    assert codes.grid[1].item() == 98
    assert not any(tensor.requires_grad for tensor in codes)
    assert torch.equal(kernels.dequantize(codes.codes, *codes.grid, None), values)


@pytest.mark.parametrize("native_path", [True, False], ids=["native", "reference"])
def test_nan_has_no_code_and_spoils_the_scale(native_path: bool) -> None:
    node = node_for()
    input = torch.randn(4, 4)
    input[2, 1] = torch.nan
    if native_path:
        codes = node.codes_on_grid(node(input))
    else:
        with kernels.reference_kernels():
            codes = node.codes_on_grid(node(input))
    assert codes.codes[2, 1] == node.scheme.quant_min
    assert bool(codes.grid[0].isnan().all())
    assert torch.equal(codes.grid[1], node.zero_point)


def test_codes_that_had_to_be_made_anew_are_counted() -> None:
    node = node_for()
    values = node(torch.randn(4, 3, 6, 6))
    node.codes_on_grid(values)
    assert node.codes_lost == 0
    node.codes_on_grid(values.flatten(1))
    assert node.codes_lost == 1


def test_inference_tensors_are_quantized_anew() -> None:
    """They count no changes, so that none would be noticed."""
    node = node_for(QuantizationScheme())
    with torch.inference_mode():
        values = node(torch.randn(30))
        values.neg_()
        codes = node.codes_on_grid(values)
        assert torch.equal(codes.codes, quantized_anew(node, values))


def test_copies_of_values_have_the_codes_of_their_own_values() -> None:
    node = node_for(QuantizationScheme())
    values = node(torch.randn(30))
    for other in (copy.deepcopy(values), pickle.loads(pickle.dumps(values))):
        other.neg_()
        codes = node.codes_on_grid(other)
        assert torch.equal(codes.codes, quantized_anew(node, other))
