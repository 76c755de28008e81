// Gradients of a learned scale and zero point, from sums that a pass over the gradient has made beside its own.
#pragma once

#include <vector>

#include "grid.h"
#include "learned_sums.h"

namespace kernels {

// LSQ's factor, 1 / sqrt(N highest): a scale of N elements learns at the pace of a weight.
double gradient_scale(int64_t elements, int64_t scales, int64_t highest);

// Float tensors of shape (1,).
struct LearnedGradients {
  Tensor to_scale, to_zero_point;

  // Sums of `elements` values in all, one after the other.
  LearnedGradients(const std::vector<LearnedSums>& sums, const Grid& grid, int64_t elements, int64_t highest);
};

}  // namespace kernels
