#include "learned_grid.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "cpu_features.h"
#include "operators.h"

namespace kernels {
namespace {

// So few elements that they and their gradients stay in the first cache.
constexpr int64_t kTogether = 2048;
// Threads share out blocks of this many elements, whose bits fill whole bytes.
constexpr int64_t kBlock = 4096;

// As the forward pass computes it, operation for operation.
struct ClipSum {
  ALWAYS_INLINE static void run(const float* __restrict x, const float* __restrict addend, float low, float high,
                                float* __restrict to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      float value = x[i] + addend[i];
      value = value < high ? value : high;
      to[i] = value > low ? value : low;
    }
  }
};

struct ClipAffine {
  ALWAYS_INLINE static void run(const float* __restrict x, const float* __restrict factor,
                                const float* __restrict shift, float low, float high, float* __restrict to,
                                int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      float value = x[i] * factor[i] + shift[i];
      value = value < high ? value : high;
      to[i] = value > low ? value : low;
    }
  }
};

struct ClipAlone {
  ALWAYS_INLINE static void run(const float* __restrict x, float low, float high, float* __restrict to,
                                int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      float value = x[i];
      value = value < high ? value : high;
      to[i] = value > low ? value : low;
    }
  }
};

Tensor number(double value) {
  const Tensor result = empty({1}, {1}, ScalarType::Float);
  *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
  return result;
}

}  // namespace

void LearnedGridSums::add(const QuantizedPiece& whole) {
  float quantized[kTogether];
  for (int64_t first = 0; first < whole.count; first += kTogether) {
    const int64_t count = std::min(kTogether, whole.count - first);
    const float* x = whole.values + first;
    if (whole.factor) {
      run_vectorized<ClipAffine>(x, whole.factor + first, whole.shift + first, clip_low_, clip_high_, +quantized, count);
    } else if (whole.addend) {
      run_vectorized<ClipSum>(x, whole.addend + first, clip_low_, clip_high_, +quantized, count);
    } else {
      run_vectorized<ClipAlone>(x, clip_low_, clip_high_, +quantized, count);
    }
    BackwardPiece piece{};
    piece.input = quantized;
    piece.gradient = whole.gradient + first;
    piece.count = count;
    piece.largest = largest_;
    piece.grid = grid_;
    fake_quantize_backward_piece(piece, false);
    scale_ += piece.to_scale;
    zero_point_ += piece.to_zero_point;
  }
}

Tensor LearnedGridSums::to_scale(double gradient_scale) const { return number(scale_ * gradient_scale); }

Tensor LearnedGridSums::to_zero_point(double gradient_scale) const {
  return number(zero_point_ * gradient_scale * -static_cast<double>(grid_->scale));
}

std::tuple<Tensor, Tensor, Tensor> learned_clip_backward(const Tensor& gradient, const Tensor& mask,
                                                         const Tensor& values, const std::optional<Tensor>& addend,
                                                         const Tensor& scale, const Tensor& zero_point, int64_t lowest,
                                                         int64_t highest, double clip_low, double clip_high,
                                                         double gradient_clip, double gradient_scale) {
  check_floats(values, "values");
  const Tensor source = dense(values);
  const Tensor other = addend ? laid_out_as(*addend, source, "addend") : Tensor();
  const Tensor passed = laid_out_as(gradient, source, "gradient");
  check_floats(passed, "gradient");
  const int64_t elements = source.numel(), blocks = (elements + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      mask.numel() == mask_bytes(elements),
                  "mask must hold ", mask_bytes(elements), " bytes, got ", mask.numel());
  const std::vector<Grid> grid =
      grids_of(scale, zero_point, 1, static_cast<float>(lowest), static_cast<float>(highest));
  const Tensor result = empty_like(source, ScalarType::Float);
  const float* from = static_cast<const float*>(source.const_data_ptr());
  const float* added = addend ? static_cast<const float*>(other.const_data_ptr()) : nullptr;
  const float* incoming = static_cast<const float*>(passed.const_data_ptr());
  const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  float* to = static_cast<float*>(result.mutable_data_ptr());
  const float largest = static_cast<float>(gradient_clip);
  const LearnedGridSums none(grid[0], static_cast<float>(clip_low), static_cast<float>(clip_high), largest);
  std::vector<LearnedGridSums> sums(static_cast<size_t>(blocks), none);
  torch::stable::parallel_for(0, blocks, kElementsPerThread / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, elements - first);
      sums[static_cast<size_t>(block)].add(
          {from + first, added ? added + first : nullptr, nullptr, nullptr, incoming + first, count});
      mask_gradient_piece({incoming + first, bits + first / 8, to + first, count, largest}, false);
    }
  });
  LearnedGridSums total = none;
  for (const LearnedGridSums& each : sums) total.add(each);
  return {result, total.to_scale(gradient_scale), total.to_zero_point(gradient_scale)};
}

}  // namespace kernels
