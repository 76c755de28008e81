// Fake quantization, backward: from the input alone, gradients of the input, the scale and the zero point.
#include <limits>
#include <optional>
#include <tuple>

#include "fake_quantize_loops.h"
#include "learned_grid.h"
#include "operators.h"

namespace kernels {
namespace {

// What is summed together, the same whatever the number of threads: a part of a run, or so many rows.
constexpr int64_t kRunPart = 1 << 14, kRowPart = 1 << 12, kRowsTogether = 32;

struct Partial {
  double scale = 0, zero_point = 0;
};

class Backward {
 public:
  Backward(const BackwardPiece& wanted, ChannelLayout layout, const std::vector<Grid>& grids, bool is_bfloat16)
      : wanted_(wanted), layout_(layout), grids_(grids), is_bfloat16_(is_bfloat16) {}

  // The sums of every channel.
  std::vector<Partial> run() {
    if (layout_.count() == 0) return std::vector<Partial>(grids_.size());
    return layout_.channels > 1 && layout_.inner < kShortestRun ? run_rows() : run_runs();
  }

 private:
  std::vector<Partial> run_runs() {
    const int64_t inner = layout_.inner, parts = (inner + kRunPart - 1) / kRunPart, runs = layout_.count() / inner;
    std::vector<Partial> partials(static_cast<size_t>(runs * parts));
    const int64_t grain = std::max<int64_t>(kElementsPerThread / std::min(inner, kRunPart), 1);
    torch::stable::parallel_for(0, runs * parts, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t run = i / parts, first = i % parts * kRunPart;
        BackwardPiece piece = piece_at(run * inner + first, std::min(kRunPart, inner - first));
        piece.grid = &grids_[static_cast<size_t>(run % layout_.channels)];
        fake_quantize_backward_piece(piece, is_bfloat16_);
        partials[static_cast<size_t>(i)] = {piece.to_scale, piece.to_zero_point};
      }
    });
    std::vector<Partial> sums(grids_.size());
    for (int64_t i = 0; i < runs * parts; ++i)
      add(sums[static_cast<size_t>(i / parts % layout_.channels)], partials[static_cast<size_t>(i)]);
    return sums;
  }

  // Each part of a row is summed element by element over some rows.
  std::vector<Partial> run_rows() {
    const GridRow row = grid_row(grids_, layout_);
    const int64_t count = layout_.count(), inner = layout_.inner, rows = (count + row.length - 1) / row.length;
    const int64_t width = std::max<int64_t>(kRowPart / inner, 1) * inner;  // channels are whole in a part
    const int64_t parts = (row.length + width - 1) / width, groups = (rows + kRowsTogether - 1) / kRowsTogether;
    std::vector<std::vector<Partial>> partials(static_cast<size_t>(groups), std::vector<Partial>(grids_.size()));
    const int64_t elements = std::min(width, row.length) * std::min(rows, kRowsTogether);
    torch::stable::parallel_for(
        0, groups * parts, std::max<int64_t>(kElementsPerThread / elements, 1), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i % parts * width, group = i / parts;
            sum_rows(row, first, std::min(width, row.length - first), group * kRowsTogether,
                     std::min(rows, (group + 1) * kRowsTogether), partials[static_cast<size_t>(group)]);
          }
        });
    std::vector<Partial> sums(grids_.size());
    for (const std::vector<Partial>& group : partials)
      for (size_t channel = 0; channel < sums.size(); ++channel) add(sums[channel], group[channel]);
    return sums;
  }

  void sum_rows(const GridRow& row, int64_t first, int64_t width, int64_t begin, int64_t end,
                std::vector<Partial>& sums) const {
    std::vector<float> to_scale(static_cast<size_t>(width)), to_zero_point(static_cast<size_t>(width));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i * row.length + first;
      if (start >= layout_.count()) break;
      BackwardPiece piece = piece_at(start, std::min(width, layout_.count() - start));
      piece.scale = row.scale.data() + first;
      piece.lowest = row.lowest.data() + first;
      piece.highest = row.highest.data() + first;
      piece.row_to_scale = to_scale.data();
      piece.row_to_zero_point = to_zero_point.data();
      fake_quantize_backward_piece(piece, is_bfloat16_);
    }
    const int64_t inner = layout_.inner;  // `first` and `width` are multiples of it
    for (int64_t start = 0; start < width; start += inner) {
      Partial& sum = sums[static_cast<size_t>((first + start) / inner % layout_.channels)];
      for (int64_t i = start; i < start + inner; ++i)
        add(sum, {static_cast<double>(to_scale[static_cast<size_t>(i)]),
                  static_cast<double>(to_zero_point[static_cast<size_t>(i)])});
    }
  }

  BackwardPiece piece_at(int64_t start, int64_t count) const {
    const int64_t size = is_bfloat16_ ? 2 : 4;
    BackwardPiece piece = wanted_;
    piece.input = static_cast<const char*>(piece.input) + start * size;
    piece.gradient = static_cast<const char*>(piece.gradient) + start * size;
    if (piece.to_input) piece.to_input = static_cast<char*>(piece.to_input) + start * size;
    piece.count = count;
    return piece;
  }

  static void add(Partial& sum, const Partial& more) {
    sum.scale += more.scale;
    sum.zero_point += more.zero_point;
  }

  BackwardPiece wanted_;
  ChannelLayout layout_;
  const std::vector<Grid>& grids_;
  bool is_bfloat16_;
};

// Sums over `source` and a gradient that lies as it does; what passes of that goes to `to_input` where it is not null.
std::tuple<Tensor, Tensor> gradients_of_grid(const Tensor& source, const Tensor& passed, void* to_input,
                                             const Tensor& scale, const Tensor& zero_point, int64_t lowest,
                                             int64_t highest, int64_t axis, bool pass_saturated,
                                             std::optional<double> gradient_clip) {
  const ChannelLayout layout = channel_layout(source, axis);
  const std::vector<Grid> grids = grids_of(scale, zero_point, layout.channels, static_cast<float>(lowest),
                                           static_cast<float>(highest));
  BackwardPiece wanted{};
  wanted.input = source.const_data_ptr();
  wanted.gradient = passed.const_data_ptr();
  wanted.to_input = to_input;
  wanted.pass_saturated = pass_saturated;
  wanted.largest = gradient_clip ? static_cast<float>(*gradient_clip) : std::numeric_limits<float>::infinity();
  const std::vector<Partial> sums =
      Backward(wanted, layout, grids, source.scalar_type() == ScalarType::BFloat16).run();

  const Tensor to_scale = empty({layout.channels}, {1}, ScalarType::Float);
  const Tensor to_zero_point = empty({layout.channels}, {1}, ScalarType::Float);
  float* scales = static_cast<float*>(to_scale.mutable_data_ptr());
  float* zero_points = static_cast<float*>(to_zero_point.mutable_data_ptr());
  const double factor = gradient_scale(source.numel(), scale.numel(), highest);
  for (size_t i = 0; i < sums.size(); ++i) {
    scales[i] = static_cast<float>(sums[i].scale * factor);
    zero_points[i] = static_cast<float>(sums[i].zero_point * factor * -static_cast<double>(grids[i].scale));
  }
  return {to_scale, to_zero_point};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& gradient, const Tensor& input,
                                                          const Tensor& scale, const Tensor& zero_point,
                                                          int64_t lowest, int64_t highest, int64_t axis,
                                                          bool pass_saturated, std::optional<double> gradient_clip,
                                                          bool needs_input) {
  check_trained(input, "input");
  const Tensor source = dense(input);
  const Tensor passed = laid_out_as(gradient, source, "gradient");
  const Tensor to_input = needs_input ? empty_like(source, source.scalar_type()) : Tensor();
  const auto [to_scale, to_zero_point] =
      gradients_of_grid(source, passed, needs_input ? to_input.mutable_data_ptr() : nullptr, scale, zero_point, lowest,
                        highest, axis, pass_saturated, gradient_clip);
  return {to_input, to_scale, to_zero_point};
}

Tensor mask_weight_gradient(const Tensor& gradient, const Tensor& weight, const Tensor& scale,
                            const Tensor& zero_point, int64_t lowest, int64_t highest, int64_t axis,
                            bool pass_saturated, std::optional<double> gradient_clip) {
  check_trained(weight, "weight");
  const Tensor source = dense(weight);
  Tensor changed = gradient;
  const Tensor passed = laid_out_as(gradient, source, "gradient");
  void* to_weight = passed.mutable_data_ptr();
  const auto [to_scale, to_zero_point] = gradients_of_grid(source, passed, to_weight, scale, zero_point, lowest,
                                                           highest, axis, pass_saturated, gradient_clip);
  if (to_weight != changed.mutable_data_ptr()) torch::stable::copy_(changed, passed);  // it lay otherwise
  return to_scale;
}

}  // namespace kernels
