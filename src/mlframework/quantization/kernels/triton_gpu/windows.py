"""Where the window of an output position begins in an image."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_of(
    position,
    output_height,
    output_width,
    step_down,
    step_right,
    top,
    left,
    input_stride,
    row_stride,
    column_stride,
):
    """Of positions of the output, counted over all images: the row and the column that the window's first tap reads
    (negative where that is padding), and the offset of its first channel. Channels lie side by side."""
    column = (position % output_width).to(tl.int32) * step_right - left
    row = (position // output_width % output_height).to(tl.int32) * step_down - top
    image = position // output_width // output_height
    start = image * input_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    return row, column, start
