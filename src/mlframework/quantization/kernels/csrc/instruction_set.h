// Which instructions a kernel may use, decided at run time: one library runs on every processor of its architecture.
#pragma once

#include <utility>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAS_X86_LEVELS 1
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define TARGET_AVX512_VBMI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))
#define TARGET_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#else
#define HAS_X86_LEVELS 0
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace kernels {

enum class InstructionSet { baseline, avx2, avx512, avx512_vnni };

// What this processor has, no more than what the environment allows: PyTorch's own variable ATEN_CPU_CAPABILITY
// ("default", "avx2", ...), or MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET with one of the names above.
InstructionSet instruction_set();

// Whether fused multiply-add is an instruction, rather than a slow function.
inline bool has_fused_multiply_add() { return !HAS_X86_LEVELS || instruction_set() > InstructionSet::baseline; }

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
  const InstructionSet best = instruction_set();
  if (best >= InstructionSet::avx512) return run_on_avx512<Loop>(arguments...);
  if (best == InstructionSet::avx2) return run_on_avx2<Loop>(arguments...);
#endif
  Loop::run(arguments...);
}

}  // namespace kernels
