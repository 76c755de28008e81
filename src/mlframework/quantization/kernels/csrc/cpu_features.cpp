#include "cpu_features.h"

#include <cstdlib>
#include <string>

#include "microkernels/microkernel.h"

#if HAS_X86_LEVELS
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace kernels {
namespace {

#if HAS_X86_LEVELS

// Not every compiler that has the instruction can be asked for it by name.
bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

Features detected() {
  __builtin_cpu_init();
  Features features = 0;
  // Each of these also asks whether the operating system keeps the registers.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return features;
  features |= feature::avx2;
  if (has_avx_vnni()) features |= feature::avx_vnni;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return features;
  features |= feature::avx512;
  if (__builtin_cpu_supports("avx512vbmi")) features |= feature::avx512_vbmi;
  if (__builtin_cpu_supports("avx512vnni")) features |= feature::avx512_vnni;
  return features;
}

#elif defined(__aarch64__) && defined(__linux__)

Features detected() {
  constexpr unsigned long kDot = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  Features features = 0;
  if (getauxval(AT_HWCAP) & kDot) features |= feature::neon_dot;
  if (getauxval(AT_HWCAP2) & kI8mm) features |= feature::neon_i8mm;
  return features;
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool has_feature_named(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

Features detected() {
  Features features = 0;
  if (has_feature_named("hw.optional.arm.FEAT_DotProd")) features |= feature::neon_dot;
  if (has_feature_named("hw.optional.arm.FEAT_I8MM")) features |= feature::neon_i8mm;
  return features;
}

#else

Features detected() { return 0; }

#endif

Features allowed_by_pytorch() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = value ? value : "";
  if (name == "default") return 0;
  if (name == "avx2") return feature::avx2;
  return ~Features{0};
}

}  // namespace

Features processor_features() {
  static const Features features = detected() & allowed_by_pytorch();
  return features;
}

Features cpu_features() {
  static const Features features =
      processor_features() & (forces_microkernel() ? microkernel().needs | microkernel().may_use : ~Features{0});
  return features;
}

}  // namespace kernels
