"""Linear layers and convolutions as one matrix product, and which of the ways to compute it is the fastest."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import triton
from torch import Tensor

from ..operators.layer_sums import Ints
from ..operators.layout import with_channels_last
from .dense import dense
from .launch import EXACT
from .library_products import suits_library, through_library
from .results import Result
from .tuning import fastest, loop_bound

# Tiles that share their weights, or their codes, run at the same time: the second reads them from the cache.
_TILES_TOGETHER = 8

# Fewer channels than these fill no tile.
_CHANNELS_OF_A_TILE = 32


class Configuration(NamedTuple):
    """Of a launch: the tile, as positions, outputs and products to a round; warps, and rounds that are loaded ahead."""

    rows: int
    outputs: int
    products: int
    warps: int
    stages: int


# Of these are compiled and measured for a layer; small tiles do not pay where large ones are filled.
_MOST_MEASURED = 5

# The first that is not too large for a layer runs where nothing can be measured.
_CONFIGURATIONS = (
    Configuration(128, 128, 128, 8, 3),
    Configuration(128, 128, 128, 4, 3),
    Configuration(128, 256, 128, 8, 3),
    Configuration(128, 64, 128, 4, 3),
    Configuration(64, 128, 128, 4, 4),
    Configuration(64, 64, 128, 4, 4),
    Configuration(64, 32, 128, 4, 4),
    Configuration(16, 64, 128, 4, 5),
    Configuration(16, 16, 128, 4, 5),
)


@functools.cache
def configurations(rows: int, outputs: int, products: int) -> tuple[Configuration, ...]:
    """Those for a layer with that many positions and outputs and, in a row of its input, products."""
    largest_rows, largest_outputs = (max(triton.next_power_of_2(size), 16) for size in (rows, outputs))
    # The fewest products with zeros, and then the longest rounds.
    length = min((128, 64, 32), key=lambda size: triton.cdiv(products, size) * size)
    small_enough = [each for each in _CONFIGURATIONS if each.rows <= largest_rows and each.outputs <= largest_outputs]
    return tuple(each._replace(products=length) for each in small_enough[:_MOST_MEASURED])


class _Layer(NamedTuple):
    """What :func:`.dense.dense` takes of a layer, in its order but for the number of steps, which the tile says.

    Attributes:
        groups: the second axis of the grid.
    """

    rows: int
    outputs: int
    channels: int
    length: int
    size: tuple[int, int]
    output_size: tuple[int, int]
    kernel_width: int
    strides: tuple[int, int, int]
    geometry: Sequence[int]
    has_window: bool
    is_flat: bool
    groups: int

    @property
    def products(self) -> int:
        """The number that tiles share out: those of a tap, or of all where tiles go over several."""
        return self.length if self.is_flat else self.channels


def linear(rows: Tensor, padding_code: int | Tensor, weight: Tensor, result: Result, output: Tensor) -> None:
    """Codes (M, I) by a weight (O, I), into ``output`` of M times O elements."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    outputs, channels = weight.shape
    layer = _Layer(
        rows=rows.shape[0],
        outputs=outputs,
        channels=channels,
        length=channels,
        size=(1, 1),
        output_size=(1, 1),
        kernel_width=1,
        strides=(0, rows.stride(0), 0),
        geometry=(1, 1, 0, 0, 1, 1),
        has_window=False,
        is_flat=False,
        groups=1,
    )
    _run(rows, padding_code, weight, result, output, layer)


def convolution(
    codes: Tensor,
    padding_code: int | Tensor,
    weight: Tensor,
    result: Result,
    output: Tensor,
    geometry: tuple[Ints, Ints, Ints, int],
) -> None:
    """Codes (N, C, H, W) by a weight (O, height, width, C / groups), into an output whose channels lie innermost."""
    codes = codes if codes.stride(1) == 1 else with_channels_last(codes)
    strides, padding, dilation, groups = geometry
    outputs, *kernel, channels = weight.shape
    number, _, height, width = codes.shape
    down, right = codes.stride(2), codes.stride(3)
    lies_in_rows = codes.stride(0) == height * down and down == width * right
    if kernel == [1, 1] and set(strides) == {1} and set(padding) == {0} and groups == 1 and lies_in_rows:
        rows = codes.as_strided((number * height * width, channels), (right, 1))
        linear(rows, padding_code, weight.reshape(outputs, channels), result, output)
        return
    size = output.shape[2], output.shape[3]
    layer = _Layer(
        rows=number * size[0] * size[1],
        outputs=outputs // groups,
        channels=channels,
        length=kernel[0] * kernel[1] * channels,
        size=(height, width),
        output_size=size,
        kernel_width=kernel[1],
        strides=(codes.stride(0), down, right),
        geometry=(*strides, *padding, *dilation),
        has_window=True,
        is_flat=channels < _CHANNELS_OF_A_TILE,
        groups=groups,
    )
    _run(codes, padding_code, weight, result, output, layer)


def _run(
    codes: Tensor,
    padding_code: int | Tensor,
    weight: Tensor,
    result: Result,
    output: Tensor,
    layer: _Layer,
) -> None:
    bucket = triton.next_power_of_2(layer.rows)
    choices: tuple[Configuration | None, ...] = configurations(bucket, layer.outputs, layer.products)
    suits = not layer.has_window and suits_library(codes, weight)
    if suits:
        choices = (*choices, None)

    def run(choice: Configuration | None) -> None:
        if choice is None:
            through_library(codes, weight, result, output)
        else:
            _launch(codes, padding_code, weight, result, output, layer, choice)

    key = (bucket, layer[1:], suits, codes.dtype, output.dtype, codes.device)
    run(fastest(key, choices, run))


def _launch(
    codes: Tensor,
    padding_code: int | Tensor,
    weight: Tensor,
    result: Result,
    output: Tensor,
    layer: _Layer,
    configuration: Configuration,
) -> None:
    block_m, block_n, block_k, warps, stages = configuration
    products = layer.products
    tiles = triton.cdiv(layer.rows, block_m) * triton.cdiv(layer.outputs, block_n)
    dense[(tiles, layer.groups)](
        codes,
        weight,
        result.bias,
        result.multiplier,
        output,
        padding_code,
        *result[2:],
        layer.rows,
        layer.outputs,
        layer.channels,
        loop_bound(layer.length // products * triton.cdiv(products, block_k)),
        layer.length,
        *layer.size,
        *layer.output_size,
        layer.kernel_width,
        *layer.strides,
        *layer.geometry,
        layer.has_window,
        layer.is_flat,
        not layer.is_flat and products % block_k == 0,
        isinstance(padding_code, Tensor),
        isinstance(padding_code, int) and padding_code == 0,  # which is loaded past the registers
        result.multiplier.numel() > 1,
        result.is_in_memory,
        _TILES_TOGETHER,
        block_m,
        block_n,
        block_k,
        num_warps=warps,
        num_stages=stages,
        **EXACT,
    )
