// Puts a layer's weights, bias and multipliers into the one block that layer.h describes.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "microkernels/microkernel.h"
#include "operators.h"

namespace kernels {
namespace {

// So many that what all lanes of them are written to stays in the level-1 cache.
constexpr int64_t kQuadsAtOnce = 64;

// A layer's weights in the order in which they are used, and what of its sums does not depend on the codes:
// (code - zero point) * weight is summed as code * weight, modulo 2**32. Weights come as (O, taps, I / groups).
class Packing {
 public:
  Packing(Layer& layer, const int8_t* weight) : layer_(layer), weight_(weight) {}

  // [group of interleaved blocks][tap][quad of input channels][block][lane][4]; the last group may be smaller.
  void dense() {
    const int64_t grain = std::max<int64_t>(kElementsPerThread / layer_.block_bytes(), 1);
    torch::stable::parallel_for(0, layer_.blocks(), grain, [this](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) dense_block(block);
    });
  }

  // [chunk][quad of taps][place in chunk][4], or of two bytes each [chunk][quad of taps][even, odd][place in chunk][2].
  void depthwise() {
    std::memset(layer_.weights(), 0, static_cast<size_t>(layer_.weight_bytes()));
    const int64_t taps = layer_.taps(), quad_of_chunk = kChunk * kQuad * layer_.weight_size;
    for (int64_t o = 0; o < layer_.output_channels; ++o) {
      const int64_t place = depthwise_place(o);
      int8_t* to = layer_.weights() + o / kChunk * layer_.steps() * quad_of_chunk + place % kChunk * kQuad;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int8_t weight = weight_[o * taps + tap];
        int8_t* quad = to + tap / kQuad * quad_of_chunk;
        if (layer_.weight_size == 1) {
          quad[tap % kQuad] = weight;
        } else {
          const int16_t wide = weight;
          std::memcpy(quad + tap % 2 * kChunk * kQuad + tap % kQuad / 2 * 2, &wide, sizeof(wide));
        }
      }
      correct_bias(place, o);
    }
  }

 private:
  void dense_block(int64_t block) {
    const int64_t taps = layer_.taps(), quads = layer_.quads(), channels = layer_.input_channels;
    const int64_t interleaved = microkernel()->interleaved, first_of_group = block / interleaved * interleaved;
    const int64_t lanes = std::min(layer_.output_channels - block * kLanes, kLanes);
    const int64_t quad_bytes = std::min(layer_.blocks() - first_of_group, interleaved) * kStepBytes;
    int8_t* const start =
        layer_.weights() + first_of_group * layer_.block_bytes() + (block - first_of_group) * kStepBytes;
    for (int64_t lane = 0; lane < lanes; ++lane) correct_bias(block * kLanes + lane, block * kLanes + lane);
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t first = 0; first < quads; first += kQuadsAtOnce) {
        const int64_t last = std::min(first + kQuadsAtOnce, quads);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int8_t* from = weight_ + ((block * kLanes + lane) * taps + tap) * channels;
          int8_t* to = start + (tap * quads + first) * quad_bytes + lane * kQuad;
          for (int64_t quad = first; quad < last; ++quad, to += quad_bytes)
            copy_quad(from + quad * kQuad, lane < lanes ? std::min(channels - quad * kQuad, kQuad) : 0, to);
        }
      }
  }

  // The first `count` of four weights; the others are zero.
  static void copy_quad(const int8_t* from, int64_t count, int8_t* to) {
    if (count == kQuad) {
      std::memcpy(to, from, kQuad);
      return;
    }
    std::memset(to, 0, kQuad);
    if (count > 0) std::memcpy(to, from, static_cast<size_t>(count));
  }

  void correct_bias(int64_t place, int64_t o) {
    const int64_t count = layer_.depthwise ? layer_.taps() : layer_.taps() * layer_.input_channels;
    const int8_t* weights = weight_ + o * count;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i];
    int32_t& bias = layer_.bias()[place];
    bias = static_cast<int32_t>(static_cast<uint32_t>(bias) - static_cast<uint32_t>(sum) *
                                                                  static_cast<uint32_t>(layer_.input_zero_point));
  }

  Layer& layer_;
  const int8_t* weight_;
};

// Writes the weights of a packed layer into another block, which has room for them, in sorted steps: those of one byte,
// then those whose products might saturate, of two bytes [even, odd input channels][lane][2].
class Sorting {
 public:
  explicit Sorting(const Layer& layer) : layer_(layer), is_wide_(static_cast<size_t>(layer.blocks() * layer.steps())) {
    for_each_block([this](int64_t block) {
      for (int64_t step = 0; step < layer_.steps(); ++step)
        is_wide_[place_of(block, step)] = microkernel()->may_saturate(weights_of(block, step));
    });
    for (uint8_t wide : is_wide_) wide_steps_ += wide;
  }

  int64_t wide_steps() const { return wide_steps_; }

  void write(Layer& sorted) const {
    int32_t* const before = sorted.wide_steps_before();
    before[0] = 0;
    for (int64_t block = 0; block < layer_.blocks(); ++block) {
      before[block + 1] = before[block];
      for (int64_t step = 0; step < layer_.steps(); ++step) before[block + 1] += is_wide_[place_of(block, step)];
    }
    for_each_block([&](int64_t block) {
      int32_t* order = sorted.order_of_steps() + block * layer_.steps();
      int8_t* to = sorted.weights() + block * layer_.block_bytes() + before[block] * kStepBytes;
      for (const bool wide : {false, true})
        for (int64_t step = 0; step < layer_.steps(); ++step) {
          if (is_wide_[place_of(block, step)] != wide) continue;
          *order++ = static_cast<int32_t>(step);
          to = wide ? write_wide(weights_of(block, step), to)
                    : std::copy_n(weights_of(block, step), kStepBytes, to);
        }
    });
  }

 private:
  template <class Function>
  void for_each_block(const Function& function) const {
    const int64_t grain = std::max<int64_t>(kElementsPerThread / layer_.block_bytes(), 1);
    torch::stable::parallel_for(0, layer_.blocks(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) function(block);
    });
  }

  static int8_t* write_wide(const int8_t* weights, int8_t* to) {
    int16_t wide[2][kLanes][2];
    for (int64_t lane = 0; lane < kLanes; ++lane)
      for (int64_t i = 0; i < kQuad; ++i) wide[i % 2][lane][i / 2] = weights[lane * kQuad + i];
    std::memcpy(to, wide, sizeof(wide));
    return to + sizeof(wide);
  }

  size_t place_of(int64_t block, int64_t step) const { return static_cast<size_t>(block * layer_.steps() + step); }
  const int8_t* weights_of(int64_t block, int64_t step) const {
    return layer_.weights() + block * layer_.block_bytes() + step * kStepBytes;
  }

  const Layer& layer_;
  std::vector<uint8_t> is_wide_;
  int64_t wide_steps_ = 0;
};

// Whether a pair of taps' products might saturate in a depthwise layer, with weights (O, taps).
bool pairs_may_saturate(const int8_t* weight, int64_t channels, int64_t taps) {
  for (int64_t o = 0; o < channels; ++o, weight += taps)
    for (int64_t tap = 0; tap + 1 < taps; tap += 2)
      if (std::abs(weight[tap] + weight[tap + 1]) > 128) return true;
  return false;
}

// Codes (O, I / groups, height, width) as (O, height, width, I / groups): where they lie, or copied to `copy`.
const int8_t* channels_innermost(const Tensor& weight, std::vector<int8_t>& copy) {
  const auto* from = static_cast<const int8_t*>(weight.const_data_ptr());
  const Shape sizes = sizes_of(weight), strides = strides_of(weight);
  if (same_layout(sizes, strides, channels_last_strides(sizes))) return from;
  copy.resize(static_cast<size_t>(weight.numel()));
  const int64_t grain = std::max<int64_t>(kElementsPerThread * sizes[0] / weight.numel(), 1);
  torch::stable::parallel_for(0, sizes[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      int8_t* to = copy.data() + o * weight.numel() / sizes[0];
      for (int64_t i = 0; i < sizes[2]; ++i)
        for (int64_t j = 0; j < sizes[3]; ++j)
          for (int64_t c = 0; c < sizes[1]; ++c)
            *to++ = from[o * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]];
    }
  });
  return copy.data();
}

Tensor with_sorted_steps(const Tensor& packed) {
  STD_TORCH_CHECK(microkernel()->interleaved == 1, "steps are sorted block by block");
  const Layer& layer = *static_cast<const Layer*>(packed.const_data_ptr());
  const Sorting sorting(layer);
  Layer header = layer;
  header.sorts_steps = 1;
  header.wide_steps = sorting.wide_steps();
  header.bytes = header.size();
  const Tensor result = empty({header.bytes}, {1}, ScalarType::Byte);
  Layer& sorted = *static_cast<Layer*>(result.mutable_data_ptr());
  std::memcpy(&sorted, &layer, static_cast<size_t>(layer.size() - layer.weight_bytes()));  // what comes before weights
  sorted = header;
  sorting.write(sorted);
  return result;
}

}  // namespace

Tensor pack_layer(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& multiplier, Shape stride, Shape padding,
                  Shape dilation, int64_t groups, int64_t input_zero_point, ScalarType input_dtype,
                  int64_t zero_point, double lowest, double highest, ScalarType dtype) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Char && weight.dim() == 4,
                  "weight must be int8 of shape (O, I / groups, height, width), on the CPU");
  STD_TORCH_CHECK(weight.numel() > 0, "weight must not be empty");
  check_code_dtype(input_dtype);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Byte || dtype == ScalarType::Char,
                  "dtype must be uint8, int8 or float32");
  Layer header{};
  STD_TORCH_CHECK(has_integer_layers(), "packed layers need a processor with AVX2 or AVX-512 VNNI");
  header.mark = Layer::kMark;
  header.packed_for = microkernel()->instruction_set;
  header.output_channels = weight.size(0);
  header.depthwise = groups > 1;
  STD_TORCH_CHECK(groups == 1 || (groups == weight.size(0) && weight.size(1) == 1),
                  "groups must be 1, or one to each channel, got ", groups);
  header.input_channels = weight.size(1) * groups;
  for (size_t axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(stride.at(axis) > 0 && dilation.at(axis) > 0 && padding.at(axis) >= 0,
                    "stride and dilation must be positive, and padding not negative");
    header.kernel[axis] = weight.size(static_cast<int64_t>(axis) + 2);
    header.stride[axis] = stride[axis];
    header.padding[axis] = padding[axis];
    header.dilation[axis] = dilation[axis];
  }
  header.input_signed = input_dtype == ScalarType::Char;
  header.input_zero_point = input_zero_point + (header.input_signed ? 128 : 0);
  STD_TORCH_CHECK(0 <= header.input_zero_point && header.input_zero_point <= 255,
                  "input_zero_point must be a code, got ", input_zero_point);
  header.output = dtype == ScalarType::Float  ? Output::floats
                  : dtype == ScalarType::Byte ? Output::unsigned_codes
                                              : Output::signed_codes;
  header.zero_point = zero_point;
  const bool floats = header.output == Output::floats;
  header.lowest = static_cast<float>(floats ? lowest : lowest - static_cast<double>(zero_point));
  header.highest = static_cast<float>(floats ? highest : highest - static_cast<double>(zero_point));

  const Tensor multipliers = torch::stable::contiguous(multiplier);
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->scalar_type() == ScalarType::Int && bias->is_contiguous() &&
                            bias->numel() == weight.size(0)),
                  "bias must be contiguous int32 and hold one number to an output channel");
  STD_TORCH_CHECK(multipliers.is_cpu() && multipliers.scalar_type() == ScalarType::Float &&
                      (multipliers.numel() == weight.size(0) || multipliers.numel() == 1),
                  "multiplier must be float32 and hold one number, or one to an output channel");

  std::vector<int8_t> copy;
  const int8_t* const codes = channels_innermost(weight, copy);
  const bool exact = microkernel()->may_saturate == nullptr;
  const bool widens =
      header.depthwise && !exact && pairs_may_saturate(codes, header.output_channels, header.taps());
  header.weight_size = widens ? 2 : 1;
  header.bytes = header.size();
  const Tensor packed = empty({header.bytes}, {1}, ScalarType::Byte);
  Layer& layer = *static_cast<Layer*>(packed.mutable_data_ptr());
  layer = header;
  const auto* bias_of = bias ? static_cast<const int32_t*>(bias->const_data_ptr()) : nullptr;
  const auto* multiplier_of = static_cast<const float*>(multipliers.const_data_ptr());
  std::fill_n(layer.bias(), layer.blocks() * kLanes, 0);
  std::fill_n(layer.multiplier(), layer.blocks() * kLanes, 0.0f);
  for (int64_t o = 0; o < layer.output_channels; ++o) {
    const int64_t place = layer.depthwise ? depthwise_place(o) : o;
    if (bias_of) layer.bias()[place] = bias_of[o];
    layer.multiplier()[place] = multiplier_of[multipliers.numel() == 1 ? 0 : o];
  }
  Packing packing(layer, codes);
  if (layer.depthwise) {
    packing.depthwise();
    return packed;
  }
  packing.dense();
  return exact ? packed : with_sorted_steps(packed);
}

}  // namespace kernels
