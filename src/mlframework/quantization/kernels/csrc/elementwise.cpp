// Codes element by element: to floats, and through a table. Each formula is that of arithmetic.py.
#include "channels.h"
#include "codes.h"
#include "cpu_features.h"
#include "operators.h"

#if HAS_X86_LEVELS
#include <immintrin.h>
#endif

namespace kernels {
namespace {

template <class Code>
struct Dequantize {
  ALWAYS_INLINE static void run(const Code* __restrict codes, float* __restrict values, int64_t count, float scale,
                                float zero_point) {
    for (int64_t i = 0; i < count; ++i) values[i] = (static_cast<float>(codes[i]) - zero_point) * scale;
  }
};

// Entry by entry of a row, again and again.
template <class Code>
struct DequantizeRows {
  ALWAYS_INLINE static void run(const Code* __restrict codes, float* __restrict values, int64_t count, int64_t length,
                                const float* __restrict scale, const float* __restrict zero_point) {
    for (int64_t start = 0; start < count; start += length) {
      const int64_t stop = std::min(length, count - start);
      for (int64_t i = 0; i < stop; ++i)
        values[start + i] = (static_cast<float>(codes[start + i]) - zero_point[i]) * scale[i];
    }
  }
};

template <class Code>
void dequantize_rows(const Code* from, float* to, const ChannelLayout& layout, const ChannelNumbers& scales,
                     const ChannelNumbers& zero_points) {
  const int64_t length = layout.row_length(), count = layout.count();
  if (count == 0) return;
  const std::vector<float> scale = layout.repeated(scales), zero_point = layout.repeated(zero_points);
  const int64_t grain = std::max<int64_t>(kElementsPerThread / length, 1);
  torch::stable::parallel_for(0, (count + length - 1) / length, grain, [&](int64_t begin, int64_t end) {
    run_vectorized<DequantizeRows<Code>>(from + begin * length, to + begin * length,
                                         std::min(end * length, count) - begin * length, length, scale.data(),
                                         zero_point.data());
  });
}

template <class Code>
void dequantize_runs(const Code* from, float* to, const ChannelLayout& layout, const ChannelNumbers& scales,
                     const ChannelNumbers& zero_points) {
  torch::stable::parallel_for(0, layout.count(), kElementsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end;) {
      const int64_t run = start / layout.inner, stop = std::min(end, (run + 1) * layout.inner);
      const int64_t channel = run % layout.channels;
      run_vectorized<Dequantize<Code>>(from + start, to + start, stop - start, scales[channel], zero_points[channel]);
      start = stop;
    }
  });
}

void lookup_each(const uint8_t* __restrict codes, uint8_t flip, const uint8_t* __restrict table,
                 uint8_t* __restrict result, int64_t count) {
  for (int64_t i = 0; i < count; ++i) result[i] = table[codes[i] ^ flip];
}

#if HAS_X86_LEVELS
// The whole table in four vectors, 64 codes at a time; the number of codes done, and the rest is left.
TARGET_AVX512_VBMI int64_t lookup_64(const uint8_t* codes, uint8_t flip, const uint8_t* table, uint8_t* result,
                                     int64_t count) {
  const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
  const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
  const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const __m512i index = _mm512_xor_si512(_mm512_loadu_si512(codes + i), flips);
    const __m512i lower = _mm512_permutex2var_epi8(a, index, b), upper = _mm512_permutex2var_epi8(c, index, d);
    _mm512_storeu_si512(result + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), lower, upper));
  }
  return i;
}
#endif

void lookup_all(const uint8_t* codes, uint8_t flip, const uint8_t* table, uint8_t* result, int64_t count) {
  int64_t done = 0;
#if HAS_X86_LEVELS
  if (has_feature(feature::avx512_vbmi))
    done = lookup_64(codes, flip, table, result, count);
#endif
  lookup_each(codes + done, flip, table, result + done, count - done);
}

}  // namespace

Tensor dequantize(const Tensor& codes, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                  ScalarType dtype) {
  check_codes(codes, "codes");
  const Tensor source = dense(codes);
  const Tensor result = empty_like(source, ScalarType::Float);
  const ChannelLayout layout = channel_layout(source, axis);
  const ChannelNumbers scales(scale, layout.channels, "scale"), zero_points(zero_point, layout.channels, "zero_point");
  float* to = static_cast<float*>(result.mutable_data_ptr());
  with_code_type(codes.scalar_type(), [&](auto code) {
    using Code = decltype(code);
    const Code* from = static_cast<const Code*>(source.const_data_ptr());
    if (layout.channels > 1 && layout.inner < kShortestRun) {
      dequantize_rows(from, to, layout, scales, zero_points);
    } else {
      dequantize_runs(from, to, layout, scales, zero_points);
    }
  });
  return dtype == ScalarType::Float ? result : torch::stable::to(result, dtype);
}

Tensor lookup(const Tensor& codes, const Tensor& table) {
  check_codes(codes, "codes");
  check_codes(table, "table");
  STD_TORCH_CHECK(table.numel() == 256 && table.is_contiguous(), "table must be contiguous and hold 256 codes");
  const Tensor source = dense(codes);
  const Tensor result = empty_like(source, table.scalar_type());
  // An int8 code has its place 128 further on, which is its byte with the highest bit changed.
  const uint8_t flip = codes.scalar_type() == ScalarType::Char ? 128 : 0;
  const uint8_t* from = static_cast<const uint8_t*>(source.const_data_ptr());
  const uint8_t* entries = static_cast<const uint8_t*>(table.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, source.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
    lookup_all(from + begin, flip, entries, to + begin, end - begin);
  });
  return result;
}

}  // namespace kernels
