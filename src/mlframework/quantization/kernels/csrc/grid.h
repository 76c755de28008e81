// The grid of one channel, with what makes a division by its scale cheap and exact.
#pragma once

#include <vector>

#include "channels.h"

namespace kernels {

struct Grid {
  float scale, zero_point;
  float lowest, highest;         // the ends of the grid less the zero point: rne(x / s) saturates there
  float reciprocal, correction;  // their sum is 1 / s to twice the digits of a float
  float first, last;             // the outermost values that do not saturate
  bool is_ordinary;              // whether the four above hold; otherwise divide, and then clamp
};

Grid grid_of(float scale, float zero_point, float lowest, float highest);

// Codes go from `lowest` to `highest`; a fractional zero point is rounded to one of them.
std::vector<Grid> grids_of(const Tensor& scale, const Tensor& zero_point, int64_t channels, float lowest,
                           float highest);

// What codes stand for, as operators return it beside them: float32 (2, C), the scales as they are and the zero points
// as codes, with as many channels as there are scales. `has_nan` says which channels of the codes held NaN, which has no
// code (it gets the lowest): their scale is NaN here, and so is whatever is computed from the codes and the grid.
Tensor grid_of_codes(const Tensor& scale, const Tensor& zero_point, int64_t lowest, int64_t highest,
                     const std::vector<bool>& has_nan);

// One entry to each element of a row of that layout.
struct GridRow {
  int64_t length = 0;
  std::vector<float> scale, zero_point, lowest, highest;
};
GridRow grid_row(const std::vector<Grid>& grids, const ChannelLayout& layout);

}  // namespace kernels
