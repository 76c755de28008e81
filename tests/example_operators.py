"""Calls of every operator of ``kernels.operators``: layouts, dtypes, channels, what is optional, and what is empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from example_codes import SIGNED, UNSIGNED, layouts, random_codes
from mlframework.quantization import kernels
from mlframework.quantization.kernels.operators.declaration import DECLARED, Operator
from mlframework.quantization.kernels.operators.integer_layers import fold_zero_point
from mlframework.quantization.kernels.operators.masks import pack_mask
from mlframework.quantization.kernels.triton_gpu.registration import IMPLEMENTED

Arguments = tuple[Any, ...]
FLOATS = (torch.float32, torch.bfloat16)
UNBOUNDED, RELU6 = (-math.inf, math.inf), (0.0, 6.0)

_IMAGE = (2, 5, 4, 3)
# More elements in a channel, or in a row of channels, than kernels take at once.
_LARGE = {"long channels": (2, 3, 4100), "many channels": (70, 192)}
_SHAPES = ((), (0,), (7,), (3, 0, 5), (4, 5))
_LINEAR = ([], [], [], 1)

# The shape of the codes, that of the weight, and the geometry as operators take it.
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Arguments]] = {
    "linear": ((7, 33), (21, 33), _LINEAR),
    "linear of a vector": ((33,), (5, 33), _LINEAR),
    "linear of an empty batch": ((2, 0, 33), (5, 33), _LINEAR),
    "conv1d": ((3, 5, 19), (20, 5, 4), ([2], [3], [2], 1)),
    "depthwise conv1d": ((2, 6, 19), (6, 1, 3), ([1], [1], [1], 6)),
    "conv2d": ((2, 17, 9, 8), (35, 17, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
    "conv2d, uneven": ((2, 4, 9, 12), (5, 4, 2, 3), ([2, 1], [0, 2], [1, 3], 1)),
    "conv2d of an empty batch": ((0, 4, 9, 12), (5, 4, 2, 3), ([2, 1], [0, 2], [1, 3], 1)),
    "depthwise": ((2, 37, 8, 9), (37, 1, 3, 3), ([2, 2], [1, 1], [1, 1], 37)),
}


# Operators with kernels for GPUs, and the dtypes of the first argument that these take. Hashes of a GPU are its own.
ON_GPU = {
    name: dtypes for operators in IMPLEMENTED.values() for name, dtypes in operators.items() if name != "fingerprints"
}

# Sums over elements, which kernels form in an order of their own. These are of up to 120 terms of
# magnitude 300 at the most; of float32 (fake_quantize_backward, batch_statistics) or rounded to it.
SUMS: dict[str, dict[int, float]] = {
    "fake_quantize_backward": {1: 1e-4, 2: 1e-6},
    "mask_weight_gradient": {0: 1e-4},
    "batch_statistics": {0: 1e-6, 1: 1e-6, 2: 1e-6, 3: 1e-6},
    "normalize_backward": {0: 1e-5, 1: 1e-5, 2: 1e-5},
    "learned_normalize_backward": {0: 1e-5, 1: 1e-5, 2: 1e-5, 3: 1e-5, 4: 1e-6},
    "learned_clip_backward": {1: 1e-5, 2: 1e-6},
}


def samples(name: str) -> dict[str, Arguments]:
    """Calls of an operator by what they are about, with tensors made anew."""
    return dict(_SAMPLES[name]())


def samples_on_gpu(name: str) -> dict[str, Arguments]:
    """The same, and those of dtypes that kernels for GPUs alone take."""
    more = _SAMPLES_ON_GPU.get(name)
    return samples(name) | ({} if more is None else dict(more()))


def with_specials(values: Tensor) -> Tensor:
    """NaN, infinities, a negative zero, and an end of RELU6 among the values."""
    flat = values.flatten()
    specials = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 6.0], dtype=values.dtype)
    flat[1 : 1 + specials.numel()] = specials[: max(flat.numel() - 1, 0)]
    return flat.view(values.shape)


def tensors_of(operator: Operator, results: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """What a call gives: its results, and what it has changed."""
    returned = list(results) if isinstance(results, tuple | list) else [results]
    return returned + [arguments[index] for index in operator.mutated]


def assert_same(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Equal to the bit, or within a tolerance, and NaN in the same places; None only with None."""
    if not isinstance(expected, Tensor):
        assert actual == expected
        return
    assert actual.dtype is expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = (each.nan_to_num(77.0, posinf=torch.inf, neginf=-torch.inf) for each in (actual, expected))
    if tolerance:
        assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(actual, expected)


def assert_same_layout(actual: Tensor, expected: Tensor) -> None:
    if actual.numel() > 0:
        one, other = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (actual, expected))
        assert one == other


def on_reference(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What an operation gives without compiled kernels."""
    with kernels.reference_kernels():
        return operation(*arguments, **options)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that fills one block of memory."""
    return torch.empty_like(tensor).copy_(tensor)


def rows_of(values: Tensor) -> Tensor:
    """The same values, channels innermost in memory."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def observer(channels: int, *, is_new: bool = True) -> tuple[Tensor, ...]:
    """Minimum, maximum, the number of batches, scale and zero point."""
    end = math.inf if is_new else 0.5
    return (
        torch.full((channels,), end),
        torch.full((channels,), -end if is_new else 0.7),
        torch.tensor([0 if is_new else 4]),
        torch.ones(channels),
        torch.zeros(channels),
    )


def _floats() -> Iterator[tuple[str, Tensor, int]]:
    """Tensors of values, and an axis of theirs or -1."""
    for layout, values in layouts(torch.randn(_IMAGE) * 3).items():
        yield layout, values, -1
        yield f"{layout}, per channel", values, 1
    for shape in _SHAPES:
        yield f"of shape {shape}", torch.randn(shape) * 3, -1
        if shape:
            yield f"of shape {shape}, per channel", torch.randn(shape) * 3, len(shape) - 1
    yield "in bfloat16", torch.randn(_IMAGE).bfloat16() * 3, 1
    yield "with what is not finite", with_specials(torch.randn(_IMAGE) * 3), 1


def _codes() -> Iterator[tuple[str, Tensor]]:
    yield from layouts(random_codes(_IMAGE, UNSIGNED)).items()
    for shape in _SHAPES:
        yield f"of shape {shape}", random_codes(shape, SIGNED)


def _grid(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Scale, and zero point: fractional, as a learned one is."""
    channels = 1 if axis < 0 else values.shape[axis]
    return torch.rand(channels) * 0.05 + 0.01, torch.randn(channels) * 60


def _quantize() -> Iterator[tuple[str, Arguments]]:
    for label, values, axis in _floats():
        scale, zero_point = _grid(values, axis)
        yield label, (values.nan_to_num(0.0), scale, zero_point.round().clamp(-128, 127), -128, 127, SIGNED, axis)
    for label, shape in _LARGE.items():
        values = torch.randn(shape) * 3
        scale, zero_point = _grid(values, 1)
        yield label, (values, scale, zero_point.round().clamp(0, 255).int(), 0, 255, UNSIGNED, 1)


def _quantize_halves() -> Iterator[tuple[str, Arguments]]:
    values = with_specials(torch.randn(_IMAGE) * 3).nan_to_num(0.0).half()
    scale, zero_point = _grid(values, 1)
    yield "in float16", (values, scale, zero_point.round().clamp(0, 255).int(), 0, 255, UNSIGNED, 1)


def _dequantize() -> Iterator[tuple[str, Arguments]]:
    for label, codes in _codes():
        yield label, (codes, *_grid(codes, -1), -1, torch.float32)
        if codes.dim() > 1:
            yield f"{label}, per channel", (codes, *_grid(codes, 1), 1, torch.float32)
    integer = torch.ones(1), torch.tensor([3]).int(), -1
    yield "of an integer zero point", (random_codes((5, 7), SIGNED), *integer, torch.float32)
    for label, shape in _LARGE.items():
        codes = random_codes(shape, UNSIGNED)
        yield label, (codes, *_grid(codes, 1), 1, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        codes = random_codes(_IMAGE, UNSIGNED)
        yield f"to {dtype}", (codes, *_grid(codes, 1), 1, dtype)


def _fake_quantize() -> Iterator[tuple[str, Arguments]]:
    for label, values, axis in _floats():
        grid = (*_grid(values, axis), -128, 127, axis)
        yield label, (values, None, *grid, *UNBOUNDED, True, True, True, SIGNED)
    values = torch.randn(_IMAGE) * 3
    scale, zero_point = _grid(values, 1)
    for label, wanted in {
        "values alone": (True, False, False, None),
        "a mask alone": (False, True, False, None),
        "extremes alone": (False, False, True, None),
        "codes alone": (False, False, False, UNSIGNED),
    }.items():
        yield label, (values, None, scale, zero_point, 0, 255, 1, *UNBOUNDED, *wanted)
    for dtype in FLOATS:
        cast = values.to(dtype)
        shared = (cast, cast.flip(0), scale[:1], zero_point[:1], -7, 7, -1, *RELU6, True, True, True, SIGNED)
        yield f"a sum, clipped, in {dtype}", shared
    yield (
        "one scale for all channels",
        (values, None, scale[:1], zero_point[:1], 0, 255, 1, *RELU6, True, True, True, UNSIGNED),
    )


def _mask_gradient() -> Iterator[tuple[str, Arguments]]:
    for label, values, _ in _floats():
        flags = dense(values) > 0
        yield label, (values, pack_mask(flags), list(flags.stride()), 0.5 if values.dtype is torch.bfloat16 else None)
    flags = rows_of(torch.rand(_IMAGE)) > 0.5
    yield "another layout than the mask, clipped", (torch.randn(_IMAGE), pack_mask(flags), list(flags.stride()), 0.7)


def _fake_quantize_backward() -> Iterator[tuple[str, Arguments]]:
    for label, values, axis in _floats():
        grid = (*_grid(values, axis), -128, 127, axis)
        yield label, (torch.randn_like(values), values.nan_to_num(0.0), *grid, False, None, True)
    values = torch.randn(_IMAGE) * 3
    grid = (*_grid(values, 1), 0, 255, 1)
    yield "all that saturated passes, clipped", (torch.randn(_IMAGE), rows_of(values), *grid, True, 0.7, True)
    yield "all passes as it is", (rows_of(torch.randn(_IMAGE)), values, *grid, True, None, True)
    yield "of scale and zero point alone", (torch.randn(_IMAGE), values, *grid, False, None, False)


def _mask_weight_gradient() -> Iterator[tuple[str, Arguments]]:
    for shape in ((12, 7), (6, 5, 3, 3), (3, 70, 1, 1)):
        for layout, weight in layouts(torch.randn(shape)).items():
            scale, gradient = torch.rand(shape[0]) * 0.02 + 0.01, torch.randn_like(weight)
            zero_point = torch.zeros(shape[0])
            yield f"{shape}, {layout}", (gradient, weight, scale, zero_point, -127, 127, 0, False, None)
    other = torch.randn(shape[::-1]).permute(3, 2, 1, 0)
    yield "laid out otherwise", (other, weight, scale, zero_point, -7, 7, 0, False, 0.7)
    yield "all that saturated passes", (gradient, weight, scale, zero_point, -7, 7, 0, True, 0.7)
    unbounded = torch.randn_like(weight).masked_fill_(weight > 1, torch.inf).masked_fill_(weight < -1, -torch.inf)
    yield (
        "infinities, whole vectors of which pass",
        (unbounded, weight, scale * 100, zero_point, -127, 127, 0, False, None),
    )
    yield "per tensor", (gradient, weight, scale[:1], zero_point[:1], -127, 127, -1, False, None)


def _extremes() -> Iterator[tuple[str, Arguments]]:
    for label, values, axis in _floats():
        yield label, (values, axis)


def _update_moving_average() -> Iterator[tuple[str, Arguments]]:
    ends = {"affine": (0, 255, False, 0), "symmetric": (-128, 127, True, 0)}
    for label, values, axis in _floats():
        if values.numel() > 0:
            channels = 1 if axis < 0 else values.shape[axis]
            yield label, (values, False, axis, *observer(channels, is_new=axis < 0), 0.1, *ends["affine"], True)
    for kind, grid in ends.items():
        yield f"measured, {kind}", (torch.rand(2, 5), True, 1, *observer(5, is_new=False), 0.3, *grid, True)
    yield "not due", (torch.randn(_IMAGE), False, 1, *observer(5), 1.0, *ends["symmetric"], False)


def _lookup() -> Iterator[tuple[str, Arguments]]:
    for label, codes in _codes():
        yield label, (codes, random_codes((256,), SIGNED))


def _lookup_gradient() -> Iterator[tuple[str, Arguments]]:
    slopes = torch.randn(256)
    slopes[::5] = 0
    for label, codes in _codes():
        yield label, (torch.randn(codes.shape), codes, slopes, None)
    broken = with_specials(torch.randn(_IMAGE))
    yield "with what is not finite", (broken, random_codes(_IMAGE, UNSIGNED), slopes, None)
    yield "clipped", (rows_of(torch.randn(_IMAGE)), random_codes(_IMAGE, UNSIGNED), slopes, 0.7)


def _lookup_gradient_in_halves() -> Iterator[tuple[str, Arguments]]:
    codes, slopes = random_codes(_IMAGE, UNSIGNED), torch.randn(256)
    for dtype in (torch.bfloat16, torch.float16):
        gradient = with_specials(torch.randn(_IMAGE)).to(dtype)
        yield f"in {dtype}", (gradient, codes, slopes, None)
        yield f"in {dtype}, clipped", (rows_of(gradient), codes, slopes, 0.7)


def _occurring() -> Iterator[tuple[str, Arguments]]:
    for label, codes in _codes():
        yield label, (codes,)
    yield "many", (random_codes((9000,), SIGNED).clamp(-100, 90),)
    yield "many, the last of them alone of its kind", (torch.arange(9001).div(9000).to(UNSIGNED),)


def _add() -> Iterator[tuple[str, Arguments]]:
    numbers = torch.tensor([0.53]), torch.tensor([1.21]), torch.tensor([3.7])

    def call(left: Tensor, right: Tensor) -> Arguments:
        return left, numbers[0], right, numbers[1], numbers[2], 0, 255, UNSIGNED

    lefts, rights = layouts(random_codes(_IMAGE, UNSIGNED)), layouts(random_codes(_IMAGE, SIGNED))
    for layout, left in lefts.items():
        yield layout, call(left, rights[layout])
        yield f"{layout} and contiguous", call(left, rights["contiguous"])
        yield f"contiguous and {layout}", call(lefts["contiguous"], rights[layout])
        yield f"{layout} and one", call(left, rights["contiguous"][:1, :1, :1, :1])
        yield f"{layout} and a row to a channel", call(left, rights[layout][:, :, :1, :1])
    yield "fewer dimensions", call(random_codes((3,), UNSIGNED), rights["channels last"])
    yield "every other dimension", call(random_codes((2, 1, 4, 1), UNSIGNED), random_codes((2, 3, 4, 5), UNSIGNED))
    for label, (*rows, columns) in _LARGE.items():
        yield label, call(random_codes((*rows, columns), UNSIGNED), random_codes((columns,), SIGNED))
    yield "nothing", call(random_codes((0, 4), UNSIGNED), random_codes((1, 4), UNSIGNED))


def _requantize() -> Iterator[tuple[str, Arguments]]:
    rest = (3, 0, 255, UNSIGNED)
    for layout, sums in layouts(torch.randint(-50_000, 50_000, _IMAGE, dtype=torch.int32)).items():
        yield layout, (sums, torch.arange(5).int() * 99, torch.rand(5) * 1e-2, *rest, 1)
    for layout, sums in layouts(torch.randn(_IMAGE).mul(5000).round()).items():
        yield f"{layout}, floats", (sums, None, torch.rand(1) * 1e-2, *rest, 1)
        bias = torch.arange(5).int() * 99
        yield f"{layout}, floats, an integer bias", (sums, bias, torch.rand(5) * 1e-2, *rest, 1)
    yield "of a linear layer", (torch.randn(4, 5).round(), torch.ones(5), torch.rand(5), *rest, -1)
    for label, shape in _LARGE.items():
        sums = torch.randint(-50_000, 50_000, shape, dtype=torch.int32)
        bias, multiplier = torch.arange(shape[1]).int() * 99, torch.rand(shape[1]) * 1e-2
        yield label, (sums, bias, multiplier, *rest, 1)
        yield f"{label}, one multiplier", (sums, bias, multiplier[:1], *rest, 1)
        yield f"{label}, one bias", (sums, bias[-1:], multiplier, *rest, 1)
    yield "nothing", (torch.zeros(0, 5).int(), None, torch.rand(5), *rest, -1)


def _max_pool2d() -> Iterator[tuple[str, Arguments]]:
    for layout, codes in layouts(random_codes(_IMAGE, SIGNED)).items():
        yield layout, (codes, [2, 3], [1, 2], [1, 1], [1, 1], True)
    codes = rows_of(random_codes((1, 64, 9, 10), UNSIGNED))
    yield "many channels", (codes, [3, 3], [1, 1], [1, 1], [1, 1], False)
    yield "dilated", (random_codes((2, 3, 8, 9), UNSIGNED), [3, 2], [2, 2], [1, 1], [2, 1], False)
    yield "an empty batch", (random_codes((0, 3, 8, 9), SIGNED), [3, 2], [2, 2], [1, 1], [2, 1], False)


def _sum_positions() -> Iterator[tuple[str, Arguments]]:
    for layout, codes in layouts(random_codes(_IMAGE, SIGNED)).items():
        yield layout, (codes,)
    yield "one dimension", (random_codes((2, 3, 9), UNSIGNED),)
    yield "many positions", (random_codes(_LARGE["long channels"], UNSIGNED),)
    yield "many positions, channels last", (rows_of(random_codes((2, 5, 20, 30), SIGNED)),)
    yield "an empty batch", (random_codes((0, 3, 9), UNSIGNED),)
    yield "no positions", (random_codes((2, 3, 0), UNSIGNED),)


def _average_positions() -> Iterator[tuple[str, Arguments]]:
    grids = (torch.tensor([9], dtype=torch.int32), torch.tensor([0.5]))
    output = (torch.tensor([0.3]), torch.tensor([3], dtype=torch.int32))
    for layout, codes in layouts(random_codes(_IMAGE, SIGNED)).items():
        yield layout, (codes, *grids, *output, 0, 255, UNSIGNED)
    yield "one dimension", (random_codes((2, 3, 9), UNSIGNED), *grids, *output, 10, 200, UNSIGNED)
    yield "an empty batch", (random_codes((0, 3, 9), UNSIGNED), *grids, *output, 0, 255, UNSIGNED)


def _codes_of_a_layer(shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    codes = random_codes(shape, UNSIGNED)
    yield "", codes
    if len(shape) == 4 and shape[0] > 0:
        for layout, laid_out in layouts(codes).items():
            if layout in ("channels last", "half of the channels", "expanded"):
                yield f", {layout}", laid_out
        yield ", signed", random_codes(shape, SIGNED)


def _train_layer() -> Iterator[tuple[str, Arguments]]:
    grid = torch.tensor([[0.037], [3.0]])
    for label, (shape, weight_shape, geometry) in LAYERS.items():
        outputs = weight_shape[0]
        weight, bias = torch.randn(weight_shape), torch.randn(outputs)
        for layout, codes in _codes_of_a_layer(shape):
            per_channel = (0, *observer(outputs), 0.1, -127, 127, True, True, *geometry, torch.float32)
            yield f"{label}{layout}, per channel", (codes, grid, weight, bias, *per_channel)
        per_tensor = (-1, *observer(1, is_new=False), 0.1, -127, 127, True, False, *geometry, torch.float32)
        yield f"{label}, per tensor", (random_codes(shape, UNSIGNED), grid, weight, None, *per_tensor)
        quiet = (0, *observer(outputs), 0.1, -7, 7, False, True, *geometry, torch.float32)
        turned = dense(layouts(weight)["turned"])
        yield f"{label}, unobserved", (random_codes(shape, UNSIGNED), grid, turned, bias, *quiet)
    shape, weight_shape, geometry = LAYERS["conv2d"]
    rest = (0, *observer(weight_shape[0]), 0.1, -127, 127, True, True, *geometry, torch.float32)
    broken = with_specials(torch.randn(weight_shape))
    yield "a weight with what is not finite", (random_codes(shape, UNSIGNED), grid, broken, None, *rest)
    bias = with_specials(torch.randn(weight_shape[0]) * 1e9)
    rest = (0, *observer(weight_shape[0]), 0.1, -127, 127, True, True, *geometry, torch.float32)
    yield "biases that do not fit", (random_codes(shape, UNSIGNED), grid, torch.randn(weight_shape), bias, *rest)
    nowhere = torch.tensor([[math.nan], [3.0]])
    rest = (0, *observer(weight_shape[0]), 0.1, -127, 127, True, True, *geometry, torch.float32)
    bias = torch.randn(weight_shape[0])
    yield "codes of NaN", (random_codes(shape, UNSIGNED), nowhere, torch.randn(weight_shape), bias, *rest)


def _weighted_product() -> Iterator[tuple[str, Arguments]]:
    for label, arguments in _train_layer():
        codes, grid, weight, bias, axis = arguments[:5]
        scale = torch.rand(1 if axis < 0 else weight.shape[0]) * 0.02 + 0.005
        yield label, (codes, grid, weight, scale, bias, axis, -127, 127, *arguments[-5:])


def _in_halves(layers: Iterator[tuple[str, Arguments]]) -> Iterator[tuple[str, Arguments]]:
    """Of layers of a training step, some with weight and output in half precision."""
    for label, (codes, grid, weight, *others, _) in layers:
        if label in _LAYERS_IN_HALVES:
            for dtype in (torch.bfloat16, torch.float16):
                # The outputs in half precision of a weight in float32 are autocast's.
                own = weight.to(dtype) if "conv2d" not in label else weight
                yield f"{label}, in {dtype}", (codes, grid, own, *others, dtype)


def _integer_layer() -> Iterator[tuple[str, Arguments]]:
    number = torch.tensor([3]).int()
    for label, (shape, weight_shape, geometry) in LAYERS.items():
        outputs = weight_shape[0]
        weight = random_codes(weight_shape, SIGNED)
        bias = torch.randint(-5000, 5000, (outputs,), dtype=torch.int32)
        for layout, codes in _codes_of_a_layer(shape):
            to_codes = (
                torch.tensor([9]).int(),
                torch.tensor([9]).int(),
                torch.tensor([255]).int(),
                *UNBOUNDED,
                UNSIGNED,
            )
            yield f"{label}{layout}", (codes, number, weight, bias, torch.rand(outputs) * 1e-3, *to_codes, *geometry)
        to_values = (None, None, None, *RELU6, torch.float32)
        codes = random_codes(shape, SIGNED)
        yield f"{label}, to values", (codes, number, weight, bias, torch.rand(1) * 1e-3, *to_values, *geometry)


def _folded_layer() -> Iterator[tuple[str, Arguments]]:
    for label, arguments in _integer_layer():
        codes, number, weight, bias, multiplier, *grid = arguments
        rest = (9, 9.0, 255.0, UNSIGNED) if grid[0] is not None else (0, *RELU6, torch.float32)
        folded = fold_zero_point(weight, bias, int(number), codes.dtype)
        yield label, (codes, int(number), *folded, multiplier, *rest, *grid[-4:])


def _pack_layer() -> Iterator[tuple[str, Arguments]]:
    for label, (_, weight_shape, (stride, padding, dilation, groups)) in LAYERS.items():
        outputs, inputs, *kernel = weight_shape
        # What is not in two dimensions is packed as a row of them.
        missing = 2 - len(kernel)
        weight = random_codes((outputs, inputs, *[1] * missing, *kernel), SIGNED)
        geometry = [1] * missing + stride, [0] * missing + padding, [1] * missing + dilation, groups
        bias = torch.randint(-5000, 5000, (outputs,), dtype=torch.int32)
        multiplier = torch.rand(outputs) * 1e-3
        yield label, (weight, bias, multiplier, *geometry, 3, UNSIGNED, 9, 9.0, 255.0, UNSIGNED)
        to_values = (-3, SIGNED, 0, *RELU6, torch.float32)
        yield f"{label}, to values", (weight, None, multiplier[:1], *geometry, *to_values)


def _packed_layer() -> Iterator[tuple[str, Arguments]]:
    if kernels.active_path() != "native":
        return  # there is nothing else that packs
    for label, arguments in _pack_layer():
        shape, weight_shape, geometry = LAYERS[label.removesuffix(", to values")]
        packed = DECLARED["pack_layer"].overload(*arguments)
        layer = packed, weight_shape[0], list(weight_shape[2:]), *geometry, arguments[-1]
        for layout, codes in _codes_of_a_layer(shape):
            if codes.dtype is UNSIGNED:
                yield f"{label}{layout}", (codes if arguments[8] is UNSIGNED else codes.view(SIGNED), *layer)


def _fingerprints() -> Iterator[tuple[str, Arguments]]:
    for layout, values in layouts(torch.randn(_IMAGE)).items():
        yield layout, ([values],)
    yield "several", ([torch.randn(3), torch.randn(0), torch.randn(4, 5).bfloat16(), torch.randn(()).double()],)


def _snapshot() -> Iterator[tuple[str, Arguments]]:
    yield "a vector", (torch.randn(5),)
    yield "an integer", (torch.tensor([3]),)


def _refuse_recomputation() -> Iterator[tuple[str, Arguments]]:
    yield "outside of a checkpoint", (torch.tensor([3]),)


def _batch_statistics() -> Iterator[tuple[str, Arguments]]:
    for shape in (_IMAGE, (4, 5), (3, 5, 7)):
        yield f"of shape {shape}", (rows_of(torch.randn(shape)), torch.randn(5), torch.rand(5), 0.1, 1e-5)
    yield "nothing that runs", (rows_of(torch.randn(_IMAGE)), None, None, 0.1, 1e-5)


def _normalize() -> Iterator[tuple[str, Arguments]]:
    scale, zero_point = torch.tensor([0.043]), torch.tensor([77.3])
    for shape in (_IMAGE, (4, 5), (3, 5, 7)):
        values = rows_of(torch.randn(shape) * 2)
        numbers = torch.randn(5), torch.rand(5) + 0.5, torch.randn(5), torch.randn(5)
        yield f"of shape {shape}", (values, *numbers, scale, zero_point, 0, 255, *UNBOUNDED, UNSIGNED)
        yield f"of shape {shape}, values alone", (values, *numbers, scale, zero_point, 0, 255, *RELU6, None)
        none = (*numbers[:2], None, None, scale, zero_point, -128, 127, *RELU6, SIGNED)
        yield f"of shape {shape}, without weight and bias", (values, *none)
    broken = rows_of(with_specials(torch.randn(_IMAGE)))
    yield "with what is not finite", (broken, *numbers, scale, zero_point, 0, 255, *UNBOUNDED, UNSIGNED)


def _normalize_backward() -> Iterator[tuple[str, Arguments]]:
    for shape in (_IMAGE, (4, 5), (3, 5, 7)):
        values = rows_of(torch.randn(shape) * 2)
        mask, gradient = pack_mask(values > 0), rows_of(torch.randn(shape))
        statistics = torch.randn(5), torch.rand(5) + 0.5
        yield f"of shape {shape}", (gradient, mask, values, *statistics, torch.randn(5), math.inf, False)
        yield f"of shape {shape}, without a weight, clipped", (gradient, mask, values, *statistics, None, 0.7, False)
        yield f"of shape {shape}, frozen", (gradient, mask, values, *statistics, torch.randn(5), math.inf, True)


def _learned_normalize_backward() -> Iterator[tuple[str, Arguments]]:
    scale, zero_point = torch.tensor([0.043]), torch.tensor([77.3])
    for label, (*operands, weight, clip, is_frozen) in _normalize_backward():
        ends = (0, 255, *UNBOUNDED) if is_frozen else (0, 100, *RELU6)
        bias = None if weight is None else torch.randn(5)
        yield label, (*operands, weight, bias, scale, zero_point, *ends, clip, is_frozen)


def _learned_clip_backward() -> Iterator[tuple[str, Arguments]]:
    scale, zero_point = torch.tensor([0.043]), torch.tensor([7.0])
    for layout, values in layouts(torch.randn(_IMAGE) * 2).items():
        gradient, addend = torch.randn(_IMAGE), torch.randn(_IMAGE)
        mask = pack_mask(torch.empty_like(values).copy_(torch.randn(_IMAGE)) > 0)
        operands = gradient, mask, values, None
        yield layout, (*operands, None, None, scale, zero_point, 0, 255, *RELU6, math.inf)
        yield f"a sum, {layout}", (*operands, addend, None, scale, zero_point, 0, 31, *UNBOUNDED, 0.7)
        codes = torch.empty_like(values, dtype=UNSIGNED).copy_(torch.randint(0, 256, _IMAGE))
        other = torch.randint(-128, 128, _IMAGE, dtype=torch.int8)
        on_grids = codes, torch.tensor([[0.02], [113.0]]), other, torch.tensor([[0.01], [0.0]])
        yield f"a sum of codes, {layout}", (gradient, mask, *on_grids, scale, zero_point, 0, 31, *RELU6, math.inf)
        mixed = values, None, *on_grids[2:]
        yield f"a sum with codes, {layout}", (gradient, mask, *mixed, scale, zero_point, 0, 31, *UNBOUNDED, math.inf)
        alone = *on_grids[:2], None, None
        yield f"codes, {layout}", (gradient, mask, *alone, scale, zero_point, 0, 31, *RELU6, math.inf)


_SAMPLES: dict[str, Callable[[], Iterator[tuple[str, Arguments]]]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "fake_quantize": _fake_quantize,
    "mask_gradient": _mask_gradient,
    "fake_quantize_backward": _fake_quantize_backward,
    "mask_weight_gradient": _mask_weight_gradient,
    "extremes": _extremes,
    "update_moving_average": _update_moving_average,
    "lookup": _lookup,
    "lookup_gradient": _lookup_gradient,
    "occurring": _occurring,
    "add": _add,
    "requantize": _requantize,
    "max_pool2d": _max_pool2d,
    "sum_positions": _sum_positions,
    "average_positions": _average_positions,
    "train_layer": _train_layer,
    "weighted_product": _weighted_product,
    "integer_layer": _integer_layer,
    "folded_layer": _folded_layer,
    "pack_layer": _pack_layer,
    "packed_layer": _packed_layer,
    "fingerprints": _fingerprints,
    "snapshot": _snapshot,
    "refuse_recomputation": _refuse_recomputation,
    "batch_statistics": _batch_statistics,
    "normalize": _normalize,
    "normalize_backward": _normalize_backward,
    "learned_normalize_backward": _learned_normalize_backward,
    "learned_clip_backward": _learned_clip_backward,
}

_LAYERS_IN_HALVES = (
    "linear, per tensor",
    "conv1d, unobserved",
    "conv2d, channels last, per channel",
    "depthwise, per channel",
    "a weight with what is not finite",
    "biases that do not fit",
)


def _folded_layer_in_halves() -> Iterator[tuple[str, Arguments]]:
    for label, (*layer, dtype, stride, padding, dilation, groups) in _folded_layer():
        if dtype is torch.float32:
            for half in (torch.bfloat16, torch.float16):
                yield f"{label} in {half}", (*layer, half, stride, padding, dilation, groups)


_SAMPLES_ON_GPU: dict[str, Callable[[], Iterator[tuple[str, Arguments]]]] = {
    "quantize": _quantize_halves,
    "lookup_gradient": _lookup_gradient_in_halves,
    "folded_layer": _folded_layer_in_halves,
    "train_layer": lambda: _in_halves(_train_layer()),
    "weighted_product": lambda: _in_halves(_weighted_product()),
}

# Every operator with each of its samples.
LABELS = [(name, label) for name in _SAMPLES for label in samples(name)]
LABELS_ON_GPU = [(name, label) for name in _SAMPLES for label in samples_on_gpu(name)]
