#include "quantized_weight.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "fake_quantize_loops.h"
#include "operators.h"

namespace kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

// As arithmetic.LARGEST_BIAS_CODE.
constexpr double kLargestBiasCode = 1 << 30;

bool has_channels_in_order(const Tensor& weight) {
  return is_dense(weight) && weight.stride(0) * weight.size(0) == weight.numel();
}

// Of a weight whose channels lie one after the other: while the cache holds a channel that was read for its range, it
// is read again for its codes.
QuantizedWeight observe_and_quantize_channels(const Tensor& weight, const Averages& averages, int64_t* batches,
                                              bool wants_mask) {
  const int64_t channels = weight.size(0), length = weight.numel() / channels;
  QuantizedWeight result{empty_like(weight, ScalarType::Char),
                         wants_mask ? empty({mask_bytes(weight.numel())}, {1}, ScalarType::Byte) : Tensor(),
                         std::vector<float>(static_cast<size_t>(channels))};
  const auto* from = static_cast<const float*>(weight.const_data_ptr());
  auto* to = static_cast<uint8_t*>(result.codes.mutable_data_ptr());
  uint8_t* bits = wants_mask ? static_cast<uint8_t*>(result.mask.mutable_data_ptr()) : nullptr;
  std::atomic<bool> any{false};
  // Eight channels begin and end at whole bytes of the mask.
  const int64_t grain = std::max<int64_t>(kElementsPerThread / (8 * length), 1);
  torch::stable::parallel_for(0, (channels + 7) / 8, grain, [&](int64_t begin, int64_t end) {
    BitWriter writer{bits ? bits + begin * length : nullptr};
    for (int64_t channel = 8 * begin; channel < std::min(8 * end, channels); ++channel) {
      float least = kInfinity, most = -kInfinity;
      const Grid none{};
      ForwardPiece piece{};
      piece.input = from + channel * length;
      piece.count = length;
      piece.lowest_code = averages.ends.lowest;
      piece.grid = &none;
      piece.wants_extremes = true;
      piece.minimum = &least;
      piece.maximum = &most;
      fake_quantize_piece(piece, false);
      if (averages.update(channel, std::isfinite(least) ? -least : -kInfinity,
                          std::isfinite(most) ? most : -kInfinity, true))
        any = true;
      const Grid grid =
          grid_of(averages.scale[channel], averages.zero_point[channel], averages.ends.lowest, averages.ends.highest);
      piece.grid = &grid;
      piece.wants_extremes = false;
      piece.codes = to + channel * length;
      piece.mask = bits ? &writer : nullptr;
      fake_quantize_piece(piece, false);
      // The averages do not follow what is not finite: the grid would be an older weight's.
      const bool is_finite = !piece.has_nan && std::isfinite(least) && std::isfinite(most);
      result.scale[static_cast<size_t>(channel)] = is_finite ? grid.scale : kNan;
    }
    if (bits) writer.finish();
  });
  if (any) ++*batches;
  return result;
}

void round_to_coarser_grid(const Tensor& codes, int64_t channel, double ratio) {
  const Tensor own = torch::stable::select(codes, 0, channel);
  const Shape sizes = sizes_of(own), strides = strides_of(own);
  auto* at = static_cast<int8_t*>(own.mutable_data_ptr());
  Shape place(sizes.size());
  for (int64_t i = 0; i < own.numel(); ++i) {
    int64_t offset = 0, rest = i;
    for (size_t axis = sizes.size(); axis-- > 0; rest /= sizes[axis]) offset += rest % sizes[axis] * strides[axis];
    at[offset] = static_cast<int8_t>(std::nearbyint(at[offset] * ratio));
  }
}

}  // namespace

QuantizedWeight quantize_weight(const Tensor& weight, int64_t axis, const Tensor& scale, int64_t lowest,
                                int64_t highest, bool wants_mask) {
  const Tensor zero_point = empty({1}, {1}, ScalarType::Float);
  *static_cast<float*>(zero_point.mutable_data_ptr()) = 0.0f;
  const auto [values, codes, mask, extremes, grid] =
      fake_quantize(weight, std::nullopt, scale, zero_point, lowest, highest, axis, -kInfinity, kInfinity, false,
                    wants_mask, false, ScalarType::Char);
  const auto* scales = static_cast<const float*>(grid.const_data_ptr());
  const int64_t channels = weight.size(0), step = scale.numel() == 1 ? 0 : 1;
  QuantizedWeight result{codes, mask, std::vector<float>(static_cast<size_t>(channels))};
  for (int64_t o = 0; o < channels; ++o) result.scale[static_cast<size_t>(o)] = scales[o * step];
  return result;
}

QuantizedWeight observe_and_quantize_weight(const Tensor& weight, int64_t axis, const Tensor& minimum,
                                            const Tensor& maximum, const Tensor& batches, const Tensor& scale,
                                            const Tensor& zero_point, double momentum, int64_t lowest, int64_t highest,
                                            bool wants_mask) {
  if (axis == 0 && has_channels_in_order(weight)) {
    const int64_t channels = weight.size(0);
    const Averages averages{numbers_in(minimum, channels, "minimum"), numbers_in(maximum, channels, "maximum"),
                            numbers_in(scale, channels, "scale"),     numbers_in(zero_point, channels, "zero_point"),
                            static_cast<float>(momentum),
                            {static_cast<float>(lowest), static_cast<float>(highest), 0.0f, true}};
    return observe_and_quantize_channels(weight, averages, count_in(batches), wants_mask);
  }
  update_moving_average(weight, false, axis, minimum, maximum, batches, scale, zero_point, momentum, lowest, highest,
                        true, 0, true);
  return quantize_weight(weight, axis, scale, lowest, highest, wants_mask);
}

Tensor fit_bias(QuantizedWeight& weight, const std::optional<Tensor>& bias, float input_scale) {
  const int64_t channels = static_cast<int64_t>(weight.scale.size());
  const Tensor result = empty({channels}, {1}, ScalarType::Int);
  auto* codes = static_cast<int32_t*>(result.mutable_data_ptr());
  const float* values = bias ? numbers_in(*bias, channels, "bias") : nullptr;
  for (int64_t o = 0; o < channels; ++o) {
    codes[o] = 0;
    float& scale = weight.scale[static_cast<size_t>(o)];
    const float value = values ? values[o] : 0.0f;
    if (!std::isfinite(value)) scale = kNan;
    if (!std::isfinite(scale) || !std::isfinite(input_scale)) continue;
    const double own = static_cast<double>(scale);
    const double smallest =
        std::abs(static_cast<double>(value)) / (static_cast<double>(input_scale) * kLargestBiasCode);
    scale = static_cast<float>(std::max({own, static_cast<double>(kSmallestScale), smallest}));
    const double ratio = own / static_cast<double>(scale);
    if (ratio != 1.0) round_to_coarser_grid(weight.codes, o, ratio);
    codes[o] = static_cast<int32_t>(std::nearbyintf(value / (input_scale * scale)));
  }
  return result;
}

}  // namespace kernels
