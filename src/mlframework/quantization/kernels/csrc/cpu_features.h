// Which instructions a kernel may use, decided at run time: one library runs on every processor of its architecture.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAS_X86_LEVELS 1
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define TARGET_AVX512_VBMI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))
#define TARGET_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#else
#define HAS_X86_LEVELS 0
#endif

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define HAS_NEON 1
#else
#define HAS_NEON 0
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace kernels {

// A set of these bits.
using Features = uint32_t;

namespace feature {
constexpr Features avx2 = 1 << 0;    // and FMA
constexpr Features avx512 = 1 << 1;  // F, BW, DQ and VL
constexpr Features avx512_vbmi = 1 << 2;
constexpr Features avx512_vnni = 1 << 3;
constexpr Features avx_vnni = 1 << 4;
constexpr Features neon_dot = 1 << 5;   // SDOT and UDOT
constexpr Features neon_i8mm = 1 << 6;  // USDOT
}  // namespace feature

// What the processor has, no more than PyTorch's own variable ATEN_CPU_CAPABILITY allows ("default", "avx2", ...).
Features processor_features();

// Of these, what kernels use: all, unless the environment forces a row of the table of microkernels; then, its.
Features cpu_features();

inline bool has_feature(Features feature) { return (cpu_features() & feature) == feature; }

// Whether PyTorch's own kernels fuse multiply-adds, whatever row the environment holds these ones to.
inline bool pytorch_fuses_multiply_add() { return !HAS_X86_LEVELS || (processor_features() & feature::avx2); }

// Whether fused multiply-add is an instruction, rather than a slow function.
inline bool has_fused_multiply_add() { return !HAS_X86_LEVELS || has_feature(feature::avx2); }

#if HAS_X86_LEVELS
template <class Loop, class... Arguments>
TARGET_AVX512 void run_on_avx512(Arguments... arguments) {
  Loop::run(arguments...);
}

template <class Loop, class... Arguments>
TARGET_AVX2 void run_on_avx2(Arguments... arguments) {
  Loop::run(arguments...);
}
#endif

// Runs `Loop::run(arguments...)`, a static ALWAYS_INLINE function that the compiler vectorizes anew for each
// instruction set. The arithmetic is the same in all: contraction to fused multiply-add is off.
template <class Loop, class... Arguments>
void run_vectorized(Arguments... arguments) {
#if HAS_X86_LEVELS
  if (has_feature(feature::avx512)) return run_on_avx512<Loop>(arguments...);
  if (has_feature(feature::avx2)) return run_on_avx2<Loop>(arguments...);
#endif
  Loop::run(arguments...);
}

}  // namespace kernels
