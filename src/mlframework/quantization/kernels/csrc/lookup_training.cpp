// What training takes to know of a function that is a table: which entries were asked for, and the gradient through it.
#include <atomic>
#include <limits>

#include "codes.h"
#include "cpu_features.h"
#include "operators.h"

#if HAS_X86_LEVELS
#include <immintrin.h>
#endif

namespace kernels {
namespace {

void multiply_slopes_each(const float* gradient, const uint8_t* codes, uint8_t flip, const float* slopes, float clip,
                          int64_t count, float* result) {
  for (int64_t i = 0; i < count; ++i) {
    float passed = gradient[i] < -clip ? -clip : gradient[i];
    passed = passed > clip ? clip : passed;
    const float slope = slopes[codes[i] ^ flip];
    result[i] = slope == 0.0f ? 0.0f : passed * slope;  // even of a gradient that is infinite
  }
}

#if HAS_X86_LEVELS
// The same for sixteen at a time; the number done, and the rest is left.
TARGET_AVX512 int64_t multiply_slopes_16(const float* gradient, const uint8_t* codes, uint8_t flip,
                                         const float* slopes, float clip, int64_t count, float* result) {
  const __m512i flips = _mm512_set1_epi32(flip);
  const __m512 highest = _mm512_set1_ps(clip), lowest = _mm512_set1_ps(-clip);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const __m512i places = _mm512_xor_si512(_mm512_cvtepu8_epi32(bytes), flips);
    // Of NaN, the second operand is taken.
    const __m512 passed = _mm512_min_ps(highest, _mm512_max_ps(lowest, _mm512_loadu_ps(gradient + i)));
    const __m512 slope = _mm512_i32gather_ps(places, slopes, 4);
    const __mmask16 slopes_up_or_down = _mm512_cmp_ps_mask(slope, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_storeu_ps(result + i, _mm512_maskz_mul_ps(slopes_up_or_down, passed, slope));
  }
  return i;
}
#endif

void multiply_slopes(const float* gradient, const uint8_t* codes, uint8_t flip, const float* slopes, float clip,
                     int64_t count, float* result) {
  int64_t done = 0;
#if HAS_X86_LEVELS
  if (has_feature(feature::avx512))
    done = multiply_slopes_16(gradient, codes, flip, slopes, clip, count, result);
#endif
  multiply_slopes_each(gradient + done, codes + done, flip, slopes, clip, count - done, result + done);
}

// An int8 code has its place 128 further on, which is its byte with the highest bit changed.
uint8_t flip_of(const Tensor& codes) { return codes.scalar_type() == ScalarType::Char ? 128 : 0; }

}  // namespace

Tensor lookup_gradient(const Tensor& gradient, const Tensor& codes, const Tensor& slopes,
                       std::optional<double> gradient_clip) {
  check_floats(gradient, "gradient");
  check_codes(codes, "codes");
  check_floats(slopes, "slopes");
  STD_TORCH_CHECK(slopes.numel() == 256 && slopes.is_contiguous(), "slopes must be contiguous and hold 256 numbers");
  STD_TORCH_CHECK(sizes_of(gradient) == sizes_of(codes), "gradient must have the shape of codes");
  const Tensor source = dense(codes);
  const Tensor result = empty_like(source, ScalarType::Float);
  const Tensor aligned = laid_out_as(gradient, result, "gradient");
  const float clip = gradient_clip ? static_cast<float>(*gradient_clip) : std::numeric_limits<float>::infinity();
  const uint8_t flip = flip_of(codes);
  const auto* from = static_cast<const float*>(aligned.const_data_ptr());
  const auto* at = static_cast<const uint8_t*>(source.const_data_ptr());
  const auto* slope = static_cast<const float*>(slopes.const_data_ptr());
  auto* to = static_cast<float*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, source.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
    multiply_slopes(from + begin, at + begin, flip, slope, clip, end - begin, to + begin);
  });
  return result;
}

Tensor occurring(const Tensor& codes) {
  check_codes(codes, "codes");
  const Tensor source = dense(codes);
  const Tensor result = empty({256}, {1}, ScalarType::Byte);
  const uint8_t flip = flip_of(codes);
  const auto* at = static_cast<const uint8_t*>(source.const_data_ptr());
  std::atomic<uint8_t> seen[256] = {};
  torch::stable::parallel_for(0, source.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
    uint8_t here[256] = {};
    for (int64_t i = begin; i < end; ++i) here[at[i]] = 1;
    for (int i = 0; i < 256; ++i)
      if (here[i]) seen[i].store(1, std::memory_order_relaxed);
  });
  auto* to = static_cast<uint8_t*>(result.mutable_data_ptr());
  for (int i = 0; i < 256; ++i) to[i ^ flip] = seen[i].load(std::memory_order_relaxed);
  return result;
}

}  // namespace kernels
