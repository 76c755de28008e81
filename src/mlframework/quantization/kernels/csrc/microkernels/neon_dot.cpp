// NEON with dot products (Arm v8.2): four products of signed bytes to a sum, exact. Unsigned codes are read 128 lower.
#include "microkernels/rows.h"

#if HAS_NEON
#define TARGET_NEON __attribute__((target("arch=armv8.2-a+dotprod")))
#include "microkernels/neon.h"

namespace kernels {
namespace {

struct SignedProducts {
  TARGET_NEON static ALWAYS_INLINE int32x4_t add(int32x4_t sums, uint8x16_t codes, int8x16_t weights) {
    return vdotq_s32(sums, vreinterpretq_s8_u8(codes), weights);
  }

  template <int kQuadOfCodes>
  TARGET_NEON static ALWAYS_INLINE int32x4_t add_quad(int32x4_t sums, uint8x16_t codes, int8x16_t weights) {
    return vdotq_laneq_s32(sums, weights, vreinterpretq_s8_u8(codes), kQuadOfCodes);
  }
};

}  // namespace

const Microkernel kNeonDot = row<SignedProducts>("neon_dot", feature::neon_dot, /*reads_signed=*/true);

}  // namespace kernels

#endif
