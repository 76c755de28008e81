// Averages of codes over all positions of each channel: what AveragePooling of int8/average_pooling.py computes of them.
#include "operators.h"
#include "tensors.h"

namespace kernels {

Tensor average_positions(const Tensor& codes, const Tensor& zero_point, const Tensor& scale, const Tensor& output_scale,
                         const Tensor& output_zero_point, int64_t lowest, int64_t highest, ScalarType dtype) {
  const Tensor sums = sum_positions(codes);
  int64_t count = 1;
  for (int64_t axis = 2; axis < codes.dim(); ++axis) count *= codes.size(axis);
  const Tensor bias = empty({1}, {1}, ScalarType::Int), multiplier = empty({1}, {1}, ScalarType::Float);
  *static_cast<int32_t*>(bias.mutable_data_ptr()) =
      -static_cast<int32_t>(number_in(zero_point, "zero_point")) * static_cast<int32_t>(count);
  *static_cast<float*>(multiplier.mutable_data_ptr()) =
      number_in(scale, "scale") / (number_in(output_scale, "output_scale") * static_cast<float>(count));
  const int64_t zero = static_cast<int64_t>(number_in(output_zero_point, "output_zero_point"));
  return requantize(sums, bias, multiplier, zero, lowest, highest, dtype, 1);
}

}  // namespace kernels
