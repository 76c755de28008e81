#include "gather.h"

#include <algorithm>
#include <cstring>

namespace kernels {
namespace {

// Columns of one phase: `count` of them, read at `source` and every `step` bytes on.
struct Columns {
  const uint8_t* source;
  int64_t step, count;
  uint8_t* target;
};

void copy_quads(const Columns& columns, int64_t begin) {
  for (int64_t column = begin; column < columns.count; ++column)
    std::memcpy(columns.target + column * kQuad, columns.source + column * columns.step, kQuad);
}

// Columns whose channels lie side by side, and still will.
void copy_columns(const Columns& columns, int64_t channels, int64_t column_step) {
  if (columns.step == channels && column_step == channels) {
    std::memcpy(columns.target, columns.source, static_cast<size_t>(columns.count * channels));
    return;
  }
  for (int64_t column = 0; column < columns.count; ++column)
    std::memcpy(columns.target + column * column_step, columns.source + column * columns.step,
                static_cast<size_t>(channels));
}

// Columns whose channels lie side by side, to where neighbouring columns will.
void transpose(TransposeColumns transpose_columns, Columns columns, int64_t channels, int64_t quad_step) {
  int64_t channel = 0;
  constexpr int64_t kQuads = 4;
  for (; channel + kQuads * kQuad <= channels; channel += kQuads * kQuad) {
    const int64_t done = transpose_columns(columns.source, columns.step, columns.count, columns.target, quad_step);
    for (int64_t quad = 0; quad < kQuads; ++quad, columns.source += kQuad, columns.target += quad_step)
      copy_quads(columns, done);
  }
  for (; channel + kQuad <= channels; channel += kQuad, columns.source += kQuad, columns.target += quad_step)
    copy_quads(columns, 0);
  // Of a quad with fewer channels the other bytes do not matter: their weights are zero.
  if (channel < channels) copy_columns(columns, channels - channel, kQuad);
}

// Columns whose channels lie apart.
void gather_planes(const Columns& columns, int64_t channels, int64_t channel_stride, const RowLayout& layout) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    const uint8_t* plane = columns.source + channel * channel_stride;
    uint8_t* bytes = columns.target + channel / kQuad * layout.quad_step + channel % kQuad;
    for (int64_t column = 0; column < columns.count; ++column)
      bytes[column * layout.column_step] = plane[column * columns.step];
  }
}

void fill_columns(uint8_t* target, int64_t begin, int64_t end, int64_t quads, const RowLayout& layout, uint8_t code) {
  if (layout.keeps_channels()) {
    std::memset(target + begin * layout.column_step, code, static_cast<size_t>((end - begin) * layout.column_step));
    return;
  }
  for (int64_t quad = 0; quad < quads; ++quad)
    std::memset(target + quad * layout.quad_step + begin * kQuad, code, static_cast<size_t>((end - begin) * kQuad));
}

}  // namespace

RowLayout row_layout(const Microkernel& kernel, const Layer& layer, int64_t output_width) {
  const int64_t stride = layer.stride[1], reach = (layer.kernel[1] - 1) * layer.dilation[1];
  if (!kernel.transpose_columns) {
    const int64_t columns = (output_width - 1) * stride + reach + 1, channels = layer.input_channels;
    return {1, columns, kQuad, channels, stride * channels, columns * channels};
  }
  const int64_t columns = output_width + reach / stride, phase_bytes = columns * kQuad;
  return {stride, columns, stride * phase_bytes, kQuad, kQuad, stride * phase_bytes * layer.quads()};
}

bool is_gathered(const Layer& layer, const Input& input, const RowLayout& layout) {
  return layout.keeps_channels() && !layer.flips_input && layer.taps() == 1 && layer.input_channels % kQuad == 0 &&
         layer.stride[0] == 1 && layer.padding[0] == 0 && layer.padding[1] == 0 && layout.columns == input.width &&
         input.channel_stride == 1 && input.column_stride == layout.column_step && input.row_stride == layout.bytes;
}

void gather_row(const Microkernel& kernel, const Layer& layer, const Input& input, int64_t image, int64_t row,
                const RowLayout& layout, uint8_t* gathered) {
  if (row < 0 || row >= input.height) {
    std::memset(gathered, static_cast<int>(layer.input_zero_point), static_cast<size_t>(layout.bytes));
    return;
  }
  const int64_t width = row == input.height - 1 ? input.last_width : input.width;
  const uint8_t* source = input.codes + image * input.image_stride + row * input.row_stride;
  for (int64_t phase = 0; phase < std::min(layout.phases, (layer.kernel[1] - 1) * layer.dilation[1] + 1); ++phase) {
    // Column `q` of the phase is column `q * phases + offset` of the input, where there is one.
    const int64_t offset = phase - layer.padding[1];
    int64_t begin = offset >= 0 ? 0 : (-offset + layout.phases - 1) / layout.phases;
    int64_t end = std::min(layout.columns, (width - offset + layout.phases - 1) / layout.phases);
    if (begin >= end) begin = end = layout.columns;
    uint8_t* target = gathered + phase * layout.columns * layout.column_step;
    fill_columns(target, 0, begin, layer.quads(), layout, layer.padding_code());
    fill_columns(target, end, layout.columns, layer.quads(), layout, layer.padding_code());
    const Columns columns{source + (begin * layout.phases + offset) * input.column_stride,
                          layout.phases * input.column_stride, end - begin, target + begin * layout.column_step};
    if (input.channel_stride != 1) {
      gather_planes(columns, layer.input_channels, input.channel_stride, layout);
    } else if (layout.keeps_channels()) {
      copy_columns(columns, layer.input_channels, layout.column_step);
    } else {
      transpose(kernel.transpose_columns, columns, layer.input_channels, layout.quad_step);
    }
  }
  if (layer.flips_input) run_vectorized<FlipHighestBit>(gathered, layout.bytes);
}

}  // namespace kernels
