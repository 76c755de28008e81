#include "instruction_set.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>

namespace kernels {
namespace {

// PyTorch's variable has one "avx512", with and without VNNI.
constexpr const char* kOwnVariable = "MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET";

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

// The most that a variable of the environment allows.
InstructionSet allowed(const char* variable) {
  const char* value = std::getenv(variable);
  const std::string name = value ? value : "";
  const bool own = std::string(variable) == kOwnVariable;
  if (name == (own ? "baseline" : "default")) return InstructionSet::baseline;
  if (name == "avx2") return InstructionSet::avx2;
  if (own && name == "avx512") return InstructionSet::avx512;
  STD_TORCH_CHECK(!own || name.empty() || name == "avx512_vnni", kOwnVariable,
                  " must be baseline, avx2, avx512 or avx512_vnni, got ", name);
  return InstructionSet::avx512_vnni;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet best = std::min({of_processor(), allowed("ATEN_CPU_CAPABILITY"), allowed(kOwnVariable)});
  return best;
}

}  // namespace kernels
