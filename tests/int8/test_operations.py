"""What stands between integer layers, against the public functions and NumPy's float32."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mlframework.quantization import QuantizationParameters, QuantizationScheme, dequantize, quantize
from mlframework.quantization.graph.subgraph import module_of_nodes
from mlframework.quantization.int8.average_pooling import AveragePooling
from mlframework.quantization.int8.integer_operation import Addition, Concatenation, Multiplication
from mlframework.quantization.int8.lookup import Lookup
from mlframework.quantization.int8.operations import (
    Dequantize,
    Int8Operation,
    Int8ReLU,
    Int8Selection,
    Int8WithFloatEdges,
    OnGrid,
    Quantize,
)

PER_CHANNEL = QuantizationParameters(
    torch.tensor([0.01, 0.1, 1.0]),
    torch.tensor([0, 10, -20]),
    QuantizationScheme(symmetric=False, channel_axis=1),
)


def grid(scale: float, zero_point: int, signed: bool = False, bits: int = 8) -> QuantizationParameters:
    scheme = QuantizationScheme(bits, signed, symmetric=False)
    return QuantizationParameters(torch.tensor([scale]), torch.tensor([zero_point]), scheme)


def scheme_name(parameters: QuantizationParameters) -> str:
    return str(parameters.scheme)


GRIDS = [grid(0.1, 0), grid(0.037, 131), grid(0.05, -7, signed=True), grid(0.4, 5, bits=4)]


def all_codes(parameters: QuantizationParameters) -> Tensor:
    scheme = parameters.scheme
    return torch.arange(scheme.quant_min, scheme.quant_max + 1).to(scheme.dtype)


@pytest.mark.parametrize("parameters", GRIDS, ids=scheme_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_in_and_out_of_codes(parameters: QuantizationParameters, dtype: torch.dtype) -> None:
    values = (torch.randn(4, 5) * 5).to(dtype)
    codes = Quantize(parameters)(values)
    assert torch.equal(codes, quantize(values, parameters))
    assert codes.dtype is parameters.scheme.dtype
    assert torch.equal(Dequantize(parameters)(codes), dequantize(codes, parameters))
    assert torch.equal(Quantize(parameters)(Dequantize(parameters)(codes)), codes)


def test_in_and_out_of_codes_per_channel() -> None:
    values = torch.randn(2, 3, 4, 4)
    codes = Quantize(PER_CHANNEL)(values)
    assert torch.equal(codes, quantize(values, PER_CHANNEL))
    assert torch.equal(Dequantize(PER_CHANNEL)(codes), dequantize(codes, PER_CHANNEL))


@pytest.mark.parametrize("parameters", GRIDS, ids=scheme_name)
def test_relu_on_codes_is_relu_on_values(parameters: QuantizationParameters) -> None:
    codes = all_codes(parameters)
    result = Int8ReLU(parameters)(codes)
    assert result.dtype is codes.dtype
    assert torch.equal(dequantize(result, parameters), dequantize(codes, parameters).relu())


def test_relu_per_channel() -> None:
    # As many columns as channels: the zero points belong to the second axis, not to the last.
    codes = torch.randint(-128, 128, (2, 3, 3), dtype=torch.int8)
    result = Int8ReLU(PER_CHANNEL)(codes)
    assert torch.equal(dequantize(result, PER_CHANNEL), dequantize(codes, PER_CHANNEL).relu())


def fma(codes: np.ndarray, factor: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """A code times a float32 is exact in float64; rounded once, with the addend."""
    return (codes.astype(np.float64) * factor.astype(np.float64) + addend.astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("left", GRIDS, ids=scheme_name)
@pytest.mark.parametrize("right", GRIDS, ids=scheme_name)
@pytest.mark.parametrize("output", GRIDS, ids=scheme_name)
@pytest.mark.parametrize("clip", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0)], ids=str)
def test_add(
    left: QuantizationParameters,
    right: QuantizationParameters,
    output: QuantizationParameters,
    clip: tuple[float, float],
) -> None:
    a, b = all_codes(left).view(-1, 1), all_codes(right)
    result = Int8Operation(Addition(), (left, right), output, clip)(a, b)
    assert result.dtype is output.scheme.dtype
    (sa, za), (sb, zb), (sy, zy) = (
        (parameters.scale.numpy(), parameters.zero_point.numpy().astype(np.float32))
        for parameters in (left, right, output)
    )
    # The left operand is constant along the last axis, and so stands second in ONNX Runtime's formula.
    constant = zy - fma(zb, sb / sy, (sa / sy) * za)
    total = fma(b.numpy(), sb / sy, fma(a.numpy(), sa / sy, constant))
    scheme = output.scheme
    lowest, highest = (np.clip(np.rint(np.float32(end) / sy) + zy, scheme.quant_min, scheme.quant_max) for end in clip)
    expected = np.clip(np.rint(total), lowest, highest)
    assert np.array_equal(result.numpy(), expected)


def test_add_of_a_tensor_to_itself_on_its_own_grid() -> None:
    parameters = grid(0.1, 100)
    codes = all_codes(parameters)
    expected = ((codes.int() - 100) * 2 + 100).clamp(0, 255).to(torch.uint8)
    assert torch.equal(Int8Operation(Addition(), (parameters, parameters), parameters)(codes, codes), expected)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (3, 1)), ((2, 1), (5,)), ((0, 4), (4,)), ((), ())])
def test_add_broadcasts(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes)
    add = Int8Operation(Addition(), GRIDS[:2], grid(0.2, 50))
    wide = torch.broadcast_tensors(a, b)
    assert torch.equal(add(a, b).reshape(-1), add(*(codes.reshape(-1) for codes in wide)))


# No zero point at an end of its grid: what an operation takes for zero is no code that it would make by itself.
SELECTION_GRIDS = [grid(0.037, 131), grid(0.05, -7, signed=True), grid(0.4, 5, bits=4)]

SELECTIONS: dict[str, nn.Module] = {
    "max pool": nn.MaxPool2d(3, 2, 1),
    "dilated max pool": nn.MaxPool2d(2, 1, dilation=3, ceil_mode=True),
    "adaptive max pool": nn.AdaptiveMaxPool2d((5, None)),
    "pixel shuffle": nn.PixelShuffle(2),
    "pixel unshuffle": nn.PixelUnshuffle(4),
    "channel shuffle": nn.ChannelShuffle(2),
    "nearest": nn.Upsample(scale_factor=(2, 1.5), mode="nearest"),
    "nearest-exact": nn.Upsample(size=(31, 17), mode="nearest-exact"),
    "upsampling": nn.UpsamplingNearest2d(scale_factor=2),
    "reflection": nn.ReflectionPad2d((1, 2, 3, 0)),
    "replication": nn.ReplicationPad2d(2),
    "circular": nn.CircularPad2d((1, 0, 2, 3)),
    "zeros": nn.ZeroPad2d((1, 2, 0, 3)),
    "constant": nn.ConstantPad2d((1, 2, 0, 3), 0.0),
    "cropping": nn.ZeroPad2d((-1, 2, -2, 0)),
}


@pytest.mark.parametrize("parameters", SELECTION_GRIDS, ids=scheme_name)
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_selections_are_those_of_values(
    parameters: QuantizationParameters, selection: nn.Module, memory_format: torch.memory_format
) -> None:
    """On images of more than 300 pixels: ATen's max pooling of uint8 ends at 255."""
    shape = (2, 4, 20, 16)
    codes = all_codes(parameters)[torch.randint(all_codes(parameters).numel(), shape)].to(memory_format=memory_format)
    selected = Int8Selection(parameters, selection)(codes)
    assert selected.dtype is codes.dtype
    assert torch.equal(selected, quantize(selection(dequantize(codes, parameters)), parameters))


@pytest.mark.parametrize("selection", [nn.MaxPool1d(301, 1), nn.AdaptiveMaxPool1d(2), nn.ReflectionPad1d(3)], ids=str)
def test_selections_in_one_dimension(selection: nn.Module) -> None:
    codes = torch.randint(0, 256, (2, 3, 700), dtype=torch.uint8)
    selected = Int8Selection(GRIDS[1], selection)(codes)
    assert torch.equal(selected, quantize(selection(dequantize(codes, GRIDS[1])), GRIDS[1]))


@pytest.mark.parametrize("selection", [nn.MaxPool3d(3, 2, 1), nn.ReplicationPad3d(1), nn.ZeroPad3d(1)], ids=str)
def test_selections_in_three_dimensions(selection: nn.Module) -> None:
    codes = torch.randint(0, 256, (2, 3, 7, 8, 9), dtype=torch.uint8)
    selected = Int8Selection(GRIDS[1], selection)(codes)
    assert torch.equal(selected, quantize(selection(dequantize(codes, GRIDS[1])), GRIDS[1]))


def test_a_selection_may_read_other_values() -> None:
    """The size that another tensor has, say."""
    graph = fx.symbolic_trace(lambda x, height: F.interpolate(x, size=(height, 11))).graph
    *inputs, node, _ = graph.nodes
    selection = Int8Selection(GRIDS[1], module_of_nodes([node], inputs, {}))
    codes = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    expected = quantize(F.interpolate(dequantize(codes, GRIDS[1]), size=(9, 11)), GRIDS[1])
    assert torch.equal(selection(codes, 9), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_are_exact_in_half_precision_models(dtype: torch.dtype) -> None:
    codes = all_codes(GRIDS[1]).view(1, 1, 16, 16)
    selection = nn.Sequential(Int8Selection(GRIDS[1], nn.ZeroPad2d(0))).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selection(codes), codes)


@pytest.mark.parametrize("output", GRIDS, ids=scheme_name)
@pytest.mark.parametrize("clip", [(-math.inf, math.inf), (0.0, math.inf), (-0.3, 1.1)], ids=str)
def test_multiply(output: QuantizationParameters, clip: tuple[float, float]) -> None:
    left, right = GRIDS[1], GRIDS[2]
    a, b = all_codes(left).view(-1, 1), all_codes(right)
    result = Int8Operation(Multiplication(), (left, right), output, clip)(a, b)
    exact = dequantize(a, left).double() * dequantize(b, right).double()
    steps = exact.clamp(*clip) / output.scale.item() + output.zero_point.item()
    wanted = steps.clamp(output.scheme.quant_min, output.scheme.quant_max)
    # A clip's end lies up to half a step from its code.
    slack = 2.0**-14 if clip[0] == -math.inf else 0.5
    assert result.dtype is output.scheme.dtype
    assert (result.double() - wanted).abs().max() <= 0.5 + slack
    assert (dequantize(result, output) >= clip[0] - output.scale.item() / 2).all()


def test_a_plan_is_made_anew_for_other_tensors() -> None:
    product, other = (Int8Operation(Multiplication(), GRIDS[1:3], grid(0.2, 50)) for _ in range(2))
    other.input_0_scale.mul_(3)
    codes = all_codes(GRIDS[1]), all_codes(GRIDS[2])
    before = product(*codes)
    product.load_state_dict(other.state_dict())
    assert not torch.equal(product(*codes), before)
    assert torch.equal(product(*codes), other(*codes))


def test_the_grids_are_told() -> None:
    operation = Int8Operation(Concatenation(1), GRIDS[:3], GRIDS[3])
    for told, given in zip((*operation.input_parameters, operation.output_parameters), GRIDS, strict=True):
        assert (told.scheme, told.scale, told.zero_point) == (given.scheme, given.scale, given.zero_point)
    assert repr(operation) == "Int8Operation(concat -> uint4 [0, 15] affine, per tensor)"
    assert "clip=(0.0, 6.0)" in repr(Int8Operation(Addition(), GRIDS[:2], GRIDS[3], (0.0, 6.0)))


def modules() -> list[nn.Module]:
    return [
        Quantize(GRIDS[1]),
        Dequantize(GRIDS[1]),
        Int8ReLU(GRIDS[1]),
        Int8Selection(GRIDS[1], nn.MaxPool2d(2)),
        Int8Operation(Addition(), GRIDS[:2], GRIDS[2]),
        Int8Operation(Multiplication(), GRIDS[:2], GRIDS[2]),
        Int8Operation(Concatenation(0), GRIDS[:3], GRIDS[2]),
        Int8Operation(AveragePooling(nn.AvgPool2d(2)), GRIDS[:1], GRIDS[2]),
        Int8Operation(Lookup(nn.GELU()), GRIDS[:1], GRIDS[2]),
    ]


@pytest.mark.parametrize("module", modules(), ids=lambda module: type(module).__name__)
def test_casting_keeps_scales_float32(module: nn.Module) -> None:
    before = copy.deepcopy(module.state_dict())
    nn.Sequential(module).to(torch.float16)
    for name, value in module.state_dict().items():
        assert value.dtype is before[name].dtype
        assert torch.equal(value, before[name])
        assert value.dtype is torch.float32 or not name.endswith("scale")


@pytest.mark.parametrize("module", modules(), ids=lambda module: type(module).__name__)
def test_state_survives_copying_and_loading(module: nn.Module) -> None:
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        for buffer in other.buffers():
            buffer.zero_()
        other.load_state_dict(module.state_dict())
        for name, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_are_copied_as_float32(dtype: torch.dtype) -> None:
    scheme = QuantizationScheme()
    parameters = QuantizationParameters(torch.tensor([0.5], dtype=dtype), torch.zeros(1, dtype=torch.int32), scheme)
    operations = [Quantize(parameters), Int8Operation(Addition(), (parameters, parameters), parameters)]
    parameters.scale.fill_(2.0)
    parameters.zero_point.fill_(3)
    for module in operations:
        for name, value in module.named_buffers():
            if name.endswith("grid"):
                continue
            assert value.item() == (0 if name.endswith("zero_point") else 0.5)
            assert value.dtype is (torch.int32 if name.endswith("zero_point") else torch.float32)


def test_integer_layer_between_floats() -> None:
    values = torch.randn(3, 4) * 5
    relu = Int8WithFloatEdges(Quantize(GRIDS[1]), Int8ReLU(GRIDS[1]), Dequantize(GRIDS[1]))
    on_grid = OnGrid(GRIDS[1])(values)
    assert torch.equal(on_grid, dequantize(quantize(values, GRIDS[1]), GRIDS[1]))
    assert torch.equal(relu(values), on_grid.relu())
    assert torch.equal(Int8WithFloatEdges(None, nn.Identity(), None)(values), values)


def test_integers_are_no_values_to_quantize() -> None:
    with pytest.raises(TypeError, match=r"input must be a floating-point tensor, got torch\.int64"):
        Quantize(GRIDS[0])(torch.arange(3))
