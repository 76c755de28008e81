// Batch normalization in training, with the clipping activation and the fake quantization that follow it, forward and
// backward: normalize and normalize_backward of kernels/normalization.py.
//
// A tensor is rows of channels that lie side by side (channels-last). Constants of the channels are repeated until they
// are as long as a tile of several rows, so that loops run over elements and not over few channels at a time. Sums are
// taken in float32 within a tile's place and over the tiles of a chunk, beyond that in float64; chunks are the same for
// any number of threads, and so are the sums.
//
// Each pass but the first over a tensor finds in the cache what the one before it read last, and so begins there.
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "fake_quantize_loops.h"
#include "cpu_features.h"
#include "learned_grid.h"
#include "normalize_loops.h"
#include "operators.h"

namespace kernels {
namespace {

constexpr int64_t kTileElements = 2048;
// Of a chunk: so much that its own sums are little beside it, and so little that all threads have some.
constexpr int64_t kTilesPerChunk = 16, kRowsPerChunk = 32;

struct Rows {
  int64_t count, channels;

  int64_t elements() const { return count * channels; }
  // A tile begins at a whole byte of the mask.
  int64_t in_tile() const {
    const int64_t whole = 8 / std::gcd<int64_t>(channels, 8);
    return whole * std::max<int64_t>(kTileElements / (whole * channels), 1);
  }
  int64_t tile_elements() const { return in_tile() * channels; }
  int64_t in_chunk() const {
    return in_tile() * std::max<int64_t>(kTilesPerChunk, (kRowsPerChunk + in_tile() - 1) / in_tile());
  }
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

// Calls `compute(piece, first element)` for all tiles of a chunk, several at a time where they are whole.
template <class Compute>
void for_pieces(const Rows& rows, int64_t chunk, const NormalizePiece& constants, const Compute& compute) {
  const int64_t last = std::min((chunk + 1) * rows.in_chunk(), rows.count) * rows.channels;
  const int64_t tile = rows.tile_elements();
  for (int64_t first = chunk * rows.in_chunk() * rows.channels; first < last;) {
    NormalizePiece piece = constants;
    piece.together = first + kTilesTogether * tile <= last;
    piece.elements = std::min(tile, last - first);
    piece.values += first;
    if (piece.gradient) piece.gradient += first;
    if (piece.bits) piece.bits += first / 8;
    compute(piece, first);
    first += piece.together ? kTilesTogether * tile : piece.elements;
  }
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

// What a sum over the places of a tile comes to for each channel, added to that of a chunk.
struct FoldTile {
  ALWAYS_INLINE static void run(const float* __restrict tile, int64_t rows, int64_t channels, double* __restrict sums) {
    for (int64_t row = 0; row < rows; ++row, tile += channels)
      for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(tile[c]);
  }
};

// Two sums for each channel, over all rows: `sum(piece, chunk, a, b)` adds those of some tiles at each place.
template <class Sum>
std::vector<double> sum_twice(const Rows& rows, const NormalizePiece& constants, const Sum& sum) {
  const size_t channels = static_cast<size_t>(rows.channels);
  std::vector<double> partial(static_cast<size_t>(rows.chunks()) * 2 * channels);
  for_chunks(rows, [&](int64_t begin, int64_t end) {
    std::vector<float> a(static_cast<size_t>(rows.tile_elements())), b(a.size());
    for (int64_t chunk = end; chunk-- > begin;) {
      std::fill(a.begin(), a.end(), 0.0f);
      std::fill(b.begin(), b.end(), 0.0f);
      for_pieces(rows, chunk, constants,
                 [&](const NormalizePiece& piece, int64_t) { sum(piece, chunk, a.data(), b.data()); });
      double* sums = partial.data() + static_cast<size_t>(chunk) * 2 * channels;
      run_vectorized<FoldTile>(a.data(), rows.in_tile(), rows.channels, sums);
      run_vectorized<FoldTile>(b.data(), rows.in_tile(), rows.channels, sums + channels);
    }
  });
  std::vector<double> totals(2 * channels);
  for (size_t chunk = 0; chunk < static_cast<size_t>(rows.chunks()); ++chunk)
    for (size_t i = 0; i < totals.size(); ++i) totals[i] += partial[chunk * totals.size() + i];
  return totals;
}

std::vector<float> numbers_of(const Tensor& tensor, const Rows& rows, const char* name) {
  const float* numbers = numbers_in(tensor, rows.channels, name);
  return {numbers, numbers + rows.channels};
}

// Of a parameter that may be left out.
std::vector<float> numbers_of(const std::optional<Tensor>& tensor, const Rows& rows, const char* name, float otherwise) {
  if (tensor.has_value()) return numbers_of(*tensor, rows, name);
  return std::vector<float>(static_cast<size_t>(rows.channels), otherwise);
}

// Normalization as x factor + shift, with an entry to each place of a tile.
struct Affine {
  std::vector<float> factors, shifts;

  Affine(const Rows& rows, const Tensor& mean, const Tensor& inverse_deviation, const std::optional<Tensor>& weight,
         const std::optional<Tensor>& bias) {
    const std::vector<float> means = numbers_of(mean, rows, "mean"), gammas = numbers_of(weight, rows, "weight", 1.0f);
    std::vector<float> factor = numbers_of(inverse_deviation, rows, "inverse_deviation");
    std::vector<float> shift = numbers_of(bias, rows, "bias", 0.0f);
    for (size_t c = 0; c < factor.size(); ++c) {
      factor[c] *= gammas[c];
      shift[c] -= means[c] * factor[c];
    }
    factors = repeated(factor, rows);
    shifts = repeated(shift, rows);
  }
};

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
  NormalizePiece constants{};
  constants.values = from;
  constants.mean = near.data();
  // Differences from a value near the mean, whose squares then lose no digits.
  const std::vector<double> sums =
      sum_twice(rows, constants, [](const NormalizePiece& piece, int64_t, float* differences, float* squares) {
        sum_differences(piece, differences, squares);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize(
    const Tensor& values, const Tensor& mean, const Tensor& inverse_deviation, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& scale, const Tensor& zero_point, int64_t lowest, int64_t highest,
    double clip_low, double clip_high, std::optional<ScalarType> code_dtype) {
  const Rows rows = rows_of(values);
  if (code_dtype) check_code_dtype(*code_dtype);
  const Affine affine(rows, mean, inverse_deviation, weight, bias);
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
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      ForwardPiece piece{};
      piece.lowest_code = static_cast<float>(lowest);
      piece.clip_low = static_cast<float>(clip_low);
      piece.clip_high = static_cast<float>(clip_high);
      piece.clips = piece.clip_low != -kInfinity || piece.clip_high != kInfinity;
      piece.wants_extremes = true;
      piece.factor = affine.factors.data();
      piece.shift = affine.shifts.data();
      piece.grid = grid.data();
      piece.minimum = &minima[static_cast<size_t>(chunk)];
      piece.maximum = &maxima[static_cast<size_t>(chunk)];
      for_tiles(rows, chunk, [&](int64_t first, int64_t count) {
        BitWriter writer{bits + first / 8};
        piece.input = from + first;
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
  return {quantized, codes, mask, extremes,
          code_dtype ? grid_of_codes(scale, zero_point, lowest, highest, {has_nan}) : Tensor()};
}

namespace {

template <class Sum>
std::tuple<Tensor, Tensor, Tensor> gradients(const Rows& rows, const Tensor& gradient, const Tensor& mask,
                                             const Tensor& values, const Tensor& mean, const Tensor& inverse_deviation,
                                             const std::optional<Tensor>& weight, double gradient_clip, bool is_frozen,
                                             const Sum& sum) {
  rows_of(gradient);
  STD_TORCH_CHECK(sizes_of(gradient) == sizes_of(values), "gradient must have the shape of values");
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte &&
                      mask.numel() == mask_bytes(rows.elements()),
                  "mask must hold one bit to an element");
  const std::vector<float> means = numbers_of(mean, rows, "mean");
  const std::vector<float> inverses = numbers_of(inverse_deviation, rows, "inverse_deviation");
  const std::vector<float> weights = numbers_of(weight, rows, "weight", 1.0f);
  const std::vector<float> near = repeated(means, rows);
  NormalizePiece constants{};
  constants.values = static_cast<const float*>(values.const_data_ptr());
  constants.gradient = static_cast<const float*>(gradient.const_data_ptr());
  constants.bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  constants.mean = near.data();
  constants.largest = static_cast<float>(gradient_clip);
  const std::vector<double> sums = sum_twice(rows, constants, sum);

  const size_t channels = static_cast<size_t>(rows.channels);
  // Statistics that are not the batch's own do not change with its values.
  const double share = is_frozen ? 0.0 : 1.0 / static_cast<double>(rows.count);
  std::vector<double> to_weight(channels), to_bias(channels);
  std::vector<float> average(channels), projection(channels), factor(channels);
  for (size_t c = 0; c < channels; ++c) {
    const double inverse = static_cast<double>(inverses[c]);
    to_bias[c] = sums[c];
    to_weight[c] = sums[channels + c] * inverse;
    average[c] = static_cast<float>(sums[c] * share);
    projection[c] = static_cast<float>(to_weight[c] * inverse * share);
    factor[c] = static_cast<float>(static_cast<double>(weights[c]) * inverse);
  }
  const std::vector<float> averages = repeated(average, rows), projections = repeated(projection, rows);
  const std::vector<float> factors = repeated(factor, rows);
  constants.average = averages.data();
  constants.projection = projections.data();
  constants.factor = factors.data();
  const Tensor result = empty_like(values, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for_chunks(rows, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for_pieces(rows, chunk, constants,
                 [&](const NormalizePiece& piece, int64_t first) { normalized_gradient(piece, to + first); });
  });
  return {result, vector_of(to_weight), vector_of(to_bias)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> normalize_backward(const Tensor& gradient, const Tensor& mask, const Tensor& values,
                                                      const Tensor& mean, const Tensor& inverse_deviation,
                                                      const std::optional<Tensor>& weight, double gradient_clip,
                                                      bool is_frozen) {
  return gradients(rows_of(values), gradient, mask, values, mean, inverse_deviation, weight, gradient_clip, is_frozen,
                   [](const NormalizePiece& piece, int64_t, float* sums, float* products) {
                     sum_gradients(piece, sums, products);
                   });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> learned_normalize_backward(
    const Tensor& gradient, const Tensor& mask, const Tensor& values, const Tensor& mean,
    const Tensor& inverse_deviation, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const Tensor& scale, const Tensor& zero_point, int64_t lowest, int64_t highest, double clip_low, double clip_high,
    double gradient_clip, bool is_frozen) {
  const Rows rows = rows_of(values);
  const Affine affine(rows, mean, inverse_deviation, weight, bias);
  const std::vector<Grid> grid =
      grids_of(scale, zero_point, 1, static_cast<float>(lowest), static_cast<float>(highest));
  std::vector<LearnedSums> grid_sums(static_cast<size_t>(rows.chunks()));
  LearnedPiece constants{grid.data(), affine.factors.data(), affine.shifts.data(), static_cast<float>(clip_low),
                         static_cast<float>(clip_high), nullptr};
  const auto [to_values, to_weight, to_bias] =
      gradients(rows, gradient, mask, values, mean, inverse_deviation, weight, gradient_clip, is_frozen,
                [&](const NormalizePiece& piece, int64_t chunk, float* sums, float* products) {
                  LearnedPiece learned = constants;
                  learned.sums = &grid_sums[static_cast<size_t>(chunk)];
                  sum_learned_gradients(piece, learned, sums, products);
                });
  const LearnedGradients to_grid(grid_sums, grid[0], rows.elements(), highest);
  return {to_values, to_weight, to_bias, to_grid.to_scale, to_grid.to_zero_point};
}

}  // namespace kernels
