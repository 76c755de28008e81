#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace kernels {

int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

void call_in_parallel(int64_t begin, int64_t end, int64_t grain, void (*function)(const void*, int64_t, int64_t),
                      const void* argument) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { function(argument, first, last); });
}

}  // namespace kernels
