// A layer of integers in one training step: its weight observed, quantized and packed, and run on codes, in one call.
#include <cmath>
#include <limits>
#include <tuple>

#include "operators.h"
#include "quantized_weight.h"

namespace kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Where a layer is applied: a number to each spatial dimension, none for a linear layer.
struct Geometry {
  Shape stride, padding, dilation;
  int64_t groups;
};

// Before anything changes: the averages of the weight are not to be moved by a call that fails.
void check(const Tensor& codes, const Tensor& grid, const Tensor& weight, const std::optional<Tensor>& bias,
           const Geometry& geometry, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float, "dtype must be float32 on a CPU");
  check_codes(codes, "codes");
  numbers_in(grid, 2, "grid");
  check_floats(weight, "weight");
  const int64_t dimensions = weight.dim();
  STD_TORCH_CHECK(2 <= dimensions && dimensions <= 4 && weight.numel() > 0,
                  "weight must have shape (O, I / groups, *kernel), with at most 2 dimensions of the kernel and at least "
                  "one element");
  for (const Shape* each : {&geometry.stride, &geometry.padding, &geometry.dilation})
    STD_TORCH_CHECK(static_cast<int64_t>(each->size()) == dimensions - 2, "stride, padding and dilation must hold ",
                    dimensions - 2, " numbers, as many as the kernel has dimensions, got ", each->size());
  if (bias) numbers_in(*bias, weight.size(0), "bias");
  const bool is_linear = dimensions == 2;
  STD_TORCH_CHECK(is_linear ? codes.dim() > 0 : codes.dim() == dimensions, "codes must have ",
                  is_linear ? 1 : dimensions, " dimensions", is_linear ? " or more" : "", ", got ", codes.dim());
  const int64_t channels = codes.size(is_linear ? codes.dim() - 1 : 1);
  STD_TORCH_CHECK(channels == weight.size(1) * geometry.groups, "codes must have ", weight.size(1) * geometry.groups,
                  " channels, got ", channels);
}

// Packed layers have two spatial dimensions: in front of those of this one come dimensions of size one.
Tensor with_two_spatial_dimensions(Tensor weight, Geometry& geometry) {
  while (geometry.stride.size() < 2) {
    weight = torch::stable::unsqueeze(weight, 2);
    geometry.stride.insert(geometry.stride.begin(), 1);
    geometry.padding.insert(geometry.padding.begin(), 0);
    geometry.dilation.insert(geometry.dilation.begin(), 1);
  }
  return weight;
}

Tensor vector_of(const std::vector<float>& numbers) {
  const Tensor result = empty({static_cast<int64_t>(numbers.size())}, {1}, ScalarType::Float);
  std::copy(numbers.begin(), numbers.end(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

// Sums of integers hold no NaN, and a product with one may be lost where it is clamped. Channels lie innermost.
void poison(const Tensor& output, const std::vector<float>& multiplier) {
  auto* values = static_cast<float*>(output.mutable_data_ptr());
  const size_t count = static_cast<size_t>(output.numel()), channels = multiplier.size();
  for (size_t channel = 0; channel < channels; ++channel)
    if (std::isnan(multiplier[channel]))
      for (size_t i = channel; i < count; i += channels) values[i] = std::numeric_limits<float>::quiet_NaN();
}

// float(sum (qx - zx) qw + b) * (sx * sw). The scales of the weight become those that leave room for the bias.
Tensor product(const Tensor& codes, const Tensor& grid, QuantizedWeight& weight, const std::optional<Tensor>& bias,
               Geometry geometry) {
  const float* input = numbers_in(grid, 2, "grid");
  const float input_scale = input[0];
  const Tensor biases = fit_bias(weight, bias, input_scale);
  std::vector<float> multiplier = weight.scale;
  for (float& each : multiplier) each *= input_scale;
  const Tensor kernel = with_two_spatial_dimensions(weight.codes, geometry);
  const Tensor packed = pack_layer(kernel, biases, vector_of(multiplier), geometry.stride, geometry.padding,
                                   geometry.dilation, geometry.groups, static_cast<int64_t>(input[1]),
                                   codes.scalar_type(), 0, -kInfinity, kInfinity, ScalarType::Float);
  const Tensor output = weight.codes.dim() == 2 ? linear(codes, packed) : convolution(codes, packed);
  poison(output, multiplier);
  return output;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> train_layer(
    const Tensor& codes, const Tensor& grid, const Tensor& weight, const std::optional<Tensor>& bias, int64_t axis,
    const Tensor& minimum, const Tensor& maximum, const Tensor& batches, const Tensor& scale, const Tensor& zero_point,
    double momentum, int64_t lowest, int64_t highest, bool observes, bool wants_mask, Shape stride, Shape padding,
    Shape dilation, int64_t groups, ScalarType dtype) {
  const Geometry geometry{stride, padding, dilation, groups};
  check(codes, grid, weight, bias, geometry, dtype);
  QuantizedWeight quantized =
      observes ? observe_and_quantize_weight(weight, axis, minimum, maximum, batches, scale, zero_point, momentum,
                                             lowest, highest, wants_mask)
               : quantize_weight(weight, axis, scale, lowest, highest, wants_mask);
  const Tensor output = product(codes, grid, quantized, bias, geometry);
  return {output, quantized.mask, vector_of(quantized.scale)};
}

Tensor weighted_product(const Tensor& codes, const Tensor& grid, const Tensor& weight, const Tensor& weight_scale,
                        const std::optional<Tensor>& bias, int64_t axis, int64_t lowest, int64_t highest, Shape stride,
                        Shape padding, Shape dilation, int64_t groups, ScalarType dtype) {
  const Geometry geometry{stride, padding, dilation, groups};
  check(codes, grid, weight, bias, geometry, dtype);
  QuantizedWeight quantized = quantize_weight(weight, axis, weight_scale, lowest, highest, false);
  return product(codes, grid, quantized, bias, geometry);
}

}  // namespace kernels
