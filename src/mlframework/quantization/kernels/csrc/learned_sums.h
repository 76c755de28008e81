// What the gradients of a learned scale and zero point are summed of, by loops of any instruction set.
#pragma once

namespace kernels {

// A sum to each lane; of the gradients' factors, see LearnedGradients.
struct LearnedSums {
  static constexpr int kMostLanes = 16;
  double scale[kMostLanes] = {}, zero_point[kMostLanes] = {};

  static double over(const double* lanes) {
    double sum = 0;
    for (int i = 0; i < kMostLanes; ++i) sum += lanes[i];
    return sum;
  }
};

}  // namespace kernels
