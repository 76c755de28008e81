// Single codes: from numbers that saturate, and as C++ types.
#pragma once

#include "cpu_features.h"
#include "tensors.h"

namespace kernels {

// NaN, which has no code, becomes the lowest.
ALWAYS_INLINE float clamp(float value, float lowest, float highest) {
  value = value > lowest ? value : lowest;
  return value < highest ? value : highest;
}

// Through int32, whose low byte is the code of either dtype.
template <class Code>
ALWAYS_INLINE Code to_code(float value) {
  return static_cast<Code>(static_cast<int32_t>(value));
}

// Calls `function` with a value of the C++ type of a code.
template <class Function>
void with_code_type(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Byte) {
    function(uint8_t());
  } else {
    function(int8_t());
  }
}

}  // namespace kernels
