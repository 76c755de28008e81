// AVX2 multiplies unsigned by signed bytes and adds two products in 16 bits, where they saturate: exact only if the
// two weights of every pair sum to between -128 and 128. Steps with another pair are told apart when a layer is packed,
// and multiply 16-bit numbers instead, at six tenths of the speed. (FBGEMM sets apart the single outliers.)
#include "microkernels/microkernel.h"

#if HAS_X86_LEVELS
#include <immintrin.h>

#include <cstring>

namespace kernels {
namespace {

constexpr int kMost = 6;  // positions of a tile: two sums to each fill the registers

TARGET_AVX2 ALWAYS_INLINE __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Products of four unsigned by four signed bytes, added to each sum.
TARGET_AVX2 ALWAYS_INLINE __m256i add_products(__m256i sums, __m256i codes, __m256i weights) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights), _mm256_set1_epi16(1)));
}

// The same with weights of two bytes: the first and third of each four, and `odd` bytes on the second and fourth.
TARGET_AVX2 ALWAYS_INLINE __m256i add_wide_products(__m256i sums, __m256i even_codes, __m256i odd_codes,
                                                    const int8_t* weights, int64_t odd) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even_codes, load(weights)));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(odd_codes, load(weights + odd)));
}

TARGET_AVX2 ALWAYS_INLINE __m256i even_bytes(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi16(255)); }
TARGET_AVX2 ALWAYS_INLINE __m256i odd_bytes(__m256i codes) { return _mm256_srli_epi16(codes, 8); }

// What becomes of the sums of eight output channels.
TARGET_AVX2 ALWAYS_INLINE __m256 scaled(__m256i sums, const float* multiplier, const Layer& layer) {
  const __m256 values = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_loadu_ps(multiplier));
  return _mm256_min_ps(_mm256_max_ps(values, _mm256_set1_ps(layer.lowest)), _mm256_set1_ps(layer.highest));
}

// Rounds to even, as every thread does that has not changed its rounding.
TARGET_AVX2 ALWAYS_INLINE __m256i codes_of(__m256 scaled, const Layer& layer) {
  return _mm256_add_epi32(_mm256_cvtps_epi32(scaled), _mm256_set1_epi32(static_cast<int>(layer.zero_point)));
}

// Numbers in 16 bits to codes, which saturate nowhere: they have been clamped.
TARGET_AVX2 ALWAYS_INLINE __m256i bytes_of(__m256i low, __m256i high, const Layer& layer) {
  return layer.output == Output::signed_codes ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
}

// The outputs of one position in one block.
TARGET_AVX2 ALWAYS_INLINE void finish(const __m256i* sums, const Layer& layer, int64_t channel, uint8_t* output) {
  const int64_t lanes = std::min(layer.output_channels - channel, kLanes);
  const __m256 values[2] = {scaled(sums[0], layer.multiplier() + channel, layer),
                            scaled(sums[1], layer.multiplier() + channel + 8, layer)};
  if (layer.output == Output::floats) {
    float* to = reinterpret_cast<float*>(output) + channel;
    if (lanes == kLanes) {
      _mm256_storeu_ps(to, values[0]);
      _mm256_storeu_ps(to + 8, values[1]);
      return;
    }
    float all[kLanes];
    _mm256_storeu_ps(all, values[0]);
    _mm256_storeu_ps(all + 8, values[1]);
    std::memcpy(to, all, static_cast<size_t>(lanes) * sizeof(float));
    return;
  }
  const __m256i halves = _mm256_packs_epi32(codes_of(values[0], layer), codes_of(values[1], layer));
  const __m256i in_order = _mm256_permute4x64_epi64(halves, 0xd8);
  const __m128i bytes = _mm256_castsi256_si128(
      bytes_of(in_order, _mm256_castsi128_si256(_mm256_extracti128_si256(in_order, 1)), layer));
  if (lanes == kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(output + channel), bytes);
    return;
  }
  uint8_t all[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), bytes);
  std::memcpy(output + channel, all, static_cast<size_t>(lanes));
}

// One quad of codes, in all lanes.
TARGET_AVX2 ALWAYS_INLINE __m256i broadcast(const uint8_t* codes) {
  int32_t quad;
  std::memcpy(&quad, codes, sizeof(quad));
  return _mm256_set1_epi32(quad);
}

template <int kPositions>
TARGET_AVX2 void tile(const TileContext& context, const uint8_t* codes, int64_t block, void* output) {
  const Layer& layer = *context.layer;
  const int64_t channel = block * kLanes;
  __m256i sums[kPositions][2];
#pragma GCC unroll 8
  for (int position = 0; position < kPositions; ++position) {
    sums[position][0] = load(layer.bias() + channel);
    sums[position][1] = load(layer.bias() + channel + 8);
  }
  const int32_t* wide_before = layer.wide_steps_before() + block;
  const int8_t* weights = layer.weights() + block * layer.block_bytes() + wide_before[0] * kStepBytes;
  const int32_t* step = layer.order_of_steps() + block * layer.steps();
  const int32_t* const end = step + layer.steps();
  const int32_t* const wide = end - (wide_before[1] - wide_before[0]);
  for (; step < wide; ++step, weights += kStepBytes) {
    const uint8_t* quads = codes + context.step_offsets[*step];
    const __m256i low = load(weights), high = load(weights + kStepBytes / 2);
#pragma GCC unroll 8
    for (int position = 0; position < kPositions; ++position) {
      const __m256i code = broadcast(quads + position * kQuad);
      sums[position][0] = add_products(sums[position][0], code, low);
      sums[position][1] = add_products(sums[position][1], code, high);
    }
  }
  for (; step < end; ++step, weights += 2 * kStepBytes) {
    const uint8_t* quads = codes + context.step_offsets[*step];
#pragma GCC unroll 8
    for (int position = 0; position < kPositions; ++position) {
      const __m256i code = broadcast(quads + position * kQuad);
      const __m256i even = even_bytes(code), odd = odd_bytes(code);
      sums[position][0] = add_wide_products(sums[position][0], even, odd, weights, kStepBytes);
      sums[position][1] = add_wide_products(sums[position][1], even, odd, weights + kStepBytes / 2, kStepBytes);
    }
  }
  const int64_t position_bytes = layer.output_channels * layer.element_size();
#pragma GCC unroll 8
  for (int position = 0; position < kPositions; ++position)
    finish(sums[position], layer, channel, static_cast<uint8_t*>(output) + position * position_bytes);
}

Tile tile_for(int64_t, int64_t positions) {
  static constexpr Tile tiles[kMost] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  return tiles[positions - 1];
}

TARGET_AVX2 bool may_saturate(const int8_t* weights) {
  const __m256i limit = _mm256_set1_epi16(128);
  __m256i exceeds = _mm256_setzero_si256();
  for (int64_t i = 0; i < kStepBytes; i += 32) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load(weights + i));
    exceeds = _mm256_or_si256(exceeds, _mm256_cmpgt_epi16(_mm256_abs_epi16(pairs), limit));
  }
  return _mm256_testz_si256(exceeds, exceeds) == 0;
}

// Products of four taps of 32 channels. Weights of one byte lie as their codes do; those of two bytes lie as the even
// taps of the chunk, then as the odd ones.
template <bool kIsWide>
TARGET_AVX2 ALWAYS_INLINE __m256i add_taps(__m256i sums, __m256i taps, const int8_t* weights) {
  if (!kIsWide) return add_products(sums, taps, load(weights));
  return add_wide_products(sums, even_bytes(taps), odd_bytes(taps), weights, kChunk * kQuad);
}

// Half a chunk, which is 32 channels, at one position: sums of channels as `depthwise_place` orders them.
template <bool kIsWide>
TARGET_AVX2 ALWAYS_INLINE void depthwise_half(const Layer& layer, const uint8_t* codes, const int32_t* tap_offsets,
                                              const int8_t* weights, __m256i* sums) {
  constexpr int64_t kSize = kIsWide ? 2 : 1;
  for (int64_t step = 0; step < layer.steps(); ++step, tap_offsets += kQuad, weights += kChunk * kQuad * kSize) {
    const __m256i a = load(codes + tap_offsets[0]), b = load(codes + tap_offsets[1]);
    const __m256i c = load(codes + tap_offsets[2]), d = load(codes + tap_offsets[3]);
    const __m256i low_ab = _mm256_unpacklo_epi8(a, b), high_ab = _mm256_unpackhi_epi8(a, b);
    const __m256i low_cd = _mm256_unpacklo_epi8(c, d), high_cd = _mm256_unpackhi_epi8(c, d);
    const __m256i taps[4] = {_mm256_unpacklo_epi16(low_ab, low_cd), _mm256_unpackhi_epi16(low_ab, low_cd),
                             _mm256_unpacklo_epi16(high_ab, high_cd), _mm256_unpackhi_epi16(high_ab, high_cd)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = add_taps<kIsWide>(sums[i], taps[i], weights + i * kStepBytes);
  }
}

// As `finish`, of half a chunk.
TARGET_AVX2 ALWAYS_INLINE void finish_half(const __m256i* sums, const Layer& layer, int64_t place, int64_t channel,
                                           int64_t count, uint8_t* output) {
  __m256 values[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) values[i] = scaled(sums[i], layer.multiplier() + place + i * kLanes, layer);
  if (layer.output == Output::floats) {
    // Quarters of four channels each: the first of each vector, then the second.
    float* to = reinterpret_cast<float*>(output) + channel;
    float all[32];
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_ps(all + i * 4, _mm256_castps256_ps128(values[i]));
      _mm_storeu_ps(all + 16 + i * 4, _mm256_extractf128_ps(values[i], 1));
    }
    std::memcpy(to, all, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const __m256i low = _mm256_packs_epi32(codes_of(values[0], layer), codes_of(values[1], layer));
  const __m256i high = _mm256_packs_epi32(codes_of(values[2], layer), codes_of(values[3], layer));
  const __m256i bytes = bytes_of(low, high, layer);
  if (count == 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(output + channel), bytes);
    return;
  }
  uint8_t all[32];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(all), bytes);
  std::memcpy(output + channel, all, static_cast<size_t>(count));
}

template <bool kIsWide>
TARGET_AVX2 void depthwise_positions(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk,
                                     int64_t positions, uint8_t* output) {
  const Layer& layer = *context.layer;
  constexpr int64_t kHalf = kChunk / 2;
  const int8_t* weights = layer.weights() + chunk * layer.steps() * kChunk * kQuad * layer.weight_size;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t channel = chunk * kChunk + half * kHalf, count = std::min(layer.output_channels - channel, kHalf);
    if (count <= 0) return;
    const int64_t place = chunk * kChunk + half * 8;
    for (int64_t position = 0; position < positions; ++position) {
      __m256i sums[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] = load(layer.bias() + place + i * kLanes);
      depthwise_half<kIsWide>(layer, codes + position * context.code_step + channel, context.tap_offsets,
                              weights + half * kStepBytes / 2, sums);
      finish_half(sums, layer, place, channel, count, output + position * context.output_step);
    }
  }
}

void depthwise_row(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk, int64_t positions,
                   uint8_t* output) {
  const bool wide = context.layer->weight_size == 2;
  (wide ? depthwise_positions<true> : depthwise_positions<false>)(context, codes, chunk, positions, output);
}

}  // namespace

const Microkernel kAvx2 = {
    InstructionSet::avx2, 1, {0, kMost}, tile_for, may_saturate, depthwise_row, 1 << 19,
};

}  // namespace kernels

#endif
