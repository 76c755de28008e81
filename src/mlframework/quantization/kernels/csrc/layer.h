// A whole integer layer in one block of memory: what it is, its weights in the order in which they are used, and what
// follows each sum. Python keeps the block as a tensor of bytes; this is its meaning.
#pragma once

#include <cstdint>

namespace kernels {

// Output channels to a vector of sums, and how many products of four bytes each one instruction adds to one.
constexpr int64_t kLanes = 16;
constexpr int64_t kQuad = 4;
constexpr int64_t kStepBytes = kLanes * kQuad;
// Channels that a depthwise layer computes at once.
constexpr int64_t kChunk = 64;

enum class Output : int64_t { unsigned_codes, signed_codes, floats };

struct alignas(64) Layer {
  static constexpr int64_t kMark = 0x6c617965722d3032;  // tells a layer from any other bytes

  int64_t mark, bytes;
  char packed_for[16];  // the name of the microkernel that reads the weights in this order
  int64_t depthwise;  // each output channel reads the input channel of its own number; otherwise, all of them
  int64_t input_channels, output_channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t input_signed;
  int64_t flips_input;       // whether codes are multiplied as bytes of the other sign, their highest bit changed
  int64_t input_zero_point;  // of the bytes that are multiplied
  Output output;
  int64_t zero_point;
  float lowest, highest;  // of codes: relative to the zero point, and whole numbers
  int64_t weight_size;    // in bytes: 1, or 2 where a depthwise layer's products are to be added in 32 bits
  int64_t joins_columns;  // whether the codes under a row of a dense layer's kernel lie side by side, as one run
  int64_t sorts_steps;    // whether the narrow steps of each block come before its wide ones
  int64_t wide_steps;     // of all blocks

  int64_t taps() const { return kernel[0] * kernel[1]; }
  // Vectors of output channels.
  int64_t blocks() const {
    return depthwise ? (output_channels + kChunk - 1) / kChunk * (kChunk / kLanes)
                     : (output_channels + kLanes - 1) / kLanes;
  }
  // Of a dense layer: runs of codes that a position reads, each side by side, in quads of which the last may exceed it.
  int64_t runs() const { return joins_columns ? kernel[0] : taps(); }
  int64_t run_length() const { return joins_columns ? kernel[1] * input_channels : input_channels; }
  int64_t quads() const { return (run_length() + kQuad - 1) / kQuad; }
  // Instructions to a vector of sums: quads, or groups of four taps.
  int64_t steps() const { return depthwise ? (taps() + kQuad - 1) / kQuad : runs() * quads(); }
  int64_t block_bytes() const { return steps() * kStepBytes * weight_size; }
  int64_t weight_bytes() const { return blocks() * block_bytes() + wide_steps * kStepBytes; }
  // What lies around the input, before bits are flipped.
  uint8_t padding_code() const { return static_cast<uint8_t>(input_zero_point ^ (flips_input ? 128 : 0)); }
  int lowest_code() const {
    return output == Output::floats ? 0 : static_cast<int>(lowest) + static_cast<int>(zero_point);
  }
  int64_t element_size() const { return output == Output::floats ? 4 : 1; }

  // Then follow, for each output channel (rounded up to whole vectors), the bias, which also makes up for the input's
  // zero point; the multiplier; and the weights (packing.cpp says in which order).
  //
  // Where a pair of products might exceed 16 bits, and the processor adds pairs in 16 bits, a step is wide: its weights
  // take two bytes each. A dense layer of that kind (`sorts_steps`) ends with two arrays: the number of wide steps before
  // each block, then their total; and for each block its steps, in the order in which their weights lie. A depthwise
  // layer is wide as a whole (`weight_size`).
  int32_t* bias() { return reinterpret_cast<int32_t*>(this + 1); }
  float* multiplier() { return reinterpret_cast<float*>(bias() + blocks() * kLanes); }
  int8_t* weights() { return reinterpret_cast<int8_t*>(multiplier() + blocks() * kLanes); }
  int32_t* wide_steps_before() { return reinterpret_cast<int32_t*>(weights() + weight_bytes()); }
  int32_t* order_of_steps() { return wide_steps_before() + blocks() + 1; }
  const int32_t* bias() const { return const_cast<Layer*>(this)->bias(); }
  const float* multiplier() const { return const_cast<Layer*>(this)->multiplier(); }
  const int8_t* weights() const { return const_cast<Layer*>(this)->weights(); }
  const int32_t* wide_steps_before() const { return const_cast<Layer*>(this)->wide_steps_before(); }
  const int32_t* order_of_steps() const { return const_cast<Layer*>(this)->order_of_steps(); }
  int64_t size() const {
    const int64_t order = sorts_steps ? blocks() * steps() + blocks() + 1 : 0;
    return static_cast<int64_t>(sizeof(Layer)) + blocks() * kLanes * 8 + weight_bytes() + order * 4;
  }
};

}  // namespace kernels
