// AVX2 multiplies unsigned by signed bytes and adds two products in 16 bits, where they saturate: exact only if the
// two weights of every pair sum to between -128 and 128. Steps with another pair are told apart when a layer is packed,
// and multiply 16-bit numbers instead, at six tenths of the speed. (FBGEMM sets apart the single outliers.)
#include "microkernels/rows.h"

#if HAS_X86_LEVELS
#include "microkernels/x86_256.h"

namespace kernels {
namespace {

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

struct PairsIn16Bits {
  static constexpr bool kSaturates = true;

  TARGET_AVX2 static ALWAYS_INLINE __m256i add(__m256i sums, __m256i codes, __m256i weights) {
    __m256i products;
    asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sums), "=&x"(products)
        : "x"(codes), "x"(weights), "m"(kOnes));
    return sums;
  }
};

TARGET_AVX2 bool may_saturate(const int8_t* weights) {
  const __m256i limit = _mm256_set1_epi16(128);
  __m256i exceeds = _mm256_setzero_si256();
  for (int64_t i = 0; i < kStepBytes; i += 32) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load(weights + i));
    exceeds = _mm256_or_si256(exceeds, _mm256_cmpgt_epi16(_mm256_abs_epi16(pairs), limit));
  }
  return _mm256_testz_si256(exceeds, exceeds) == 0;
}

constexpr Microkernel row(const char* name, Features needs, Features may_use) {
  return {
      /*name=*/name,
      /*needs=*/needs,
      /*may_use=*/may_use,
      /*interleaved=*/1,
      /*most_positions=*/{0, kMostPositions256},
      /*tile=*/tile_for<PairsIn16Bits>,
      /*reads_signed=*/false,
      /*transpose_columns=*/nullptr,
      /*order=*/Order::quads,
      /*may_saturate=*/may_saturate,
      /*depthwise_row=*/depthwise_row<PairsIn16Bits>,
      /*depthwise_place=*/place_in_quarters,
      /*products_per_thread=*/1 << 19,
  };
}

}  // namespace

const Microkernel kAvx2 = row("avx2", feature::avx2, 0);

// The same tiles, where all other loops have AVX-512.
const Microkernel kAvx512 =
    row("avx512", feature::avx2 | feature::avx512, feature::avx512_vbmi);

}  // namespace kernels

#endif
