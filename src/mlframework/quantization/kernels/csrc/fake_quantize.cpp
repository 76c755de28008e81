// Fake quantization, forward: values on the grid and, of the same reading of the input, their codes, the mask of what
// did not saturate, and extremes.
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>

#include "fake_quantize_loops.h"
#include "operators.h"

namespace kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Threads share out blocks of this many elements, whose bits fill whole bytes.
constexpr int64_t kBlock = 4096;

// The extremes of every channel, or of every element of a row; NaN stays.
struct Extremes {
  std::vector<float> minimum, maximum;
  explicit Extremes(int64_t count)
      : minimum(static_cast<size_t>(count), kInfinity), maximum(static_cast<size_t>(count), -kInfinity) {}

  void join(size_t i, float other_minimum, float other_maximum) {
    if (std::isnan(minimum[i]) || std::isnan(other_minimum)) {
      minimum[i] = maximum[i] = std::numeric_limits<float>::quiet_NaN();
    } else {
      minimum[i] = std::min(minimum[i], other_minimum);
      maximum[i] = std::max(maximum[i], other_maximum);
    }
  }
};

// One pass over a dense input, in the order in which it lies.
class Forward {
 public:
  // `wanted` holds the pointers to the beginnings, and what is the same for all pieces.
  Forward(const ForwardPiece& wanted, ChannelLayout layout, const std::vector<Grid>& grids, bool is_bfloat16)
      : wanted_(wanted),
        mask_(wanted.mask ? wanted.mask->to : nullptr),
        layout_(layout),
        grids_(grids),
        is_bfloat16_(is_bfloat16),
        extremes_(wanted.wants_extremes ? layout.channels : 0),
        has_nan_(static_cast<size_t>(layout.channels)) {
    if (layout.inner < kShortestRun && layout.channels > 1 && layout.count() > 0) row_ = grid_row(grids, layout);
  }

  void run() {
    const int64_t count = layout_.count();
    torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, kElementsPerThread / kBlock,
                                [&](int64_t begin, int64_t end) {
                                  run_share(begin * kBlock, std::min(end * kBlock, count));
                                });
  }

  // Which channels hold NaN, if codes are wanted.
  const std::vector<bool>& has_nan() const { return has_nan_; }
  const Extremes& extremes() const { return extremes_; }

 private:
  void run_share(int64_t begin, int64_t end) {
    Extremes seen(!wanted_.wants_extremes ? 0 : row_.length ? row_.length + kPadding : layout_.channels);
    BitWriter mask{mask_ ? mask_ + begin / 8 : nullptr};
    for (int64_t start = begin; start < end;) {
      const int64_t stop = std::min(end, row_.length ? next(start, row_.length) : next(start, layout_.inner));
      ForwardPiece piece = piece_at(start, seen);
      piece.count = stop - start;
      piece.mask = mask_ ? &mask : nullptr;
      fake_quantize_piece(piece, is_bfloat16_);
      if (piece.has_nan && piece.codes) note_nan(piece, start);
      start = stop;
    }
    if (mask_) mask.finish();
    if (wanted_.wants_extremes) join(seen);
  }

  static int64_t next(int64_t start, int64_t step) { return (start / step + 1) * step; }

  ForwardPiece piece_at(int64_t start, Extremes& seen) const {
    const int64_t size = is_bfloat16_ ? 2 : 4;
    ForwardPiece piece = wanted_;
    piece.input = static_cast<const char*>(piece.input) + start * size;
    if (piece.addend) piece.addend = static_cast<const char*>(piece.addend) + start * size;
    if (piece.values) piece.values = static_cast<char*>(piece.values) + start * size;
    if (piece.codes) piece.codes += start;
    const int64_t place = row_.length ? start % row_.length : start / layout_.inner % layout_.channels;
    if (row_.length) {
      piece.grid = nullptr;
      piece.scale = row_.scale.data() + place;
      piece.zero_point = row_.zero_point.data() + place;
      piece.lowest = row_.lowest.data() + place;
      piece.highest = row_.highest.data() + place;
    } else {
      piece.grid = &grids_[static_cast<size_t>(place)];
    }
    if (piece.wants_extremes) {
      piece.minimum = seen.minimum.data() + place;
      piece.maximum = seen.maximum.data() + place;
    }
    return piece;
  }

  void join(const Extremes& seen) {
    const std::lock_guard<std::mutex> guard(joining_);
    const int64_t count = row_.length ? row_.length : layout_.channels, repeats = row_.length ? layout_.inner : 1;
    for (int64_t i = 0; i < count; ++i)
      extremes_.join(static_cast<size_t>(i / repeats % layout_.channels), seen.minimum[static_cast<size_t>(i)],
                     seen.maximum[static_cast<size_t>(i)]);
  }

  void note_nan(ForwardPiece piece, int64_t start) {
    const std::lock_guard<std::mutex> guard(joining_);
    if (!row_.length) {
      has_nan_[static_cast<size_t>(start / layout_.inner % layout_.channels)] = true;
      return;
    }
    // The channels of a row are told apart by their extremes, which are NaN where a value is.
    const int64_t place = start % row_.length;
    Extremes seen(row_.length + kPadding);
    piece.values = nullptr;
    piece.codes = nullptr;
    piece.mask = nullptr;
    piece.wants_extremes = true;
    piece.minimum = seen.minimum.data() + place;
    piece.maximum = seen.maximum.data() + place;
    fake_quantize_piece(piece, is_bfloat16_);
    for (int64_t i = place; i < place + piece.count; ++i)
      if (std::isnan(seen.minimum[static_cast<size_t>(i)]))
        has_nan_[static_cast<size_t>(i / layout_.inner % layout_.channels)] = true;
  }

  const ForwardPiece& wanted_;
  uint8_t* mask_;
  ChannelLayout layout_;
  const std::vector<Grid>& grids_;
  bool is_bfloat16_;
  GridRow row_;
  Extremes extremes_;
  std::vector<bool> has_nan_;
  std::mutex joining_;
};

// (2, C): [-minimum, maximum], and minus infinity where that is not finite.
Tensor packed(const Extremes& extremes) {
  const int64_t channels = static_cast<int64_t>(extremes.minimum.size());
  const Tensor result = empty({2, channels}, {std::max<int64_t>(channels, 1), 1}, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < channels; ++i) {
    const float minimum = extremes.minimum[static_cast<size_t>(i)], maximum = extremes.maximum[static_cast<size_t>(i)];
    to[i] = std::isfinite(minimum) ? -minimum : -kInfinity;
    to[channels + i] = std::isfinite(maximum) ? maximum : -kInfinity;
  }
  return result;
}

// Undefined, which Python sees as None.
Tensor none() { return Tensor(); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fake_quantize(
    const Tensor& input, const std::optional<Tensor>& addend, const Tensor& scale, const Tensor& zero_point,
    int64_t lowest, int64_t highest, int64_t axis, double clip_low, double clip_high, bool wants_values,
    bool wants_mask, bool wants_extremes, std::optional<ScalarType> code_dtype) {
  check_trained(input, "input");
  if (code_dtype) check_code_dtype(*code_dtype);
  const Tensor source = dense(input);
  const ChannelLayout layout = channel_layout(source, axis);
  const std::vector<Grid> grids = grids_of(scale, zero_point, layout.channels, static_cast<float>(lowest),
                                           static_cast<float>(highest));
  const Tensor other = addend ? laid_out_as(*addend, source, "addend") : none();
  const Tensor values = wants_values ? empty_like(source, source.scalar_type()) : none();
  const Tensor codes = code_dtype ? empty_like(source, *code_dtype) : none();
  const Tensor mask = wants_mask ? empty({mask_bytes(layout.count())}, {1}, ScalarType::Byte) : none();

  BitWriter bits{wants_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr};
  ForwardPiece wanted{};
  wanted.input = source.const_data_ptr();
  wanted.addend = addend ? other.const_data_ptr() : nullptr;
  wanted.values = wants_values ? values.mutable_data_ptr() : nullptr;
  wanted.codes = code_dtype ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr;
  wanted.mask = wants_mask ? &bits : nullptr;
  wanted.lowest_code = static_cast<float>(lowest);
  wanted.clip_low = static_cast<float>(clip_low);
  wanted.clip_high = static_cast<float>(clip_high);
  wanted.clips = wanted.clip_low != -kInfinity || wanted.clip_high != kInfinity;
  wanted.wants_extremes = wants_extremes;
  Forward forward(wanted, layout, grids, source.scalar_type() == ScalarType::BFloat16);
  forward.run();
  return {values, codes, mask, wants_extremes ? packed(forward.extremes()) : none(),
          code_dtype ? grid_of_codes(scale, zero_point, lowest, highest, forward.has_nan()) : none()};
}

Tensor quantize(const Tensor& values, const Tensor& scale, const Tensor& zero_point, int64_t lowest, int64_t highest,
                ScalarType dtype, int64_t axis) {
  check_trained(values, "values");
  check_code_dtype(dtype);
  const Tensor source = dense(values);
  const ChannelLayout layout = channel_layout(source, axis);
  const std::vector<Grid> grids = grids_of(scale, zero_point, layout.channels, static_cast<float>(lowest),
                                           static_cast<float>(highest));
  const Tensor codes = empty_like(source, dtype);
  ForwardPiece wanted{};
  wanted.input = source.const_data_ptr();
  wanted.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  wanted.lowest_code = static_cast<float>(lowest);
  Forward(wanted, layout, grids, source.scalar_type() == ScalarType::BFloat16).run();
  return codes;
}

Tensor extremes(const Tensor& input, int64_t axis) {
  check_trained(input, "input");
  const Tensor source = dense(input);
  const ChannelLayout layout = channel_layout(source, axis);
  const std::vector<Grid> grids(static_cast<size_t>(layout.channels));
  ForwardPiece wanted{};
  wanted.input = source.const_data_ptr();
  wanted.wants_extremes = true;
  Forward forward(wanted, layout, grids, source.scalar_type() == ScalarType::BFloat16);
  forward.run();
  return packed(forward.extremes());
}

Tensor mask_gradient(const Tensor& gradient, const Tensor& mask, Shape strides, std::optional<double> gradient_clip) {
  check_trained(gradient, "gradient");
  const Shape sizes = sizes_of(gradient);
  STD_TORCH_CHECK(strides.size() == sizes.size(), "strides must hold ", sizes.size(), " numbers, got ", strides.size());
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      mask.numel() == mask_bytes(gradient.numel()),
                  "mask must hold ", mask_bytes(gradient.numel()), " bytes, got ", mask.numel());
  const bool is_bfloat16 = gradient.scalar_type() == ScalarType::BFloat16;
  const Tensor result = empty(sizes, strides, gradient.scalar_type());
  STD_TORCH_CHECK(is_dense(result), "strides must be those of a dense tensor");
  const Tensor source = laid_out_as(gradient, result, "gradient");
  const int64_t size = is_bfloat16 ? 2 : 4, count = gradient.numel();
  const char* from = static_cast<const char*>(source.const_data_ptr());
  const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  char* to = static_cast<char*>(result.mutable_data_ptr());
  const float largest = gradient_clip ? static_cast<float>(*gradient_clip) : kInfinity;
  torch::stable::parallel_for(
      0, (count + kBlock - 1) / kBlock, kElementsPerThread / kBlock, [&](int64_t begin, int64_t end) {
        begin *= kBlock, end = std::min(end * kBlock, count);
        mask_gradient_piece({from + begin * size, bits + begin / 8, to + begin * size, end - begin, largest},
                            is_bfloat16);
      });
  return result;
}

}  // namespace kernels
