// The operator that packs a layer: it checks, and finds the weights' channels side by side.
#include <vector>

#include "operators.h"
#include "packing.h"

namespace kernels {
namespace {

// Codes (O, I / groups, height, width) as (O, height, width, I / groups): where they lie, or copied to `copy`.
const int8_t* channels_innermost(const Tensor& weight, std::vector<int8_t>& copy) {
  const auto* from = static_cast<const int8_t*>(weight.const_data_ptr());
  const Shape sizes = sizes_of(weight), strides = strides_of(weight);
  if (same_layout(sizes, strides, channels_last_strides(sizes))) return from;
  copy.resize(static_cast<size_t>(weight.numel()));
  const int64_t grain = std::max<int64_t>(kElementsPerThread * sizes[0] / weight.numel(), 1);
  torch::stable::parallel_for(0, sizes[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      int8_t* to = copy.data() + o * weight.numel() / sizes[0];
      for (int64_t i = 0; i < sizes[2]; ++i)
        for (int64_t j = 0; j < sizes[3]; ++j)
          for (int64_t c = 0; c < sizes[1]; ++c)
            *to++ = from[o * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]];
    }
  });
  return copy.data();
}

}  // namespace

Tensor pack_layer(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& multiplier, Shape stride, Shape padding,
                  Shape dilation, int64_t groups, int64_t input_zero_point, ScalarType input_dtype,
                  int64_t zero_point, double lowest, double highest, ScalarType dtype) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Char && weight.dim() == 4,
                  "weight must be int8 of shape (O, I / groups, height, width), on the CPU");
  STD_TORCH_CHECK(weight.numel() > 0, "weight must not be empty");
  check_code_dtype(input_dtype);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Byte || dtype == ScalarType::Char,
                  "dtype must be uint8, int8 or float32");
  Layer layer{};
  layer.output_channels = weight.size(0);
  layer.depthwise = groups > 1;
  STD_TORCH_CHECK(groups == 1 || (groups == weight.size(0) && weight.size(1) == 1),
                  "groups must be 1, or one to each channel, got ", groups);
  layer.input_channels = weight.size(1) * groups;
  for (size_t axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(stride.at(axis) > 0 && dilation.at(axis) > 0 && padding.at(axis) >= 0,
                    "stride and dilation must be positive, and padding not negative");
    layer.kernel[axis] = weight.size(static_cast<int64_t>(axis) + 2);
    layer.stride[axis] = stride[axis];
    layer.padding[axis] = padding[axis];
    layer.dilation[axis] = dilation[axis];
  }
  layer.input_signed = input_dtype == ScalarType::Char;
  const int64_t smallest_code = layer.input_signed ? -128 : 0;
  STD_TORCH_CHECK(smallest_code <= input_zero_point && input_zero_point <= smallest_code + 255,
                  "input_zero_point must be a code, got ", input_zero_point);
  layer.input_zero_point = input_zero_point;
  layer.output = dtype == ScalarType::Float  ? Output::floats
                 : dtype == ScalarType::Byte ? Output::unsigned_codes
                                             : Output::signed_codes;
  layer.zero_point = zero_point;
  const bool floats = layer.output == Output::floats;
  layer.lowest = static_cast<float>(floats ? lowest : lowest - static_cast<double>(zero_point));
  layer.highest = static_cast<float>(floats ? highest : highest - static_cast<double>(zero_point));

  const Tensor multipliers = torch::stable::contiguous(multiplier);
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->scalar_type() == ScalarType::Int && bias->is_contiguous() &&
                            bias->numel() == weight.size(0)),
                  "bias must be contiguous int32 and hold one number to an output channel");
  STD_TORCH_CHECK(multipliers.is_cpu() && multipliers.scalar_type() == ScalarType::Float &&
                      (multipliers.numel() == weight.size(0) || multipliers.numel() == 1),
                  "multiplier must be float32 and hold one number, or one to an output channel");

  std::vector<int8_t> copy;
  const LayerContents contents{channels_innermost(weight, copy),
                               bias ? static_cast<const int32_t*>(bias->const_data_ptr()) : nullptr,
                               static_cast<const float*>(multipliers.const_data_ptr()), multipliers.numel() == 1};
  Tensor packed;
  pack(microkernel(), layer, contents, [&](int64_t bytes) {
    packed = empty({bytes}, {1}, ScalarType::Byte);
    return packed.mutable_data_ptr();
  });
  return packed;
}

}  // namespace kernels
