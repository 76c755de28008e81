// SSE2, which every x86-64 processor has: 16-bit numbers multiplied in pairs, whose sums have 32 bits.
#include "microkernels/rows.h"

#if HAS_X86_LEVELS
#include <emmintrin.h>

#include <cstring>

namespace kernels {
namespace {

constexpr int kMostPositions = 4;  // of a tile: two sums to each, beside weights and codes, fill the registers
constexpr int kVectors = 4;        // of sums to a block
constexpr int64_t kVectorBytes = kStepBytes / kVectors;

ALWAYS_INLINE __m128i load(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

// Bytes as 16-bit numbers: the first and the third of each quad, and the second and the fourth.
struct Codes {
  __m128i even, odd;

  explicit ALWAYS_INLINE Codes(__m128i bytes)
      : even(_mm_and_si128(bytes, _mm_set1_epi16(255))), odd(_mm_srli_epi16(bytes, 8)) {}
};

struct Weights {
  __m128i even, odd;

  explicit ALWAYS_INLINE Weights(__m128i bytes)
      : even(_mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8)), odd(_mm_srai_epi16(bytes, 8)) {}
};

ALWAYS_INLINE __m128i add_products(__m128i sums, const Codes& codes, const Weights& weights) {
  sums = _mm_add_epi32(sums, _mm_madd_epi16(weights.even, codes.even));
  return _mm_add_epi32(sums, _mm_madd_epi16(weights.odd, codes.odd));
}

ALWAYS_INLINE __m128i broadcast(const uint8_t* codes) {
  int32_t quad;
  std::memcpy(&quad, codes, sizeof(quad));
  return _mm_set1_epi32(quad);
}

// Rounds to even, as every thread does that has not changed its rounding.
ALWAYS_INLINE __m128i codes_of(__m128 scaled, const Layer& layer) {
  return _mm_add_epi32(_mm_cvtps_epi32(scaled), _mm_set1_epi32(static_cast<int>(layer.zero_point)));
}

// The outputs of one position in eight channels.
ALWAYS_INLINE void finish(const __m128i* sums, const Layer& layer, int64_t channel, uint8_t* output) {
  constexpr int64_t kCount = 8;
  const int64_t lanes = std::min(layer.output_channels - channel, kCount);
  const float* multiplier = layer.multiplier() + channel;
  __m128 values[2];
  for (int i = 0; i < 2; ++i) {
    values[i] = _mm_mul_ps(_mm_cvtepi32_ps(sums[i]), _mm_loadu_ps(multiplier + 4 * i));
    values[i] = _mm_min_ps(_mm_max_ps(values[i], _mm_set1_ps(layer.lowest)), _mm_set1_ps(layer.highest));
  }
  if (layer.output == Output::floats) {
    float all[kCount];
    for (int i = 0; i < 2; ++i) _mm_storeu_ps(all + 4 * i, values[i]);
    std::memcpy(output + channel * 4, all, static_cast<size_t>(lanes) * sizeof(float));
    return;
  }
  // They saturate nowhere: they have been clamped.
  const __m128i halves = _mm_packs_epi32(codes_of(values[0], layer), codes_of(values[1], layer));
  const __m128i bytes = layer.output == Output::signed_codes ? _mm_packs_epi16(halves, halves)
                                                             : _mm_packus_epi16(halves, halves);
  if (lanes == kCount) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(output + channel), bytes);
    return;
  }
  uint8_t all[kCount];
  _mm_storel_epi64(reinterpret_cast<__m128i*>(all), bytes);
  std::memcpy(output + channel, all, static_cast<size_t>(lanes));
}

// Half a block, from `channel` on.
template <int kPositions>
ALWAYS_INLINE void tile_half(const TileContext& context, const uint8_t* codes, int64_t channel, const int8_t* weights,
                             uint8_t* output) {
  const Layer& layer = *context.layer;
  __m128i sums[kPositions][2];
#pragma GCC unroll 4
  for (int position = 0; position < kPositions; ++position)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sums[position][i] = load(layer.bias() + channel + 4 * i);
  const int64_t steps = layer.steps();
  for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
    const uint8_t* quads = codes + context.step_offsets[step];
    const Weights low(load(weights)), high(load(weights + kVectorBytes));
#pragma GCC unroll 4
    for (int position = 0; position < kPositions; ++position) {
      const Codes code(broadcast(quads + position * context.position_step));
      sums[position][0] = add_products(sums[position][0], code, low);
      sums[position][1] = add_products(sums[position][1], code, high);
    }
  }
#pragma GCC unroll 4
  for (int position = 0; position < kPositions; ++position)
    finish(sums[position], layer, channel, output + position * layer.output_channels * layer.element_size());
}

template <int kPositions>
void tile(const TileContext& context, const uint8_t* codes, int64_t block, void* output) {
  const Layer& layer = *context.layer;
  const int64_t channel = block * kLanes;
  const int8_t* weights = layer.weights() + block * layer.block_bytes();
  auto* bytes = static_cast<uint8_t*>(output);
  tile_half<kPositions>(context, codes, channel, weights, bytes);
  if (channel + kLanes / 2 < layer.output_channels)
    tile_half<kPositions>(context, codes, channel + kLanes / 2, weights + kStepBytes / 2, bytes);
}

Tile tile_for(int64_t, int64_t positions) {
  static constexpr Tile tiles[kMostPositions] = {tile<1>, tile<2>, tile<3>, tile<4>};
  return tiles[positions - 1];
}

// Sixteen channels at one position.
ALWAYS_INLINE void depthwise_block(const DepthwiseContext& context, const uint8_t* codes, const int8_t* weights,
                                   int64_t channel, uint8_t* output) {
  const Layer& layer = *context.layer;
  __m128i sums[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) sums[i] = load(layer.bias() + channel + 4 * i);
  const int32_t* tap_offsets = context.tap_offsets;
  const int64_t steps = layer.steps();
  for (int64_t step = 0; step < steps; ++step, tap_offsets += kQuad, weights += kChunk * kQuad) {
    const __m128i a = load(codes + tap_offsets[0]), b = load(codes + tap_offsets[1]);
    const __m128i c = load(codes + tap_offsets[2]), d = load(codes + tap_offsets[3]);
    const __m128i low_ab = _mm_unpacklo_epi8(a, b), high_ab = _mm_unpackhi_epi8(a, b);
    const __m128i low_cd = _mm_unpacklo_epi8(c, d), high_cd = _mm_unpackhi_epi8(c, d);
    const __m128i taps[kVectors] = {_mm_unpacklo_epi16(low_ab, low_cd), _mm_unpackhi_epi16(low_ab, low_cd),
                                    _mm_unpacklo_epi16(high_ab, high_cd), _mm_unpackhi_epi16(high_ab, high_cd)};
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i)
      sums[i] = add_products(sums[i], Codes(taps[i]), Weights(load(weights + i * kVectorBytes)));
  }
  finish(sums, layer, channel, output);
  if (channel + kLanes / 2 < layer.output_channels) finish(sums + 2, layer, channel + kLanes / 2, output);
}

void depthwise_row(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk, int64_t positions,
                   uint8_t* output) {
  const Layer& layer = *context.layer;
  const int64_t end = std::min((chunk + 1) * kChunk, layer.output_channels);
  const int8_t* weights = layer.weights() + chunk * layer.steps() * kChunk * kQuad;
  for (int64_t channel = chunk * kChunk; channel < end; channel += kLanes, weights += kStepBytes)
    for (int64_t position = 0; position < positions; ++position)
      depthwise_block(context, codes + position * context.code_step + channel, weights, channel,
                      output + position * context.output_step);
}

}  // namespace

const Microkernel kSse2 = {
    /*name=*/"sse2",
    /*needs=*/0,
    /*may_use=*/0,
    /*interleaved=*/1,
    /*most_positions=*/{0, kMostPositions},
    /*tile=*/tile_for,
    /*reads_signed=*/false,
    /*transpose_columns=*/nullptr,
    /*order=*/Order::quads,
    /*may_saturate=*/nullptr,
    /*depthwise_row=*/depthwise_row,
    /*depthwise_place=*/place_in_order,
    /*products_per_thread=*/1 << 18,
};

}  // namespace kernels

#endif
