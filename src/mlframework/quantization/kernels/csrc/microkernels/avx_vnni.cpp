// AVX-VNNI: the products of AVX-512 VNNI on 256-bit vectors, for processors without AVX-512.
#include "microkernels/rows.h"

#if HAS_AVX_VNNI
#include "microkernels/x86_256.h"

namespace kernels {
namespace {

struct ExactQuads {
  static constexpr bool kSaturates = false;

  // _mm256_dpbusd_avx_epi32, in place: of the intrinsic, GCC 12 makes two copies for each product.
  TARGET_AVX2 static ALWAYS_INLINE __m256i add(__m256i sums, __m256i codes, __m256i weights) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(weights));
    return sums;
  }
};

}  // namespace

const Microkernel kAvxVnni = {
    /*name=*/"avx_vnni",
    /*needs=*/feature::avx2 | feature::avx_vnni,
    /*may_use=*/0,
    /*interleaved=*/1,
    /*most_positions=*/{0, kMostPositions256},
    /*tile=*/tile_for<ExactQuads>,
    /*reads_signed=*/false,
    /*transpose_columns=*/nullptr,
    /*order=*/Order::quads,
    /*may_saturate=*/nullptr,
    /*depthwise_row=*/depthwise_row<ExactQuads>,
    /*depthwise_place=*/place_in_quarters,
    /*products_per_thread=*/1 << 20,
};

}  // namespace kernels

#endif
