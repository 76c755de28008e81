// What the gradients of a learned scale and zero point are summed of, by loops of any instruction set.
#pragma once

namespace kernels {

// A sum to each lane; of the gradients' factors, see LearnedGradients.
struct LearnedSums {
  static constexpr int kMostLanes = 16;
  double scale[kMostLanes] = {}, zero_point[kMostLanes] = {};

  static double over(const double* lanes) {
    double sums[kMostLanes / 2];
    for (int i = 0; i < kMostLanes / 2; ++i) sums[i] = lanes[i] + lanes[i + kMostLanes / 2];
    for (int half = kMostLanes / 4; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
  }
};

}  // namespace kernels
