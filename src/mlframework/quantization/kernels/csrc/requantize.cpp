// Sums of an integer layer to codes: the epilogue of a layer whose sums another library computed.
#include <cmath>
#include <optional>

#include "codes.h"
#include "cpu_features.h"
#include "operators.h"

namespace kernels {
namespace {

struct Grid {
  float lowest, highest;  // relative to the zero point
  int32_t zero_point;
};

ALWAYS_INLINE uint8_t requantized(float accumulator, float multiplier, const Grid& grid) {
  const float rounded = std::nearbyintf(clamp(accumulator * multiplier, grid.lowest, grid.highest));
  return static_cast<uint8_t>(static_cast<int32_t>(rounded) + grid.zero_point);
}

// Int32 sums and biases are added as integers; float ones hold exact integers, and so do their float sums.
ALWAYS_INLINE float accumulated(float sum, float bias) { return sum + bias; }
ALWAYS_INLINE float accumulated(int32_t sum, int32_t bias) {
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(bias)));
}

// The channels of one position after another, with one bias and multiplier to each element of a row.
template <class Sum>
struct RequantizeRows {
  ALWAYS_INLINE static void run(const Sum* __restrict sums, const Sum* __restrict bias,
                                const float* __restrict multiplier, uint8_t* __restrict codes, int64_t count,
                                int64_t row, Grid grid) {
    for (int64_t start = 0; start < count; start += row) {
      const int64_t length = std::min(row, count - start);
      for (int64_t i = 0; i < length; ++i)
        codes[start + i] = requantized(accumulated(sums[start + i], bias[i]), multiplier[i], grid);
    }
  }
};

// The positions of one channel.
template <class Sum>
struct RequantizePositions {
  ALWAYS_INLINE static void run(const Sum* __restrict sums, Sum bias, float multiplier, uint8_t* __restrict codes,
                                int64_t count, Grid grid) {
    for (int64_t i = 0; i < count; ++i) codes[i] = requantized(accumulated(sums[i], bias), multiplier, grid);
  }
};

// `count` numbers, as `Number`s: those of a tensor again and again, or zeros where there is none.
template <class Number>
std::vector<Number> repeated(const std::optional<Tensor>& values, int64_t count) {
  std::vector<Number> result(static_cast<size_t>(count), Number(0));
  if (!values) return result;
  const Tensor source = torch::stable::contiguous(*values);
  const Number* numbers = static_cast<const Number*>(source.const_data_ptr());
  const int64_t length = source.numel();
  for (int64_t i = 0; i < count; ++i) result[static_cast<size_t>(i)] = numbers[i % length];
  return result;
}

// Sums whose channels lie innermost. Short rows are joined, so that the inner loop is worth its while.
template <class Sum>
void requantize_rows(const Tensor& sums, const std::optional<Tensor>& bias, const Tensor& multiplier, uint8_t* codes,
                     int64_t channels, const Grid& grid) {
  const int64_t row = channels * ((511 + channels) / channels);
  const std::vector<Sum> biases = repeated<Sum>(bias, row);
  const std::vector<float> multipliers = repeated<float>(multiplier, row);
  const Sum* from = static_cast<const Sum*>(sums.const_data_ptr());
  const int64_t count = sums.numel();
  const int64_t grain = std::max<int64_t>(kElementsPerThread / row, 1);
  torch::stable::parallel_for(0, (count + row - 1) / row, grain, [&](int64_t begin, int64_t end) {
    run_vectorized<RequantizeRows<Sum>>(from + begin * row, biases.data(), multipliers.data(), codes + begin * row,
                                        std::min(end * row, count) - begin * row, row, grid);
  });
}

// Sums of one channel after the other, `inner` of each.
template <class Sum>
void requantize_planes(const Tensor& sums, const std::optional<Tensor>& bias, const Tensor& multiplier, uint8_t* codes,
                       int64_t channels, int64_t inner, const Grid& grid) {
  const std::vector<Sum> biases = repeated<Sum>(bias, channels);
  const std::vector<float> multipliers = repeated<float>(multiplier, channels);
  const Sum* from = static_cast<const Sum*>(sums.const_data_ptr());
  const int64_t grain = std::max<int64_t>(kElementsPerThread / inner, 1);
  torch::stable::parallel_for(0, sums.numel() / inner, grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane)
      run_vectorized<RequantizePositions<Sum>>(from + plane * inner, biases[static_cast<size_t>(plane % channels)],
                                               multipliers[static_cast<size_t>(plane % channels)],
                                               codes + plane * inner, inner, grid);
  });
}

}  // namespace

Tensor requantize(const Tensor& sums, const std::optional<Tensor>& bias, const Tensor& multiplier, int64_t zero_point,
                  int64_t lowest, int64_t highest, ScalarType dtype, int64_t channel_axis) {
  check_code_dtype(dtype);
  const bool floats = sums.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(sums.is_cpu() && (floats || sums.scalar_type() == ScalarType::Int),
                  "sums must be float32 or int32, on the CPU");
  const int64_t dimensions = sums.dim();
  STD_TORCH_CHECK(-dimensions <= channel_axis && channel_axis < dimensions, "channel_axis must lie within ", dimensions,
                  " dimensions, got ", channel_axis);
  const int64_t axis = channel_axis < 0 ? channel_axis + dimensions : channel_axis;
  const int64_t channels = sums.size(axis);
  check_floats(multiplier, "multiplier");
  STD_TORCH_CHECK(multiplier.numel() == 1 || multiplier.numel() == channels, "multiplier must hold 1 or ", channels,
                  " numbers, got ", multiplier.numel());
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && (bias->numel() == 1 || bias->numel() == channels),
                    "bias must be on the CPU and hold 1 or ", channels, " numbers, got ", bias->numel());
    if (floats && bias->scalar_type() == ScalarType::Int) {  // an int32 bias makes an int32 accumulator
      return requantize(torch::stable::to(sums, ScalarType::Int), bias, multiplier, zero_point, lowest, highest, dtype,
                        axis);
    }
    STD_TORCH_CHECK(bias->scalar_type() == sums.scalar_type(), "bias must be int32, or float32 as the sums are");
  }
  // Where the channels of a position lie side by side, the order of the positions does not matter.
  const bool channels_innermost = (sums.stride(axis) == 1 || channels == 1) && is_dense(sums);
  const Tensor source = channels_innermost ? sums : torch::stable::contiguous(sums);
  const Tensor result = empty_like(source, dtype);
  if (result.numel() == 0) return result;
  const Grid grid{static_cast<float>(lowest - zero_point), static_cast<float>(highest - zero_point),
                  static_cast<int32_t>(zero_point)};
  uint8_t* codes = static_cast<uint8_t*>(result.mutable_data_ptr());
  if (channels_innermost) {
    if (floats) {
      requantize_rows<float>(source, bias, multiplier, codes, channels, grid);
    } else {
      requantize_rows<int32_t>(source, bias, multiplier, codes, channels, grid);
    }
  } else {
    const int64_t inner = source.stride(axis);
    if (floats) {
      requantize_planes<float>(source, bias, multiplier, codes, channels, inner, grid);
    } else {
      requantize_planes<int32_t>(source, bias, multiplier, codes, channels, inner, grid);
    }
  }
  return result;
}

}  // namespace kernels
