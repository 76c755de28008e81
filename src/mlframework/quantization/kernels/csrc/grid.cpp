#include "grid.h"

#include <cmath>
#include <limits>

#include "codes.h"

namespace kernels {
namespace {

// Within these bounds no product or remainder of the division below leaves the normal numbers.
constexpr float kSmallestScale = 0x1p-60f, kLargestScale = 0x1p60f;

// The outermost float whose rne(x / s) does not pass `end`, an integer on that side (-1 or 1) of zero or zero itself.
float outermost(float end, float scale, float side) {
  const auto passes = [&](float value) { return std::nearbyintf(value / scale) * side > end * side; };
  float value = (end + 0.5f * side) * scale;  // but for rounding
  while (passes(value)) value = std::nextafterf(value, 0.0f);
  for (;;) {
    const float next = std::nextafterf(value, side * std::numeric_limits<float>::infinity());
    if (passes(next)) return value;
    value = next;
  }
}

}  // namespace

Grid grid_of(float scale, float zero_point, float lowest, float highest) {
  zero_point = clamp(std::nearbyintf(zero_point), lowest, highest);
  Grid grid{scale, zero_point, lowest - zero_point, highest - zero_point, 0, 0, 0, 0, false};
  grid.is_ordinary = scale >= kSmallestScale && scale <= kLargestScale && has_fused_multiply_add();
  if (!grid.is_ordinary) return grid;
  grid.reciprocal = 1.0f / scale;
  // 1 - r s, exactly: a product of two floats is exact in double.
  const double rest = 1.0 - static_cast<double>(grid.reciprocal) * static_cast<double>(scale);
  grid.correction = static_cast<float>(rest * static_cast<double>(grid.reciprocal));
  grid.first = outermost(grid.lowest, scale, -1.0f);
  grid.last = outermost(grid.highest, scale, 1.0f);
  return grid;
}

std::vector<Grid> grids_of(const Tensor& scale, const Tensor& zero_point, int64_t channels, float lowest,
                           float highest) {
  const ChannelNumbers scales(scale, channels, "scale"), zero_points(zero_point, channels, "zero_point");
  std::vector<Grid> grids;
  grids.reserve(static_cast<size_t>(channels));
  for (int64_t i = 0; i < channels; ++i) grids.push_back(grid_of(scales[i], zero_points[i], lowest, highest));
  return grids;
}

namespace {

// A member of the grids, as ChannelLayout::repeated reads it.
struct Member {
  const std::vector<Grid>& grids;
  float Grid::*member;
  float operator[](int64_t i) const { return grids[static_cast<size_t>(i)].*member; }
};

}  // namespace

GridRow grid_row(const std::vector<Grid>& grids, const ChannelLayout& layout) {
  const auto row = [&](float Grid::*member) { return layout.repeated(Member{grids, member}); };
  return {layout.row_length(), row(&Grid::scale), row(&Grid::zero_point), row(&Grid::lowest), row(&Grid::highest)};
}

}  // namespace kernels
