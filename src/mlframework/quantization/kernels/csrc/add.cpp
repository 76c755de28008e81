// Sums of two tensors of codes: add_codes of arithmetic.py.
#include <cmath>
#include <limits>

#include "codes.h"
#include "cpu_features.h"
#include "operators.h"

namespace kernels {
namespace {

struct AddConstants {
  float left_ratio, right_ratio, constant, lowest, highest;
};

// `code * factor + addend`, rounded once to float32: by the processor's own instruction, or through float64.
template <bool kInstruction>
ALWAYS_INLINE float multiply_add(float code, float factor, float addend) {
  if (kInstruction) return __builtin_fmaf(code, factor, addend);
  return static_cast<float>(static_cast<double>(code) * static_cast<double>(factor) + static_cast<double>(addend));
}

// The two ways agree where float64 holds the sums exactly: where from the lowest bit of any constant to the highest of
// any sum there are no more than its 53.
bool sums_fit_float64(const AddConstants& c) {
  int lowest = std::numeric_limits<int>::max();
  for (float number : {c.left_ratio, c.right_ratio, c.constant})
    if (number != 0.0f) lowest = std::min(lowest, std::ilogb(number) - 23);
  const double largest = 256.0 * (std::abs(c.left_ratio) + std::abs(c.right_ratio)) + std::abs(c.constant);
  return largest == 0.0 || (std::isfinite(largest) && std::ilogb(largest) + 1 - lowest <= 53);
}

template <class Left, class Right, class Code, bool kInstruction>
ALWAYS_INLINE Code add_codes(Left left, Right right, const AddConstants& c) {
  const float inner = multiply_add<kInstruction>(static_cast<float>(right), c.right_ratio, c.constant);
  const float total = multiply_add<kInstruction>(static_cast<float>(left), c.left_ratio, inner);
  return to_code<Code>(clamp(std::nearbyintf(total), c.lowest, c.highest));
}

// Steps of 0 or 1: an operand that is one element to the whole row, or one to each of the sum's.
template <class Left, class Right, class Code, bool kInstruction>
struct AddRows {
  ALWAYS_INLINE static void run(const Left* __restrict left, int64_t left_step, const Right* __restrict right,
                                int64_t right_step, Code* __restrict sum, int64_t count, AddConstants constants) {
    if (left_step == 1 && right_step == 1) {
      for (int64_t i = 0; i < count; ++i)
        sum[i] = add_codes<Left, Right, Code, kInstruction>(left[i], right[i], constants);
    } else {
      for (int64_t i = 0; i < count; ++i)
        sum[i] = add_codes<Left, Right, Code, kInstruction>(left[i * left_step], right[i * right_step], constants);
    }
  }
};

template <class Left, class Right, class Code>
void add_rows(const Left* left, int64_t left_step, const Right* right, int64_t right_step, Code* sum, int64_t count,
              const AddConstants& constants) {
  if (has_fused_multiply_add() && sums_fit_float64(constants)) {
    run_vectorized<AddRows<Left, Right, Code, true>>(left, left_step, right, right_step, sum, count, constants);
  } else {
    run_vectorized<AddRows<Left, Right, Code, false>>(left, left_step, right, right_step, sum, count, constants);
  }
}

// Shape of the sum of two tensors that broadcast.
Shape broadcast_shape(const Shape& left, const Shape& right) {
  Shape shape(std::max(left.size(), right.size()));
  for (size_t axis = 0; axis < shape.size(); ++axis) {  // counted from the last
    const int64_t a = axis < left.size() ? left[left.size() - 1 - axis] : 1;
    const int64_t b = axis < right.size() ? right[right.size() - 1 - axis] : 1;
    STD_TORCH_CHECK(a == b || a == 1 || b == 1, "shapes of the operands must broadcast, got sizes ", a, " and ", b,
                    " in dimension -", axis + 1);
    shape[shape.size() - 1 - axis] = a == 1 ? b : a;
  }
  return shape;
}

// Strides with which a tensor is read as if it had `shape`.
Shape broadcast_strides(const Tensor& tensor, const Shape& shape) {
  const Shape sizes = sizes_of(tensor), strides = strides_of(tensor);
  Shape result(shape.size(), 0);
  const size_t missing = shape.size() - sizes.size();
  for (size_t axis = 0; axis < sizes.size(); ++axis) result[missing + axis] = sizes[axis] == 1 ? 0 : strides[axis];
  return result;
}

template <class Left, class Right, class Code>
void add_broadcast(const Left* left, const Shape& left_strides, const Right* right, const Shape& right_strides,
                   Code* sum, const Shape& shape, const AddConstants& constants) {
  const int64_t last = shape.empty() ? 0 : static_cast<int64_t>(shape.size()) - 1;
  const int64_t count = shape.empty() ? 1 : shape[last];
  const int64_t left_step = shape.empty() ? 0 : left_strides[last], right_step = shape.empty() ? 0 : right_strides[last];
  int64_t rows = 1;
  for (int64_t axis = 0; axis < last; ++axis) rows *= shape[axis];
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(kElementsPerThread / std::max<int64_t>(count, 1), 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          int64_t left_offset = 0, right_offset = 0, rest = row;
          for (int64_t axis = last; axis-- > 0;) {
            left_offset += rest % shape[axis] * left_strides[axis];
            right_offset += rest % shape[axis] * right_strides[axis];
            rest /= shape[axis];
          }
          add_rows(left + left_offset, left_step, right + right_offset, right_step, sum + row * count, count,
                   constants);
        }
      });
}

}  // namespace

Tensor add(const Tensor& left, const Tensor& left_ratio, const Tensor& right, const Tensor& right_ratio,
           const Tensor& constant, int64_t lowest, int64_t highest, ScalarType dtype) {
  check_codes(left, "left");
  check_codes(right, "right");
  check_code_dtype(dtype);
  const AddConstants constants{number_in(left_ratio, "left_ratio"), number_in(right_ratio, "right_ratio"),
                               number_in(constant, "constant"), static_cast<float>(lowest),
                               static_cast<float>(highest)};
  const Shape shape = broadcast_shape(sizes_of(left), sizes_of(right));
  const bool one_layout = sizes_of(left) == shape && sizes_of(right) == shape && is_dense(left) &&
                          same_layout(shape, strides_of(right), strides_of(left));
  const Tensor result = empty(shape, one_layout ? strides_of(left) : contiguous_strides(shape), dtype);
  if (result.numel() == 0) return result;
  with_code_type(left.scalar_type(), [&](auto left_code) {
    with_code_type(right.scalar_type(), [&](auto right_code) {
      with_code_type(dtype, [&](auto sum_code) {
        using Left = decltype(left_code);
        using Right = decltype(right_code);
        using Code = decltype(sum_code);
        const Left* a = static_cast<const Left*>(left.const_data_ptr());
        const Right* b = static_cast<const Right*>(right.const_data_ptr());
        Code* sum = static_cast<Code*>(result.mutable_data_ptr());
        if (!one_layout) {
          return add_broadcast(a, broadcast_strides(left, shape), b, broadcast_strides(right, shape), sum, shape,
                               constants);
        }
        torch::stable::parallel_for(0, result.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
          add_rows(a + begin, 1, b + begin, 1, sum + begin, end - begin, constants);
        });
      });
    });
  });
  return result;
}

}  // namespace kernels
