"""Integer layers against exact int64 sums and the epilogue in NumPy's float32: every code equal."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QuantizationParameters, QuantizationScheme
from mlframework.quantization.int8.folding import IntegerWeights
from mlframework.quantization.int8.layers import Int8Embedding, Int8Layer, Int8Linear
from mlframework.quantization.qat.layer_types import LAYER_TYPES

Clip = tuple[float, float]
NO_CLIP = (-math.inf, math.inf)


def grid(scale: float, zero_point: int, signed: bool = False, bits: int = 8) -> QuantizationParameters:
    scheme = QuantizationScheme(bits, signed, symmetric=False)
    return QuantizationParameters(torch.tensor([scale]), torch.tensor([zero_point]), scheme)


def scheme_name(parameters: QuantizationParameters | None) -> str:
    return "float" if parameters is None else str(parameters.scheme)


INPUT, OUTPUT = grid(0.02, 117), grid(0.05, 121)
GRIDS = [grid(0.02, 0), INPUT, grid(0.013, 0, signed=True), grid(0.017, -7, signed=True)]
SMALL_GRIDS = [grid(0.5, 3, bits=4), grid(0.5, -1, signed=True, bits=3)]
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(20, 7), (5, 20)),
    "linear with more dimensions": (nn.Linear(20, 7), (2, 3, 20)),
    "linear of one row": (nn.Linear(20, 7), (20,)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2)), (2, 4, 7, 8)),
    "grouped conv2d": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    "depthwise conv2d": (nn.Conv2d(4, 4, 3, groups=4, padding=1, dilation=2), (2, 4, 7, 8)),
    "conv3d": (nn.Conv3d(3, 5, 2, padding=1), (2, 3, 4, 5, 4)),
    "transposed conv2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), (2, 4, 5, 5)),
    "unbatched conv1d": (nn.Conv1d(4, 6, 3), (4, 11)),
    "unbatched conv2d": (nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "unbatched conv3d": (nn.Conv3d(3, 5, 2), (3, 4, 5, 4)),
    "unbatched transposed conv2d": (nn.ConvTranspose2d(4, 6, 3), (4, 5, 5)),
}
# PyTorch's own convolution says that it copies its input; the integer layer pads on its own.
the_reference_may_warn = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
EVERY_LAYER = pytest.mark.parametrize(("float_layer", "shape"), LAYERS.values(), ids=LAYERS)


def random_codes(shape: tuple[int, ...], parameters: QuantizationParameters) -> Tensor:
    scheme = parameters.scheme
    return torch.randint(scheme.quant_min, scheme.quant_max + 1, shape, dtype=scheme.dtype)


def random_weights(layer: nn.Module) -> IntegerWeights:
    assert isinstance(layer.weight, Tensor)
    channels = layer.weight.shape[LAYER_TYPES[type(layer)].output_axis]
    return IntegerWeights(
        torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8),
        torch.rand(channels) * 0.005 + 0.001,
        torch.randint(-5000, 5000, (channels,), dtype=torch.int32),
    )


def integer_layer(
    layer: nn.Module,
    weights: IntegerWeights,
    input: QuantizationParameters = INPUT,
    output: QuantizationParameters | None = OUTPUT,
    clip: Clip = NO_CLIP,
) -> Int8Layer:
    application = LAYER_TYPES[type(layer)].application
    assert application is not None
    return application(layer).to_integer(weights, input, output, clip)


def accumulators(layer: nn.Module, weights: IntegerWeights, input: QuantizationParameters, codes: Tensor) -> Any:
    """The user's own layer on integers held in float64, which is exact below 2**53; int64, output channels last."""
    exact = copy.deepcopy(layer).double()
    assert isinstance(exact.weight, Tensor)
    exact.bias = None
    with torch.no_grad():
        exact.weight.copy_(weights.codes)
        sums = exact(codes.double() - input.zero_point)
    axis = -1 if isinstance(layer, nn.Linear) else 1 - (codes.dim() < layer.weight.dim())  # type: ignore[operator]
    total = sums.movedim(axis, -1).numpy().astype(np.int64) + weights.bias.numpy()
    assert np.abs(total).max(initial=0) < 2**31
    return total, axis


def expected_output(
    layer: nn.Module,
    weights: IntegerWeights,
    input: QuantizationParameters,
    output: QuantizationParameters | None,
    clip: Clip,
    codes: Tensor,
) -> Tensor:
    total, axis = accumulators(layer, weights, input, codes)
    accumulator_scale = input.scale.numpy() * weights.scale.numpy()
    if output is None:
        values = total.astype(np.float32) * accumulator_scale
        return torch.from_numpy(np.clip(values, *np.float32(clip))).movedim(-1, axis)
    scheme, zero_point, output_scale = output.scheme, int(output.zero_point), output.scale.numpy()
    scaled = total.astype(np.float32) * (accumulator_scale / output_scale)
    result = np.rint(np.clip(scaled, scheme.quant_min - zero_point, scheme.quant_max - zero_point)) + zero_point
    lowest, highest = (np.rint(np.float32(end) / output_scale) + zero_point for end in clip)
    return torch.from_numpy(np.clip(result, lowest, highest)).to(scheme.dtype).movedim(-1, axis)


def assert_same(result: Tensor, expected: Tensor) -> None:
    assert result.dtype is expected.dtype
    assert torch.equal(result, expected)


@EVERY_LAYER
@pytest.mark.parametrize("output", [OUTPUT, None], ids=["codes", "float"])
def test_every_layer(float_layer: nn.Module, shape: tuple[int, ...], output: QuantizationParameters | None) -> None:
    weights, codes = random_weights(float_layer), random_codes(shape, INPUT)
    layer = integer_layer(float_layer, weights, output=output)
    expected = expected_output(float_layer, weights, INPUT, output, NO_CLIP, codes)
    assert_same(layer(codes), expected)
    assert_same(layer(codes), expected)
    assert len(expected.unique()) > 4


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d"])
@pytest.mark.parametrize("input", [*GRIDS, *SMALL_GRIDS], ids=scheme_name)
@pytest.mark.parametrize("output", [*GRIDS, *SMALL_GRIDS], ids=scheme_name)
def test_every_pair_of_grids(name: str, input: QuantizationParameters, output: QuantizationParameters) -> None:
    float_layer, shape = LAYERS[name]
    weights, codes = random_weights(float_layer), random_codes(shape, input)
    layer = integer_layer(float_layer, weights, input, output)
    assert_same(layer(codes), expected_output(float_layer, weights, input, output, NO_CLIP, codes))


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed conv2d"])
@pytest.mark.parametrize("output", [*GRIDS, None], ids=scheme_name)
@pytest.mark.parametrize("clip", [(0.0, math.inf), (0.0, 1.0), (-0.5, 0.73), (-1000.0, 1000.0)], ids=str)
def test_clipping_activations(name: str, output: QuantizationParameters | None, clip: Clip) -> None:
    float_layer, shape = LAYERS[name]
    weights, codes = random_weights(float_layer), random_codes(shape, INPUT)
    layer = integer_layer(float_layer, weights, INPUT, output, clip)
    expected = expected_output(float_layer, weights, INPUT, output, clip, codes)
    assert_same(layer(codes), expected)


@the_reference_may_warn
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, 2, (2, 1), "same", "valid"], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_padding_of_conv2d(mode: str, padding: Any, batched: bool) -> None:
    # An even kernel: "same" pads one more after than before.
    float_layer = nn.Conv2d(3, 4, (2, 4), padding=padding, padding_mode=mode)
    check_padding(float_layer, (2, 3, 6, 7) if batched else (3, 6, 7))


@the_reference_may_warn
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_padding_of_other_convolutions(kind: Any, mode: str, padding: Any, batched: bool) -> None:
    shape = (3, 6) if kind is nn.Conv1d else (3, 6, 5, 4)
    check_padding(kind(3, 4, 2, padding=padding, padding_mode=mode), (2, *shape) if batched else shape)


def check_padding(float_layer: nn.Module, shape: tuple[int, ...]) -> None:
    for input in (INPUT, GRIDS[3]):
        weights, codes = random_weights(float_layer), random_codes(shape, input)
        result = integer_layer(float_layer, weights, input)(codes)
        assert_same(result, expected_output(float_layer, weights, input, OUTPUT, NO_CLIP, codes))


@pytest.mark.parametrize(
    ("float_layer", "shape"), [(nn.Linear(3001, 3), (4, 3001)), (nn.Conv2d(601, 3, 3), (1, 601, 4, 4))], ids=str
)
@pytest.mark.parametrize("output", [grid(1.0, 3), None], ids=scheme_name)
def test_sums_beyond_float32(
    float_layer: nn.Module, shape: tuple[int, ...], output: QuantizationParameters | None
) -> None:
    weights = random_weights(float_layer)
    weights.codes.abs_().clamp_(min=100)
    codes = random_codes(shape, INPUT).clamp_(min=250)
    layer = integer_layer(float_layer, weights, grid(0.02, 0), output)
    total, _ = accumulators(float_layer, weights, grid(0.02, 0), codes)
    assert total.min() > 2**24
    assert_same(layer(codes), expected_output(float_layer, weights, grid(0.02, 0), output, NO_CLIP, codes))


def test_bias_beyond_float32() -> None:
    float_layer = nn.Linear(20, 3)
    weights = random_weights(float_layer)._replace(bias=torch.tensor([2**30, -(2**30) + 1, 2**24 + 1]).int())
    codes = random_codes((9, 20), INPUT)
    layer = integer_layer(float_layer, weights, output=None)
    assert_same(layer(codes), expected_output(float_layer, weights, INPUT, None, NO_CLIP, codes))


@EVERY_LAYER
def test_empty_batches(float_layer: nn.Module, shape: tuple[int, ...]) -> None:
    if shape[0] != 2:
        shape = (2, *shape)  # without a batch, or a linear layer, which takes any
    layer = integer_layer(float_layer, random_weights(float_layer))
    expected = layer(torch.zeros(shape, dtype=torch.uint8))
    empty = layer(torch.empty(0, *shape[1:], dtype=torch.uint8))
    assert empty.shape == (0, *expected.shape[1:])
    assert empty.dtype is torch.uint8


def test_channels_last() -> None:
    float_layer, shape = LAYERS["conv2d"]
    layer, codes = integer_layer(float_layer, random_weights(float_layer)), random_codes(shape, INPUT)
    assert_same(layer(codes.contiguous(memory_format=torch.channels_last)), layer(codes))


# State


@EVERY_LAYER
@pytest.mark.parametrize("output", [OUTPUT, None], ids=["codes", "float"])
def test_loading_remakes_the_plan(
    float_layer: nn.Module, shape: tuple[int, ...], output: QuantizationParameters | None
) -> None:
    codes = random_codes(shape, INPUT)
    saved = integer_layer(float_layer, random_weights(float_layer), output=output)
    loaded = integer_layer(float_layer, random_weights(float_layer), grid(0.5, 1), output and grid(0.7, 9))
    assert not torch.equal(loaded(codes), saved(codes))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    assert_same(loaded(codes), saved(codes))


@EVERY_LAYER
def test_copies_compute_the_same(float_layer: nn.Module, shape: tuple[int, ...]) -> None:
    codes = random_codes(shape, INPUT)
    layer = integer_layer(float_layer, random_weights(float_layer))
    before, after = copy.deepcopy(layer), layer(codes)
    for other in (before, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(other(codes), after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_a_model_leaves_the_integers_and_the_scales(dtype: torch.dtype) -> None:
    float_layer, shape = LAYERS["conv2d"]
    codes = random_codes(shape, INPUT)
    layer = integer_layer(float_layer, random_weights(float_layer))
    before, result = copy.deepcopy(layer.state_dict()), layer(codes)
    nn.Sequential(layer).to(dtype)
    for name, value in layer.state_dict().items():
        assert_same(value, before[name])
    assert_same(layer(codes), result)


def test_changing_the_parameters_afterwards_changes_nothing() -> None:
    output = QuantizationParameters(torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32), OUTPUT.scheme)
    layer = integer_layer(nn.Linear(20, 7), random_weights(nn.Linear(20, 7)), output=output)
    output.scale.fill_(9.0)
    output.zero_point.fill_(9)
    assert layer.output_scale is not None
    assert layer.output_zero_point is not None
    assert layer.output_scale.item() == torch.tensor(0.05).item()
    assert layer.output_zero_point.item() == 3


def test_scales_are_float32_whatever_they_came_in() -> None:
    double = QuantizationParameters(OUTPUT.scale.double(), OUTPUT.zero_point, OUTPUT.scheme)
    float_layer, shape = LAYERS["linear"]
    weights, codes = random_weights(float_layer), random_codes(shape, INPUT)
    layer = integer_layer(float_layer, weights, output=double)
    assert layer.output_scale is not None
    assert layer.output_scale.dtype is torch.float32
    assert_same(layer(codes), expected_output(float_layer, weights, INPUT, OUTPUT, NO_CLIP, codes))


def test_state_is_int8_weights_int32_bias_and_scales() -> None:
    layer = integer_layer(nn.Linear(20, 7), random_weights(nn.Linear(20, 7)))
    assert {name: value.dtype for name, value in layer.state_dict().items()} == {
        "weight": torch.int8,
        "weight_scale": torch.float32,
        "bias": torch.int32,
        "input_scale": torch.float32,
        "input_zero_point": torch.int32,
        "input_grid": torch.int64,
        "output_scale": torch.float32,
        "output_zero_point": torch.int32,
        "output_grid": torch.int64,
    }
    assert list(layer.parameters()) == []


def test_layers_describe_themselves() -> None:
    layer = Int8Linear(random_weights(nn.Linear(20, 7)), INPUT, None, (0.0, 6.0))
    assert repr(layer) == "Int8Linear(weight=(7, 20), uint8 [0, 255] affine, per tensor -> float32, clip=(0.0, 6.0))"


# Embedding


@pytest.mark.parametrize("scale", [torch.tensor([0.03]), torch.rand(11)], ids=["per tensor", "per row"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_embedding(scale: Tensor, shape: tuple[int, ...]) -> None:
    table = torch.randint(-127, 128, (11, 5), dtype=torch.int8)
    indices = torch.randint(0, 11, shape)
    layer = Int8Embedding(table, scale)
    rows = (table.float() * scale.view(-1, 1))[indices]
    assert_same(layer(indices), rows)
    assert_same(copy.deepcopy(layer).half()(indices), rows.half())


def test_floats_are_refused() -> None:
    float_layer = nn.Linear(3, 2)
    layer = integer_layer(float_layer, random_weights(float_layer))
    with pytest.raises(TypeError, match=r"must have dtype torch.uint8, got torch.float32: .* only the forward is"):
        layer(torch.randn(4, 3))
    with pytest.raises(TypeError, match=r"must have dtype torch.uint8, got torch.int8$"):
        layer(torch.zeros(4, 3, dtype=torch.int8))
