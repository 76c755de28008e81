#include "microkernels/microkernel.h"

namespace kernels {

const Microkernel* microkernel() {
#if HAS_X86_LEVELS
  if (instruction_set() == InstructionSet::avx512_vnni) return &kAvx512Vnni;
  if (instruction_set() >= InstructionSet::avx2) return &kAvx2;
#endif
  return nullptr;
}

}  // namespace kernels
