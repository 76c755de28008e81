// What an observer of moving averages does with the extremes of a batch, in one call: each formula is that of
// moving_average_statistics.py, activation_observer.py and arithmetic.py.
#include <cmath>

#include "codes.h"
#include "cpu_features.h"
#include "moving_average.h"
#include "operators.h"

namespace kernels {
namespace {

// As torch.lerp computes it: fused where PyTorch fuses, and from the nearer end.
float lerp(float from, float to, float weight) {
  const bool near_from = std::abs(weight) < 0.5f;
  const float base = near_from ? from : to, coefficient = near_from ? weight : weight - 1.0f, difference = to - from;
  return pytorch_fuses_multiply_add() ? std::fma(coefficient, difference, base) : base + coefficient * difference;
}

float averaged(float running, float batch, float momentum) {
  if (!std::isfinite(batch)) return running;
  return std::isfinite(running) ? lerp(running, batch, momentum) : batch;
}

void set_parameters(float minimum, float maximum, const GridEnds& ends, float& scale, float& zero_point) {
  minimum = std::isfinite(minimum) ? std::min(minimum, 0.0f) : 0.0f;
  maximum = std::isfinite(maximum) ? std::max(maximum, 0.0f) : 0.0f;
  float step;
  if (ends.symmetric) {
    step = maximum / (ends.highest - ends.zero);
    if (ends.lowest < ends.zero) step = std::max(step, minimum / (ends.lowest - ends.zero));
  } else {
    step = (maximum * 0.5f - minimum * 0.5f) / ((ends.highest - ends.lowest) * 0.5f);
  }
  scale = step > 0 ? std::min(std::max(step, kSmallestScale), kLargestScale) : 1.0f;
  zero_point = ends.symmetric
                   ? ends.zero
                   : clamp(std::nearbyintf(ends.lowest - minimum / scale), ends.lowest, ends.highest);
}

}  // namespace

bool Averages::update(int64_t channel, float negated_minimum, float batch_maximum, bool due) const {
  minimum[channel] = averaged(minimum[channel], -negated_minimum, momentum);
  maximum[channel] = averaged(maximum[channel], batch_maximum, momentum);
  if (due) set_parameters(minimum[channel], maximum[channel], ends, scale[channel], zero_point[channel]);
  return std::isfinite(negated_minimum) || std::isfinite(batch_maximum);
}

int64_t* count_in(const Tensor& batches) {
  STD_TORCH_CHECK(batches.numel() == 1 && batches.is_cpu() && batches.scalar_type() == ScalarType::Long,
                  "batches must be one int64, on the CPU");
  return static_cast<int64_t*>(batches.mutable_data_ptr());
}

void update_moving_average(const Tensor& batch, bool is_measured, int64_t axis, const Tensor& minimum,
                           const Tensor& maximum, const Tensor& batches, const Tensor& scale,
                           const Tensor& zero_point, double momentum, int64_t lowest, int64_t highest, bool symmetric,
                           int64_t symmetric_zero, bool due) {
  const Tensor both = is_measured ? batch : extremes(batch, axis);
  const int64_t channels = minimum.numel();
  const float* negated_minima = numbers_in(both, 2 * channels, "extremes");
  const Averages averages{numbers_in(minimum, channels, "minimum"), numbers_in(maximum, channels, "maximum"),
                          numbers_in(scale, channels, "scale"),     numbers_in(zero_point, channels, "zero_point"),
                          static_cast<float>(momentum),
                          {static_cast<float>(lowest), static_cast<float>(highest), static_cast<float>(symmetric_zero),
                           symmetric}};
  int64_t* count = count_in(batches);
  bool any = false;
  for (int64_t i = 0; i < channels; ++i) any |= averages.update(i, negated_minima[i], negated_minima[channels + i], due);
  if (any) ++*count;
}

}  // namespace kernels
