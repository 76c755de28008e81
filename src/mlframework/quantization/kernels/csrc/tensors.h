// Tensors as the kernels see them: shapes, layouts in memory, and how elements are shared out among threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline Shape strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return Shape(strides.begin(), strides.end());
}

inline Shape contiguous_strides(const Shape& sizes) {
  Shape strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  }
  return strides;
}

// Strides of a dense tensor whose axis 1 lies innermost in memory: channels-last, in any number of dimensions.
inline Shape channels_last_strides(const Shape& sizes) {
  Shape strides(sizes.size());
  strides[1] = 1;
  int64_t stride = std::max<int64_t>(sizes[1], 1);
  for (size_t axis = sizes.size(); axis-- > 0;) {
    if (axis == 1) continue;
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  }
  return strides;
}

// Whether the strides place the elements as `expected` does; the stride of an axis of one element is arbitrary.
inline bool same_layout(const Shape& sizes, const Shape& strides, const Shape& expected) {
  for (size_t axis = 0; axis < sizes.size(); ++axis)
    if (sizes[axis] > 1 && strides[axis] != expected[axis]) return false;
  return true;
}

// Whether the elements fill one block of memory, in the order of any permutation of the axes.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const Shape sizes = sizes_of(tensor), strides = strides_of(tensor);
  std::vector<size_t> axes;
  for (size_t axis = 0; axis < sizes.size(); ++axis)
    if (sizes[axis] > 1) axes.push_back(axis);
  std::sort(axes.begin(), axes.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t stride = 1;
  for (size_t axis : axes) {
    if (strides[axis] != stride) return false;
    stride *= sizes[axis];
  }
  return true;
}

// A copy, where there must be one, keeps the order of the axes.
inline Tensor dense(const Tensor& tensor) { return is_dense(tensor) ? tensor : torch::stable::clone(tensor); }

// An uninitialized tensor of codes, int32, bfloat16 or float32.
inline Tensor empty(const Shape& sizes, const Shape& strides, ScalarType dtype) {
  const int32_t code = dtype == ScalarType::Byte       ? aoti_torch_dtype_uint8()
                       : dtype == ScalarType::Char     ? aoti_torch_dtype_int8()
                       : dtype == ScalarType::Int      ? aoti_torch_dtype_int32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// An uninitialized tensor that lies in memory as a dense one does.
inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  return empty(sizes_of(tensor), strides_of(tensor), dtype);
}

// `tensor`, of that dtype, with its elements in the places in which those of `like`, which is dense, lie.
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like, ScalarType dtype, const char* name) {
  const Shape sizes = sizes_of(like), strides = strides_of(like);
  STD_TORCH_CHECK(tensor.is_cpu() && sizes_of(tensor) == sizes && tensor.scalar_type() == dtype, name,
                  " must be on the CPU, of the shape and the dtype of what it belongs to");
  if (same_layout(sizes, strides_of(tensor), strides)) return tensor;
  Tensor result = empty(sizes, strides, dtype);
  torch::stable::copy_(result, tensor);
  return result;
}

inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like, const char* name) {
  return laid_out_as(tensor, like, like.scalar_type(), name);
}

inline void check_codes(const Tensor& codes, const char* name) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte || codes.scalar_type() == ScalarType::Char,
                  name, " must be uint8 or int8");
  STD_TORCH_CHECK(codes.is_cpu(), name, " must be on the CPU");
}

inline void check_code_dtype(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Byte || dtype == ScalarType::Char, "dtype must be uint8 or int8");
}

inline void check_floats(const Tensor& values, const char* name) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(values.is_cpu(), name, " must be on the CPU");
}

inline void check_trained(const Tensor& values, const char* name) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float || values.scalar_type() == ScalarType::BFloat16, name,
                  " must be float32 or bfloat16");
  STD_TORCH_CHECK(values.is_cpu(), name, " must be on the CPU");
}

// The single number that a tensor of float32 or int32 holds.
inline float number_in(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.is_cpu(), name, " must hold one number, on the CPU");
  if (tensor.scalar_type() == ScalarType::Float) return *static_cast<const float*>(tensor.const_data_ptr());
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, " must be float32 or int32");
  return static_cast<float>(*static_cast<const int32_t*>(tensor.const_data_ptr()));
}

// The float32 numbers, so many side by side, that a tensor holds.
inline float* numbers_in(const Tensor& tensor, int64_t count, const char* name) {
  check_floats(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == count && tensor.is_contiguous(), name, " must hold ", count,
                  " numbers side by side, got ", tensor.numel());
  return static_cast<float*>(tensor.mutable_data_ptr());
}

}  // namespace kernels
