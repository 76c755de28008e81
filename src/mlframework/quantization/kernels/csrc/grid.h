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

// One entry to each element of a row of that layout.
struct GridRow {
  int64_t length = 0;
  std::vector<float> scale, zero_point, lowest, highest;
};
GridRow grid_row(const std::vector<Grid>& grids, const ChannelLayout& layout);

}  // namespace kernels
