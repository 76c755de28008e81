// Sums of codes over the positions of each channel, which global average pooling starts from.
#include "cpu_features.h"
#include "operators.h"
#include "tensors.h"

namespace kernels {
namespace {

// Channels side by side: one vector of sums, to which every position adds.
template <class Code>
struct SumRows {
  ALWAYS_INLINE static void run(const Code* __restrict codes, int64_t positions, int64_t channels,
                                int32_t* __restrict sums) {
    for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
    for (int64_t position = 0; position < positions; ++position)
      for (int64_t c = 0; c < channels; ++c) sums[c] += codes[position * channels + c];
  }
};

// Positions side by side: one sum after the other.
template <class Code>
struct SumPlanes {
  ALWAYS_INLINE static void run(const Code* __restrict codes, int64_t positions, int64_t channels,
                                int32_t* __restrict sums) {
    for (int64_t c = 0; c < channels; ++c) {
      int32_t sum = 0;
      for (int64_t position = 0; position < positions; ++position) sum += codes[c * positions + position];
      sums[c] = sum;
    }
  }
};

template <class Code>
void sum_images(const Tensor& codes, int64_t images, int64_t channels, int64_t positions, bool channels_last,
                int32_t* sums) {
  const Code* from = static_cast<const Code*>(codes.const_data_ptr());
  const int64_t grain = std::max<int64_t>(kElementsPerThread / std::max<int64_t>(channels * positions, 1), 1);
  torch::stable::parallel_for(0, images, grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const Code* source = from + image * channels * positions;
      if (channels_last) {
        run_vectorized<SumRows<Code>>(source, positions, channels, sums + image * channels);
      } else {
        run_vectorized<SumPlanes<Code>>(source, positions, channels, sums + image * channels);
      }
    }
  });
}

}  // namespace

Tensor sum_positions(const Tensor& codes) {
  check_codes(codes, "codes");
  STD_TORCH_CHECK(codes.dim() >= 3, "codes must have shape (N, C, *size), got ", codes.dim(), " dimensions");
  const Shape sizes = sizes_of(codes);
  const bool channels_last = same_layout(sizes, strides_of(codes), channels_last_strides(sizes));
  const Tensor source = channels_last ? codes : torch::stable::contiguous(codes);
  const Tensor result = empty({sizes[0], sizes[1]}, {std::max<int64_t>(sizes[1], 1), 1}, ScalarType::Int);
  int64_t positions = 1;
  for (size_t axis = 2; axis < sizes.size(); ++axis) positions *= sizes[axis];
  int32_t* sums = static_cast<int32_t*>(result.mutable_data_ptr());
  if (codes.scalar_type() == ScalarType::Byte) {
    sum_images<uint8_t>(source, sizes[0], sizes[1], positions, channels_last, sums);
  } else {
    sum_images<int8_t>(source, sizes[0], sizes[1], positions, channels_last, sums);
  }
  return result;
}

}  // namespace kernels
