// What the instructions of a program compute: the operators, with what the Python modules do around them.
#include <unordered_map>

#include "operators.h"
#include "program.h"
#include "views.h"

namespace kernels {
namespace {

using Inputs = std::vector<const Tensor*>;

ScalarType code_dtype(int64_t is_signed) { return is_signed ? ScalarType::Char : ScalarType::Byte; }

// Values leave a program in the dtype of the model around it.
Tensor in_dtype(const Tensor& values, int64_t dtype) {
  constexpr ScalarType dtypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16};
  return dtype == 0 ? values : torch::stable::to(values, dtypes[dtype]);
}

Tensor run_quantize(const Instruction& i, const Inputs& inputs) {
  return quantize(*inputs[0], i.tensors[0], i.tensors[1], i.numbers[0], i.numbers[1], code_dtype(i.numbers[2]), -1);
}

Tensor run_dequantize(const Instruction& i, const Inputs& inputs) {
  return in_dtype(dequantize(*inputs[0], i.tensors[0], i.tensors[1], -1, ScalarType::Float), i.numbers[0]);
}

Tensor run_linear(const Instruction& i, const Inputs& inputs) {
  return in_dtype(linear(*inputs[0], i.tensors[0]), i.numbers[0]);
}

// Numbers: the dtype of values, the spatial dimensions.
Tensor run_convolution(const Instruction& i, const Inputs& inputs) {
  const Tensor& codes = *inputs[0];
  const bool is_batch = codes.dim() == i.numbers[1] + 2;
  STD_TORCH_CHECK(is_batch || codes.dim() == i.numbers[1] + 1, "codes must have ", i.numbers[1] + 2,
                  " dimensions, got ", codes.dim());
  if (is_batch) return in_dtype(convolution(codes, i.tensors[0]), i.numbers[0]);
  return in_dtype(without_batch_axis(convolution(with_batch_axis(codes), i.tensors[0])), i.numbers[0]);
}

// Whether, along the last axis on which either is longer than 1, `left` is broadcast; so it is on none.
bool is_constant_along_last_axis(const Tensor& left, const Tensor& right) {
  for (int64_t axis = 1; axis <= std::max(left.dim(), right.dim()); ++axis) {
    const int64_t left_size = axis <= left.dim() ? left.size(left.dim() - axis) : 1;
    const int64_t right_size = axis <= right.dim() ? right.size(right.dim() - axis) : 1;
    if (left_size != 1 || right_size != 1) return left_size == 1;
  }
  return true;
}

// Tensors: the constants for the operands as given, then for the operands swapped.
Tensor run_add(const Instruction& i, const Inputs& inputs) {
  const bool swapped = is_constant_along_last_axis(*inputs[0], *inputs[1]);
  const Tensor* constants = &i.tensors[swapped ? 3 : 0];
  return add(*inputs[swapped], constants[0], *inputs[!swapped], constants[1], constants[2], i.numbers[0], i.numbers[1],
             code_dtype(i.numbers[2]));
}

Tensor run_lookup(const Instruction& i, const Inputs& inputs) { return lookup(*inputs[0], i.tensors[0]); }

Tensor run_max_pool2d(const Instruction& i, const Inputs& inputs) {
  const auto pair = [&](size_t place) { return Shape{i.numbers[place], i.numbers[place + 1]}; };
  const bool ceil_mode = i.numbers[8] != 0;
  const Tensor& codes = *inputs[0];
  if (codes.dim() == 4) return max_pool2d(codes, pair(0), pair(2), pair(4), pair(6), ceil_mode);
  return without_batch_axis(max_pool2d(with_batch_axis(codes), pair(0), pair(2), pair(4), pair(6), ceil_mode));
}

// Numbers: the spatial dimensions, which are averaged over; where the output saturates; its dtype.
Tensor run_average(const Instruction& i, const Inputs& inputs) {
  const Tensor& codes = *inputs[0];
  const int64_t dimensions = i.numbers[0];
  Shape sizes = sizes_of(codes);
  STD_TORCH_CHECK(codes.dim() == dimensions + 1 || codes.dim() == dimensions + 2, "codes must have ", dimensions + 2,
                  " dimensions, got ", codes.dim());
  std::fill(sizes.end() - dimensions, sizes.end(), 1);
  const Tensor& images = codes.dim() == dimensions + 2 ? codes : with_batch_axis(codes);
  const Tensor averages = average_positions(images, i.tensors[0], i.tensors[1], i.tensors[2], i.tensors[3],
                                            i.numbers[1], i.numbers[2], code_dtype(i.numbers[3]));
  return reinterpret(averages, sizes, contiguous_strides(sizes));
}

// Tensors: a table for each operand. Numbers: the axis.
Tensor run_concat(const Instruction& i, const Inputs& inputs) {
  STD_TORCH_CHECK(i.tensors.size() == inputs.size(), "concat must have a table for each operand");
  std::vector<Tensor> parts;
  for (size_t place = 0; place < inputs.size(); ++place) parts.push_back(lookup(*inputs[place], i.tensors[place]));
  using torch::stable::detail::from;
  return call_operator<2>("aten::cat", "", {from(parts), from(i.numbers[0])});
}

// A transposed convolution as the convolution of its phases. Numbers: the dtype of values; the upscaling factor; the
// rows to cut off at the top and at the bottom, and the columns on the left and on the right.
Tensor run_subpixel(const Instruction& i, const Inputs& inputs) {
  const Tensor& codes = *inputs[0];
  const bool is_batch = codes.dim() == 4;
  const Tensor phases = convolution(is_batch ? codes : with_batch_axis(codes), i.tensors[0]);
  using torch::stable::detail::from;
  const Tensor shuffled = call_operator<2>("aten::pixel_shuffle", "", {from(phases), from(i.numbers[1])});
  Shape sizes = sizes_of(shuffled);
  const Shape strides = strides_of(shuffled);
  sizes[2] -= i.numbers[2] + i.numbers[3];
  sizes[3] -= i.numbers[4] + i.numbers[5];
  const Tensor result = reinterpret(shuffled, sizes, strides, i.numbers[2] * strides[2] + i.numbers[4] * strides[3]);
  return in_dtype(is_batch ? result : without_batch_axis(result), i.numbers[0]);
}

// What follows takes the numbers that int8/views.py says.

Tensor run_identity(const Instruction&, const Inputs& inputs) { return *inputs[0]; }

Tensor run_contiguous(const Instruction&, const Inputs& inputs) { return torch::stable::contiguous(*inputs[0]); }

Tensor run_flatten(const Instruction& i, const Inputs& inputs) {
  return torch::stable::flatten(*inputs[0], i.numbers[0], i.numbers[1]);
}

Tensor run_transpose(const Instruction& i, const Inputs& inputs) {
  return torch::stable::transpose(*inputs[0], i.numbers[0], i.numbers[1]);
}

Tensor run_select(const Instruction& i, const Inputs& inputs) {
  return torch::stable::select(*inputs[0], i.numbers[0], i.numbers[1]);
}

Tensor run_part(const Instruction& i, const Inputs& inputs) {
  return part_of(*inputs[0], i.numbers[0], i.numbers[1], i.numbers[2]);
}

Tensor run_permute(const Instruction& i, const Inputs& inputs) {
  using torch::stable::detail::from;
  return call_operator<2>("aten::permute", "", {from(*inputs[0]), from(i.numbers)});
}

Tensor run_reshape(const Instruction& i, const Inputs& inputs) {
  using torch::stable::detail::from;
  return call_operator<2>("aten::reshape", "", {from(*inputs[0]), from(i.numbers)});
}

Tensor run_unflatten(const Instruction& i, const Inputs& inputs) {
  using torch::stable::detail::from;
  const Shape sizes(i.numbers.begin() + 1, i.numbers.end());
  return call_operator<3>("aten::unflatten", "int", {from(*inputs[0]), from(i.numbers[0]), from(sizes)});
}

}  // namespace

void set_function(Instruction& instruction, const std::string& name) {
  struct Kind {
    Instruction::Function function;
    size_t inputs, tensors, numbers;  // the fewest that it reads
  };
  static const std::unordered_map<std::string, Kind> kinds{
      {"quantize", {run_quantize, 1, 2, 3}},
      {"dequantize", {run_dequantize, 1, 2, 1}},
      {"linear", {run_linear, 1, 1, 1}},
      {"convolution", {run_convolution, 1, 1, 2}},
      {"subpixel", {run_subpixel, 1, 1, 6}},
      {"add", {run_add, 2, 6, 3}},
      {"lookup", {run_lookup, 1, 1, 0}},
      {"concat", {run_concat, 1, 1, 1}},
      {"average", {run_average, 1, 4, 4}},
      {"max_pool2d", {run_max_pool2d, 1, 0, 9}},
      {"identity", {run_identity, 1, 0, 0}},
      {"contiguous", {run_contiguous, 1, 0, 0}},
      {"flatten", {run_flatten, 1, 0, 2}},
      {"transpose", {run_transpose, 1, 0, 2}},
      {"permute", {run_permute, 1, 0, 0}},
      {"reshape", {run_reshape, 1, 0, 0}},
      {"unflatten", {run_unflatten, 1, 0, 2}},
      {"select", {run_select, 1, 0, 2}},
      {"part", {run_part, 1, 0, 3}},
  };
  const auto found = kinds.find(name);
  STD_TORCH_CHECK(found != kinds.end(), "names must be those of instructions, got ", name);
  const Kind& kind = found->second;
  const bool has_all = instruction.inputs.size() >= kind.inputs && instruction.tensors.size() >= kind.tensors &&
                       instruction.numbers.size() >= kind.numbers;
  STD_TORCH_CHECK(has_all, name, " must have at least ", kind.inputs, " inputs, ", kind.tensors, " tensors and ",
                  kind.numbers, " numbers");
  instruction.function = kind.function;
}

}  // namespace kernels
