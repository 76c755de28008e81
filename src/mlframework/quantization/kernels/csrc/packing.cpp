#include "packing.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace kernels {
namespace {

// So many that what all lanes of them are written to stays in the level-1 cache.
constexpr int64_t kQuadsAtOnce = 64;

// The first `count` of four weights; the others are zero.
void copy_quad(const int8_t* from, int64_t count, int8_t* to) {
  if (count == kQuad) {
    std::memcpy(to, from, kQuad);
    return;
  }
  std::memset(to, 0, kQuad);
  if (count > 0) std::memcpy(to, from, static_cast<size_t>(count));
}

// A step's weights of one byte, [lane][4], as [4][lane].
void copy_planes(const int8_t* quads, int8_t* to) {
  for (int64_t lane = 0; lane < kLanes; ++lane)
    for (int64_t i = 0; i < kQuad; ++i) to[i * kLanes + lane] = quads[lane * kQuad + i];
}

// The same as weights of two bytes, [pair][lane][2].
void copy_wide(const int8_t* quads, int8_t* to) {
  int16_t wide[2][kLanes][2];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    for (int64_t i = 0; i < kQuad; ++i) wide[i / 2][lane][i % 2] = quads[lane * kQuad + i];
  std::memcpy(to, wide, sizeof(wide));
}

// Weights of a layer as rows of quads: a dense layer has a row to each run of codes that it reads, a depthwise one a row
// of taps. A step is one quad of each of kLanes output channels, which are a block.
class Packing {
 public:
  Packing(const Microkernel& kernel, const Layer& description, const LayerContents& contents)
      : kernel_(kernel),
        layer_(description),
        contents_(contents),
        joins_columns_(!description.depthwise && !kernel.transpose_columns && description.dilation[1] == 1),
        rows_(description.depthwise ? 1 : joins_columns_ ? description.kernel[0] : description.taps()),
        length_(description.taps() / rows_ * (description.depthwise ? 1 : description.input_channels)),
        quads_((length_ + kQuad - 1) / kQuad) {
    layer_.joins_columns = joins_columns_;
    layer_.mark = Layer::kMark;
    std::strncpy(layer_.packed_for, kernel.name, sizeof(layer_.packed_for) - 1);
    layer_.flips_input = static_cast<bool>(layer_.input_signed) != kernel.reads_signed;
    layer_.input_zero_point += layer_.flips_input ? (kernel.reads_signed ? -128 : 128) : 0;
    layer_.weight_size = 1;
    layer_.sorts_steps = !layer_.depthwise && kernel.may_saturate;
    if (kernel.may_saturate) find_wide_steps();
    layer_.bytes = layer_.size();
  }

  int64_t bytes() const { return layer_.bytes; }

  void write(Layer& layer) const {
    layer = layer_;
    write_epilogue(layer);
    if (layer.depthwise) {
      std::memset(layer.weights(), 0, static_cast<size_t>(layer.weight_bytes()));
      for_each_block([&](int64_t block) { write_depthwise(layer, block); });
    } else if (layer.sorts_steps) {
      write_order(layer);
      for_each_block([&](int64_t block) { write_sorted(layer, block); });
    } else {
      for_each_block([&](int64_t block) { write_interleaved(layer, block); });
    }
  }

 private:
  int64_t source_blocks() const { return (layer_.output_channels + kLanes - 1) / kLanes; }

  template <class Function>
  void for_each_block(const Function& function) const {
    const int64_t grain = std::max<int64_t>(kElementsPerThread / (rows_ * quads_ * kStepBytes), 1);
    parallel_for(0, source_blocks(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) function(block);
    });
  }

  // Some neighbouring steps of one row of a block, [lane][4] each, `step_bytes` apart.
  void gather_steps(int64_t block, int64_t row, int64_t first, int64_t last, int8_t* to, int64_t step_bytes) const {
    // A member would be read again after every byte that is written.
    const int64_t lanes = std::min(layer_.output_channels - block * kLanes, kLanes), length = length_;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int8_t* from = contents_.weight + ((block * kLanes + lane) * rows_ + row) * length;
      int8_t* quads = to + lane * kQuad;
      for (int64_t quad = first; quad < last; ++quad, quads += step_bytes)
        copy_quad(from + quad * kQuad, lane < lanes ? std::min(length - quad * kQuad, kQuad) : 0, quads);
    }
  }

  // Calls `function(step, weights)` for each step of a block, its weights as [lane][4].
  template <class Function>
  void for_each_step(int64_t block, const Function& function) const {
    alignas(64) int8_t steps[kQuadsAtOnce * kStepBytes];
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t first = 0; first < quads_; first += kQuadsAtOnce) {
        const int64_t last = std::min(first + kQuadsAtOnce, quads_);
        gather_steps(block, row, first, last, steps, kStepBytes);
        for (int64_t quad = first; quad < last; ++quad)
          function(row * quads_ + quad, steps + (quad - first) * kStepBytes);
      }
  }

  // A dense layer has wide steps; a depthwise one is wide as a whole.
  void find_wide_steps() {
    is_wide_.resize(static_cast<size_t>(source_blocks() * rows_ * quads_));
    for_each_block([this](int64_t block) {
      for_each_step(block, [&](int64_t step, const int8_t* weights) {
        is_wide_[place_of(block, step)] = kernel_.may_saturate(weights);
      });
    });
    int64_t wide_steps = 0;
    for (uint8_t wide : is_wide_) wide_steps += wide;
    if (layer_.depthwise) {
      layer_.weight_size = wide_steps ? 2 : 1;
    } else {
      layer_.wide_steps = wide_steps;
    }
  }

  size_t place_of(int64_t block, int64_t step) const { return static_cast<size_t>(block * rows_ * quads_ + step); }

  // [group of interleaved blocks][tap][quad of input channels][block], each [lane][4] or [4][lane]; the last group may
  // be smaller.
  void write_interleaved(Layer& layer, int64_t block) const {
    const int64_t interleaved = kernel_.interleaved, first_of_group = block / interleaved * interleaved;
    const int64_t step_bytes = std::min(layer.blocks() - first_of_group, interleaved) * kStepBytes;
    int8_t* const start =
        layer.weights() + first_of_group * layer.block_bytes() + (block - first_of_group) * kStepBytes;
    if (kernel_.order == Order::planes) {
      for_each_step(block, [&](int64_t step, const int8_t* quads) { copy_planes(quads, start + step * step_bytes); });
      return;
    }
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t first = 0; first < quads_; first += kQuadsAtOnce)
        gather_steps(block, row, first, std::min(first + kQuadsAtOnce, quads_),
                     start + (row * quads_ + first) * step_bytes, step_bytes);
  }

  void write_order(Layer& layer) const {
    int32_t* const before = layer.wide_steps_before();
    before[0] = 0;
    for (int64_t block = 0; block < layer.blocks(); ++block) {
      int32_t* order = layer.order_of_steps() + block * layer.steps();
      for (const bool wide : {false, true})
        for (int64_t step = 0; step < layer.steps(); ++step)
          if (is_wide_[place_of(block, step)] == wide) *order++ = static_cast<int32_t>(step);
      before[block + 1] = before[block];
      for (int64_t step = 0; step < layer.steps(); ++step) before[block + 1] += is_wide_[place_of(block, step)];
    }
  }

  // [block][step]: those of one byte, [lane][4], then those whose products might saturate, of two bytes.
  void write_sorted(Layer& layer, int64_t block) const {
    const int32_t* before = layer.wide_steps_before() + block;
    int8_t* narrow = layer.weights() + block * layer.block_bytes() + before[0] * kStepBytes;
    int8_t* wide = narrow + (layer.steps() - (before[1] - before[0])) * kStepBytes;
    for_each_step(block, [&](int64_t step, const int8_t* weights) {
      if (is_wide_[place_of(block, step)]) {
        copy_wide(weights, wide);
        wide += 2 * kStepBytes;
      } else {
        std::memcpy(narrow, weights, kStepBytes);
        narrow += kStepBytes;
      }
    });
  }

  // [chunk][quad of taps][place in chunk][4], or [4][place in chunk], or of two bytes [pair][place in chunk][2].
  void write_depthwise(Layer& layer, int64_t block) const {
    const int64_t first = block * kLanes, lanes = std::min(layer.output_channels - first, kLanes);
    const bool is_wide = layer.weight_size == 2, in_quads = kernel_.order == Order::quads;
    const int64_t quad_of_chunk = kChunk * kQuad * layer.weight_size;
    int8_t* const chunk = layer.weights() + first / kChunk * quads_ * quad_of_chunk;
    int64_t places[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) places[lane] = kernel_.depthwise_place(first + lane) % kChunk;
    for_each_step(block, [&](int64_t step, const int8_t* quads) {
      int8_t* const to = chunk + step * quad_of_chunk;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int8_t* quad = quads + lane * kQuad;
        const int64_t place = places[lane];
        if (is_wide) {
          const int16_t pairs[2][2] = {{quad[0], quad[1]}, {quad[2], quad[3]}};
          std::memcpy(to + place * kQuad, pairs[0], sizeof(pairs[0]));
          std::memcpy(to + (kChunk + place) * kQuad, pairs[1], sizeof(pairs[1]));
        } else if (in_quads) {
          std::memcpy(to + place * kQuad, quad, kQuad);
        } else {
          for (int64_t i = 0; i < kQuad; ++i) to[i * kChunk + place] = quad[i];
        }
      }
    });
  }

  // (code - zero point) * weight is summed as code * weight, modulo 2**32; the bias makes up for it.
  void write_epilogue(Layer& layer) const {
    std::fill_n(layer.bias(), layer.blocks() * kLanes, 0);
    std::fill_n(layer.multiplier(), layer.blocks() * kLanes, 0.0f);
    const int64_t count = rows_ * length_, grain = std::max<int64_t>(kElementsPerThread / count, 1);
    parallel_for(0, layer.output_channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const int64_t place = layer.depthwise ? kernel_.depthwise_place(o) : o;
        const int8_t* weights = contents_.weight + o * count;
        int32_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += weights[i];
        const auto bias = static_cast<uint32_t>(contents_.bias ? contents_.bias[o] : 0);
        layer.bias()[place] = static_cast<int32_t>(bias - static_cast<uint32_t>(sum) *
                                                              static_cast<uint32_t>(layer.input_zero_point));
        layer.multiplier()[place] = contents_.multiplier[contents_.has_one_multiplier ? 0 : o];
      }
    });
  }

  const Microkernel& kernel_;
  Layer layer_;
  const LayerContents contents_;
  const bool joins_columns_;
  const int64_t rows_, length_, quads_;
  std::vector<uint8_t> is_wide_;
};

}  // namespace

void pack(const Microkernel& kernel, const Layer& description, const LayerContents& contents,
          const std::function<void*(int64_t)>& allocate) {
  const Packing packing(kernel, description, contents);
  packing.write(*static_cast<Layer*>(allocate(packing.bytes())));
}

}  // namespace kernels
