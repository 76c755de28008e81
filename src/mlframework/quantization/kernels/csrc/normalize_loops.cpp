#include "normalize_loops.h"

#include <cstring>

#include "lanes.h"

namespace kernels {

namespace baseline {
namespace {
#define TARGET
#define INLINE static ALWAYS_INLINE
#define FUSED 0
#include "normalize_loops.inc"
#undef TARGET
#undef INLINE
#undef FUSED
}  // namespace
}  // namespace baseline

#if HAS_X86_LEVELS
#define FUSED 1

namespace avx2 {
namespace {
#define TARGET TARGET_AVX2
#define INLINE INLINE_AVX2
#include "normalize_loops.inc"
#undef TARGET
#undef INLINE
}  // namespace
}  // namespace avx2

namespace avx512 {
namespace {
#define TARGET TARGET_AVX512
#define INLINE INLINE_AVX512
#include "normalize_loops.inc"
#undef TARGET
#undef INLINE
}  // namespace
}  // namespace avx512

#undef FUSED
#endif

void sum_differences(const NormalizePiece& piece, float* sums, float* squares) {
  BEST_OF(sum_differences)(piece, sums, squares);
}

void sum_gradients(const NormalizePiece& piece, float* sums, float* products) {
  BEST_OF(sum_gradients)(piece, sums, products);
}

void sum_learned_gradients(const NormalizePiece& piece, const LearnedPiece& learned, float* sums, float* products) {
  BEST_OF(sum_learned_gradients)(piece, learned, sums, products);
}

void normalized_gradient(const NormalizePiece& piece, float* result) { BEST_OF(normalized_gradient)(piece, result); }

}  // namespace kernels
