// AVX-512 VNNI: one instruction multiplies four pairs of bytes and adds them to a sum, exactly.
#include "microkernels/rows.h"

#if HAS_X86_LEVELS
#include <immintrin.h>

#include <array>
#include <cstring>
#include <utility>

#include "microkernels/x86_256.h"


namespace kernels {
namespace {

// Products of four unsigned by four signed bytes, added to each sum: _mm512_dpbusd_epi32, in place. Of the intrinsic,
// GCC 12 makes two copies for each product.
TARGET_AVX512_VNNI ALWAYS_INLINE void add_products(__m512i& sums, __m512i codes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(weights));
}

// What becomes of sums. Codes are made without a sign first: narrowing then saturates at the ends of all dtypes, and a
// clip to fewer codes is one maximum of bytes.
class Epilogue512 {
 public:
  TARGET_AVX512_VNNI ALWAYS_INLINE explicit Epilogue512(const Layer& layer)
      : lowest_(_mm512_set1_ps(layer.lowest)), highest_(_mm512_set1_ps(layer.highest)) {
    const int sign = layer.output == Output::signed_codes ? 128 : 0;
    zero_point_ = _mm512_set1_epi16(static_cast<int16_t>(static_cast<int>(layer.zero_point) + sign));
    lowest_code_ = _mm512_set1_epi8(static_cast<char>(layer.lowest_code() + sign));
    sign_ = _mm512_set1_epi8(static_cast<char>(sign));
  }

  TARGET_AVX512_VNNI ALWAYS_INLINE __m512 values(__m512i sums, __m512 multiplier) const {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), multiplier);
    return _mm512_min_ps(_mm512_max_ps(scaled, lowest_), highest_);
  }

  // Codes of four vectors of sums: in each quarter, four channels of each.
  TARGET_AVX512_VNNI ALWAYS_INLINE __m512i codes(__m512i a, __m512i b, __m512i c, __m512i d,
                                                 const __m512* multipliers) const {
    const __m512i low = _mm512_packs_epi32(rounded(a, multipliers[0]), rounded(b, multipliers[1]));
    const __m512i high = _mm512_packs_epi32(rounded(c, multipliers[2]), rounded(d, multipliers[3]));
    const __m512i bytes =
        _mm512_packus_epi16(_mm512_adds_epi16(low, zero_point_), _mm512_adds_epi16(high, zero_point_));
    return _mm512_xor_si512(_mm512_max_epu8(bytes, lowest_code_), sign_);
  }

 private:
  // To even. What lies below all numbers of 32 bits becomes the smallest of them, and so does NaN, of which the minimum
  // is its second operand.
  TARGET_AVX512_VNNI ALWAYS_INLINE __m512i rounded(__m512i sums, __m512 multiplier) const {
    const __m512 scaled = _mm512_min_ps(highest_, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), multiplier));
    return _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  __m512 lowest_, highest_;
  __m512i zero_point_, lowest_code_, sign_;
};

TARGET_AVX512_VNNI ALWAYS_INLINE void store(__m128i bytes, int64_t lanes, uint8_t* output) {
  if (lanes == kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(output), bytes);
  _mm_mask_storeu_epi8(output, static_cast<__mmask16>((1u << lanes) - 1), bytes);
}

// The outputs of some positions in one block.
template <int kPositions>
TARGET_AVX512_VNNI ALWAYS_INLINE void finish(const __m512i* sums, const TileContext& context, int64_t channel,
                                             void* output) {
  const Layer& layer = *context.layer;
  const int64_t lanes = std::min(layer.output_channels - channel, kLanes), stride = layer.output_channels;
  const Epilogue512 epilogue(layer);
  const __m512 multiplier = _mm512_loadu_ps(context.multiplier + channel);
  if (layer.output == Output::floats) {
    float* values = static_cast<float*>(output) + channel;
#pragma GCC unroll 16
    for (int position = 0; position < kPositions; ++position)
      _mm512_mask_storeu_ps(values + position * stride, static_cast<__mmask16>((1u << lanes) - 1),
                            epilogue.values(sums[position], multiplier));
    return;
  }
  uint8_t* codes = static_cast<uint8_t*>(output) + channel;
  const __m512 multipliers[4] = {multiplier, multiplier, multiplier, multiplier};
#pragma GCC unroll 4
  for (int position = 0; position < kPositions; position += 4, codes += 4 * stride) {
    constexpr int kLast = kPositions - 1;
    const int second = position + 1 < kLast ? position + 1 : kLast;
    const int third = position + 2 < kLast ? position + 2 : kLast;
    const int fourth = position + 3 < kLast ? position + 3 : kLast;
    const __m512i packed = epilogue.codes(sums[position], sums[second], sums[third], sums[fourth], multipliers);
    // Four bytes of each position in turn: brought together by transposing four by four.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(order, packed);
    store(_mm512_castsi512_si128(bytes), lanes, codes);
    if (position + 1 <= kLast) store(_mm512_extracti32x4_epi32(bytes, 1), lanes, codes + stride);
    if (position + 2 <= kLast) store(_mm512_extracti32x4_epi32(bytes, 2), lanes, codes + 2 * stride);
    if (position + 3 <= kLast) store(_mm512_extracti32x4_epi32(bytes, 3), lanes, codes + 3 * stride);
  }
}

// Where up to 16 positions lie that are `step` bytes apart: each a sum that an instruction works out with its operand,
// from few registers. Compilers would add up one position after the other.
class PositionSteps {
 public:
  explicit ALWAYS_INLINE PositionSteps(int64_t step)
      : step_(step), three_(3 * step), five_(5 * step), seven_(7 * step) {
    asm("" : "+r"(three_), "+r"(five_), "+r"(seven_));
  }

  // eighth: the address of position 8, if there is one.
  ALWAYS_INLINE const uint8_t* at(const uint8_t* first, const uint8_t* eighth, int position) const {
    const uint8_t* base = position < 8 ? first : eighth;
    switch (position % 8) {
      case 3: return base + three_;
      case 5: return base + five_;
      case 6: return base + 2 * three_;
      case 7: return base + seven_;
      default: return base + position % 8 * step_;
    }
  }

 private:
  int64_t step_, three_, five_, seven_;
};

// The most positions that a tile of so many blocks computes: as many as there are registers to sum in.
constexpr std::array<int64_t, 5> kMostPositions = {0, 16, 14, 0, 6};

template <int kBlocks, int kPositions>
TARGET_AVX512_VNNI void tile(const TileContext& context, const uint8_t* codes, int64_t first_block, void* output) {
  constexpr int64_t kBytes = kLanes * kQuad;
  const int8_t* weights = context.weights + first_block * context.block_bytes;
  const int64_t steps = context.steps, next_pair = 2 * context.block_bytes, position_step = context.position_step;
  __m512i sums[kBlocks][kPositions];
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) {
    const __m512i bias = _mm512_loadu_si512(context.bias + (first_block + block) * kLanes);
#pragma GCC unroll 16
    for (int position = 0; position < kPositions; ++position) sums[block][position] = bias;
  }

  const PositionSteps position_steps(position_step);
  for (int64_t step = 0; step < steps; ++step, weights += std::min(kBlocks, 2) * kBytes) {
    const uint8_t* const quads = codes + context.step_offsets[step];
    const uint8_t* const eighth = quads + 8 * position_step;
    __m512i weight[kBlocks];
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block)
      weight[block] = _mm512_loadu_si512(weights + block / 2 * next_pair + block % 2 * kBytes);
#pragma GCC unroll 16
    for (int position = 0; position < kPositions; ++position) {
      int32_t quad;
      std::memcpy(&quad, position_steps.at(quads, eighth, position), sizeof(quad));
      const __m512i code = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) add_products(sums[block][position], code, weight[block]);
    }
  }

#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block)
    finish<kPositions>(sums[block], context, (first_block + block) * kLanes, output);
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

// The same products on vectors of half the length.
struct HalfVectors {
  static constexpr bool kSaturates = false;

  TARGET_AVX2 static ALWAYS_INLINE __m256i add(__m256i sums, __m256i codes, __m256i weights) {
    asm("vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(weights));
    return sums;
  }
};

TARGET_AVX512_VNNI void depthwise_row(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk,
                                      int64_t positions, uint8_t* output) {
  // All in variables: outputs are bytes, which might lie anywhere.
  const Layer& layer = *context.layer;
  const int64_t channel = chunk * kChunk, count = std::min(layer.output_channels - channel, kChunk);
  if (count <= kChunk / 2) return depthwise_half<HalfVectors, false>(context, codes, chunk, 0, positions, output);
  const int64_t steps = layer.steps(), code_step = context.code_step, output_step = context.output_step;
  const int32_t* const tap_offsets = context.tap_offsets;
  const int8_t* const weights = layer.weights() + chunk * steps * kChunk * kQuad;
  const bool floats = layer.output == Output::floats;
  const __mmask64 channels = ~__mmask64{0} >> (kChunk - count);
  const Epilogue512 epilogue(layer);
  __m512i bias[4];
  __m512 multipliers[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    bias[i] = _mm512_loadu_si512(layer.bias() + channel + i * kLanes);
    multipliers[i] = _mm512_loadu_ps(layer.multiplier() + channel + i * kLanes);
  }
  codes += channel;
  output += channel * layer.element_size();
  for (int64_t position = 0; position < positions; ++position, codes += code_step, output += output_step) {
    __m512i sums[4] = {bias[0], bias[1], bias[2], bias[3]};
    for (int64_t step = 0; step < steps; ++step) {
      const int32_t* offsets = tap_offsets + step * kQuad;
      const int8_t* step_weights = weights + step * kChunk * kQuad;
      const __m512i a = _mm512_loadu_si512(codes + offsets[0]), b = _mm512_loadu_si512(codes + offsets[1]);
      const __m512i c = _mm512_loadu_si512(codes + offsets[2]), d = _mm512_loadu_si512(codes + offsets[3]);
      const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
      const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
      const __m512i taps[4] = {_mm512_unpacklo_epi16(low_ab, low_cd), _mm512_unpackhi_epi16(low_ab, low_cd),
                               _mm512_unpacklo_epi16(high_ab, high_cd), _mm512_unpackhi_epi16(high_ab, high_cd)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        add_products(sums[i], taps[i], _mm512_loadu_si512(step_weights + i * kStepBytes));
    }
    if (floats) {
      float values[kChunk];
      for (int i = 0; i < 4; ++i) _mm512_storeu_ps(values + i * kLanes, epilogue.values(sums[i], multipliers[i]));
      float* to = reinterpret_cast<float*>(output);
      for (int64_t i = 0; i < count; ++i) to[i] = values[place_in_quarters(i)];
      continue;
    }
    const __m512i bytes = epilogue.codes(sums[0], sums[1], sums[2], sums[3], multipliers);
    if (count == kChunk) {
      _mm512_storeu_si512(output, bytes);
    } else {
      _mm512_mask_storeu_epi8(output, channels, bytes);
    }
  }
}

}  // namespace

const Microkernel kAvx512Vnni = {
    /*name=*/"avx512_vnni",
    /*needs=*/feature::avx2 | feature::avx512 | feature::avx512_vnni,
    /*may_use=*/feature::avx512_vbmi,
    /*interleaved=*/2,
    /*most_positions=*/kMostPositions,
    /*tile=*/tile_for,
    /*reads_signed=*/false,
    /*transpose_columns=*/nullptr,
    /*order=*/Order::quads,
    /*may_saturate=*/nullptr,
    /*depthwise_row=*/depthwise_row,
    /*depthwise_place=*/place_in_quarters,
    /*products_per_thread=*/2 << 20,
};

}  // namespace kernels

#endif
