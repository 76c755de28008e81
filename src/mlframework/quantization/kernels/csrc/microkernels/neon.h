// Tiles and depthwise rows of NEON, for rows of the table that differ in how they multiply. Whoever includes it defines
// TARGET_NEON, the attribute of functions that may use its instructions, and
//
//     struct Products {
//       // Of four codes by four signed bytes, added to each sum; and the same of the quad `kQuadOfCodes` of the codes.
//       static int32x4_t add(int32x4_t sums, uint8x16_t codes, int8x16_t weights);
//       template <int kQuadOfCodes>
//       static int32x4_t add_quad(int32x4_t sums, uint8x16_t codes, int8x16_t weights);
//     };
#pragma once

#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "microkernels/microkernel.h"

namespace kernels {
namespace {

constexpr int kMostPositions = 6;  // of a tile: four sums to each fill the registers
constexpr int kVectors = 4;        // of sums to a block
constexpr int64_t kVectorBytes = kStepBytes / kVectors;

// As all rows do it: of NaN, the lowest; of two zeros, the bound.
TARGET_NEON ALWAYS_INLINE float32x4_t clamped(float32x4_t values, const Layer& layer) {
  const float32x4_t lowest = vdupq_n_f32(layer.lowest), highest = vdupq_n_f32(layer.highest);
  values = vbslq_f32(vcgtq_f32(values, lowest), values, lowest);
  return vbslq_f32(vcltq_f32(values, highest), values, highest);
}

// The outputs of one position in one block, whose multipliers begin at `multiplier`.
TARGET_NEON ALWAYS_INLINE void finish(const int32x4_t* sums, const Layer& layer, int64_t channel, uint8_t* output) {
  const int64_t lanes = std::min(layer.output_channels - channel, kLanes);
  const float* multiplier = layer.multiplier() + channel;
  float32x4_t values[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i)
    values[i] = clamped(vmulq_f32(vcvtq_f32_s32(sums[i]), vld1q_f32(multiplier + 4 * i)), layer);
  if (layer.output == Output::floats) {
    float* to = reinterpret_cast<float*>(output) + channel;
    float rest[kLanes];
    float* all = lanes == kLanes ? to : rest;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) vst1q_f32(all + 4 * i, values[i]);
    if (all == rest) std::memcpy(to, rest, static_cast<size_t>(lanes) * sizeof(float));
    return;
  }
  // A code's lowest byte is the code, of either sign.
  const int32x4_t zero_point = vdupq_n_s32(static_cast<int32_t>(layer.zero_point));
  int16x8_t halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    halves[i] = vuzp1q_s16(vreinterpretq_s16_s32(vaddq_s32(vcvtnq_s32_f32(values[2 * i]), zero_point)),
                           vreinterpretq_s16_s32(vaddq_s32(vcvtnq_s32_f32(values[2 * i + 1]), zero_point)));
  const uint8x16_t codes = vuzp1q_u8(vreinterpretq_u8_s16(halves[0]), vreinterpretq_u8_s16(halves[1]));
  if (lanes == kLanes) {
    vst1q_u8(output + channel, codes);
    return;
  }
  uint8_t rest[kLanes];
  vst1q_u8(rest, codes);
  std::memcpy(output + channel, rest, static_cast<size_t>(lanes));
}

ALWAYS_INLINE uint32_t load_quad(const uint8_t* quad) {
  uint32_t value;
  std::memcpy(&value, quad, sizeof(value));
  return value;
}

// Some quads, and nothing beyond the last.
template <int kCount>
TARGET_NEON ALWAYS_INLINE uint8x16_t load_quads(const uint8_t* quads) {
  if constexpr (kCount == 4) return vld1q_u8(quads);
  if constexpr (kCount == 1) return vreinterpretq_u8_u32(vdupq_n_u32(load_quad(quads)));
  const uint8x8_t two = vld1_u8(quads);
  if constexpr (kCount == 2) return vcombine_u8(two, two);
  return vcombine_u8(two, vreinterpret_u8_u32(vdup_n_u32(load_quad(quads + 2 * kQuad))));
}

template <class Products, int... kPosition>
TARGET_NEON ALWAYS_INLINE void add_step(int32x4_t (*sums)[kVectors], const uint8_t* quads, const int8_t* weights,
                                        std::integer_sequence<int, kPosition...>) {
  constexpr int kPositions = sizeof...(kPosition);
  uint8x16_t codes[2];
  codes[0] = load_quads<std::min(kPositions, 4)>(quads);
  if constexpr (kPositions > 4) codes[1] = load_quads<kPositions - 4>(quads + 4 * kQuad);
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const int8x16_t weight = vld1q_s8(weights + i * kVectorBytes);
    ((sums[kPosition][i] =
          Products::template add_quad<kPosition % 4>(sums[kPosition][i], codes[kPosition / 4], weight)),
     ...);
  }
}

template <class Products, int kPositions>
TARGET_NEON void tile(const TileContext& context, const uint8_t* codes, int64_t block, void* output) {
  const Layer& layer = *context.layer;
  const int64_t channel = block * kLanes, steps = layer.steps();
  int32x4_t sums[kPositions][kVectors];
#pragma GCC unroll 8
  for (int position = 0; position < kPositions; ++position)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sums[position][i] = vld1q_s32(layer.bias() + channel + 4 * i);
  const int8_t* weights = layer.weights() + block * layer.block_bytes();
  for (int64_t step = 0; step < steps; ++step, weights += kStepBytes)
    add_step<Products>(sums, codes + context.step_offsets[step], weights,
                       std::make_integer_sequence<int, kPositions>());
  const int64_t position_bytes = layer.output_channels * layer.element_size();
#pragma GCC unroll 8
  for (int position = 0; position < kPositions; ++position)
    finish(sums[position], layer, channel, static_cast<uint8_t*>(output) + position * position_bytes);
}

template <class Products>
Tile tile_for(int64_t, int64_t positions) {
  static constexpr Tile tiles[kMostPositions] = {tile<Products, 1>, tile<Products, 2>, tile<Products, 3>,
                                                 tile<Products, 4>, tile<Products, 5>, tile<Products, 6>};
  return tiles[positions - 1];
}

// Sixteen channels at one position.
template <class Products>
TARGET_NEON ALWAYS_INLINE void depthwise_block(const DepthwiseContext& context, const uint8_t* codes,
                                               const int8_t* weights, int64_t channel, uint8_t* output) {
  const Layer& layer = *context.layer;
  int32x4_t sums[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) sums[i] = vld1q_s32(layer.bias() + channel + 4 * i);
  const int32_t* tap_offsets = context.tap_offsets;
  const int64_t steps = layer.steps();
  for (int64_t step = 0; step < steps; ++step, tap_offsets += kQuad, weights += kChunk * kQuad) {
    const uint8x16_t a = vld1q_u8(codes + tap_offsets[0]), b = vld1q_u8(codes + tap_offsets[1]);
    const uint8x16_t c = vld1q_u8(codes + tap_offsets[2]), d = vld1q_u8(codes + tap_offsets[3]);
    const uint16x8_t low_ab = vreinterpretq_u16_u8(vzip1q_u8(a, b)), high_ab = vreinterpretq_u16_u8(vzip2q_u8(a, b));
    const uint16x8_t low_cd = vreinterpretq_u16_u8(vzip1q_u8(c, d)), high_cd = vreinterpretq_u16_u8(vzip2q_u8(c, d));
    const uint16x8_t taps[kVectors] = {vzip1q_u16(low_ab, low_cd), vzip2q_u16(low_ab, low_cd),
                                       vzip1q_u16(high_ab, high_cd), vzip2q_u16(high_ab, high_cd)};
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i)
      sums[i] = Products::add(sums[i], vreinterpretq_u8_u16(taps[i]), vld1q_s8(weights + i * kVectorBytes));
  }
  finish(sums, layer, channel, output);
}

template <class Products>
TARGET_NEON void depthwise_row(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk,
                               int64_t positions, uint8_t* output) {
  const Layer& layer = *context.layer;
  const int64_t end = std::min((chunk + 1) * kChunk, layer.output_channels);
  const int8_t* weights = layer.weights() + chunk * layer.steps() * kChunk * kQuad;
  for (int64_t channel = chunk * kChunk; channel < end; channel += kLanes, weights += kStepBytes)
    for (int64_t position = 0; position < positions; ++position)
      depthwise_block<Products>(context, codes + position * context.code_step + channel, weights, channel,
                                output + position * context.output_step);
}

// Four by four quads at a time.
int64_t transpose_columns(const uint8_t* source, int64_t step, int64_t count, uint8_t* target, int64_t quad_step) {
  int64_t column = 0;
  for (; column + 4 <= count; column += 4, source += 4 * step, target += 4 * kQuad) {
    uint32x4_t rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = vreinterpretq_u32_u8(vld1q_u8(source + i * step));
    const uint64x2_t low_ab = vreinterpretq_u64_u32(vzip1q_u32(rows[0], rows[1]));
    const uint64x2_t high_ab = vreinterpretq_u64_u32(vzip2q_u32(rows[0], rows[1]));
    const uint64x2_t low_cd = vreinterpretq_u64_u32(vzip1q_u32(rows[2], rows[3]));
    const uint64x2_t high_cd = vreinterpretq_u64_u32(vzip2q_u32(rows[2], rows[3]));
    const uint64x2_t quads[4] = {vzip1q_u64(low_ab, low_cd), vzip2q_u64(low_ab, low_cd),
                                 vzip1q_u64(high_ab, high_cd), vzip2q_u64(high_ab, high_cd)};
    for (int i = 0; i < 4; ++i) vst1q_u8(target + i * quad_step, vreinterpretq_u8_u64(quads[i]));
  }
  return column;
}

template <class Products>
constexpr Microkernel row(const char* name, Features needs, bool reads_signed) {
  return {
      /*name=*/name,
      /*needs=*/needs,
      /*may_use=*/0,
      /*interleaved=*/1,
      /*most_positions=*/{0, kMostPositions},
      /*tile=*/tile_for<Products>,
      /*reads_signed=*/reads_signed,
      /*transpose_columns=*/transpose_columns,
      /*order=*/Order::quads,
      /*may_saturate=*/nullptr,
      /*depthwise_row=*/depthwise_row<Products>,
      /*depthwise_place=*/place_in_order,
      /*products_per_thread=*/1 << 19,
  };
}

}  // namespace
}  // namespace kernels
