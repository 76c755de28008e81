// Puts a layer's weights, bias and multipliers into the one block that layer.h describes.
#include <cstring>

#include "layer.h"
#include "operators.h"

namespace kernels {
namespace {

// A layer's weights in the order in which they are used, and what of its sums does not depend on the codes:
// (code - zero point) * weight is summed as code * weight, modulo 2**32.
class Packing {
 public:
  Packing(Layer& layer, const int8_t* weight) : layer_(layer), weight_(weight) {
    std::memset(layer.weights(), 0, static_cast<size_t>(layer.weight_bytes()));
  }

  // [pair of blocks][tap][quad of input channels][block][lane][4]; the last pair may be one block.
  void dense() {
    const int64_t taps = layer_.taps(), quads = layer_.quads();
    for (int64_t o = 0; o < layer_.output_channels; ++o) {
      const int64_t block = o / kLanes, pair = block / 2;
      const int64_t blocks_of_pair = std::min<int64_t>(layer_.blocks() - 2 * pair, 2);
      const int64_t start = 2 * pair * layer_.block_bytes() + (block % 2 * kLanes + o % kLanes) * kQuad;
      for (int64_t c = 0; c < layer_.input_channels; ++c)
        for (int64_t tap = 0; tap < taps; ++tap)
          put(o, (o * layer_.input_channels + c) * taps + tap,
              start + (tap * quads + c / kQuad) * blocks_of_pair * kLanes * kQuad + c % kQuad);
    }
  }

  // [chunk][quad of taps][place in chunk][4].
  void depthwise() {
    const int64_t taps = layer_.taps(), chunk_bytes = layer_.steps() * kChunk * kQuad;
    for (int64_t o = 0; o < layer_.output_channels; ++o)
      for (int64_t tap = 0; tap < taps; ++tap)
        put(depthwise_place(o), o * taps + tap,
            o / kChunk * chunk_bytes + (tap / kQuad * kChunk + depthwise_place(o) % kChunk) * kQuad + tap % kQuad);
  }

 private:
  void put(int64_t bias_place, int64_t from, int64_t to) {
    layer_.weights()[to] = weight_[from];
    int32_t& bias = layer_.bias()[bias_place];
    bias = static_cast<int32_t>(static_cast<uint32_t>(bias) -
                                static_cast<uint32_t>(weight_[from] * layer_.input_zero_point));
  }

  Layer& layer_;
  const int8_t* weight_;
};

}  // namespace

Tensor pack_layer(const Tensor& weight, const Tensor& bias, const Tensor& multiplier, Shape stride, Shape padding,
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

  const Tensor codes = torch::stable::contiguous(weight);
  const Tensor biases = torch::stable::contiguous(bias), multipliers = torch::stable::contiguous(multiplier);
  STD_TORCH_CHECK(biases.is_cpu() && biases.scalar_type() == ScalarType::Int && biases.numel() == weight.size(0),
                  "bias must be int32 and hold one number to an output channel");
  STD_TORCH_CHECK(multipliers.is_cpu() && multipliers.scalar_type() == ScalarType::Float &&
                      (multipliers.numel() == weight.size(0) || multipliers.numel() == 1),
                  "multiplier must be float32 and hold one number, or one to an output channel");

  const Tensor packed = empty({header.bytes}, {1}, ScalarType::Byte);
  Layer& layer = *static_cast<Layer*>(packed.mutable_data_ptr());
  layer = header;
  const auto* bias_of = static_cast<const int32_t*>(biases.const_data_ptr());
  const auto* multiplier_of = static_cast<const float*>(multipliers.const_data_ptr());
  std::fill_n(layer.bias(), layer.blocks() * kLanes, 0);
  std::fill_n(layer.multiplier(), layer.blocks() * kLanes, 0.0f);
  for (int64_t o = 0; o < layer.output_channels; ++o) {
    const int64_t place = layer.depthwise ? depthwise_place(o) : o;
    layer.bias()[place] = bias_of[o];
    layer.multiplier()[place] = multiplier_of[multipliers.numel() == 1 ? 0 : o];
  }
  Packing packing(layer, static_cast<const int8_t*>(codes.const_data_ptr()));
  if (layer.depthwise) {
    packing.depthwise();
  } else {
    packing.dense();
  }
  return packed;
}

}  // namespace kernels
