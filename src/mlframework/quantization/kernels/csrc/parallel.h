// Threads, for what also compiles without PyTorch (the layers, and all below them): whoever links it says where they
// come from. In the library they are PyTorch's (parallel.cpp).
#pragma once

#include <cstdint>

namespace kernels {

// Below this many elements to a thread, waking it costs more than it does.
constexpr int64_t kElementsPerThread = 1 << 15;

int64_t thread_count();

// Calls `function(argument, begin, end)` on parts of a range, of at least `grain` each.
void call_in_parallel(int64_t begin, int64_t end, int64_t grain, void (*function)(const void*, int64_t, int64_t),
                      const void* argument);

template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Function& function) {
  const auto call = [](const void* argument, int64_t first, int64_t last) {
    (*static_cast<const Function*>(argument))(first, last);
  };
  call_in_parallel(begin, end, grain, call, &function);
}

}  // namespace kernels
