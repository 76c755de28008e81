#include "fake_quantize_loops.h"

#include <limits>

#include "lanes.h"

namespace kernels {

namespace baseline {
namespace {
#define TARGET
#define INLINE static ALWAYS_INLINE
#define FUSED 0
#include "fake_quantize_loops.inc"
#include "fake_quantize_gradients.inc"
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
#include "fake_quantize_loops.inc"
#include "fake_quantize_gradients.inc"
#undef TARGET
#undef INLINE
}  // namespace
}  // namespace avx2

namespace avx512 {
namespace {
#define TARGET TARGET_AVX512
#define INLINE INLINE_AVX512
#include "fake_quantize_loops.inc"
#include "fake_quantize_gradients.inc"
#undef TARGET
#undef INLINE
}  // namespace
}  // namespace avx512

#undef FUSED
#endif

void fake_quantize_piece(ForwardPiece& piece, bool is_bfloat16) { BEST_OF(fake_quantize_piece)(piece, is_bfloat16); }

void mask_gradient_piece(const MaskedGradient& piece, bool is_bfloat16) {
  BEST_OF(mask_gradient_piece)(piece, is_bfloat16);
}

void fake_quantize_backward_piece(BackwardPiece& piece, bool is_bfloat16) {
  BEST_OF(fake_quantize_backward_piece)(piece, is_bfloat16);
}

void learned_clip_piece(const LearnedClipPiece& piece, LearnedSums& sums) {
  BEST_OF(learned_clip_piece)(piece, sums);
}

}  // namespace kernels
