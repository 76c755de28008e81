// Operators that run packed layers: they check, and say where codes are read and outputs written.
#include <cstring>

#include "operators.h"
#include "run_layer.h"

namespace kernels {
namespace {

const Layer& layer_in(const Tensor& block, const Tensor& codes) {
  const bool readable = block.is_cpu() && block.scalar_type() == ScalarType::Byte && block.is_contiguous() &&
                        block.numel() >= static_cast<int64_t>(sizeof(Layer)) &&
                        reinterpret_cast<uintptr_t>(block.const_data_ptr()) % alignof(Layer) == 0;
  STD_TORCH_CHECK(readable, "layer must come from pack_layer");
  const Layer& layer = *static_cast<const Layer*>(block.const_data_ptr());
  STD_TORCH_CHECK(layer.mark == Layer::kMark && layer.bytes == block.numel(), "layer must come from pack_layer");
  STD_TORCH_CHECK(std::strcmp(layer.packed_for, microkernel().name) == 0,
                  "layer was packed for another instruction set");
  check_codes(codes, "codes");
  STD_TORCH_CHECK((codes.scalar_type() == ScalarType::Char) == static_cast<bool>(layer.input_signed), "codes must be ",
                  layer.input_signed ? "int8" : "uint8", ", as the layer was packed for");
  return layer;
}

Tensor output_of(const Layer& layer, const Shape& sizes, const Shape& strides) {
  constexpr ScalarType dtypes[] = {ScalarType::Byte, ScalarType::Char, ScalarType::Float};
  return empty(sizes, strides, dtypes[static_cast<int64_t>(layer.output)]);
}

// A layer that reads one position to each output: their order is free, so they are cut into rows that fill tiles.
void run_on_positions(const Layer& layer, const uint8_t* codes, int64_t count, uint8_t* output) {
  const Microkernel& kernel = microkernel();
  const int64_t most = kernel.most_positions[static_cast<size_t>(std::min(layer.blocks(), kernel.interleaved))];
  const int64_t tiles = (count + most - 1) / most;
  const int64_t width = (count + tiles - 1) / tiles;
  const int64_t height = (count + width - 1) / width, last_width = count - (height - 1) * width;
  const int64_t channels = layer.input_channels;
  run_dense(kernel, layer, {codes, height, width, last_width, 0, 1, width * channels, channels},
            {1, height, width, last_width}, output);
}

}  // namespace

Tensor linear(const Tensor& codes, const Tensor& block) {
  const Layer& layer = layer_in(block, codes);
  STD_TORCH_CHECK(layer.taps() == 1 && !layer.depthwise, "layer must be linear");
  Shape sizes = sizes_of(codes);
  STD_TORCH_CHECK(!sizes.empty() && sizes.back() == layer.input_channels, "codes must have ", layer.input_channels,
                  " features in the last dimension");
  sizes.back() = layer.output_channels;
  const Tensor result = output_of(layer, sizes, contiguous_strides(sizes));
  if (result.numel() == 0) return result;
  const Tensor rows = torch::stable::contiguous(codes);
  run_on_positions(layer, static_cast<const uint8_t*>(rows.const_data_ptr()), codes.numel() / layer.input_channels,
                   static_cast<uint8_t*>(result.mutable_data_ptr()));
  return result;
}

Tensor convolution(const Tensor& codes, const Tensor& block) {
  const Layer& layer = layer_in(block, codes);
  const int64_t dimensions = codes.dim();
  STD_TORCH_CHECK(dimensions == 3 || dimensions == 4, "codes must have shape (N, C, W) or (N, C, H, W), got ",
                  dimensions, " dimensions");
  STD_TORCH_CHECK(codes.size(1) == layer.input_channels, "codes must have ", layer.input_channels, " channels, got ",
                  codes.size(1));
  const bool flat = dimensions == 3;
  const int64_t height = flat ? 1 : codes.size(2), width = codes.size(dimensions - 1);
  const int64_t row_stride = flat ? 0 : codes.stride(2), column_stride = codes.stride(dimensions - 1);
  int64_t outputs[2];
  bool pointwise = layer.taps() == 1 && !layer.depthwise;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t size = axis == 0 ? height : width;
    const int64_t room = size + 2 * layer.padding[axis] - layer.dilation[axis] * (layer.kernel[axis] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "kernel must fit into the padded input, got size ", size, ", kernel ",
                    layer.kernel[axis], ", padding ", layer.padding[axis]);
    outputs[axis] = room / layer.stride[axis] + 1;
    pointwise = pointwise && layer.stride[axis] == 1 && layer.padding[axis] == 0;
  }
  Shape sizes{codes.size(0), layer.output_channels, outputs[0], outputs[1]};
  if (flat) sizes.erase(sizes.begin() + 2);
  const Tensor result = output_of(layer, sizes, channels_last_strides(sizes));
  if (result.numel() == 0) return result;
  const uint8_t* from = static_cast<const uint8_t*>(codes.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(result.mutable_data_ptr());

  if (pointwise && same_layout(sizes_of(codes), strides_of(codes), channels_last_strides(sizes_of(codes)))) {
    run_on_positions(layer, from, codes.size(0) * height * width, to);
    return result;
  }
  const Input input{from, height, width, width, codes.stride(0), codes.stride(1), row_stride, column_stride};
  (layer.depthwise ? run_depthwise : run_dense)(microkernel(), layer, input,
                                                {codes.size(0), outputs[0], outputs[1], outputs[1]}, to);
  return result;
}

}  // namespace kernels
