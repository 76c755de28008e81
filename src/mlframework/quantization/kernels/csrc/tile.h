// The innermost part of an integer layer: all sums of a few positions in one, two or four blocks of output channels.
#pragma once

#include "layer.h"

namespace kernels {

// What the tiles of one call have in common. A step multiplies one quad of input channels at one tap.
struct TileContext {
  const Layer* layer;
  const int32_t* step_offsets;  // from a position's first byte in the gathered input to those that each step reads
  int64_t steps;
};

// Writes the outputs of `positions` neighbouring positions in `blocks` blocks of output channels.
//   codes: the first position's first quad; the next position's lies 4 bytes further on.
//   first_block: even.
//   output: the first position's first channel; the next position's lies all output channels further on.
using Tile = void (*)(const TileContext& context, const uint8_t* codes, int64_t first_block, void* output);

// The most positions that a tile of so many blocks takes: as many as there are registers to sum in.
constexpr int64_t most_positions(int64_t blocks) { return blocks == 1 ? 16 : blocks == 2 ? 14 : 6; }

// How many blocks a tile should take of those that are left: enough sums to keep the processor busy.
inline int64_t blocks_of_tile(int64_t blocks_left, int64_t positions) {
  return blocks_left >= 4 && positions <= most_positions(4) ? 4 : std::min<int64_t>(blocks_left, 2);
}

// The tile for so many blocks (1, 2 or 4) and positions, on processors with AVX-512 VNNI.
Tile tile_for(int64_t blocks, int64_t positions);

}  // namespace kernels
