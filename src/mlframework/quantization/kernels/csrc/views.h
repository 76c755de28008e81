// Views of tensors, and what moves values without computing any, as PyTorch has them.
#pragma once

#include <array>

#include "tensors.h"

namespace kernels {

// Calls an operator of PyTorch that returns a tensor.
template <size_t kCount>
Tensor call_operator(const char* name, const char* overload, std::array<StableIValue, kCount> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The same memory, from `offset` elements further on, with other sizes and strides.
inline Tensor reinterpret(const Tensor& tensor, const Shape& sizes, const Shape& strides, int64_t offset = 0) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

inline Tensor with_batch_axis(const Tensor& tensor) {
  Shape sizes = sizes_of(tensor), strides = strides_of(tensor);
  strides.insert(strides.begin(), sizes.empty() ? 1 : sizes[0] * strides[0]);
  sizes.insert(sizes.begin(), 1);
  return reinterpret(tensor, sizes, strides);
}

inline Tensor without_batch_axis(const Tensor& tensor) {
  const Shape sizes = sizes_of(tensor), strides = strides_of(tensor);
  return reinterpret(tensor, Shape(sizes.begin() + 1, sizes.end()), Shape(strides.begin() + 1, strides.end()));
}

// One of the parts that torch.chunk makes.
inline Tensor part_of(const Tensor& tensor, int64_t index, int64_t count, int64_t axis) {
  axis = axis < 0 ? axis + tensor.dim() : axis;
  STD_TORCH_CHECK(0 <= axis && axis < tensor.dim() && count > 0 && index >= 0, "chunk must be one of a tensor");
  Shape sizes = sizes_of(tensor);
  const Shape strides = strides_of(tensor);
  const int64_t length = std::max<int64_t>((sizes[axis] + count - 1) / count, 1), first = index * length;
  STD_TORCH_CHECK(first < sizes[axis] || index == 0, "chunk ", index, " must be there, of ", sizes[axis], " in ", count);
  sizes[axis] = std::min(length, sizes[axis] - first);
  return reinterpret(tensor, sizes, strides, first * strides[axis]);
}

}  // namespace kernels
