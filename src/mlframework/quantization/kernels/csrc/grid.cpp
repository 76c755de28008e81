#include "grid.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "codes.h"

namespace kernels {
namespace {

// Within these bounds no product or remainder of the division below leaves the normal numbers.
constexpr float kSmallestScale = 0x1p-60f, kLargestScale = 0x1p60f;

// The next float further from zero (step 1) or nearer to it (step -1); not from zero itself.
float neighbour(float value, int32_t step) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits += step;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Half to even; magnitudes are below 2**22.
float rounded(float value) {
  constexpr float kAnchor = 0x1.8p23f;
  return (value + kAnchor) - kAnchor;
}

// The outermost float whose rne(x / s) does not pass `end`, an integer on that side (-1 or 1) of zero or zero itself.
float outermost(float end, float scale, float side) {
  const auto passes = [&](float value) { return rounded(value / scale) * side > end * side; };
  float value = (end + 0.5f * side) * scale;  // but for rounding
  while (passes(value)) value = neighbour(value, -1);
  for (;;) {
    const float next = neighbour(value, 1);
    if (passes(next)) return value;
    value = next;
  }
}

// A zero point that is learned may lie between two codes, or beyond them.
float code_of_zero_point(float zero_point, float lowest, float highest) {
  return clamp(std::nearbyintf(zero_point), lowest, highest);
}

}  // namespace

Grid grid_of(float scale, float zero_point, float lowest, float highest) {
  zero_point = code_of_zero_point(zero_point, lowest, highest);
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

Tensor grid_of_codes(const Tensor& scale, const Tensor& zero_point, int64_t lowest, int64_t highest,
                     const std::vector<bool>& has_nan) {
  const int64_t channels = scale.numel();
  const ChannelNumbers scales(scale, channels, "scale"), zero_points(zero_point, channels, "zero_point");
  const bool any_nan = std::find(has_nan.begin(), has_nan.end(), true) != has_nan.end();
  const Tensor result = empty({2, channels}, {std::max<int64_t>(channels, 1), 1}, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < channels; ++i) {
    const bool is_nan = channels == 1 ? any_nan : has_nan[static_cast<size_t>(i)];
    to[i] = is_nan ? std::numeric_limits<float>::quiet_NaN() : scales[i];
    to[channels + i] = code_of_zero_point(zero_points[i], static_cast<float>(lowest), static_cast<float>(highest));
  }
  return result;
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
