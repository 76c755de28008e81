// Several floats at once, with one set of names for every instruction set, so that a loop is written once.
//
// `min(a, b)` and `max(a, b)` give b where either is NaN, as the instructions of x86 do: whoever wants NaN to stay
// passes the value second. A `Mask` holds a truth to each lane; as bits, lane 0 is the lowest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_features.h"

#if HAS_X86_LEVELS
#include <immintrin.h>
#endif

namespace kernels {

// The upper half of a float32, as it lies in memory.
struct BFloat16 {
  uint16_t bits;
};

namespace baseline {

struct Lanes {
  static constexpr int kWidth = 8;
  struct Float {
    float lane[kWidth];
  };
  using Mask = uint32_t;

#define EACH_LANE(expression)                                    \
  Float result;                                                  \
  for (int i = 0; i < kWidth; ++i) result.lane[i] = (expression); \
  return result

#define EACH_TRUTH(expression)                                                     \
  Mask result = 0;                                                                 \
  for (int i = 0; i < kWidth; ++i) result |= static_cast<Mask>(expression) << i; \
  return result

  static ALWAYS_INLINE Float of(float value) { EACH_LANE(value); }
  static ALWAYS_INLINE Float load(const float* from) { EACH_LANE(from[i]); }
  static ALWAYS_INLINE Float load(const BFloat16* from) { EACH_LANE(widened(from[i])); }
  static ALWAYS_INLINE Float load(const uint8_t* from) { EACH_LANE(static_cast<float>(from[i])); }
  static ALWAYS_INLINE Float load(const int8_t* from) { EACH_LANE(static_cast<float>(from[i])); }
  static ALWAYS_INLINE void store(float* to, Float a) { std::memcpy(to, a.lane, sizeof a.lane); }
  static ALWAYS_INLINE void store(BFloat16* to, Float a) {
    for (int i = 0; i < kWidth; ++i) to[i] = narrowed(a.lane[i]);
  }
  static ALWAYS_INLINE void store_codes(uint8_t* to, Float a) {
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<uint8_t>(static_cast<int32_t>(a.lane[i]));
  }
  static ALWAYS_INLINE Float add(Float a, Float b) { EACH_LANE(a.lane[i] + b.lane[i]); }
  static ALWAYS_INLINE Float sub(Float a, Float b) { EACH_LANE(a.lane[i] - b.lane[i]); }
  static ALWAYS_INLINE Float mul(Float a, Float b) { EACH_LANE(a.lane[i] * b.lane[i]); }
  static ALWAYS_INLINE Float div(Float a, Float b) { EACH_LANE(a.lane[i] / b.lane[i]); }
  static ALWAYS_INLINE Float min(Float a, Float b) { EACH_LANE(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
  static ALWAYS_INLINE Float max(Float a, Float b) { EACH_LANE(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
  static ALWAYS_INLINE Float round(Float a) { EACH_LANE(std::nearbyintf(a.lane[i])); }
  static ALWAYS_INLINE Mask equal(Float a, Float b) { EACH_TRUTH(a.lane[i] == b.lane[i]); }
  static ALWAYS_INLINE Mask less(Float a, Float b) { EACH_TRUTH(a.lane[i] < b.lane[i]); }
  static ALWAYS_INLINE Mask unordered(Float a, Float b) {
    EACH_TRUTH(a.lane[i] != a.lane[i] || b.lane[i] != b.lane[i]);
  }
  static ALWAYS_INLINE Mask both(Mask a, Mask b) { return a & b; }
  static ALWAYS_INLINE Mask either(Mask a, Mask b) { return a | b; }
  static ALWAYS_INLINE Float select(Mask mask, Float a, Float b) {
    EACH_LANE(mask >> i & 1 ? a.lane[i] : b.lane[i]);
  }
  static ALWAYS_INLINE uint32_t bits(Mask mask) { return mask; }
  static ALWAYS_INLINE Mask from_bits(uint32_t bits) { return bits; }

#undef EACH_LANE
#undef EACH_TRUTH

 private:
  static ALWAYS_INLINE float widened(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }
  static ALWAYS_INLINE BFloat16 narrowed(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7FC0};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  }
};

}  // namespace baseline

#if HAS_X86_LEVELS

#define INLINE_AVX2 static inline __attribute__((always_inline)) TARGET_AVX2
#define INLINE_AVX512 static inline __attribute__((always_inline)) TARGET_AVX512

namespace avx2 {

struct Lanes {
  static constexpr int kWidth = 8;
  using Float = __m256;
  using Mask = __m256;

  INLINE_AVX2 Float of(float value) { return _mm256_set1_ps(value); }
  INLINE_AVX2 Float load(const float* from) { return _mm256_loadu_ps(from); }
  INLINE_AVX2 Float load(const BFloat16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  INLINE_AVX2 Float load(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  INLINE_AVX2 Float load(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  INLINE_AVX2 void store(float* to, Float a) { _mm256_storeu_ps(to, a); }
  INLINE_AVX2 void store(BFloat16* to, Float a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(sum, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i halves = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
  INLINE_AVX2 void store_codes(uint8_t* to, Float a) {
    const __m256i low_bytes = _mm256_and_si256(_mm256_cvttps_epi32(a), _mm256_set1_epi32(0xFF));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low_bytes), _mm256_extracti128_si256(low_bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }
  INLINE_AVX2 Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  INLINE_AVX2 Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  INLINE_AVX2 Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  INLINE_AVX2 Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  INLINE_AVX2 Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }             // a * b + c
  INLINE_AVX2 Float fused_remainder(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
  INLINE_AVX2 Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  INLINE_AVX2 Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  INLINE_AVX2 Float round(Float a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  INLINE_AVX2 Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  INLINE_AVX2 Mask less(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  INLINE_AVX2 Mask unordered(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
  INLINE_AVX2 Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  INLINE_AVX2 Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  INLINE_AVX2 Float select(Mask mask, Float a, Float b) { return _mm256_blendv_ps(b, a, mask); }
  INLINE_AVX2 uint32_t bits(Mask mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
  INLINE_AVX2 Mask from_bits(uint32_t bits) {
    const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, places), places));
  }
};

}  // namespace avx2

namespace avx512 {

struct Lanes {
  static constexpr int kWidth = 16;
  using Float = __m512;
  using Mask = __mmask16;

  INLINE_AVX512 Float of(float value) { return _mm512_set1_ps(value); }
  INLINE_AVX512 Float load(const float* from) { return _mm512_loadu_ps(from); }
  INLINE_AVX512 Float load(const BFloat16* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  INLINE_AVX512 Float load(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  INLINE_AVX512 Float load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  INLINE_AVX512 void store(float* to, Float a) { _mm512_storeu_ps(to, a); }
  INLINE_AVX512 void store(BFloat16* to, Float a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(sum, 16);
    const __m512i halves = _mm512_mask_mov_epi32(rounded, unordered(a, a), _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(halves));
  }
  INLINE_AVX512 void store_codes(uint8_t* to, Float a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a)));
  }
  INLINE_AVX512 Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  INLINE_AVX512 Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  INLINE_AVX512 Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  INLINE_AVX512 Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  INLINE_AVX512 Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }             // a * b + c
  INLINE_AVX512 Float fused_remainder(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
  INLINE_AVX512 Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  INLINE_AVX512 Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  INLINE_AVX512 Float round(Float a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  INLINE_AVX512 Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  INLINE_AVX512 Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  INLINE_AVX512 Mask unordered(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  INLINE_AVX512 Mask both(Mask a, Mask b) { return _kand_mask16(a, b); }
  INLINE_AVX512 Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
  INLINE_AVX512 Float select(Mask mask, Float a, Float b) { return _mm512_mask_blend_ps(mask, b, a); }
  INLINE_AVX512 uint32_t bits(Mask mask) { return mask; }
  INLINE_AVX512 Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
};

}  // namespace avx512

#endif

// Of a function that each namespace has, the one for the instruction set of this processor.
#if HAS_X86_LEVELS
#define BEST_OF(function)                            \
  (has_feature(feature::avx512) ? avx512::function   \
   : has_feature(feature::avx2) ? avx2::function : baseline::function)
#else
#define BEST_OF(function) baseline::function
#endif

}  // namespace kernels
