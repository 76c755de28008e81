#include "learned_grid.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "fake_quantize_loops.h"
#include "operators.h"

namespace kernels {
namespace {

// Threads share out blocks of this many elements, whose bits fill whole bytes.
constexpr int64_t kBlock = 4096;

Tensor number(double value) {
  const Tensor result = empty({1}, {1}, ScalarType::Float);
  *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
  return result;
}

// `grid` is that of codes; without one the tensor holds floats.
Operand operand_of(const Tensor& tensor, const std::optional<Tensor>& grid, const char* name) {
  if (!grid) {
    check_floats(tensor, name);
    return {tensor.const_data_ptr(), Operand::floats, 1, 0};
  }
  check_codes(tensor, name);
  const float* numbers = numbers_in(*grid, 2, "grid");
  const bool is_unsigned = tensor.scalar_type() == ScalarType::Byte;
  return {tensor.const_data_ptr(), is_unsigned ? Operand::unsigned_codes : Operand::signed_codes, numbers[0],
          numbers[1]};
}

}  // namespace

double gradient_scale(int64_t elements, int64_t scales, int64_t highest) {
  const int64_t of_each = std::max<int64_t>(elements / std::max<int64_t>(scales, 1), 1);
  return 1.0 / std::sqrt(static_cast<double>(of_each * highest));
}

LearnedGradients::LearnedGradients(const std::vector<LearnedSums>& sums, const Grid& grid, int64_t elements,
                                   int64_t highest) {
  double scale = 0, zero_point = 0;
  for (const LearnedSums& each : sums) {
    scale += LearnedSums::over(each.scale);
    zero_point += LearnedSums::over(each.zero_point);
  }
  const double factor = gradient_scale(elements, 1, highest);
  to_scale = number(scale * factor);
  to_zero_point = number(zero_point * factor * -static_cast<double>(grid.scale));
}

std::tuple<Tensor, Tensor, Tensor> learned_clip_backward(
    const Tensor& gradient, const Tensor& mask, const Tensor& values, const std::optional<Tensor>& values_grid,
    const std::optional<Tensor>& addend, const std::optional<Tensor>& addend_grid, const Tensor& scale,
    const Tensor& zero_point, int64_t lowest, int64_t highest, double clip_low, double clip_high,
    double gradient_clip) {
  const Tensor source = dense(values);
  const Tensor other = addend ? laid_out_as(*addend, source, addend->scalar_type(), "addend") : Tensor();
  const Tensor passed = laid_out_as(gradient, source, ScalarType::Float, "gradient");
  const int64_t elements = source.numel(), blocks = (elements + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      mask.numel() == mask_bytes(elements),
                  "mask must hold ", mask_bytes(elements), " bytes, got ", mask.numel());
  const std::vector<Grid> grid =
      grids_of(scale, zero_point, 1, static_cast<float>(lowest), static_cast<float>(highest));
  const Tensor result = empty_like(source, ScalarType::Float);
  LearnedClipPiece whole{};
  whole.input = operand_of(source, values_grid, "values");
  if (addend) whole.addend = operand_of(other, addend_grid, "addend");
  whole.gradient = static_cast<const float*>(passed.const_data_ptr());
  whole.bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  whole.result = static_cast<float*>(result.mutable_data_ptr());
  whole.clip_low = static_cast<float>(clip_low);
  whole.clip_high = static_cast<float>(clip_high);
  whole.largest = static_cast<float>(gradient_clip);
  whole.grid = grid.data();
  std::vector<LearnedSums> sums(static_cast<size_t>(blocks));
  torch::stable::parallel_for(0, blocks, kElementsPerThread / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      LearnedClipPiece piece = whole;
      piece.input = whole.input.from(first);
      piece.addend = whole.addend.from(first);
      piece.gradient += first;
      piece.bits += first / 8;
      piece.result += first;
      piece.count = std::min(kBlock, elements - first);
      learned_clip_piece(piece, sums[static_cast<size_t>(block)]);
    }
  });
  const LearnedGradients gradients(sums, grid[0], elements, highest);
  return {result, gradients.to_scale, gradients.to_zero_point};
}

}  // namespace kernels
