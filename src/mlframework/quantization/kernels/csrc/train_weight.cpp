// The weight of a layer in one training step: observed, quantized and packed in one call.
#include <cmath>
#include <tuple>

#include "operators.h"

namespace kernels {
namespace {

// As arithmetic.LARGEST_BIAS_CODE.
constexpr float kLargestBiasCode = 1 << 30;

const float* numbers_of(const Tensor& tensor, const char* name) {
  check_floats(tensor, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<const float*>(tensor.const_data_ptr());
}

Tensor copy_of(const Tensor& numbers) {
  const float* from = numbers_of(numbers, "scale");
  const Tensor result = empty({numbers.numel()}, {1}, ScalarType::Float);
  std::copy_n(from, numbers.numel(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

// In units of the accumulator; undefined where a bias does not fit.
Tensor bias_codes(const Tensor& bias, const Tensor& multiplier) {
  const float *values = numbers_of(bias, "bias"), *scales = numbers_of(multiplier, "multiplier");
  const Tensor result = empty({bias.numel()}, {1}, ScalarType::Int);
  auto* codes = static_cast<int32_t*>(result.mutable_data_ptr());
  for (int64_t o = 0; o < bias.numel(); ++o) {
    const float scale = scales[multiplier.numel() == 1 ? 0 : o];
    if (!(std::abs(values[o]) <= scale * kLargestBiasCode)) return Tensor();
    codes[o] = static_cast<int32_t>(std::nearbyintf(values[o] / scale));
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> train_weight(
    const Tensor& weight, const std::optional<Tensor>& bias, int64_t axis, const Tensor& minimum,
    const Tensor& maximum, const Tensor& batches, const Tensor& scale, const Tensor& zero_point, double momentum,
    int64_t lowest, int64_t highest, bool observes, bool wants_mask, double input_scale, int64_t input_zero_point,
    ScalarType input_dtype, Shape stride, Shape padding, Shape dilation, int64_t groups) {
  if (observes)
    update_moving_average(weight, false, axis, minimum, maximum, batches, scale, zero_point, momentum, lowest, highest,
                          true, 0, true);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto [values, codes, mask, extremes] =
      fake_quantize(weight, std::nullopt, scale, zero_point, lowest, highest, axis, -kInfinity, kInfinity, false,
                    wants_mask, false, ScalarType::Char);
  const Tensor own_scale = copy_of(scale), multiplier = copy_of(scale);
  auto* multipliers = static_cast<float*>(multiplier.mutable_data_ptr());
  for (int64_t i = 0; i < multiplier.numel(); ++i) multipliers[i] *= static_cast<float>(input_scale);
  std::optional<Tensor> biases;
  if (bias) biases = bias_codes(*bias, multiplier);
  if (!codes.defined() || (biases && !biases->defined())) return {Tensor(), mask, own_scale};
  const Tensor packed = pack_layer(codes, biases, multiplier, stride, padding, dilation, groups, input_zero_point,
                                   input_dtype, 0, -kInfinity, kInfinity, ScalarType::Float);
  return {packed, mask, own_scale};
}

}  // namespace kernels
