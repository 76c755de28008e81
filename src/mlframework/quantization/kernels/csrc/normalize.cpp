// Batch normalization in training, with the clipping activation and the fake quantization that follow it, forward and
// backward: normalize and normalize_backward of kernels/normalization.py.
//
// A tensor is rows of channels that lie side by side (channels-last). Constants of the channels are repeated until they
// are as long as a tile of several rows, so that loops run over elements and not over few channels at a time. Sums are
// taken in float32 within a tile's place and over no more than kTilesPerChunk tiles, beyond that in float64; chunks are
// the same for any number of threads, and so are the sums.
#include <cmath>
#include <limits>
#include <tuple>

#include "fake_quantize_loops.h"
#include "instruction_set.h"
#include "operators.h"

namespace kernels {
namespace {

constexpr int64_t kTileElements = 2048;
constexpr int64_t kTilesPerChunk = 32;

struct Rows {
  int64_t count, channels;

  int64_t elements() const { return count * channels; }
  // Eight rows at least: a tile then begins at a whole byte of the mask.
  int64_t in_tile() const { return 8 * std::max<int64_t>(kTileElements / (8 * channels), 1); }
  int64_t tile_elements() const { return in_tile() * channels; }
  int64_t in_chunk() const { return in_tile() * kTilesPerChunk; }
  int64_t chunks() const { return (count + in_chunk() - 1) / in_chunk(); }
};

Rows rows_of(const Tensor& values) {
  check_floats(values, "values");
  STD_TORCH_CHECK(values.dim() >= 2, "values must have shape (N, C, *size), got ", values.dim(), " dimensions");
  const Shape sizes = sizes_of(values);
  STD_TORCH_CHECK(same_layout(sizes, strides_of(values), channels_last_strides(sizes)),
                  "values must lie in memory with their channels innermost");
  STD_TORCH_CHECK(values.numel() > 0, "values must not be empty");
  return {values.numel() / sizes[1], sizes[1]};
}

// Calls `compute(first element, elements)` for each tile of a chunk.
template <class Compute>
void for_tiles(const Rows& rows, int64_t chunk, const Compute& compute) {
  const int64_t last = std::min((chunk + 1) * rows.in_chunk(), rows.count) * rows.channels;
  for (int64_t first = chunk * rows.in_chunk() * rows.channels; first < last; first += rows.tile_elements())
    compute(first, std::min(rows.tile_elements(), last - first));
}

// Each thread takes a run of chunks.
template <class Compute>
void for_chunks(const Rows& rows, const Compute& compute) {
  const int64_t grain = std::max<int64_t>(kElementsPerThread / (rows.in_chunk() * rows.channels), 1);
  torch::stable::parallel_for(0, rows.chunks(), grain, [&](int64_t begin, int64_t end) { compute(begin, end); });
}

std::vector<float> repeated(const std::vector<float>& values, const Rows& rows) {
  std::vector<float> tile;
  tile.reserve(static_cast<size_t>(rows.tile_elements()));
  for (int64_t row = 0; row < rows.in_tile(); ++row) tile.insert(tile.end(), values.begin(), values.end());
  return tile;
}

// What two sums over the places of a tile come to for each channel, added to those of a chunk.
void fold_tile(const std::vector<float>& tile, const Rows& rows, double* sums) {
  const float* place = tile.data();
  for (int64_t row = 0; row < rows.in_tile(); ++row)
    for (int64_t c = 0; c < rows.channels; ++c) sums[c] += static_cast<double>(*place++);
}

// Two sums for each channel, over all rows: `accumulate(first, count, a, b)` adds what a tile has at each place.
template <class Accumulate>
std::vector<double> sum_twice(const Rows& rows, const Accumulate& accumulate) {
  const size_t channels = static_cast<size_t>(rows.channels);
  std::vector<double> partial(static_cast<size_t>(rows.chunks()) * 2 * channels);
  for_chunks(rows, [&](int64_t begin, int64_t end) {
    std::vector<float> a(static_cast<size_t>(rows.tile_elements())), b(a.size());
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill(a.begin(), a.end(), 0.0f);
      std::fill(b.begin(), b.end(), 0.0f);
      for_tiles(rows, chunk, [&](int64_t first, int64_t count) { accumulate(first, count, a.data(), b.data()); });
      double* sums = partial.data() + static_cast<size_t>(chunk) * 2 * channels;
      fold_tile(a, rows, sums);
      fold_tile(b, rows, sums + channels);
    }
  });
  std::vector<double> totals(2 * channels);
  for (size_t chunk = 0; chunk < static_cast<size_t>(rows.chunks()); ++chunk)
    for (size_t i = 0; i < totals.size(); ++i) totals[i] += partial[chunk * totals.size() + i];
  return totals;
}

// Sums of differences from a value near the mean, and of their squares, which then lose no digits.
struct SumDifferences {
  ALWAYS_INLINE static void run(const float* __restrict values, const float* __restrict near, int64_t count,
                                float* __restrict sums, float* __restrict squares) {
    for (int64_t i = 0; i < count; ++i) {
      const float difference = values[i] - near[i];
      sums[i] += difference;
      squares[i] += difference * difference;
    }
  }
};

struct ScaleAndShift {
  ALWAYS_INLINE static void run(const float* __restrict values, const float* __restrict factor,
                                const float* __restrict addend, int64_t count, float* __restrict result) {
    for (int64_t i = 0; i < count; ++i) result[i] = values[i] * factor[i] + addend[i];
  }
};

// The gradient of what was normalized, where the mask lets it pass.
ALWAYS_INLINE float passing(float gradient, uint8_t inside, float clip) {
  gradient = gradient < -clip ? -clip : gradient;
  gradient = gradient > clip ? clip : gradient;
  return inside ? gradient : 0.0f;
}

struct SumGradients {
  ALWAYS_INLINE static void run(const float* __restrict gradient, const uint8_t* __restrict inside,
                                const float* __restrict values, const float* __restrict mean, float clip, int64_t count,
                                float* __restrict sums, float* __restrict products) {
    for (int64_t i = 0; i < count; ++i) {
      const float passed = passing(gradient[i], inside[i], clip);
      sums[i] += passed;
      products[i] += passed * (values[i] - mean[i]);
    }
  }
};

// (g - mean(g) - (x - mean) mean(g x^) / sigma) gamma / sigma, each constant a vector over the tile.
struct GradientOfNormalized {
  ALWAYS_INLINE static void run(const float* __restrict gradient, const uint8_t* __restrict inside,
                                const float* __restrict values, const float* __restrict mean,
                                const float* __restrict average, const float* __restrict projection,
                                const float* __restrict factor, float clip, int64_t count, float* __restrict result) {
    for (int64_t i = 0; i < count; ++i) {
      const float passed = passing(gradient[i], inside[i], clip);
      result[i] = (passed - average[i] - (values[i] - mean[i]) * projection[i]) * factor[i];
    }
  }
};

std::vector<float> numbers_of(const Tensor& tensor, const Rows& rows, const char* name) {
  const float* numbers = numbers_in(tensor, rows.channels, name);
  return {numbers, numbers + rows.channels};
}

// Of a parameter that may be left out.
std::vector<float> numbers_of(const std::optional<Tensor>& tensor, const Rows& rows, const char* name, float otherwise) {
  if (tensor.has_value()) return numbers_of(*tensor, rows, name);
  return std::vector<float>(static_cast<size_t>(rows.channels), otherwise);
}

Tensor vector_of(const std::vector<double>& numbers) {
  const Tensor result = empty({static_cast<int64_t>(numbers.size())}, {1}, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for (size_t i = 0; i < numbers.size(); ++i) to[i] = static_cast<float>(numbers[i]);
  return result;
}

// r <- (1 - m) r + m (factor b), as ATen's batch normalization does in float32.
void average_in(const Tensor& running, const std::vector<double>& batch, double momentum, double factor) {
  float* to = numbers_in(running, static_cast<int64_t>(batch.size()), "running statistics");
  for (size_t c = 0; c < batch.size(); ++c)
    to[c] = static_cast<float>(momentum * factor * batch[c] + (1.0 - momentum) * static_cast<double>(to[c]));
}

}  // namespace

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& values, const std::optional<Tensor>& running_mean,
                                            const std::optional<Tensor>& running_variance, double momentum,
                                            double epsilon) {
  const Rows rows = rows_of(values);
  const float* from = static_cast<const float*>(values.const_data_ptr());
  const std::vector<float> first(from, from + rows.channels), near = repeated(first, rows);
  const std::vector<double> sums = sum_twice(rows, [&](int64_t start, int64_t count, float* a, float* b) {
    run_vectorized<SumDifferences>(from + start, near.data(), count, a, b);
  });
  const double count = static_cast<double>(rows.count);
  std::vector<double> mean(first.begin(), first.end()), variance(first.size()), inverse(first.size());
  for (size_t c = 0; c < first.size(); ++c) {
    const double difference = sums[c] / count;
    mean[c] += difference;
    variance[c] = std::max(sums[first.size() + c] / count - difference * difference, 0.0);
    inverse[c] = 1.0 / std::sqrt(variance[c] + epsilon);
  }
  if (running_mean) average_in(*running_mean, mean, momentum, 1.0);
  if (running_variance) average_in(*running_variance, variance, momentum, count / (count - 1.0));
  return {vector_of(mean), vector_of(inverse)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(const Tensor& values, const Tensor& mean,
                                                     const Tensor& inverse_deviation,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias, const Tensor& scale,
                                                     const Tensor& zero_point, int64_t lowest, int64_t highest,
                                                     double clip_low, double clip_high, std::optional<ScalarType> code_dtype) {
  const Rows rows = rows_of(values);
  if (code_dtype) check_code_dtype(*code_dtype);
  const std::vector<float> means = numbers_of(mean, rows, "mean"), gammas = numbers_of(weight, rows, "weight", 1.0f);
  std::vector<float> factor = numbers_of(inverse_deviation, rows, "inverse_deviation");
  std::vector<float> addend = numbers_of(bias, rows, "bias", 0.0f);
  for (size_t c = 0; c < factor.size(); ++c) {
    factor[c] *= gammas[c];
    addend[c] -= means[c] * factor[c];
  }
  const std::vector<float> factors = repeated(factor, rows), addends = repeated(addend, rows);
  const std::vector<Grid> grid =
      grids_of(scale, zero_point, 1, static_cast<float>(lowest), static_cast<float>(highest));
  const Tensor quantized = empty_like(values, ScalarType::Float);
  const Tensor codes = code_dtype ? empty_like(values, *code_dtype) : Tensor();
  const Tensor mask = empty({mask_bytes(rows.elements())}, {1}, ScalarType::Byte);
  const float* from = static_cast<const float*>(values.const_data_ptr());
  float* to = static_cast<float*>(quantized.mutable_data_ptr());
  uint8_t* code_at = code_dtype ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr;
  uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  // Of every chunk; NaN where a value is NaN.
  std::vector<float> minima(static_cast<size_t>(rows.chunks()), kInfinity), maxima(minima.size(), -kInfinity);
  for_chunks(rows, [&](int64_t begin, int64_t end) {
    std::vector<float> normalized(static_cast<size_t>(rows.tile_elements()));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      ForwardPiece piece{};
      piece.lowest_code = static_cast<float>(lowest);
      piece.clip_low = static_cast<float>(clip_low);
      piece.clip_high = static_cast<float>(clip_high);
      piece.clips = piece.clip_low != -kInfinity || piece.clip_high != kInfinity;
      piece.wants_extremes = true;
      piece.grid = grid.data();
      piece.minimum = &minima[static_cast<size_t>(chunk)];
      piece.maximum = &maxima[static_cast<size_t>(chunk)];
      for_tiles(rows, chunk, [&](int64_t first, int64_t count) {
        run_vectorized<ScaleAndShift>(from + first, factors.data(), addends.data(), count, normalized.data());
        BitWriter writer{bits + first / 8};
        piece.input = normalized.data();
        piece.values = to + first;
        piece.codes = code_at ? code_at + first : nullptr;
        piece.mask = &writer;
        piece.count = count;
        fake_quantize_piece(piece, false);
        writer.finish();
      });
    }
  });
  float least = kInfinity, most = -kInfinity;
  bool has_nan = false;
  for (size_t chunk = 0; chunk < minima.size(); ++chunk) {
    has_nan |= std::isnan(minima[chunk]);
    least = std::min(least, minima[chunk]);
    most = std::max(most, maxima[chunk]);
  }
  const Tensor extremes = empty({2, 1}, {1, 1}, ScalarType::Float);
  float* end = static_cast<float*>(extremes.mutable_data_ptr());
  end[0] = !has_nan && std::isfinite(least) ? -least : -kInfinity;
  end[1] = !has_nan && std::isfinite(most) ? most : -kInfinity;
  return {quantized, has_nan ? Tensor() : codes, mask, extremes};
}

std::tuple<Tensor, Tensor, Tensor> normalize_backward(const Tensor& gradient, const Tensor& mask, const Tensor& values,
                                                      const Tensor& mean, const Tensor& inverse_deviation,
                                                      const std::optional<Tensor>& weight, double gradient_clip) {
  const Rows rows = rows_of(values);
  rows_of(gradient);
  STD_TORCH_CHECK(sizes_of(gradient) == sizes_of(values), "gradient must have the shape of values");
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte &&
                      mask.numel() == mask_bytes(rows.elements()),
                  "mask must hold one bit to an element");
  const std::vector<float> means = numbers_of(mean, rows, "mean");
  const std::vector<float> inverses = numbers_of(inverse_deviation, rows, "inverse_deviation");
  const std::vector<float> weights = numbers_of(weight, rows, "weight", 1.0f);
  const float clip = static_cast<float>(gradient_clip);
  const float* from = static_cast<const float*>(gradient.const_data_ptr());
  const float* value = static_cast<const float*>(values.const_data_ptr());
  const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  const std::vector<float> near = repeated(means, rows);
  // Filled up to whole bytes of the mask.
  const size_t flags = static_cast<size_t>(rows.tile_elements());

  const std::vector<double> sums = sum_twice(rows, [&](int64_t first, int64_t count, float* a, float* b) {
    thread_local std::vector<uint8_t> inside;
    inside.resize(std::max(inside.size(), flags));
    unpack_mask(bits + first / 8, count, inside.data());
    run_vectorized<SumGradients>(from + first, inside.data(), value + first, near.data(), clip, count, a, b);
  });

  const size_t channels = static_cast<size_t>(rows.channels);
  const double count = static_cast<double>(rows.count);
  std::vector<double> to_weight(channels), to_bias(channels);
  std::vector<float> average(channels), projection(channels), factor(channels);
  for (size_t c = 0; c < channels; ++c) {
    const double inverse = static_cast<double>(inverses[c]);
    to_bias[c] = sums[c];
    to_weight[c] = sums[channels + c] * inverse;
    average[c] = static_cast<float>(sums[c] / count);
    projection[c] = static_cast<float>(to_weight[c] * inverse / count);
    factor[c] = static_cast<float>(static_cast<double>(weights[c]) * inverse);
  }
  const std::vector<float> averages = repeated(average, rows), projections = repeated(projection, rows);
  const std::vector<float> factors = repeated(factor, rows);
  const Tensor result = empty_like(values, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for_chunks(rows, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> inside(flags);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for_tiles(rows, chunk, [&](int64_t first, int64_t elements) {
        unpack_mask(bits + first / 8, elements, inside.data());
        run_vectorized<GradientOfNormalized>(from + first, inside.data(), value + first, near.data(), averages.data(),
                                             projections.data(), factors.data(), clip, elements, to + first);
      });
  });
  return {result, vector_of(to_weight), vector_of(to_bias)};
}

}  // namespace kernels
