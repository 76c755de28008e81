// Gradients of a learned scale and zero point, summed by a pass over the gradient that is made anyway.
#pragma once

#include <vector>

#include "fake_quantize_loops.h"

namespace kernels {

// What was quantized: v = clip(x), clip(x + addend), or clip(x factor + shift) with an entry of these to each element.
struct QuantizedPiece {
  const float* values;
  const float* addend;
  const float *factor, *shift;
  const float* gradient;
  int64_t count;
};

// The sums of one run of pieces. Runs that are summed in the same order have the same sums.
class LearnedGridSums {
 public:
  // `largest`: the magnitude of a gradient that passes.
  LearnedGridSums(const Grid& grid, float clip_low, float clip_high, float largest)
      : grid_(&grid), clip_low_(clip_low), clip_high_(clip_high), largest_(largest) {}

  void add(const QuantizedPiece& piece);
  void add(const LearnedGridSums& other) { scale_ += other.scale_, zero_point_ += other.zero_point_; }

  // Float tensors of shape (1): the gradients, with LSQ's factor.
  Tensor to_scale(double gradient_scale) const;
  Tensor to_zero_point(double gradient_scale) const;

 private:
  const Grid* grid_;
  float clip_low_, clip_high_, largest_;
  double scale_ = 0, zero_point_ = 0;
};

}  // namespace kernels
