// The weight of a layer in one training step: observed, quantized and packed in one call.
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

#include "fake_quantize_loops.h"
#include "moving_average.h"
#include "operators.h"

namespace kernels {
namespace {

// As arithmetic.LARGEST_BIAS_CODE.
constexpr float kLargestBiasCode = 1 << 30;

Tensor copy_of(const Tensor& numbers) {
  const float* from = numbers_in(numbers, numbers.numel(), "scale");
  const Tensor result = empty({numbers.numel()}, {1}, ScalarType::Float);
  std::copy_n(from, numbers.numel(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

// What to return to where nothing is to have changed.
class SavedState {
 public:
  SavedState(std::vector<Tensor> tensors, int64_t* batches)
      : tensors_(std::move(tensors)), batches_(batches), count_(*batches) {
    for (const Tensor& tensor : tensors_) {
      const float* numbers = numbers_in(tensor, tensor.numel(), "state");
      values_.emplace_back(numbers, numbers + tensor.numel());
    }
  }

  void restore() const {
    for (size_t i = 0; i < tensors_.size(); ++i)
      std::copy(values_[i].begin(), values_[i].end(), static_cast<float*>(tensors_[i].mutable_data_ptr()));
    *batches_ = count_;
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<std::vector<float>> values_;
  int64_t* batches_;
  int64_t count_;
};

// In units of the accumulator; undefined where a bias does not fit.
Tensor bias_codes(const Tensor& bias, const Tensor& multiplier) {
  const float* values = numbers_in(bias, bias.numel(), "bias");
  const float* scales = numbers_in(multiplier, multiplier.numel(), "multiplier");
  const Tensor result = empty({bias.numel()}, {1}, ScalarType::Int);
  auto* codes = static_cast<int32_t*>(result.mutable_data_ptr());
  for (int64_t o = 0; o < bias.numel(); ++o) {
    const float scale = scales[multiplier.numel() == 1 ? 0 : o];
    if (!(std::abs(values[o]) <= scale * kLargestBiasCode)) return Tensor();
    codes[o] = static_cast<int32_t>(std::nearbyintf(values[o] / scale));
  }
  return result;
}

struct Quantized {
  Tensor codes, mask;  // undefined codes where a weight is NaN; a mask only where asked for
};

// Observes and quantizes a weight whose channels lie one after the other: while the cache holds a channel that was read
// for its range, it is read again for its codes.
Quantized observe_and_quantize(const Tensor& weight, const Averages& averages, int64_t* batches, bool wants_mask) {
  const int64_t channels = weight.size(0), length = weight.numel() / channels;
  const Tensor codes = empty_like(weight, ScalarType::Char);
  const Tensor mask = wants_mask ? empty({mask_bytes(weight.numel())}, {1}, ScalarType::Byte) : Tensor();
  const auto* from = static_cast<const float*>(weight.const_data_ptr());
  auto* to = static_cast<uint8_t*>(codes.mutable_data_ptr());
  uint8_t* bits = wants_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  std::atomic<bool> has_nan{false}, any{false};
  // Eight channels begin and end at whole bytes of the mask.
  const int64_t grain = std::max<int64_t>(kElementsPerThread / (8 * length), 1);
  torch::stable::parallel_for(0, (channels + 7) / 8, grain, [&](int64_t begin, int64_t end) {
    BitWriter writer{bits ? bits + begin * length : nullptr};
    for (int64_t channel = 8 * begin; channel < std::min(8 * end, channels); ++channel) {
      float least = std::numeric_limits<float>::infinity(), most = -least;
      const float infinity = least;
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
      if (averages.update(channel, std::isfinite(least) ? -least : -infinity, std::isfinite(most) ? most : -infinity,
                          true))
        any = true;
      const Grid grid =
          grid_of(averages.scale[channel], averages.zero_point[channel], averages.ends.lowest, averages.ends.highest);
      piece.grid = &grid;
      piece.wants_extremes = false;
      piece.codes = to + channel * length;
      piece.mask = bits ? &writer : nullptr;
      fake_quantize_piece(piece, false);
      if (piece.has_nan) has_nan = true;
    }
    if (bits) writer.finish();
  });
  if (any) ++*batches;
  // Of a grid that was made for these very weights, every gradient passes.
  const bool passes = wants_mask && passes_all(bits, weight.numel());
  return {has_nan ? Tensor() : codes, passes ? empty({0}, {1}, ScalarType::Byte) : mask};
}

bool has_channels_in_order(const Tensor& weight) {
  return is_dense(weight) && weight.stride(0) * weight.size(0) == weight.numel();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> train_weight(
    const Tensor& weight, const std::optional<Tensor>& bias, int64_t axis, const Tensor& minimum,
    const Tensor& maximum, const Tensor& batches, const Tensor& scale, const Tensor& zero_point, double momentum,
    int64_t lowest, int64_t highest, bool observes, bool wants_mask, double input_scale, int64_t input_zero_point,
    ScalarType input_dtype, Shape stride, Shape padding, Shape dilation, int64_t groups) {
  check_floats(weight, "weight");
  STD_TORCH_CHECK(weight.numel() > 0, "weight must not be empty");
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const SavedState before({minimum, maximum, scale, zero_point}, count_in(batches));
  Quantized quantized;
  if (observes && axis == 0 && has_channels_in_order(weight)) {
    const int64_t channels = weight.size(0);
    const Averages averages{numbers_in(minimum, channels, "minimum"), numbers_in(maximum, channels, "maximum"),
                            numbers_in(scale, channels, "scale"),     numbers_in(zero_point, channels, "zero_point"),
                            static_cast<float>(momentum),
                            {static_cast<float>(lowest), static_cast<float>(highest), 0.0f, true}};
    quantized = observe_and_quantize(weight, averages, count_in(batches), wants_mask);
  } else {
    if (observes)
      update_moving_average(weight, false, axis, minimum, maximum, batches, scale, zero_point, momentum, lowest,
                            highest, true, 0, true);
    const auto result = fake_quantize(weight, std::nullopt, scale, zero_point, lowest, highest, axis, -kInfinity,
                                      kInfinity, false, wants_mask, false, ScalarType::Char);
    quantized = {std::get<1>(result), std::get<2>(result)};
  }
  const auto& [codes, mask] = quantized;
  const Tensor own_scale = copy_of(scale), multiplier = copy_of(scale);
  auto* multipliers = static_cast<float*>(multiplier.mutable_data_ptr());
  for (int64_t i = 0; i < multiplier.numel(); ++i) multipliers[i] *= static_cast<float>(input_scale);
  std::optional<Tensor> biases;
  if (bias) biases = bias_codes(*bias, multiplier);
  if (!codes.defined() || (biases && !biases->defined())) {
    before.restore();
    return {Tensor(), Tensor(), Tensor()};
  }
  const Tensor packed = pack_layer(codes, biases, multiplier, stride, padding, dilation, groups, input_zero_point,
                                   input_dtype, 0, -kInfinity, kInfinity, ScalarType::Float);
  return {packed, mask, own_scale};
}

}  // namespace kernels
