// Rows of the input as a tile reads them: padded, as bytes, channels in quads.
#pragma once

#include "microkernels/microkernel.h"

namespace kernels {

// Codes (N, C, H, W) wherever they lie; strides in elements, which are bytes. The last row may be a shorter one.
struct Input {
  const uint8_t* codes;
  int64_t height, width, last_width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
};

// How a row lies once gathered: as [column][channel]; or, where the quads of neighbouring positions are to lie side by
// side, as [quad][phase][column][4], a phase being the columns that one step of the stride connects.
struct RowLayout {
  int64_t phases, columns;         // columns of each phase
  int64_t quad_step, column_step;  // bytes from one quad, or column of a phase, to the next
  int64_t position_step;           // from the columns of one output to the next's
  int64_t bytes;

  bool keeps_channels() const { return quad_step == kQuad; }
  // From an output position to one of its taps in the row.
  int64_t offset(int64_t column) const { return (column % phases * columns + column / phases) * column_step; }
};

// Makes of codes of one sign those of the other, 128 above or below them, which the same weights are multiplied by. It is
// done to a whole row once it is gathered.
struct FlipHighestBit {
  ALWAYS_INLINE static void run(uint8_t* bytes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) bytes[i] ^= 128;
  }
};

// Codes in two bytes each.
struct Widen {
  ALWAYS_INLINE static void run(const uint8_t* bytes, int64_t count, uint16_t* wide) {
    for (int64_t i = 0; i < count; ++i) wide[i] = bytes[i];
  }
};

RowLayout row_layout(const Microkernel& kernel, const Layer& layer, int64_t output_width);

// Reading whole quads, a tile reads up to so many bytes beyond the last row. What they hold does not matter: their
// weights are zero.
constexpr int64_t kReadBeyond = kQuad - 1;

// Whether rows of the input lie as `layout` has them, one after the other, without any padding, and in whole quads.
bool is_gathered(const Layer& layer, const Input& input, const RowLayout& layout);

// Gathers one row of one image; a row outside of the image is all padding.
void gather_row(const Microkernel& kernel, const Layer& layer, const Input& input, int64_t image, int64_t row,
                const RowLayout& layout, uint8_t* gathered);

}  // namespace kernels
