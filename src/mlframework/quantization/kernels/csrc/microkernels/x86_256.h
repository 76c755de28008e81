// Tiles and depthwise rows of 256-bit vectors, for rows of the table that differ in how they multiply:
//
//     struct Products {
//       static constexpr bool kSaturates;  // whether pairs of products may, so that some steps are wide
//       static __m256i add(__m256i sums, __m256i codes, __m256i weights);  // of four unsigned by four signed bytes
//     };
#pragma once

#include "microkernels/microkernel.h"

#if HAS_X86_LEVELS
#include <immintrin.h>

#include <cstring>

namespace kernels {

constexpr int kMostPositions256 = 6;  // of a tile: two sums to each fill the registers

namespace {

TARGET_AVX2 ALWAYS_INLINE __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Products of two 16-bit numbers, added to each sum. Written out, here and in `Products::add`, because compilers move
// such products ahead of their additions until the registers overflow.
TARGET_AVX2 ALWAYS_INLINE __m256i add_pair(__m256i sums, __m256i codes, __m256i weights) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(codes), "xm"(weights));
  return sums;
}

// The first `count` of 16 bytes.
TARGET_AVX2 ALWAYS_INLINE void store_bytes(__m128i bytes, int64_t count, uint8_t* output) {
  if (count >= 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(output), bytes);
  if (count & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(output), bytes);
    bytes = _mm_srli_si128(bytes, 8);
    output += 8;
  }
  uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(bytes));
  for (; count & 7; --count, rest >>= 8) *output++ = static_cast<uint8_t>(rest);
}

// What becomes of sums. Codes are made without a sign first: narrowing then saturates at the ends of all dtypes, and a
// clip to fewer codes is one maximum of bytes.
class Epilogue256 {
 public:
  TARGET_AVX2 ALWAYS_INLINE explicit Epilogue256(const Layer& layer)
      : lowest_(_mm256_set1_ps(layer.lowest)), highest_(_mm256_set1_ps(layer.highest)) {
    const int sign = layer.output == Output::signed_codes ? 128 : 0;
    const int zero_point = static_cast<int>(layer.zero_point) + sign;
    zero_point_ = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
    lowest_code_ = _mm256_set1_epi8(static_cast<char>(layer.lowest_code() + sign));
    sign_ = _mm256_set1_epi8(static_cast<char>(sign));
  }

  TARGET_AVX2 ALWAYS_INLINE __m256 values(__m256i sums, __m256 multiplier) const {
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), multiplier);
    return _mm256_min_ps(_mm256_max_ps(scaled, lowest_), highest_);
  }

  // Twice eight channels in 16 bits, four of one and four of the other in each half.
  TARGET_AVX2 ALWAYS_INLINE __m256i numbers(const __m256i* sums, const __m256* multipliers) const {
    return _mm256_adds_epi16(_mm256_packs_epi32(rounded(sums[0], multipliers[0]), rounded(sums[1], multipliers[1])),
                             zero_point_);
  }

  TARGET_AVX2 ALWAYS_INLINE __m256i codes(__m256i low, __m256i high) const {
    return _mm256_xor_si256(_mm256_max_epu8(_mm256_packus_epi16(low, high), lowest_code_), sign_);
  }

 private:
  // To even, as every thread rounds that has not changed it. What lies below all numbers of 32 bits becomes the
  // smallest of them, and so does NaN, of which the minimum is its second operand.
  TARGET_AVX2 ALWAYS_INLINE __m256i rounded(__m256i sums, __m256 multiplier) const {
    return _mm256_cvtps_epi32(_mm256_min_ps(highest_, _mm256_mul_ps(_mm256_cvtepi32_ps(sums), multiplier)));
  }

  __m256 lowest_, highest_;
  __m256i zero_point_, lowest_code_, sign_;
};

// The outputs of some positions in one block.
template <int kPositions>
TARGET_AVX2 ALWAYS_INLINE void finish(const __m256i (*sums)[2], const TileContext& context, int64_t channel,
                                      uint8_t* output) {
  const Layer& layer = *context.layer;
  const int64_t lanes = std::min(layer.output_channels - channel, kLanes);
  const Epilogue256 epilogue(layer);
  const __m256 multipliers[2] = {_mm256_loadu_ps(context.multiplier + channel),
                                 _mm256_loadu_ps(context.multiplier + channel + 8)};
  if (layer.output == Output::floats) {
#pragma GCC unroll 8
    for (int position = 0; position < kPositions; ++position) {
      float values[kLanes];
      _mm256_storeu_ps(values, epilogue.values(sums[position][0], multipliers[0]));
      _mm256_storeu_ps(values + 8, epilogue.values(sums[position][1], multipliers[1]));
      std::memcpy(reinterpret_cast<float*>(output) + position * layer.output_channels + channel, values,
                  static_cast<size_t>(lanes) * sizeof(float));
    }
    return;
  }
  output += channel;
#pragma GCC unroll 8
  for (int position = 0; position < kPositions; position += 2, output += 2 * layer.output_channels) {
    constexpr int kLast = kPositions - 1;
    const int next = position < kLast ? position + 1 : position;
    const __m256i codes = _mm256_permutevar8x32_epi32(
        epilogue.codes(epilogue.numbers(sums[position], multipliers), epilogue.numbers(sums[next], multipliers)),
        _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    store_bytes(_mm256_castsi256_si128(codes), lanes, output);
    if (position < kLast) store_bytes(_mm256_extracti128_si256(codes, 1), lanes, output + layer.output_channels);
  }
}

// One quad of codes, in all lanes.
TARGET_AVX2 ALWAYS_INLINE __m256i broadcast(const uint8_t* codes) {
  int32_t quad;
  std::memcpy(&quad, codes, sizeof(quad));
  return _mm256_set1_epi32(quad);
}

// Adds the products of one step, its weights as bytes.
template <class Products, int kPositions>
TARGET_AVX2 ALWAYS_INLINE void add_step(__m256i (*sums)[2], const uint8_t* quads, int64_t position_step,
                                        const int8_t* weights) {
  const __m256i low = load(weights), high = load(weights + kStepBytes / 2);
#pragma GCC unroll 8
  for (int position = 0; position < kPositions; ++position) {
    const __m256i code = broadcast(quads + position * position_step);
    sums[position][0] = Products::add(sums[position][0], code, low);
    sums[position][1] = Products::add(sums[position][1], code, high);
  }
}

// Adds those of one pair of codes and weights, of two bytes each.
template <int kPositions>
TARGET_AVX2 ALWAYS_INLINE void add_pairs(__m256i (*sums)[2], const uint8_t* pairs, int64_t position_step,
                                         const int8_t* weights) {
  const __m256i low = load(weights), high = load(weights + kStepBytes / 2);
#pragma GCC unroll 8
  for (int position = 0; position < kPositions; ++position) {
    const __m256i code = broadcast(pairs + position * position_step);
    sums[position][0] = add_pair(sums[position][0], code, low);
    sums[position][1] = add_pair(sums[position][1], code, high);
  }
}

template <class Products, int kPositions>
TARGET_AVX2 void tile(const TileContext& context, const uint8_t* codes, int64_t block, void* output) {
  const int64_t channel = block * kLanes;
  __m256i sums[kPositions][2];
#pragma GCC unroll 8
  for (int position = 0; position < kPositions; ++position) {
    sums[position][0] = load(context.bias + channel);
    sums[position][1] = load(context.bias + channel + 8);
  }
  const int8_t* weights = context.weights + block * context.block_bytes;
  const int64_t steps = context.steps, position_step = context.position_step;
  if constexpr (Products::kSaturates) {
    const int32_t* wide_before = context.wide_steps_before + block;
    weights += wide_before[0] * kStepBytes;
    const int32_t* step = context.order_of_steps + block * steps;
    const int32_t* const end = step + steps;
    const int32_t* const wide = end - (wide_before[1] - wide_before[0]);
    for (; step < wide; ++step, weights += kStepBytes)
      add_step<Products, kPositions>(sums, codes + context.step_offsets[*step], position_step, weights);
    const uint8_t* const widened = context.widened + 2 * (codes - context.gathered);
    for (; step < end; ++step, weights += 2 * kStepBytes) {
      const uint8_t* pairs = widened + 2 * context.step_offsets[*step];
      add_pairs<kPositions>(sums, pairs, 2 * position_step, weights);
      add_pairs<kPositions>(sums, pairs + kQuad, 2 * position_step, weights + kStepBytes);
    }
  } else {
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes)
      add_step<Products, kPositions>(sums, codes + context.step_offsets[step], position_step, weights);
  }
  finish<kPositions>(sums, context, channel, static_cast<uint8_t*>(output));
}

template <class Products>
Tile tile_for(int64_t, int64_t positions) {
  static constexpr Tile tiles[kMostPositions256] = {tile<Products, 1>, tile<Products, 2>, tile<Products, 3>,
                                                    tile<Products, 4>, tile<Products, 5>, tile<Products, 6>};
  return tiles[positions - 1];
}

// Half a chunk, which is 32 channels, at one position: sums of channels as `place_in_quarters` orders them.
template <class Products>
TARGET_AVX2 ALWAYS_INLINE void add_taps(const uint8_t* codes, const int32_t* tap_offsets, int64_t steps,
                                        const int8_t* weights, __m256i* sums) {
  for (int64_t step = 0; step < steps; ++step, tap_offsets += kQuad, weights += kChunk * kQuad) {
    const __m256i a = load(codes + tap_offsets[0]), b = load(codes + tap_offsets[1]);
    const __m256i c = load(codes + tap_offsets[2]), d = load(codes + tap_offsets[3]);
    const __m256i low_ab = _mm256_unpacklo_epi8(a, b), high_ab = _mm256_unpackhi_epi8(a, b);
    const __m256i low_cd = _mm256_unpacklo_epi8(c, d), high_cd = _mm256_unpackhi_epi8(c, d);
    const __m256i taps[4] = {_mm256_unpacklo_epi16(low_ab, low_cd), _mm256_unpackhi_epi16(low_ab, low_cd),
                             _mm256_unpacklo_epi16(high_ab, high_cd), _mm256_unpackhi_epi16(high_ab, high_cd)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = Products::add(sums[i], taps[i], load(weights + i * kStepBytes));
  }
}

// The same, codes and weights as numbers of 16 bits: pairs of taps.
TARGET_AVX2 ALWAYS_INLINE void add_wide_taps(const uint8_t* codes, const int32_t* tap_offsets, int64_t pairs,
                                             const int8_t* weights, __m256i* sums) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t pair = 0; pair < pairs; ++pair, tap_offsets += 2, weights += kChunk * kQuad) {
    const __m256i a = load(codes + tap_offsets[0]), b = load(codes + tap_offsets[1]);
    const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
    sums[0] = add_pair(sums[0], _mm256_unpacklo_epi8(low, zero), load(weights));
    sums[1] = add_pair(sums[1], _mm256_unpackhi_epi8(low, zero), load(weights + kStepBytes));
    sums[2] = add_pair(sums[2], _mm256_unpacklo_epi8(high, zero), load(weights + 2 * kStepBytes));
    sums[3] = add_pair(sums[3], _mm256_unpackhi_epi8(high, zero), load(weights + 3 * kStepBytes));
  }
}

template <class Products, bool kIsWide>
TARGET_AVX2 void depthwise_half(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk, int64_t half,
                                int64_t positions, uint8_t* output) {
  // All in variables: outputs are bytes, which might lie anywhere.
  const Layer& layer = *context.layer;
  const int64_t channel = chunk * kChunk + half * kChunk / 2;
  const int64_t count = std::min(layer.output_channels - channel, kChunk / 2);
  if (count <= 0) return;
  const int64_t steps = layer.steps(), pairs = (layer.taps() + 1) / 2;
  const int64_t code_step = context.code_step, output_step = context.output_step, place = chunk * kChunk + half * 8;
  const int32_t* const tap_offsets = context.tap_offsets;
  const bool floats = layer.output == Output::floats;
  const int8_t* const weights =
      layer.weights() + chunk * steps * kChunk * kQuad * layer.weight_size + half * kStepBytes / 2;
  const Epilogue256 epilogue(layer);
  __m256i bias[4];
  __m256 multipliers[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    bias[i] = load(layer.bias() + place + i * kLanes);
    multipliers[i] = _mm256_loadu_ps(layer.multiplier() + place + i * kLanes);
  }
  codes += channel;
  output += channel * layer.element_size();
  for (int64_t position = 0; position < positions; ++position, codes += code_step, output += output_step) {
    __m256i sums[4] = {bias[0], bias[1], bias[2], bias[3]};
    if constexpr (kIsWide) {
      add_wide_taps(codes, tap_offsets, pairs, weights, sums);
    } else {
      add_taps<Products>(codes, tap_offsets, steps, weights, sums);
    }
    if (floats) {
      // Quarters of four channels each: the first of each vector, then the second.
      float all[kChunk / 2];
      for (int i = 0; i < 4; ++i) {
        const __m256 values = epilogue.values(sums[i], multipliers[i]);
        _mm_storeu_ps(all + i * 4, _mm256_castps256_ps128(values));
        _mm_storeu_ps(all + 16 + i * 4, _mm256_extractf128_ps(values, 1));
      }
      std::memcpy(output, all, static_cast<size_t>(count) * sizeof(float));
      continue;
    }
    const __m256i result =
        epilogue.codes(epilogue.numbers(sums, multipliers), epilogue.numbers(sums + 2, multipliers + 2));
    if (count == kChunk / 2) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(output), result);
      continue;
    }
    store_bytes(_mm256_castsi256_si128(result), count, output);
    if (count > 16) store_bytes(_mm256_extracti128_si256(result, 1), count - 16, output + 16);
  }
}

template <class Products>
void depthwise_row(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk, int64_t positions,
                   uint8_t* output) {
  for (int64_t half = 0; half < 2; ++half) {
    if constexpr (Products::kSaturates) {
      if (context.layer->weight_size == 2) {
        depthwise_half<Products, true>(context, codes, chunk, half, positions, output);
        continue;
      }
    }
    depthwise_half<Products, false>(context, codes, chunk, half, positions, output);
  }
}

}  // namespace
}  // namespace kernels

#endif
