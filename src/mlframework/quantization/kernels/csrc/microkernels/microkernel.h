// What one instruction set contributes to integer layers: the sums, and how it wants the weights to lie. The loops
// around it (run_dense.cpp, run_depthwise.cpp) and the packing (pack_layer.cpp) are the same for all.
#pragma once

#include <algorithm>
#include <array>

#include "instruction_set.h"
#include "layer.h"

namespace kernels {

// What the tiles of one call have in common. A step multiplies one quad of input channels at one tap.
struct TileContext {
  const Layer* layer;
  const int32_t* step_offsets;  // from a position's first byte in the gathered input to those that each step reads
};

// Writes the outputs of `positions` neighbouring positions in `blocks` blocks of output channels.
//   codes: the first position's first quad; the next position's lies 4 bytes further on.
//   first_block: a multiple of `Microkernel::interleaved`.
//   output: the first position's first channel; the next position's lies all output channels further on.
using Tile = void (*)(const TileContext& context, const uint8_t* codes, int64_t first_block, void* output);

// What the rows of one call of a depthwise layer have in common.
struct DepthwiseContext {
  const Layer* layer;
  const int32_t* tap_offsets;  // from a position's bytes to those of each tap; in fours
  int64_t code_step, output_step;  // bytes from one position to the next
};

// Writes the outputs of one chunk of channels at `positions` positions. Codes are read in whole chunks.
using DepthwiseRow = void (*)(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk, int64_t positions,
                              uint8_t* output);

struct Microkernel {
  InstructionSet instruction_set;
  // Blocks of output channels whose weights lie side by side, step by step.
  int64_t interleaved;
  // The most positions that a tile of so many blocks computes; 0 where there is no such tile.
  std::array<int64_t, 5> most_positions;
  Tile (*tile)(int64_t blocks, int64_t positions);
  // Where products are added in pairs that saturate at 16 bits: whether the pairs of a step's weights (kLanes quads)
  // could, so that the step is to be wide; only with blocks that are not interleaved. Null where sums are exact whatever
  // the weights.
  bool (*may_saturate)(const int8_t* weights);
  DepthwiseRow depthwise_row;
  // Fewer products than this are done before another thread has woken up.
  int64_t products_per_thread;

  // How many blocks a tile should compute of those that are left: enough sums to keep the processor busy.
  int64_t blocks_of_tile(int64_t blocks_left, int64_t positions) const {
    if (blocks_left >= 4 && positions <= most_positions[4]) return 4;
    return std::min(blocks_left, interleaved);
  }
};

// The microkernel of this processor; null where integer layers are not compiled for it.
const Microkernel* microkernel();

#if HAS_X86_LEVELS
extern const Microkernel kAvx512Vnni, kAvx2;
#endif

}  // namespace kernels
