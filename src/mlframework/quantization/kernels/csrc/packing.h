// Puts a layer's weights, bias and multipliers into the one block that layer.h describes.
#pragma once

#include <functional>

#include "microkernels/microkernel.h"

namespace kernels {

struct LayerContents {
  const int8_t* weight;  // (O, taps, I / groups)
  const int32_t* bias;   // (O); null for none
  const float* multiplier;  // (O), or one for all
  bool has_one_multiplier;
};

// Packs a layer for a microkernel, into a block of as many bytes as `allocate` is asked for, at a multiple of 64.
//   description: of the layer, its input's zero point that of the codes as they are; all that follows from the
//     microkernel and the weights is filled in.
void pack(const Microkernel& kernel, const Layer& description, const LayerContents& contents,
          const std::function<void*(int64_t)>& allocate);

}  // namespace kernels
