#include "instruction_set.h"

#include <cstdlib>
#include <string>

namespace kernels {
namespace {

InstructionSet of_processor() {
#if HAS_X86_LEVELS
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return __builtin_cpu_supports("avx512vnni") ? InstructionSet::avx512_vnni : InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet allowed() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = capability ? capability : "";
  if (name == "default") return InstructionSet::baseline;
  if (name == "avx2") return InstructionSet::avx2;
  return InstructionSet::avx512_vnni;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet best = of_processor() < allowed() ? of_processor() : allowed();
  return best;
}

}  // namespace kernels
