// Max-pooling of codes: codes are ordered as the values they stand for, and padding, being no code, never wins.
#include <limits>

#include "cpu_features.h"
#include "operators.h"
#include "tensors.h"

namespace kernels {
namespace {

struct Window {
  int64_t kernel, stride, padding, dilation;

  int64_t input(int64_t position, int64_t tap) const { return position * stride - padding + tap * dilation; }

  // Of an output position, the first tap inside the input and the one after the last.
  int64_t first_tap(int64_t position) const {
    const int64_t start = input(position, 0);
    return start >= 0 ? 0 : (-start + dilation - 1) / dilation;
  }
  int64_t end_tap(int64_t position, int64_t size) const {
    const int64_t start = input(position, 0);
    return std::min(kernel, std::max<int64_t>((size - start + dilation - 1) / dilation, 0));
  }

  int64_t output_size(int64_t size, bool ceil_mode) const {
    const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "kernel must fit into the padded input, got size ", size, ", kernel ", kernel,
                    ", padding ", padding, ", dilation ", dilation);
    int64_t result = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    // The last window must start inside the input or the padding before it.
    if (ceil_mode && (result - 1) * stride >= size + padding) --result;
    return result;
  }
};

struct Strides {
  int64_t channel, row, column;
};

// One row of outputs, from all rows of one image.
template <class Code>
struct PoolRow {
  ALWAYS_INLINE static void run(const Code* codes, Strides from, int64_t height, int64_t width, int64_t y,
                                Window vertical, Window horizontal, Code* __restrict row, Strides to,
                                int64_t output_width, int64_t channels) {
    const int64_t first_i = vertical.first_tap(y), end_i = vertical.end_tap(y, height);
    for (int64_t x = 0; x < output_width; ++x) {
      Code* __restrict largest = row + x * to.column;
      const int64_t first_j = horizontal.first_tap(x), end_j = horizontal.end_tap(x, width);
      for (int64_t c = 0; c < channels; ++c) largest[c * to.channel] = std::numeric_limits<Code>::lowest();
      for (int64_t i = first_i; i < end_i; ++i)
        for (int64_t j = first_j; j < end_j; ++j) {
          const Code* __restrict source = codes + vertical.input(y, i) * from.row + horizontal.input(x, j) * from.column;
          if (from.channel == 1 && to.channel == 1) {
            for (int64_t c = 0; c < channels; ++c) largest[c] = std::max(largest[c], source[c]);
          } else {
            for (int64_t c = 0; c < channels; ++c)
              largest[c * to.channel] = std::max(largest[c * to.channel], source[c * from.channel]);
          }
        }
    }
  }
};

template <class Code>
void pool(const Tensor& codes, const Tensor& result, const Window& vertical, const Window& horizontal) {
  const Shape sizes = sizes_of(result);
  const Strides from{codes.stride(1), codes.stride(2), codes.stride(3)};
  const Strides to{result.stride(1), result.stride(2), result.stride(3)};
  const int64_t height = codes.size(2), width = codes.size(3);
  const Code* input = static_cast<const Code*>(codes.const_data_ptr());
  Code* output = static_cast<Code*>(result.mutable_data_ptr());
  const int64_t row_size = sizes[1] * sizes[3] * vertical.kernel * horizontal.kernel;
  const int64_t grain = std::max<int64_t>(kElementsPerThread / row_size, 1);
  torch::stable::parallel_for(0, sizes[0] * sizes[2], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / sizes[2], y = row % sizes[2];
      run_vectorized<PoolRow<Code>>(input + image * codes.stride(0), from, height, width, y, vertical, horizontal,
                                    output + image * result.stride(0) + y * to.row, to, sizes[3], sizes[1]);
    }
  });
}

}  // namespace

Tensor max_pool2d(const Tensor& codes, Shape kernel, Shape stride, Shape padding, Shape dilation, bool ceil_mode) {
  check_codes(codes, "codes");
  STD_TORCH_CHECK(codes.dim() == 4, "codes must have shape (N, C, H, W), got ", codes.dim(), " dimensions");
  for (size_t axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(kernel.at(axis) > 0 && stride.at(axis) > 0 && dilation.at(axis) > 0,
                    "kernel, stride and dilation must be positive");
    STD_TORCH_CHECK(0 <= padding.at(axis) && 2 * padding[axis] <= dilation[axis] * (kernel[axis] - 1) + 1,
                    "padding must be at most half of the kernel's extent, got ", padding[axis]);
  }
  const Window vertical{kernel[0], stride[0], padding[0], dilation[0]};
  const Window horizontal{kernel[1], stride[1], padding[1], dilation[1]};
  const Shape sizes{codes.size(0), codes.size(1), vertical.output_size(codes.size(2), ceil_mode),
                    horizontal.output_size(codes.size(3), ceil_mode)};
  const bool channels_innermost = codes.stride(1) == 1;
  const Tensor result =
      empty(sizes, channels_innermost ? channels_last_strides(sizes) : contiguous_strides(sizes), codes.scalar_type());
  if (result.numel() == 0) return result;
  if (codes.scalar_type() == ScalarType::Byte) {
    pool<uint8_t>(codes, result, vertical, horizontal);
  } else {
    pool<int8_t>(codes, result, vertical, horizontal);
  }
  return result;
}

}  // namespace kernels
