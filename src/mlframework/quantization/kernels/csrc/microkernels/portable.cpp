// Plain C++, which the compiler vectorizes for the oldest processors of its architecture.
#include <cstring>

#include "microkernels/rows.h"

namespace kernels {
namespace {

constexpr int kMost = 4;  // positions of a tile, to which its weights are widened once

// Adding it to a number in a code's range, and taking it off again, rounds to even.
constexpr float kRounds = 3 << 22;

// What becomes of one block's sums: the outputs of the first `count` channels.
void finish(const int32_t* sums, const float* multiplier, const Layer& layer, int64_t count, int64_t channel,
            uint8_t* output) {
  float values[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const float scaled = static_cast<float>(sums[lane]) * multiplier[lane];
    const float raised = scaled > layer.lowest ? scaled : layer.lowest;
    values[lane] = raised < layer.highest ? raised : layer.highest;
  }
  if (layer.output == Output::floats) {
    std::memcpy(output + channel * 4, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint8_t codes[kLanes];
  const auto zero_point = static_cast<int32_t>(layer.zero_point);
  for (int64_t lane = 0; lane < kLanes; ++lane)
    codes[lane] = static_cast<uint8_t>(static_cast<int32_t>(values[lane] + kRounds - kRounds) + zero_point);
  std::memcpy(output + channel, codes, static_cast<size_t>(count));
}

template <int kPositions>
void tile(const TileContext& context, const uint8_t* codes, int64_t block, void* output) {
  const Layer& layer = *context.layer;
  const int64_t steps = layer.steps();
  const int8_t* weights = layer.weights() + block * layer.block_bytes();
  int32_t sums[kPositions][kLanes];
  for (int position = 0; position < kPositions; ++position)
    std::memcpy(sums[position], layer.bias() + block * kLanes, sizeof(sums[position]));
  for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
    const uint8_t* quads = codes + context.step_offsets[step];
    // A product of a code and a weight fits 16 bits, for which every architecture has an instruction. Compilers find it
    // in a loop over channels that does all else inside.
    int16_t code[kPositions][kQuad];
#pragma GCC unroll 4
    for (int position = 0; position < kPositions; ++position)
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i) code[position][i] = quads[position * context.position_step + i];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int16_t weight[kQuad] = {weights[lane], weights[kLanes + lane], weights[2 * kLanes + lane],
                                     weights[3 * kLanes + lane]};
#pragma GCC unroll 4
      for (int position = 0; position < kPositions; ++position)
        sums[position][lane] += code[position][0] * weight[0] + code[position][1] * weight[1] +
                                code[position][2] * weight[2] + code[position][3] * weight[3];
    }
  }
  const int64_t channel = block * kLanes, count = std::min(layer.output_channels - channel, kLanes);
  for (int position = 0; position < kPositions; ++position)
    finish(sums[position], layer.multiplier() + channel, layer, count, channel,
           static_cast<uint8_t*>(output) + position * layer.output_channels * layer.element_size());
}

Tile tile_for(int64_t, int64_t positions) {
  static constexpr Tile tiles[kMost] = {tile<1>, tile<2>, tile<3>, tile<4>};
  return tiles[positions - 1];
}

void depthwise_row(const DepthwiseContext& context, const uint8_t* codes, int64_t chunk, int64_t positions,
                   uint8_t* output) {
  const Layer& layer = *context.layer;
  const int8_t* chunk_weights = layer.weights() + chunk * layer.steps() * kChunk * kQuad;
  for (int64_t channel = chunk * kChunk; channel < std::min((chunk + 1) * kChunk, layer.output_channels);
       channel += kLanes) {
    const int64_t count = std::min(layer.output_channels - channel, kLanes);
    for (int64_t position = 0; position < positions; ++position) {
      const uint8_t* bytes = codes + position * context.code_step + channel;
      const int8_t* weights = chunk_weights + channel % kChunk;
      int32_t sums[kLanes];
      std::memcpy(sums, layer.bias() + channel, sizeof(sums));
      for (int64_t tap = 0; tap < layer.taps(); ++tap, weights += kChunk) {
        const uint8_t* here = bytes + context.tap_offsets[tap];
        for (int64_t lane = 0; lane < kLanes; ++lane)
          sums[lane] += static_cast<int16_t>(here[lane]) * static_cast<int16_t>(weights[lane]);
      }
      finish(sums, layer.multiplier() + channel, layer, count, channel, output + position * context.output_step);
    }
  }
}

}  // namespace

const Microkernel kPortable = {
    /*name=*/"portable",
    /*needs=*/0,
    /*may_use=*/0,
    /*interleaved=*/1,
    /*most_positions=*/{0, kMost},
    /*tile=*/tile_for,
    /*reads_signed=*/false,
    /*transpose_columns=*/nullptr,
    /*order=*/Order::planes,
    /*may_saturate=*/nullptr,
    /*depthwise_row=*/depthwise_row,
    /*depthwise_place=*/place_in_order,
    /*products_per_thread=*/1 << 17,
};

}  // namespace kernels
