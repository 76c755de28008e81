"""Random calls of operators: sizes as networks have them, and others that no block divides, dtypes, layouts, axes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from example_codes import SIGNED, UNSIGNED, random_codes
from example_operators import RELU6, UNBOUNDED, observer, rows_of, with_specials
from mlframework.quantization.kernels.operators.integer_layers import fold_zero_point
from mlframework.quantization.kernels.operators.masks import pack_mask

Arguments = tuple[Any, ...]

# Elements of a tensor, and multiply-adds of a layer: what the CPU's references take tenths of a second for.
_MOST_ELEMENTS = 2_000_000
_MOST_PRODUCTS = 300_000_000

# Of gradients: one that every dtype has.
CLIP = 0.75

GRIDS = ((-128, 127, SIGNED), (0, 255, UNSIGNED), (-127, 127, SIGNED), (-8, 7, SIGNED), (0, 15, UNSIGNED))


class Draw:
    """Random sizes and tensors.

    Args:
        seed: the same one draws the same.
        tiny: sizes for an interpreter.
        dtypes: of floats.
    """

    def __init__(self, seed: int, tiny: bool, dtypes: tuple[torch.dtype, ...]) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.tiny = tiny
        self.dtypes = dtypes
        # The interpreter's halves are not those of a GPU (tests/kernels/triton_gpu/conftest.py).
        self.floats_of_results = (torch.float32,) if tiny else (torch.float32, torch.bfloat16, torch.float16)

    def maybe(self, value: Any, chance: float = 0.5) -> Any:
        return value if self.random.random() < chance else None

    def one_of(self, *values: Any) -> Any:
        return self.random.choice(values)

    def image(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        if self.tiny:
            return self.random.randint(1, 2), self.random.randint(1, 9), 5, self.random.randint(1, 4)
        channels = self.one_of(3, 16, 24, 64, 96, 130, 256, 512)
        height, width = self.one_of(7, 14, 28, 33, 56, 112), self.one_of(7, 14, 28, 31, 56, 112)
        most = max(1, _MOST_ELEMENTS // (channels * height * width))
        return self.random.randint(1, min(most, 64)), channels, height, width

    def shape(self) -> tuple[int, ...]:
        """Of one dimension to four."""
        dimensions = self.random.randint(1, 4)
        if dimensions == 4:
            return self.image()
        if self.tiny:
            return tuple(self.random.randint(1, 9) for _ in range(dimensions))
        if dimensions == 1:
            return (self.random.randint(1, _MOST_ELEMENTS),)
        width = self.one_of(1, 33, 256, 768, 1000, 3072, 4096)
        rows = self.random.randint(1, _MOST_ELEMENTS // width)
        return (rows, width) if dimensions == 2 else (self.random.randint(1, 8), -(-rows // 8), width)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Contiguous, with the channels last, with rows for columns, or a part of a larger tensor."""
        layout = self.one_of("contiguous", "contiguous", "channels last", "channels last", "turned", "part")
        if layout == "channels last" and tensor.dim() > 1:
            return rows_of(tensor)
        if layout == "turned" and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "part" and tensor.dim() > 1:
            return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
        return tensor

    def floats(self, shape: tuple[int, ...]) -> Tensor:
        """Values of which some saturate."""
        values = torch.randn(shape) * 3
        if self.maybe(True, 0.2):
            values = with_specials(values)
        return self.laid_out(values.to(self.one_of(*self.dtypes)))

    def gradient_of(self, values: Tensor) -> Tensor:
        """Of another layout now and then, and with a mean: sums of it are far from zero."""
        gradient = (torch.randn(values.shape) + 0.5).to(values.dtype)
        return self.laid_out(gradient) if self.maybe(True, 0.2) else torch.empty_like(values).copy_(gradient)

    def axis(self, shape: tuple[int, ...]) -> int:
        """One that has channels, or -1."""
        return self.one_of(-1, self.random.randrange(len(shape)))

    def grid(self, shape: tuple[int, ...], axis: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point, which is fractional now and then."""
        channels = 1 if axis < 0 else shape[axis]
        zero_point = torch.randn(channels) * 20
        return torch.rand(channels) * 0.05 + 0.01, zero_point if self.maybe(True) else zero_point.round()

    def codes(self, shape: tuple[int, ...]) -> Tensor:
        return self.laid_out(random_codes(shape, self.one_of(SIGNED, UNSIGNED)))

    def size_of_a_layer(self) -> int:
        """Any size, or one that tiles divide."""
        if self.tiny:
            return self.random.randint(1, 40)
        return self.one_of(64, 128, 256, 768, 1000, self.random.randint(1, 800))

    def layer(self) -> tuple[tuple[int, ...], tuple[int, ...], Arguments]:
        """The shape of the codes, that of the weight, and the geometry as operators take it."""
        if self.maybe(True):
            rows, inputs, outputs = (self.size_of_a_layer() for _ in range(3))
            return (rows, inputs), (outputs, inputs), ([], [], [], 1)
        kernel, stride, dilation = self.one_of(1, 3, 3, 5), self.one_of(1, 1, 2), self.one_of(1, 1, 2)
        size = 6 if self.tiny else self.one_of(7, 14, 28, 31)
        geometry = [stride] * 2, [self.random.randint(0, kernel // 2)] * 2, [dilation] * 2
        size = max(size, dilation * (kernel - 1) + 1)
        channels = self.random.randint(1, 9) if self.tiny else self.one_of(3, 16, 33, 64, 128, 256)
        if self.maybe(True, 0.3):
            return (2, channels, size, size), (channels, 1, kernel, kernel), (*geometry, channels)
        outputs = self.random.randint(1, 9) if self.tiny else self.one_of(8, 10, 64, 130)
        products = channels * outputs * kernel * kernel * size * size
        batch = min(2 if self.tiny else 16, max(1, _MOST_PRODUCTS // products))
        return (batch, channels, size, size), (outputs, channels, kernel, kernel), (*geometry, 1)


def _fake_quantize(draw: Draw) -> Arguments:
    values = draw.floats(draw.shape())
    addend = draw.maybe(draw.laid_out(torch.randn(values.shape).to(values.dtype)), 0.3)
    axis = draw.axis(tuple(values.shape))
    lowest, highest, dtype = draw.one_of(*GRIDS)
    wanted = draw.one_of((True, True, axis < 0), (True, False, False), (False, True, False), (True, True, False))
    clip = draw.one_of(UNBOUNDED, UNBOUNDED, RELU6)
    return (
        values,
        addend,
        *draw.grid(tuple(values.shape), axis),
        lowest,
        highest,
        axis,
        *clip,
        *wanted,
        draw.maybe(dtype),
    )


def _mask_gradient(draw: Draw) -> Arguments:
    gradient = draw.floats(draw.shape())
    flags = torch.empty_like(gradient, dtype=torch.bool).copy_(torch.rand(gradient.shape) > 0.4)
    return draw.gradient_of(gradient), pack_mask(flags), list(flags.stride()), draw.maybe(CLIP)


def _fake_quantize_backward(draw: Draw) -> Arguments:
    values = draw.floats(draw.shape()).nan_to_num(0.0, 50.0, -50.0)
    axis = draw.axis(tuple(values.shape))
    lowest, highest, _ = draw.one_of(*GRIDS)
    grid = (*draw.grid(tuple(values.shape), axis), lowest, highest, axis)
    return draw.gradient_of(values), values, *grid, draw.one_of(True, False), draw.maybe(CLIP), 0.01, True


def _quantize(draw: Draw) -> Arguments:
    values = draw.floats(draw.shape()).nan_to_num(0.0)
    axis = draw.axis(tuple(values.shape))
    lowest, highest, dtype = draw.one_of(*GRIDS)
    scale, zero_point = draw.grid(tuple(values.shape), axis)
    return values, scale, zero_point.round().clamp(lowest, highest), lowest, highest, dtype, axis


def _dequantize(draw: Draw) -> Arguments:
    codes = draw.codes(draw.shape())
    axis = draw.axis(tuple(codes.shape))
    return codes, *draw.grid(tuple(codes.shape), axis), axis, draw.one_of(*draw.floats_of_results)


def _extremes(draw: Draw) -> Arguments:
    values = draw.floats(draw.shape())
    return values, draw.axis(tuple(values.shape))


def _update_moving_average(draw: Draw) -> Arguments:
    values = draw.floats(draw.shape())
    axis = draw.axis(tuple(values.shape))
    channels = 1 if axis < 0 else values.shape[axis]
    grid = draw.one_of((0, 255, False, 0), (-128, 127, True, 0))
    return (
        values,
        False,
        axis,
        *observer(channels, is_new=draw.one_of(True, False)),
        0.1,
        *grid,
        draw.one_of(True, False),
    )


def _lookup(draw: Draw) -> Arguments:
    return draw.codes(draw.shape()), random_codes((256,), draw.one_of(SIGNED, UNSIGNED))


def _lookup_gradient(draw: Draw) -> Arguments:
    codes = draw.codes(draw.shape())
    gradient = draw.laid_out(torch.randn(codes.shape).to(draw.one_of(*draw.dtypes)))
    return gradient, codes, torch.randn(256), draw.maybe(CLIP)


def _add(draw: Draw) -> Arguments:
    left = draw.codes(draw.shape())
    right = draw.codes(tuple(left.shape))
    return left, torch.tensor([0.53]), right, torch.tensor([1.21]), torch.tensor([3.7]), *draw.one_of(*GRIDS[:2])


def _requantize(draw: Draw) -> Arguments:
    shape = draw.one_of(draw.image(), draw.image()[:2])
    sums = draw.laid_out(torch.randint(-50_000, 50_000, shape, dtype=torch.int32))
    bias = draw.maybe(torch.randint(-5000, 5000, (shape[1],), dtype=torch.int32))
    return sums, bias, torch.rand(shape[1]) * 1e-2, 3, 0, 255, UNSIGNED, 1 if len(shape) == 4 else -1


def _max_pool2d(draw: Draw) -> Arguments:
    kernel = draw.one_of(2, 3)
    return draw.codes(draw.image()), [kernel, 3], [2, draw.one_of(1, 2)], [1, 1], [1, 1], draw.one_of(True, False)


def _occurring(draw: Draw) -> Arguments:
    return (draw.codes(draw.shape()),)


def _positions(draw: Draw) -> Arguments:
    return (draw.codes(draw.image()),)


def _average_positions(draw: Draw) -> Arguments:
    grids = torch.tensor([9], dtype=torch.int32), torch.tensor([0.5])
    output = torch.tensor([0.3]), torch.tensor([3], dtype=torch.int32)
    return draw.codes(draw.image()), *grids, *output, 0, 255, UNSIGNED


def _train_layer(draw: Draw) -> Arguments:
    shape, weight_shape, geometry = draw.layer()
    outputs = weight_shape[0]
    codes = draw.laid_out(random_codes(shape, UNSIGNED))
    bias = draw.maybe(torch.randn(outputs))
    grid = torch.tensor([[0.037], [float(draw.one_of(0, 3, 128))]])
    rest = (0, *observer(outputs, is_new=draw.one_of(True, False)), 0.1, -127, 127, True, True, *geometry)
    return codes, grid, torch.randn(weight_shape), bias, *rest, draw.one_of(*draw.floats_of_results)


def _weighted_product(draw: Draw) -> Arguments:
    codes, grid, weight, bias, *rest = _train_layer(draw)
    return codes, grid, weight, torch.rand(weight.shape[0]) * 0.02 + 0.005, bias, 0, -127, 127, *rest[-5:]


def _integer_layer(draw: Draw) -> Arguments:
    shape, weight_shape, geometry = draw.layer()
    outputs = weight_shape[0]
    bias = torch.randint(-5000, 5000, (outputs,), dtype=torch.int32)
    number = torch.tensor([9]).int()
    to_codes = (number, number.clone(), torch.tensor([255]).int(), *UNBOUNDED, UNSIGNED)
    output = draw.one_of(to_codes, (None, None, None, *RELU6, torch.float32))
    weight = random_codes(weight_shape, SIGNED)
    return draw.codes(shape), torch.tensor([3]).int(), weight, bias, torch.rand(outputs) * 1e-3, *output, *geometry


def _folded_layer(draw: Draw) -> Arguments:
    codes, zero_point, weight, bias, multiplier, *_, stride, padding, dilation, groups = _integer_layer(draw)
    folded = fold_zero_point(weight, bias, zero_point, codes.dtype)
    output = draw.one_of((9, 9.0, 255.0, UNSIGNED), (0, *RELU6, draw.one_of(*draw.floats_of_results)))
    return codes, int(zero_point), *folded, multiplier, *output, stride, padding, dilation, groups


def _batch_of_rows(draw: Draw) -> Tensor:
    return rows_of(torch.randn(draw.image()) * 2).to(draw.one_of(*draw.dtypes))


def _batch_statistics(draw: Draw) -> Arguments:
    values = _batch_of_rows(draw)
    channels = values.shape[1]
    return values, torch.randn(channels), torch.rand(channels), 0.1, 1e-5


def _normalize(draw: Draw) -> Arguments:
    values = _batch_of_rows(draw)
    channels = values.shape[1]
    numbers = torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels)
    grid = torch.tensor([0.043]), torch.tensor([77.3]), 0, 255
    return values, *numbers, *grid, *draw.one_of(UNBOUNDED, RELU6), draw.one_of(UNSIGNED, None)


def _normalize_backward(draw: Draw) -> Arguments:
    values = _batch_of_rows(draw)
    channels = values.shape[1]
    gradient = torch.empty_like(values).copy_(torch.randn(values.shape) + 0.5)
    statistics = torch.randn(channels), torch.rand(channels) + 0.5, draw.maybe(torch.randn(channels))
    return gradient, pack_mask(values > 0), values, *statistics, draw.one_of(math.inf, CLIP), draw.one_of(True, False)


RANDOM: dict[str, Callable[[Draw], Arguments]] = {
    "fake_quantize": _fake_quantize,
    "fake_quantize_backward": _fake_quantize_backward,
    "mask_gradient": _mask_gradient,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "extremes": _extremes,
    "update_moving_average": _update_moving_average,
    "lookup": _lookup,
    "lookup_gradient": _lookup_gradient,
    "occurring": _occurring,
    "add": _add,
    "requantize": _requantize,
    "max_pool2d": _max_pool2d,
    "sum_positions": _positions,
    "average_positions": _average_positions,
    "train_layer": _train_layer,
    "weighted_product": _weighted_product,
    "integer_layer": _integer_layer,
    "folded_layer": _folded_layer,
    "batch_statistics": _batch_statistics,
    "normalize": _normalize,
    "normalize_backward": _normalize_backward,
}
