#include "channels.h"

namespace kernels {
namespace {

template <class Number>
float number_at(const void* from, int64_t i) {
  return static_cast<float>(static_cast<const Number*>(from)[i]);
}

}  // namespace

ChannelNumbers::ChannelNumbers(const Tensor& tensor, int64_t channels, const char* name)
    : source_(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor)), step_(tensor.numel() != 1) {
  STD_TORCH_CHECK(tensor.is_cpu() && (tensor.numel() == 1 || tensor.numel() == channels), name,
                  " must be on the CPU and hold 1 or ", channels, " numbers, got ", tensor.numel());
  switch (tensor.scalar_type()) {
    case ScalarType::Float: read_ = number_at<float>; break;
    case ScalarType::Int: read_ = number_at<int32_t>; break;
    case ScalarType::Long: read_ = number_at<int64_t>; break;
    case ScalarType::Byte: read_ = number_at<uint8_t>; break;
    case ScalarType::Char: read_ = number_at<int8_t>; break;
    default: STD_TORCH_CHECK(false, name, " must be float32 or an integer");
  }
  data_ = source_.const_data_ptr();
}

ChannelLayout channel_layout(const Tensor& tensor, int64_t axis) {
  const int64_t count = tensor.numel();
  if (axis < 0) return {1, 1, count};
  STD_TORCH_CHECK(axis < tensor.dim(), "axis must lie within ", tensor.dim(), " dimensions, got ", axis);
  const int64_t channels = tensor.size(axis);
  if (channels == 1 || count == 0) return {count == 0 ? 0 : 1, channels, count};
  const int64_t inner = tensor.stride(axis);
  return {count / (channels * inner), channels, inner};
}

}  // namespace kernels
