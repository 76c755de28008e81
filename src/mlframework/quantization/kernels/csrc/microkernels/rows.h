// Each row of the table, defined in the file of its instruction set.
#pragma once

#include "microkernels/microkernel.h"

// Assemblers know AVX-VNNI's shorter code of an instruction of AVX-512 as long as compilers of these versions do.
#if HAS_X86_LEVELS && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AVX_VNNI 1
#else
#define HAS_AVX_VNNI 0
#endif

// The first versions whose headers have what multiplies bytes of two signs.
#if HAS_NEON && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 10)
#define HAS_NEON_I8MM 1
#else
#define HAS_NEON_I8MM 0
#endif

namespace kernels {

#if HAS_X86_LEVELS
extern const Microkernel kAvx512Vnni, kAvx512, kAvx2, kSse2;
#endif
#if HAS_AVX_VNNI
extern const Microkernel kAvxVnni;
#endif
#if HAS_NEON_I8MM
extern const Microkernel kNeonI8mm;
#endif
#if HAS_NEON
extern const Microkernel kNeonDot;
#endif
extern const Microkernel kPortable;

}  // namespace kernels
