// What one instruction set contributes to integer layers: the sums, and how it wants codes and weights to lie. The loops
// around it (run_dense.cpp, run_depthwise.cpp), the gathering (gather.cpp) and the packing (packing.cpp) are the same
// for all.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "cpu_features.h"
#include "layer.h"

namespace kernels {

// What the tiles of one call have in common. A step multiplies one quad of input channels at one tap.
struct TileContext {
  const Layer* layer;
  // Of the layer, which would compute them again for every tile.
  int64_t steps, block_bytes;
  const int32_t* bias;
  const float* multiplier;
  const int8_t* weights;
  const int32_t *wide_steps_before, *order_of_steps;

  const int32_t* step_offsets;  // from a position's first byte in the gathered input to those that each step reads
  int64_t position_step;        // bytes from one position's first to the next's
  const uint8_t* gathered;
  const uint8_t* widened;  // the same in two bytes for each, which wide steps read
};

// Writes the outputs of `positions` neighbouring positions in `blocks` blocks of output channels.
//   codes: the first position's first quad.
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

// For tiles that load the quads of neighbouring positions at once. Copies four quads of each of the first columns of
// `count`, as many as it does at a time, and returns how many: those 16 bytes lie side by side at `source`, the next
// column's `step` bytes further on; a column's quads go to `target`, `quad_step` bytes apart, the next column's 4 bytes
// further on.
using TransposeColumns = int64_t (*)(const uint8_t* source, int64_t step, int64_t count, uint8_t* target,
                                     int64_t quad_step);

// In what order a step's weights, for four codes of each of many channels, lie in memory.
enum class Order {
  quads,   // [channel][4]: beside each other what one instruction adds to one sum
  planes,  // [4][channel]
};

// A row of the table of microkernels (microkernel.cpp).
struct Microkernel {
  const char* name;
  Features needs;
  Features may_use;  // besides, elsewhere in the library, where the environment forces this row

  // Blocks of output channels whose weights lie side by side, step by step.
  int64_t interleaved;
  // The most positions that a tile of so many blocks computes; 0 where there is no such tile.
  std::array<int64_t, 5> most_positions;
  Tile (*tile)(int64_t blocks, int64_t positions);

  // Whether codes are multiplied as signed bytes, 128 below unsigned ones, rather than as unsigned bytes.
  bool reads_signed;
  // Null where tiles read positions at any distance, so that a position's channels stay side by side; otherwise, the
  // quads of neighbouring positions are to lie side by side, 4 bytes from one position to the next.
  TransposeColumns transpose_columns;

  Order order;
  // Where products are added in pairs that saturate at 16 bits: whether the pairs of a step's weights (kLanes quads)
  // could, so that the step is to be wide; only with blocks that are not interleaved. Null where sums are exact whatever
  // the weights.
  bool (*may_saturate)(const int8_t* weights);

  DepthwiseRow depthwise_row;
  // Where a depthwise layer keeps a channel, among those of its chunk.
  int64_t (*depthwise_place)(int64_t channel);

  // Fewer products than this are done before another thread has woken up.
  int64_t products_per_thread;

  bool runs_with(Features features) const { return (needs & ~features) == 0; }

  // How many blocks a tile should compute of those that are left: enough sums to keep the processor busy.
  int64_t blocks_of_tile(int64_t blocks_left, int64_t positions) const {
    if (blocks_left >= 4 && positions <= most_positions[4]) return 4;
    return std::min(blocks_left, interleaved);
  }
};

// The order of channels for those that multiply channel after channel.
inline int64_t place_in_order(int64_t channel) { return channel; }

// The order in which bytes come to lie when those of four taps are interleaved within quarters of a vector of 64.
// Reading it backwards, packing sums to bytes restores the order of the channels.
inline int64_t place_in_quarters(int64_t channel) {
  const int64_t in_chunk = channel % kChunk, quarter = in_chunk / 16, vector = in_chunk % 16 / 4;
  return channel - in_chunk + vector * kLanes + quarter * 4 + in_chunk % 4;
}

// The rows that this processor can run, the best first; the last, which is portable, always can.
std::vector<const Microkernel*> runnable_microkernels();

// The one in use: the best, or that which MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET names. Throws std::runtime_error if
// it names none that runs here.
const Microkernel& microkernel();
bool forces_microkernel();

}  // namespace kernels
