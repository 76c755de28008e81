// The two ways in which a packed layer runs, on the microkernel that it was packed for.
#pragma once

#include <vector>

#include "gather.h"
#include "shares.h"

namespace kernels {

// Every output channel reads every input channel (linear layers and ordinary convolutions).
void run_dense(const Microkernel& kernel, const Layer& layer, const Input& input, const Positions& positions,
               uint8_t* output);

// Every output channel reads its own input channel.
void run_depthwise(const Microkernel& kernel, const Layer& layer, const Input& input, const Positions& positions,
                   uint8_t* output);

// A buffer of the thread's own, of at least so many bytes.
inline uint8_t* scratch(int64_t bytes) {
  thread_local std::vector<uint8_t> buffer;
  if (static_cast<int64_t>(buffer.size()) < bytes) buffer.resize(static_cast<size_t>(bytes));
  return buffer.data();
}

}  // namespace kernels
