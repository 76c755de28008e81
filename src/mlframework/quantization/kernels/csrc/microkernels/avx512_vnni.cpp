// AVX-512 VNNI: one instruction multiplies four pairs of bytes and adds them to a sum, exactly.
#include "microkernels/microkernel.h"

#if HAS_X86_LEVELS
#include <immintrin.h>

#include <array>
#include <cstring>
#include <utility>

namespace kernels {
namespace {

// Products of four unsigned by four signed bytes, added to each sum: _mm512_dpbusd_epi32, in place. Of the intrinsic,
// GCC 12 makes two copies for each product.
TARGET_AVX512_VNNI ALWAYS_INLINE void add_products(__m512i& sums, __m512i codes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(weights));
}

// What becomes of the sums of one block of output channels.
struct Epilogue {
  __m512 multiplier, lowest, highest;
  __m512i zero_point;
  bool signed_codes;
  __mmask16 lanes;
  int64_t stride;  // from one position's outputs to the next's

  TARGET_AVX512_VNNI ALWAYS_INLINE __m512 scaled(__m512i sums) const {
    return _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), multiplier), lowest), highest);
  }

  TARGET_AVX512_VNNI ALWAYS_INLINE __m512i codes(__m512i sums) const {
    const __m512i rounded = _mm512_cvt_roundps_epi32(scaled(sums), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_add_epi32(rounded, zero_point);
  }

  TARGET_AVX512_VNNI ALWAYS_INLINE void store(__m128i bytes, uint8_t* output) const {
    if (lanes == 0xffff) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(output), bytes);
    } else {
      _mm_mask_storeu_epi8(output, lanes, bytes);
    }
  }

  TARGET_AVX512_VNNI ALWAYS_INLINE void store_one(__m512i sums, uint8_t* output) const {
    store(_mm512_cvtepi32_epi8(codes(sums)), output);
  }

  // The same for four positions, with half as many shuffles.
  TARGET_AVX512_VNNI ALWAYS_INLINE void store_four(const __m512i* sums, uint8_t* output) const {
    const __m512i a = _mm512_packs_epi32(codes(sums[0]), codes(sums[1]));
    const __m512i b = _mm512_packs_epi32(codes(sums[2]), codes(sums[3]));
    const __m512i packed = signed_codes ? _mm512_packs_epi16(a, b) : _mm512_packus_epi16(a, b);
    // Four bytes of each position in turn: brought together by transposing four by four.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(order, packed);
    store(_mm512_castsi512_si128(bytes), output);
    store(_mm512_extracti32x4_epi32(bytes, 1), output + stride);
    store(_mm512_extracti32x4_epi32(bytes, 2), output + 2 * stride);
    store(_mm512_extracti32x4_epi32(bytes, 3), output + 3 * stride);
  }
};

template <int kPositions>
TARGET_AVX512_VNNI ALWAYS_INLINE void finish(const __m512i* sums, const Layer& layer, int64_t channel, void* output) {
  const int64_t lanes = std::min(layer.output_channels - channel, kLanes);
  const Epilogue epilogue{_mm512_loadu_ps(layer.multiplier() + channel),
                          _mm512_set1_ps(layer.lowest),
                          _mm512_set1_ps(layer.highest),
                          _mm512_set1_epi32(static_cast<int>(layer.zero_point)),
                          layer.output == Output::signed_codes,
                          static_cast<__mmask16>((1u << lanes) - 1),
                          layer.output_channels};
  if (layer.output == Output::floats) {
    float* values = static_cast<float*>(output) + channel;
#pragma GCC unroll 16
    for (int position = 0; position < kPositions; ++position)
      _mm512_mask_storeu_ps(values + position * epilogue.stride, epilogue.lanes, epilogue.scaled(sums[position]));
    return;
  }
  uint8_t* codes = static_cast<uint8_t*>(output) + channel;
#pragma GCC unroll 4
  for (int position = 0; position + 4 <= kPositions; position += 4)
    epilogue.store_four(sums + position, codes + position * epilogue.stride);
#pragma GCC unroll 4
  for (int position = kPositions / 4 * 4; position < kPositions; ++position)
    epilogue.store_one(sums[position], codes + position * epilogue.stride);
}

// The most positions that a tile of so many blocks computes: as many as there are registers to sum in.
constexpr std::array<int64_t, 5> kMostPositions = {0, 16, 14, 0, 6};

template <int kBlocks, int kPositions>
TARGET_AVX512_VNNI void tile(const TileContext& context, const uint8_t* codes, int64_t first_block, void* output) {
  const Layer& layer = *context.layer;
  constexpr int64_t kBytes = kLanes * kQuad;
  const int8_t* weights = layer.weights() + first_block * layer.block_bytes();
  const int64_t steps = layer.steps(), next_pair = 2 * layer.block_bytes();
  __m512i sums[kBlocks][kPositions];
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) {
    const __m512i bias = _mm512_loadu_si512(layer.bias() + (first_block + block) * kLanes);
#pragma GCC unroll 16
    for (int position = 0; position < kPositions; ++position) sums[block][position] = bias;
  }

  for (int64_t step = 0; step < steps; ++step, weights += std::min(kBlocks, 2) * kBytes) {
    const uint8_t* quads = codes + context.step_offsets[step];
    __m512i weight[kBlocks];
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block)
      weight[block] = _mm512_loadu_si512(weights + block / 2 * next_pair + block % 2 * kBytes);
#pragma GCC unroll 16
    for (int position = 0; position < kPositions; ++position) {
      int32_t quad;
      std::memcpy(&quad, quads + position * kQuad, sizeof(quad));
      const __m512i code = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) add_products(sums[block][position], code, weight[block]);
    }
  }

#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block)
    finish<kPositions>(sums[block], layer, (first_block + block) * kLanes, output);
}

template <int kBlocks, int... kIndex>
constexpr std::array<Tile, sizeof...(kIndex)> tiles(std::integer_sequence<int, kIndex...>) {
  return {tile<kBlocks, kIndex + 1>...};
}

template <int kBlocks>
constexpr auto tiles() {
  return tiles<kBlocks>(std::make_integer_sequence<int, static_cast<int>(kMostPositions[kBlocks])>());
}

Tile tile_for(int64_t blocks, int64_t positions) {
  static constexpr auto singles = tiles<1>();
  static constexpr auto pairs = tiles<2>();
  static constexpr auto fours = tiles<4>();
  return blocks == 1 ? singles[positions - 1] : blocks == 2 ? pairs[positions - 1] : fours[positions - 1];
}

// Outputs of one chunk of channels at one position.
class Chunk {
 public:
  TARGET_AVX512_VNNI Chunk(const Layer& layer, int64_t chunk)
      : layer_(layer),
        first_(chunk * kChunk),
        count_(std::min(layer.output_channels - first_, kChunk)),
        weights_(layer.weights() + chunk * layer.steps() * kChunk * kQuad) {}

  // The channels' bytes at tap t lie at `codes + tap_offsets[t]`; offsets come in fours.
  TARGET_AVX512_VNNI void compute(const uint8_t* codes, const int32_t* tap_offsets, uint8_t* output) const {
    __m512i sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = _mm512_loadu_si512(layer_.bias() + first_ + i * kLanes);
    const int8_t* weights = weights_;
    for (int64_t step = 0; step < layer_.steps(); ++step, tap_offsets += kQuad, weights += kChunk * kQuad) {
      const __m512i a = _mm512_loadu_si512(codes + first_ + tap_offsets[0]);
      const __m512i b = _mm512_loadu_si512(codes + first_ + tap_offsets[1]);
      const __m512i c = _mm512_loadu_si512(codes + first_ + tap_offsets[2]);
      const __m512i d = _mm512_loadu_si512(codes + first_ + tap_offsets[3]);
      const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
      const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
      const __m512i taps[4] = {_mm512_unpacklo_epi16(low_ab, low_cd), _mm512_unpackhi_epi16(low_ab, low_cd),
                               _mm512_unpacklo_epi16(high_ab, high_cd), _mm512_unpackhi_epi16(high_ab, high_cd)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sums[i] = _mm512_dpbusd_epi32(sums[i], taps[i], _mm512_loadu_si512(weights + i * kLanes * kQuad));
    }
    finish(sums, output);
  }

 private:
  TARGET_AVX512_VNNI ALWAYS_INLINE void finish(const __m512i* sums, uint8_t* output) const {
    const __m512 lowest = _mm512_set1_ps(layer_.lowest), highest = _mm512_set1_ps(layer_.highest);
    __m512 scaled[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 multiplier = _mm512_loadu_ps(layer_.multiplier() + first_ + i * kLanes);
      scaled[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), multiplier);
      scaled[i] = _mm512_min_ps(_mm512_max_ps(scaled[i], lowest), highest);
    }
    if (layer_.output == Output::floats) {
      float values[kChunk];
      for (int i = 0; i < 4; ++i) _mm512_storeu_ps(values + i * kLanes, scaled[i]);
      float* to = reinterpret_cast<float*>(output) + first_;
      for (int64_t channel = 0; channel < count_; ++channel) to[channel] = values[depthwise_place(channel)];
      return;
    }
    __m512i codes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      codes[i] = _mm512_add_epi32(_mm512_cvt_roundps_epi32(scaled[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                                  _mm512_set1_epi32(static_cast<int>(layer_.zero_point)));
    const __m512i a = _mm512_packs_epi32(codes[0], codes[1]), b = _mm512_packs_epi32(codes[2], codes[3]);
    const __m512i bytes =
        layer_.output == Output::signed_codes ? _mm512_packs_epi16(a, b) : _mm512_packus_epi16(a, b);
    const __mmask64 channels = count_ == kChunk ? ~__mmask64{0} : (__mmask64{1} << count_) - 1;
    _mm512_mask_storeu_epi8(output + first_, channels, bytes);
  }

  const Layer& layer_;
  const int64_t first_, count_;
  const int8_t* const weights_;
};

TARGET_AVX512_VNNI void depthwise_row(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk_index,
                                      int64_t positions, uint8_t* output) {
  const Chunk chunk(*context.layer, chunk_index);
  for (int64_t position = 0; position < positions; ++position)
    chunk.compute(codes + position * context.code_step, context.tap_offsets,
                  output + position * context.output_step);
}

}  // namespace

const Microkernel kAvx512Vnni = {
    InstructionSet::avx512_vnni,
    2,
    kMostPositions,
    tile_for,
    nullptr,
    depthwise_row,
    2 << 20,
};

}  // namespace kernels

#endif
