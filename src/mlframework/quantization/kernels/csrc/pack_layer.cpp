// Puts a layer's weights, bias and multipliers into the one block that layer.h describes.
#include <cstring>

#include "layer.h"
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

  // [pair of blocks][tap][quad of input channels][block][lane][4]; the last pair may be one block.
  void dense() {
    const int64_t grain = std::max<int64_t>(kElementsPerThread / layer_.block_bytes(), 1);
    torch::stable::parallel_for(0, layer_.blocks(), grain, [this](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) dense_block(block);
    });
  }

  // [chunk][quad of taps][place in chunk][4].
  void depthwise() {
    std::memset(layer_.weights(), 0, static_cast<size_t>(layer_.weight_bytes()));
    const int64_t taps = layer_.taps(), chunk_bytes = layer_.steps() * kChunk * kQuad;
    for (int64_t o = 0; o < layer_.output_channels; ++o) {
      const int64_t place = depthwise_place(o);
      int8_t* to = layer_.weights() + o / kChunk * chunk_bytes + place % kChunk * kQuad;
      for (int64_t tap = 0; tap < taps; ++tap) to[tap / kQuad * kChunk * kQuad + tap % kQuad] = weight_[o * taps + tap];
      correct_bias(place, o);
    }
  }

 private:
  void dense_block(int64_t block) {
    const int64_t taps = layer_.taps(), quads = layer_.quads(), channels = layer_.input_channels;
    const int64_t pair = block / 2, blocks_of_pair = std::min<int64_t>(layer_.blocks() - 2 * pair, 2);
    const int64_t lanes = std::min(layer_.output_channels - block * kLanes, kLanes);
    const int64_t quad_bytes = blocks_of_pair * kLanes * kQuad;
    int8_t* const start = layer_.weights() + 2 * pair * layer_.block_bytes() + block % 2 * kLanes * kQuad;
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
  header.mark = Layer::kMark;
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
  header.bytes = header.size();

  const Tensor multipliers = torch::stable::contiguous(multiplier);
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->scalar_type() == ScalarType::Int && bias->is_contiguous() &&
                            bias->numel() == weight.size(0)),
                  "bias must be contiguous int32 and hold one number to an output channel");
  STD_TORCH_CHECK(multipliers.is_cpu() && multipliers.scalar_type() == ScalarType::Float &&
                      (multipliers.numel() == weight.size(0) || multipliers.numel() == 1),
                  "multiplier must be float32 and hold one number, or one to an output channel");

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
  std::vector<int8_t> copy;
  Packing packing(layer, channels_innermost(weight, copy));
  if (layer.depthwise) {
    packing.depthwise();
  } else {
    packing.dense();
  }
  return packed;
}

}  // namespace kernels
