// The loops of fake quantization, which run on one piece of memory at a time: compiled once for each instruction set.
#pragma once

#include "grid.h"
#include "learned_sums.h"
#include "mask.h"

namespace kernels {

// What a forward pass reads and writes. Null is what is not there, or not wanted.
struct ForwardPiece {
  const void* input;
  const void* addend;
  const float *factor, *shift;  // each element is multiplied by an entry of the one, and one of the other added
  void* values;
  uint8_t* codes;
  BitWriter* mask;
  int64_t count;
  float lowest_code;
  bool clips, wants_extremes;
  float clip_low, clip_high;

  const Grid* grid;  // of the whole piece; or, where null, an entry of a row for each element:
  const float *scale, *zero_point, *lowest, *highest;
  float *minimum, *maximum;  // joined to what is there: one number with a grid, a row of them with rows; NaN stays
  bool has_nan;              // set where a value is NaN, if extremes or codes are wanted
};

void fake_quantize_piece(ForwardPiece& piece, bool is_bfloat16);

// What passes a gradient back through a mask: `bits` starts at the first element's.
struct MaskedGradient {
  const void* gradient;
  const uint8_t* bits;
  void* result;
  int64_t count;
  float largest;  // the gradient's magnitude is clipped to it; infinity clips nothing
};

void mask_gradient_piece(const MaskedGradient& piece, bool is_bfloat16);

// What a backward pass reads and writes.
struct BackwardPiece {
  const void* input;
  const void* gradient;
  void* to_input;  // null where nobody asks
  int64_t count;
  bool pass_saturated;
  float largest;

  const Grid* grid;  // or a row, as in ForwardPiece
  const float *scale, *lowest, *highest;
  // Without the factor that every gradient of a scale has, and without minus the scale that one of a zero point has:
  double to_scale, to_zero_point;           // with a grid, the sums over the piece
  float *row_to_scale, *row_to_zero_point;  // with a row, added to, element by element
};

void fake_quantize_backward_piece(BackwardPiece& piece, bool is_bfloat16);

// One operand of a sum: floats, or codes on a grid. None where `data` is null.
struct Operand {
  enum Kind { floats, unsigned_codes, signed_codes };
  const void* data;
  Kind kind;
  float scale, zero_point;  // of codes

  Operand from(int64_t first) const {
    Operand rest = *this;
    if (data) rest.data = static_cast<const uint8_t*>(data) + first * (kind == floats ? 4 : 1);
    return rest;
  }
};

// The backward pass of a clipped sum that was quantized on a learned grid. `bits` starts at the first element's.
struct LearnedClipPiece {
  Operand input, addend;
  const float* gradient;
  const uint8_t* bits;
  float* result;  // the gradient where a bit is set, and 0 elsewhere
  int64_t count;
  float clip_low, clip_high, largest;
  const Grid* grid;
};

void learned_clip_piece(const LearnedClipPiece& piece, LearnedSums& sums);

}  // namespace kernels
