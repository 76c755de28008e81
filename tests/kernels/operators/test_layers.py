"""Layers of a training step in one call: against the formulas of arithmetic and folding, and exact sums of float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from example_codes import DTYPES, UNSIGNED, layouts, random_codes
from mlframework.quantization import QuantizationScheme, arithmetic, kernels
from mlframework.quantization.int8.folding import fold
from mlframework.quantization.kernels import ConvolutionGeometry
from mlframework.quantization.kernels.operators.integer_layers import OutputGrid, integer_layer
from mlframework.quantization.kernels.operators.training_layers import train_layer, weighted_product

pytestmark = pytest.mark.usefixtures("_path")

LINEAR = ConvolutionGeometry((), (), ())
# The shape of the codes, that of the weight, and the geometry.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], ConvolutionGeometry]] = {
    "linear": ((7, 33), (21, 33), LINEAR),
    "linear of a vector": ((33,), (5, 33), LINEAR),
    "linear of many dimensions": ((2, 3, 4, 16), (32, 16), LINEAR),
    "one feature": ((3, 1), (1, 1), LINEAR),
    "conv1d": ((3, 5, 19), (20, 5, 4), ConvolutionGeometry((2,), (3,), (2,))),
    "pointwise conv1d": ((2, 8, 9), (16, 8, 1), ConvolutionGeometry((1,), (0,), (1,))),
    "depthwise conv1d": ((2, 6, 19), (6, 1, 3), ConvolutionGeometry((1,), (1,), (1,), 6)),
    "conv2d": ((2, 17, 9, 8), (35, 17, 3, 3), ConvolutionGeometry((1, 1), (1, 1), (1, 1))),
    "stem": ((2, 3, 15, 15), (16, 3, 7, 7), ConvolutionGeometry((2, 2), (3, 3), (1, 1))),
    "uneven": ((2, 4, 9, 12), (5, 4, 2, 3), ConvolutionGeometry((2, 1), (0, 2), (1, 3))),
    "pointwise": ((2, 20, 5, 6), (33, 20, 1, 1), ConvolutionGeometry((1, 1), (0, 0), (1, 1))),
    "shortcut": ((2, 20, 7, 6), (16, 20, 1, 1), ConvolutionGeometry((2, 2), (0, 0), (1, 1))),
    "depthwise": ((2, 37, 8, 9), (37, 1, 3, 3), ConvolutionGeometry((2, 2), (1, 1), (1, 1), 37)),
    "depthwise dilated": ((2, 16, 11, 9), (16, 1, 5, 3), ConvolutionGeometry((1, 1), (4, 2), (2, 1), 16)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SOME_CASES = pytest.mark.parametrize(
    "case", [CASES[name] for name in ("linear", "conv1d", "uneven", "depthwise")], ids=str
)
PER_CHANNEL, PER_TENSOR = 0, -1
AXES = pytest.mark.parametrize("axis", [PER_CHANNEL, PER_TENSOR], ids=["per channel", "per tensor"])


class State(NamedTuple):
    """Of the observer of a weight, and its node."""

    minimum: Tensor
    maximum: Tensor
    batches: Tensor
    scale: Tensor
    zero_point: Tensor


def new_state(channels: int) -> State:
    return State(
        torch.full((channels,), torch.inf),
        torch.full((channels,), -torch.inf),
        torch.zeros(1, dtype=torch.int64),
        torch.ones(channels),
        torch.zeros(channels),
    )


def scheme_of(axis: int) -> QuantizationScheme:
    return QuantizationScheme(narrow_range=True, channel_axis=axis if axis >= 0 else None)


def grid_of(scale: float, zero_point: float) -> Tensor:
    return torch.tensor([[scale], [zero_point]])


def memory_order(tensor: Tensor) -> Tensor:
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def expected_update(state: State, weight: Tensor, axis: int, momentum: float) -> State:
    """A batch of finite values."""
    rows = weight.flatten(1) if axis >= 0 else weight.reshape(1, -1)
    ends = rows.amin(1), rows.amax(1)
    running = state.minimum, state.maximum
    first = bool(state.batches == 0)
    minimum, maximum = (
        end if first else torch.lerp(old, end, momentum) for old, end in zip(running, ends, strict=True)
    )
    scale, zero_point = arithmetic.range_to_scale_and_zero_point(minimum, maximum, scheme_of(axis))
    return State(minimum, maximum, state.batches + 1, scale, zero_point)


def expected_layer(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    axis: int,
    geometry: ConvolutionGeometry,
) -> tuple[Tensor, Tensor]:
    """The output, and the scale that was used: what conversion makes of the layer, on exact sums."""
    scheme = scheme_of(axis)
    weight_codes = arithmetic.quantize_values(weight, scale, torch.zeros_like(scale), scheme)
    layer = fold(weight_codes, scale, scheme, bias, grid[0], None)
    values = codes.double() - float(grid[1])  # padding holds zeros, not codes
    if weight.dim() == 2:
        sums = F.linear(values, layer.codes.double(), layer.bias.double())
        multiplier = grid[0] * layer.scale
    else:
        convolution = F.conv1d if weight.dim() == 3 else F.conv2d
        sums = convolution(values, layer.codes.double(), layer.bias.double(), *geometry)
        multiplier = (grid[0] * layer.scale).reshape(-1, *[1] * (weight.dim() - 2))
    return sums.float() * multiplier, layer.scale


def train(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: int,
    state: State,
    geometry: ConvolutionGeometry,
    *,
    momentum: float = 1.0,
    observes: bool = True,
    mask: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    return train_layer(
        codes,
        grid,
        weight,
        bias,
        state[:3],
        *state[3:],
        momentum,
        scheme_of(axis),
        own(geometry),
        observes=observes,
        mask=mask,
    )


def product(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    axis: int,
    geometry: ConvolutionGeometry,
) -> Tensor:
    return weighted_product(codes, grid, weight, scale, bias, scheme_of(axis), own(geometry))


def own(geometry: ConvolutionGeometry) -> ConvolutionGeometry | None:
    return None if geometry is LINEAR else geometry


@AXES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_CASE
def test_the_product_is_the_rounded_accumulator_times_the_scale(case: Any, dtype: torch.dtype, axis: int) -> None:
    shape, weight_shape, geometry = case
    ends = torch.iinfo(dtype)
    weight = torch.randn(weight_shape)
    scale = torch.rand(weight_shape[0] if axis >= 0 else 1) * 0.02 + 0.005  # some weights saturate
    for zero_point, bias in (
        (ends.min, None),
        (3, torch.randn(weight_shape[0])),
        (ends.max, torch.randn(weight_shape[0])),
    ):
        grid = grid_of(0.037, zero_point)
        for name, codes in layouts(random_codes(shape, dtype)).items():
            output = product(codes, grid, weight, scale, bias, axis, geometry)
            expected, _ = expected_layer(codes, grid, weight, scale, bias, axis, geometry)
            assert torch.equal(output, expected), name
            if geometry is not LINEAR:
                assert output.movedim(1, -1).is_contiguous(), "channels lie innermost"


@pytest.mark.parametrize("momentum", [1.0, 0.3])
@AXES
@EVERY_CASE
def test_a_layer_observes_its_weight_and_runs(case: Any, axis: int, momentum: float) -> None:
    shape, weight_shape, geometry = case
    codes, grid = random_codes(shape, UNSIGNED), grid_of(0.037, 3)
    bias = torch.randn(weight_shape[0])
    state = new_state(weight_shape[0] if axis >= 0 else 1)
    for factor in (1.0, 0.5, 3.0):  # the last saturates where the averages lag behind
        weight = torch.randn(weight_shape) * factor
        if factor == 0.5 and weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        expected_state = expected_update(state, weight, axis, momentum)
        output, mask, scale = train(codes, grid, weight, bias, axis, state, geometry, momentum=momentum)
        for actual, expected in zip(state, expected_state, strict=True):
            assert torch.equal(actual, expected)
        expected_output, expected_scale = expected_layer(codes, grid, weight, state.scale, bias, axis, geometry)
        assert torch.equal(output, expected_output)
        assert torch.equal(scale, expected_scale)
        assert scale.shape == weight_shape[:1]
        steps = (weight / arithmetic.along_axis(state.scale, weight.dim(), 0)).round()
        flags = memory_order(steps.abs() <= 127)
        assert mask is not None
        assert mask.tolist() == np.packbits(flags.numpy(), bitorder="little").tolist()


@AXES
@SOME_CASES
def test_what_is_not_asked_for_is_not_done(case: Any, axis: int) -> None:
    shape, weight_shape, geometry = case
    codes, grid, weight = random_codes(shape, UNSIGNED), grid_of(0.1, 200), torch.randn(weight_shape)
    state = new_state(weight_shape[0] if axis >= 0 else 1)._replace(
        scale=torch.rand(weight_shape[0] if axis >= 0 else 1) + 0.1
    )
    before = State(*(each.clone() for each in state))
    output, mask, scale = train(codes, grid, weight, None, axis, state, geometry, observes=False, mask=False)
    assert mask is None
    assert all(map(torch.equal, state, before))
    assert torch.equal(scale, state.scale.expand(weight_shape[0]))
    assert torch.equal(output, product(codes, grid, weight, state.scale, None, axis, geometry))


@AXES
@SOME_CASES
def test_the_scale_is_raised_where_a_bias_does_not_fit(case: Any, axis: int) -> None:
    """To what conversion raises it to, of that channel alone."""
    shape, weight_shape, geometry = case
    codes, grid, weight = random_codes(shape, UNSIGNED), grid_of(2.0**-20, 7), torch.randn(weight_shape)
    weight[1] *= 1e-4  # per channel, a scale of its own
    largest_codes = 2.0**30 * 2.0**-20 / 127
    limit = float(weight.abs().max()) * largest_codes
    bias = torch.zeros(weight_shape[0])
    bias[0], bias[1], bias[2], bias[3] = (
        float(weight[0].abs().max()) * largest_codes * 0.9,
        limit * 0.5,
        -limit * 2.3,
        limit * 900,
    )
    state = new_state(weight_shape[0] if axis >= 0 else 1)
    output, mask, scale = train(codes, grid, weight, bias, axis, state, geometry)
    expected, expected_scale = expected_layer(codes, grid, weight, state.scale, bias, axis, geometry)
    assert torch.equal(output, expected)
    assert torch.equal(scale, expected_scale)
    raised = scale > state.scale
    assert raised.nonzero().flatten().tolist() == ([1, 2, 3] if axis >= 0 else [2, 3])
    assert torch.equal(product(codes, grid, weight, state.scale, bias, axis, geometry), expected)
    assert mask is not None
    assert mask.numel() == (weight.numel() + 7) // 8


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@AXES
@SOME_CASES
def test_a_bias_that_is_not_finite_is_nan_in_its_channel(case: Any, axis: int, value: float) -> None:
    shape, weight_shape, geometry = case
    codes, grid, weight, bias = (
        random_codes(shape, UNSIGNED),
        grid_of(0.1, 7),
        torch.randn(weight_shape),
        torch.zeros(weight_shape[0]),
    )
    bias[2] = value
    output, _, scale = train(codes, grid, weight, bias, axis, new_state(weight_shape[0] if axis >= 0 else 1), geometry)
    channels = output.movedim(1 if geometry is not LINEAR else -1, 0)
    assert channels[2].isnan().all()
    assert channels[[0, 1, 3]].isfinite().all()
    assert scale.isnan().nonzero().flatten().tolist() == [2]


@AXES
@SOME_CASES
def test_a_weight_that_is_nan_makes_its_output_nan(case: Any, axis: int) -> None:
    shape, weight_shape, geometry = case
    codes, grid = random_codes(shape, UNSIGNED), grid_of(0.1, 7)
    state = new_state(weight_shape[0] if axis >= 0 else 1)
    weight = torch.randn(weight_shape)
    clean, _, clean_scale = train(codes, grid, weight, None, axis, state, geometry)
    before = State(*(each.clone() for each in state))
    broken = weight.clone()
    broken[2].view(-1)[0] = torch.nan
    output, _, scale = train(codes, grid, broken, None, axis, state, geometry)
    hit = torch.arange(weight_shape[0]) == 2 if axis >= 0 else torch.ones(weight_shape[0], dtype=torch.bool)
    assert torch.equal(scale.isnan(), hit)
    channels, expected = (each.movedim(1 if geometry is not LINEAR else -1, 0) for each in (output, clean))
    assert channels[hit].isnan().all()
    assert torch.equal(channels[~hit], expected[~hit])
    assert torch.equal(scale[~hit], clean_scale[~hit])
    # The averages take no notice of NaN, and what they take notice of is the same weight once more.
    for one, other in zip(state[:2], before[:2], strict=True):
        assert torch.equal(one, other)
    assert int(state.batches) == (2 if axis >= 0 else 1)
    assert (
        product(codes, grid, broken, before.scale, None, axis, geometry)
        .movedim(1 if geometry is not LINEAR else -1, 0)[hit]
        .isnan()
        .all()
    )


@AXES
@SOME_CASES
def test_a_weight_that_is_infinite_saturates(case: Any, axis: int) -> None:
    shape, weight_shape, geometry = case
    codes, grid = random_codes(shape, UNSIGNED), grid_of(0.1, 7)
    scale = torch.full((weight_shape[0] if axis >= 0 else 1,), 0.1)
    state = new_state(scale.numel())._replace(scale=scale)
    weight = torch.randn(weight_shape)
    weight[0].view(-1)[0] = torch.inf
    weight[1].view(-1)[0] = -torch.inf
    output, mask, _ = train(codes, grid, weight, None, axis, state, geometry, observes=False)
    assert torch.equal(output, product(codes, grid, weight.clamp(-100, 100), scale, None, axis, geometry))
    assert mask is not None
    assert not mask[0] & 1


@AXES
@EVERY_CASE
def test_codes_of_nan_make_everything_nan(case: Any, axis: int) -> None:
    """Codes are of values that held NaN where the scale of their grid is NaN."""
    shape, weight_shape, geometry = case
    codes, grid, weight = random_codes(shape, UNSIGNED), grid_of(torch.nan, 7), torch.randn(weight_shape)
    state = new_state(weight_shape[0] if axis >= 0 else 1)
    output, _, scale = train(codes, grid, weight, torch.randn(weight_shape[0]), axis, state, geometry)
    assert output.isnan().all()
    assert torch.equal(scale, state.scale.expand(weight_shape[0]))
    assert product(codes, grid, weight, state.scale, None, axis, geometry).isnan().all()


@EVERY_CASE
def test_an_empty_batch_has_an_empty_output(case: Any) -> None:
    shape, weight_shape, geometry = case
    codes = torch.zeros((0, *shape[1:]) if len(shape) > 1 else (0, *shape), dtype=UNSIGNED)
    grid, weight, state = grid_of(0.1, 7), torch.randn(weight_shape), new_state(weight_shape[0])
    output, _, _ = train(codes, grid, weight, None, PER_CHANNEL, state, geometry)
    assert output.shape == expected_layer(codes, grid, weight, state.scale, None, PER_CHANNEL, geometry)[0].shape
    assert int(state.batches) == 1


def test_a_weight_of_any_layout() -> None:
    shape, weight_shape, geometry = CASES["conv2d"]
    codes, grid = random_codes(shape, UNSIGNED), grid_of(0.1, 7)
    for axis in (PER_CHANNEL, PER_TENSOR):
        for name, weight in layouts(torch.randn(weight_shape)).items():
            state = new_state(weight_shape[0] if axis >= 0 else 1)
            output, _, _ = train(codes, grid, weight, None, axis, state, geometry)
            expected, _ = expected_layer(codes, grid, weight, state.scale, None, axis, geometry)
            assert torch.equal(output, expected), name


@pytest.mark.usefixtures("_threads")
@AXES
def test_several_threads_compute_the_same(axis: int) -> None:
    codes, grid = random_codes((700, 600), UNSIGNED), grid_of(0.1, 7)
    weight, bias = torch.randn(300, 600), torch.randn(300)
    results = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        state = new_state(300 if axis >= 0 else 1)
        output, mask, scale = train(codes, grid, weight, bias, axis, state, LINEAR)
        assert mask is not None
        results.append((output, mask, scale, *state))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.randn(5)}, "weight must have shape"),
        ({"weight": torch.zeros(0, 17, 3, 3)}, "weight must have shape"),
        ({"weight": torch.randn(35, 17, 3, 3).double()}, "weight must be float32"),
        ({"weight": torch.randn(35, 17, 3)}, "must hold 1 numbers, as many as the kernel has dimensions, got 2"),
        ({"codes": torch.zeros(17, 9, 8, dtype=UNSIGNED)}, "codes must have 4 dimensions, got 3"),
        ({"codes": torch.zeros(2, 16, 9, 8, dtype=UNSIGNED)}, "codes must have 17 channels, got 16"),
        ({"grid": torch.ones(2, 17)}, "grid must hold 2 numbers"),
        ({"bias": torch.ones(34)}, "bias must hold 35 numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_compiled_kernels_refuse_changes_nothing(changed: dict[str, Tensor], message: str) -> None:
    shape, weight_shape, geometry = CASES["conv2d"]
    arguments = {
        "codes": random_codes(shape, UNSIGNED),
        "grid": grid_of(0.1, 7),
        "weight": torch.randn(weight_shape),
        "bias": torch.randn(weight_shape[0]),
        **changed,
    }
    if kernels.active_path() != "native":
        pytest.skip("needs compiled kernels")
    state = new_state(weight_shape[0])
    before = State(*(each.clone() for each in state))
    with pytest.raises(RuntimeError, match=message):
        train(**arguments, axis=PER_CHANNEL, state=state, geometry=geometry)
    assert all(map(torch.equal, state, before))


def test_the_largest_sums_do_not_overflow() -> None:
    features = 2**30 // (255 * 128)
    weight = torch.full((2, features), 127.0)
    weight[1] = -127.0
    codes, grid = torch.full((1, features), 255, dtype=UNSIGNED), grid_of(1.0, 0)
    # As large as a bias may be.
    bias = torch.tensor([2.0**30, -(2.0**30)])
    total = 255 * 127 * features + 2**30
    assert total < 2**31
    output = product(codes, grid, weight, torch.ones(2), bias, PER_CHANNEL, LINEAR)
    assert torch.equal(output, torch.tensor([[total, -total]], dtype=torch.float64).float())


# Evaluation: weights that are integers, given with the call


@pytest.mark.parametrize("to", ["codes", "values"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "weight_shape", "geometry", "output_padding"),
    [
        *((*CASES[name], None) for name in ("linear", "linear of a vector", "conv1d", "uneven", "depthwise")),
        ((2, 6, 9, 8), (10, 3, 3, 3), ConvolutionGeometry((1, 1), (1, 1), (1, 1), 2), None),
        ((2, 3, 4, 5, 6), (7, 3, 2, 2, 2), ConvolutionGeometry((1, 1, 2), (0, 1, 0), (1, 1, 1)), None),
        ((2, 4, 5, 6), (4, 6, 3, 3), ConvolutionGeometry((2, 2), (1, 1), (1, 1)), (1, 0)),
        ((2, 4, 5, 6), (4, 3, 3, 3), ConvolutionGeometry((2, 1), (0, 0), (1, 2), 2), (0, 0)),
    ],
    ids=str,
)
def test_a_whole_layer(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: ConvolutionGeometry,
    output_padding: tuple[int, int] | None,
    dtype: torch.dtype,
    to: str,
) -> None:
    codes, weight = random_codes(shape, dtype), random_codes(weight_shape, torch.int8)
    values, weights = codes.double() - 5, weight.double()  # padding holds zeros, not codes
    if geometry is LINEAR:
        sums = F.linear(values, weights)
    elif output_padding is not None:
        stride, padding, dilation, groups = geometry
        sums = F.conv_transpose2d(values, weights, None, stride, padding, output_padding, groups, dilation)
    else:
        sums = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3](values, weights, None, *geometry)
    axis = sums.dim() - 1 if geometry is LINEAR else 1
    outputs = sums.shape[axis]
    bias = torch.randint(-3000, 3000, (outputs,), dtype=torch.int32)
    multiplier = torch.rand(outputs) * 5e-3
    along = [-1 if dimension == axis else 1 for dimension in range(sums.dim())]
    scaled = (sums + bias.reshape(along)).float() * multiplier.reshape(along)
    output = None
    expected = scaled.clamp(-9.0, 30.0)
    if to == "codes":
        zero_point, lowest, highest = (torch.tensor([number]).int() for number in (100, 7, 250))
        output = OutputGrid(zero_point, lowest, highest, UNSIGNED)
        expected = (scaled.round() + 100).clamp(7, 250).to(UNSIGNED)
    number = torch.tensor([5]).int()
    actual = integer_layer(codes, number, weight, bias, multiplier, output, (-9.0, 30.0), own(geometry), output_padding)
    assert actual.dtype is expected.dtype
    assert torch.equal(actual, expected)
