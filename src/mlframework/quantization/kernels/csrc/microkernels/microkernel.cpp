#include "microkernels/microkernel.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "microkernels/rows.h"

namespace kernels {
namespace {

constexpr const char* kVariable = "MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET";

// The best first.
const Microkernel* const kTable[] = {
#if HAS_X86_LEVELS
    &kAvx512Vnni,
#endif
#if HAS_AVX_VNNI
    &kAvxVnni,
#endif
#if HAS_X86_LEVELS
    &kAvx512, &kAvx2, &kSse2,
#endif
#if HAS_NEON_I8MM
    &kNeonI8mm,
#endif
#if HAS_NEON
    &kNeonDot,
#endif
    &kPortable,
};

std::string forced_name() {
  const char* value = std::getenv(kVariable);
  return value ? value : "";
}

const Microkernel& choose() {
  const std::vector<const Microkernel*> rows = runnable_microkernels();
  const std::string name = forced_name();
  if (name.empty()) return *rows.front();
  std::string names;
  for (const Microkernel* row : rows) {
    if (row->name == name) return *row;
    names += (names.empty() ? "" : ", ") + std::string(row->name);
  }
  throw std::runtime_error(std::string(kVariable) + " must be one that this processor can run (" + names + "), got " +
                           name);
}

}  // namespace

std::vector<const Microkernel*> runnable_microkernels() {
  std::vector<const Microkernel*> rows;
  for (const Microkernel* row : kTable)
    if (row->runs_with(processor_features())) rows.push_back(row);
  return rows;
}

const Microkernel& microkernel() {
  static const Microkernel& chosen = choose();
  return chosen;
}

bool forces_microkernel() { return !forced_name().empty(); }

}  // namespace kernels
