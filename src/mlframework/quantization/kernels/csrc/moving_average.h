// The state of an observer of moving averages, and one step of it.
#pragma once

#include "tensors.h"

namespace kernels {

// As in arithmetic.py.
constexpr float kSmallestScale = 0x1p-40f, kLargestScale = 0x1p40f;

struct GridEnds {
  float lowest, highest, zero;  // the ends of the grid, and the zero point of a symmetric one
  bool symmetric;
};

struct Averages {
  float *minimum, *maximum, *scale, *zero_point;  // one number to a channel
  float momentum;
  GridEnds ends;

  // Folds the extremes of a channel in, minus infinity where not finite; where due, makes scale and zero point of what
  // comes out. Returns whether an extreme was finite.
  bool update(int64_t channel, float negated_minimum, float batch_maximum, bool due) const;
};

// The single int64 that a tensor holds.
int64_t* count_in(const Tensor& batches);

}  // namespace kernels
