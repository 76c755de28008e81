#include "operators.h"

#include <string>

#include "microkernels/microkernel.h"

namespace kernels {
namespace {

std::string instruction_set() { return microkernel().name; }

std::string instruction_sets() {
  std::string names;
  for (const Microkernel* row : runnable_microkernels()) names += (names.empty() ? "" : " ") + std::string(row->name);
  return names;
}

}  // namespace
}  // namespace kernels

// The others are declared in Python (kernels/operators), where their references stand.
STABLE_TORCH_LIBRARY_FRAGMENT(mlframework_quantization_kernels, library) {
  // Of each of a program's instructions, `code` holds the letters of its name, the values that it reads, and its numbers,
  // each after how many there are; before the last, how many tensors it has.
  library.def("make_program(int inputs, int[] code, Tensor[] tensors, int[] outputs) -> int");
  library.def("run_program(Tensor[] inputs, int program) -> Tensor[]");
  library.def("release_program(int program) -> ()");
  library.def("instruction_set() -> str");
  // Names, the best first, with spaces between them.
  library.def("instruction_sets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mlframework_quantization_kernels, CPU, library) {
  library.impl("quantize", TORCH_BOX(&kernels::quantize));
  library.impl("dequantize", TORCH_BOX(&kernels::dequantize));
  library.impl("fake_quantize", TORCH_BOX(&kernels::fake_quantize));
  library.impl("mask_gradient", TORCH_BOX(&kernels::mask_gradient));
  library.impl("fake_quantize_backward", TORCH_BOX(&kernels::fake_quantize_backward));
  library.impl("mask_weight_gradient", TORCH_BOX(&kernels::mask_weight_gradient));
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
  library.impl("average_positions", TORCH_BOX(&kernels::average_positions));
  library.impl("pack_layer", TORCH_BOX(&kernels::pack_layer));
  library.impl("packed_layer", TORCH_BOX(&kernels::packed_layer));
  library.impl("integer_layer", TORCH_BOX(&kernels::integer_layer));
  library.impl("train_layer", TORCH_BOX(&kernels::train_layer));
  library.impl("weighted_product", TORCH_BOX(&kernels::weighted_product));
  library.impl("run_program", TORCH_BOX(&kernels::run_program));
  library.impl("batch_statistics", TORCH_BOX(&kernels::batch_statistics));
  library.impl("normalize", TORCH_BOX(&kernels::normalize));
  library.impl("normalize_backward", TORCH_BOX(&kernels::normalize_backward));
  library.impl("learned_normalize_backward", TORCH_BOX(&kernels::learned_normalize_backward));
  library.impl("learned_clip_backward", TORCH_BOX(&kernels::learned_clip_backward));
}

STABLE_TORCH_LIBRARY_IMPL(mlframework_quantization_kernels, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&kernels::instruction_set));
  library.impl("instruction_sets", TORCH_BOX(&kernels::instruction_sets));
  library.impl("make_program", TORCH_BOX(&kernels::make_program));
  library.impl("release_program", TORCH_BOX(&kernels::release_program));
}
