// NEON with products of unsigned by signed bytes (Arm v8.6): codes are read as they are. The matrix products of the
// same extension, twice as many to an instruction, would take eight channels of a position side by side, in which order
// the shared loops do not gather codes.
#include "microkernels/rows.h"

#if HAS_NEON_I8MM
#define TARGET_NEON __attribute__((target("arch=armv8.2-a+i8mm")))
#include "microkernels/neon.h"

namespace kernels {
namespace {

struct MixedProducts {
  TARGET_NEON static ALWAYS_INLINE int32x4_t add(int32x4_t sums, uint8x16_t codes, int8x16_t weights) {
    return vusdotq_s32(sums, codes, weights);
  }

  template <int kQuadOfCodes>
  TARGET_NEON static ALWAYS_INLINE int32x4_t add_quad(int32x4_t sums, uint8x16_t codes, int8x16_t weights) {
    return vsudotq_laneq_s32(sums, weights, codes, kQuadOfCodes);
  }
};

}  // namespace

const Microkernel kNeonI8mm = row<MixedProducts>("neon_i8mm", feature::neon_i8mm, /*reads_signed=*/false);

}  // namespace kernels

#endif
