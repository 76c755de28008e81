// Rows of the input as a tile reads them: padded, as bytes, four channels of neighbouring positions side by side.
#pragma once

#include "instruction_set.h"
#include "layer.h"

namespace kernels {

// Codes (N, C, H, W) wherever they lie; strides in elements, which are bytes. The last row may be a shorter one.
struct Input {
  const uint8_t* codes;
  int64_t height, width, last_width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
};

// How a row lies once gathered: [quad][phase][column][4]. A phase holds the columns that one step of the stride
// connects, so that neighbouring outputs read neighbouring columns.
struct RowLayout {
  int64_t phases, columns;

  int64_t quad_step() const { return phases * columns * kQuad; }
  int64_t bytes(const Layer& layer) const { return layer.quads() * quad_step(); }
  // From an output position to one of its taps in the row.
  int64_t offset(int64_t column) const { return (column % phases * columns + column / phases) * kQuad; }
};

// Turns int8 codes into the bytes 128 above them.
struct FlipHighestBit {
  ALWAYS_INLINE static void run(uint8_t* bytes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) bytes[i] ^= 128;
  }
};

RowLayout row_layout(const Layer& layer, int64_t output_width);

// Gathers one row of one image; a row outside of the image is all padding.
void gather_row(const Layer& layer, const Input& input, int64_t image, int64_t row, const RowLayout& layout,
                uint8_t* gathered);

}  // namespace kernels
