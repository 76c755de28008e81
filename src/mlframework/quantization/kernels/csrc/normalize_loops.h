// The loops of normalization, over one or several tiles at a time: compiled once for each instruction set.
#pragma once

#include "grid.h"
#include "learned_sums.h"

namespace kernels {

// So many tiles share a load of what belongs to the places of a tile.
constexpr int kTilesTogether = 4;

// One tile, or kTilesTogether of them side by side in memory, with as many elements each; and what belongs to each place
// of a tile.
struct NormalizePiece {
  const float* values;
  const float* gradient;
  const uint8_t* bits;  // the mask, from the first element on
  int64_t elements;     // of a tile
  bool together;
  float largest;  // magnitude of a gradient that passes

  const float *mean, *average, *projection, *factor;
};

// Adds differences from the mean to `sums`, and their squares to `squares`.
void sum_differences(const NormalizePiece& piece, float* sums, float* squares);

// Adds gradients that pass to `sums`, and their products with the differences to `products`.
void sum_gradients(const NormalizePiece& piece, float* sums, float* products);

// A learned grid that clip(x factor + shift) was quantized on.
struct LearnedPiece {
  const Grid* grid;
  const float *factor, *shift;  // of each place of a tile
  float clip_low, clip_high;
  LearnedSums* sums;  // added to
};

// Both in one reading.
void sum_learned_gradients(const NormalizePiece& piece, const LearnedPiece& learned, float* sums, float* products);

// (g - average - (x - mean) projection) factor, of the gradients g that pass.
void normalized_gradient(const NormalizePiece& piece, float* result);

}  // namespace kernels
