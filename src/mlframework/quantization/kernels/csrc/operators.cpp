#include "operators.h"

#include <cstdlib>
#include <string>

#include "instruction_set.h"

namespace kernels {
namespace {

std::string instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::avx512_vnni: return "avx512_vnni";
    case InstructionSet::avx512: return "avx512";
    case InstructionSet::avx2: return "avx2";
    default: return "baseline";
  }
}

// glibc hands freed memory at the top of the heap back to the system once there is more of it than twice the largest
// block it has mapped and freed: with every activation of a model, whose pages then fault in anew at the next call.
// Having freed one large block, it keeps more. (Nothing is written to it, so it costs no memory.)
const bool keeps_freed_memory = [] {
  void* volatile block = std::malloc((32 << 20) - (64 << 10));
  std::free(block);
  return true;
}();

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY(mlframework_quantization_kernels, library) {
  // An axis of -1 is per tensor.
  library.def("quantize(Tensor values, Tensor scale, Tensor zero_point, int lowest, int highest, ScalarType dtype,"
              " int axis) -> Tensor");
  library.def("dequantize(Tensor codes, Tensor scale, Tensor zero_point, int axis) -> Tensor");
  library.def("fake_quantize(Tensor input, Tensor? addend, Tensor scale, Tensor zero_point, int lowest, int highest,"
              " int axis, float clip_low, float clip_high, bool wants_values, bool wants_mask, bool wants_extremes,"
              " ScalarType? code_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("mask_gradient(Tensor gradient, Tensor mask, int[] strides, float? gradient_clip) -> Tensor");
  library.def("fake_quantize_backward(Tensor gradient, Tensor input, Tensor scale, Tensor zero_point, int lowest,"
              " int highest, int axis, bool pass_saturated, float? gradient_clip, float gradient_scale,"
              " bool needs_input) -> (Tensor, Tensor, Tensor)");
  library.def("update_moving_average(Tensor batch, bool is_measured, int axis, Tensor(a!) minimum,"
              " Tensor(b!) maximum, Tensor(c!) batches, Tensor(d!) scale, Tensor(e!) zero_point, float momentum,"
              " int lowest, int highest, bool symmetric, int symmetric_zero, bool due) -> ()");
  library.def("extremes(Tensor input, int axis) -> Tensor");
  library.def("fingerprints(Tensor[] tensors) -> int[]");
  library.def("lookup(Tensor codes, Tensor table) -> Tensor");
  library.def("lookup_gradient(Tensor gradient, Tensor codes, Tensor slopes, float? gradient_clip) -> Tensor");
  library.def("occurring(Tensor codes) -> Tensor");
  library.def("add(Tensor left, Tensor left_ratio, Tensor right, Tensor right_ratio, Tensor constant, int lowest,"
              " int highest, ScalarType dtype) -> Tensor");
  library.def("requantize(Tensor sums, Tensor? bias, Tensor multiplier, int zero_point, int lowest, int highest,"
              " ScalarType dtype, int channel_axis) -> Tensor");
  library.def("max_pool2d(Tensor codes, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode)"
              " -> Tensor");
  library.def("sum_positions(Tensor codes) -> Tensor");
  library.def("pack_layer(Tensor weight, Tensor? bias, Tensor multiplier, int[] stride, int[] padding, int[] dilation,"
              " int groups, int input_zero_point, ScalarType input_dtype, int zero_point, float lowest, float highest,"
              " ScalarType dtype) -> Tensor");
  library.def("convolution(Tensor codes, Tensor layer) -> Tensor");
  library.def("linear(Tensor codes, Tensor layer) -> Tensor");
  library.def("train_weight(Tensor weight, Tensor? bias, int axis, Tensor(a!) minimum, Tensor(b!) maximum,"
              " Tensor(c!) batches, Tensor(d!) scale, Tensor(e!) zero_point, float momentum, int lowest, int highest,"
              " bool observes, bool wants_mask, float input_scale, int input_zero_point, ScalarType input_dtype,"
              " int[] stride, int[] padding, int[] dilation, int groups) -> (Tensor, Tensor, Tensor)");
  library.def("batch_statistics(Tensor values, Tensor(a!)? running_mean, Tensor(b!)? running_variance, float momentum,"
              " float epsilon) -> (Tensor, Tensor)");
  library.def("normalize(Tensor values, Tensor mean, Tensor inverse_deviation, Tensor? weight, Tensor? bias, Tensor scale,"
              " Tensor zero_point, int lowest, int highest, float clip_low, float clip_high, ScalarType? code_dtype)"
              " -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("normalize_backward(Tensor gradient, Tensor mask, Tensor values, Tensor mean, Tensor inverse_deviation,"
              " Tensor? weight, float gradient_clip) -> (Tensor, Tensor, Tensor)");
  library.def("has_integer_layers() -> bool");
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mlframework_quantization_kernels, CPU, library) {
  library.impl("quantize", TORCH_BOX(&kernels::quantize));
  library.impl("dequantize", TORCH_BOX(&kernels::dequantize));
  library.impl("fake_quantize", TORCH_BOX(&kernels::fake_quantize));
  library.impl("mask_gradient", TORCH_BOX(&kernels::mask_gradient));
  library.impl("fake_quantize_backward", TORCH_BOX(&kernels::fake_quantize_backward));
  library.impl("update_moving_average", TORCH_BOX(&kernels::update_moving_average));
  library.impl("extremes", TORCH_BOX(&kernels::extremes));
  library.impl("fingerprints", TORCH_BOX(&kernels::fingerprints));
  library.impl("lookup", TORCH_BOX(&kernels::lookup));
  library.impl("lookup_gradient", TORCH_BOX(&kernels::lookup_gradient));
  library.impl("occurring", TORCH_BOX(&kernels::occurring));
  library.impl("add", TORCH_BOX(&kernels::add));
  library.impl("requantize", TORCH_BOX(&kernels::requantize));
  library.impl("max_pool2d", TORCH_BOX(&kernels::max_pool2d));
  library.impl("sum_positions", TORCH_BOX(&kernels::sum_positions));
  library.impl("pack_layer", TORCH_BOX(&kernels::pack_layer));
  library.impl("convolution", TORCH_BOX(&kernels::convolution));
  library.impl("linear", TORCH_BOX(&kernels::linear));
  library.impl("train_weight", TORCH_BOX(&kernels::train_weight));
  library.impl("batch_statistics", TORCH_BOX(&kernels::batch_statistics));
  library.impl("normalize", TORCH_BOX(&kernels::normalize));
  library.impl("normalize_backward", TORCH_BOX(&kernels::normalize_backward));
}

STABLE_TORCH_LIBRARY_IMPL(mlframework_quantization_kernels, CompositeExplicitAutograd, library) {
  library.impl("has_integer_layers", TORCH_BOX(&kernels::has_integer_layers));
  library.impl("instruction_set", TORCH_BOX(&kernels::instruction_set_name));
}
