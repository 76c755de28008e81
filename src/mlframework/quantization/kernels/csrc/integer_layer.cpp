// Integer layers as graphs call them: packed once and described by the call, or packed for the call.
#include "channels.h"
#include "operators.h"

namespace kernels {
namespace {

double number_at(const Tensor& tensor, const char* name) {
  return static_cast<double>(ChannelNumbers(tensor, 1, name)[0]);
}

// The weight of a convolution in one or two dimensions, or of a linear layer, as one in two dimensions.
Tensor as_convolution(const Tensor& weight) {
  Tensor result = weight;
  while (result.dim() < 4) result = torch::stable::unsqueeze(result, 2);
  return result;
}

Shape in_two_dimensions(Shape values, int64_t first) {
  while (values.size() < 2) values.insert(values.begin(), first);
  return values;
}

}  // namespace

Tensor packed_layer(const Tensor& codes, const Tensor& packed, int64_t, Shape, Shape stride, Shape, Shape, int64_t,
                    ScalarType) {
  return stride.empty() ? linear(codes, packed) : convolution(codes, packed);
}

Tensor integer_layer(const Tensor& codes, const Tensor& zero_point, const Tensor& weight, const Tensor& bias,
                     const Tensor& multiplier, const std::optional<Tensor>& output_zero_point,
                     const std::optional<Tensor>& lowest, const std::optional<Tensor>& highest, double clip_low,
                     double clip_high, ScalarType dtype, Shape stride, Shape padding, Shape dilation, int64_t groups) {
  const bool with_codes = output_zero_point && lowest && highest;
  const Tensor packed = pack_layer(
      as_convolution(weight), torch::stable::contiguous(bias), multiplier, in_two_dimensions(stride, 1),
      in_two_dimensions(padding, 0), in_two_dimensions(dilation, 1), groups,
      static_cast<int64_t>(number_at(zero_point, "zero_point")), codes.scalar_type(),
      with_codes ? static_cast<int64_t>(number_at(*output_zero_point, "output_zero_point")) : 0,
      with_codes ? number_at(*lowest, "lowest") : clip_low, with_codes ? number_at(*highest, "highest") : clip_high,
      dtype);
  return stride.empty() ? linear(codes, packed) : convolution(codes, packed);
}

}  // namespace kernels
