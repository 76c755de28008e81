// The weight of a layer as integers: quantized, observed before that where training asks for it, and made to leave room
// for a bias.
#pragma once

#include <optional>
#include <vector>

#include "moving_average.h"

namespace kernels {

struct QuantizedWeight {
  Tensor codes;              // int8, in the shape and the layout of the weight
  Tensor mask;               // a bit to an element, whether its gradient passes; undefined where not asked for
  std::vector<float> scale;  // of each output channel; NaN where a weight is NaN
};

// With the scale that is given: one number, or one to a channel along `axis`, 0; an axis of -1 is per tensor.
QuantizedWeight quantize_weight(const Tensor& weight, int64_t axis, const Tensor& scale, int64_t lowest,
                                int64_t highest, bool wants_mask);

// Folds the range of the weight into an observer's averages first, and quantizes with the scale that comes of them.
QuantizedWeight observe_and_quantize_weight(const Tensor& weight, int64_t axis, const Tensor& minimum,
                                            const Tensor& maximum, const Tensor& batches, const Tensor& scale,
                                            const Tensor& zero_point, double momentum, int64_t lowest, int64_t highest,
                                            bool wants_mask);

// A bias, or zero for none, in units of the accumulator, int32. As `fold` in int8/folding.py: the scale of a channel
// whose bias would exceed half of an int32 is raised to where it fits, and the channel's codes are rounded to the
// coarser grid. A bias that is not finite makes the scale of its channel NaN.
Tensor fit_bias(QuantizedWeight& weight, const std::optional<Tensor>& bias, float input_scale);

}  // namespace kernels
