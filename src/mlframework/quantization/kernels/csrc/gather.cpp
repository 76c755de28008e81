#include "gather.h"

#include <cstring>

#include "instruction_set.h"

#if HAS_X86_LEVELS
#include <immintrin.h>
#endif

namespace kernels {
namespace {

// Columns of one phase: `count` of them, read at `source` and every `step` bytes on, into [quad][column][4].
struct Columns {
  const uint8_t* source;
  int64_t step, count;
  uint8_t* target;
  int64_t quad_step;
};

#if HAS_X86_LEVELS
// Four quads of sixteen columns: four by four of them are transposed in each quarter of a vector.
TARGET_AVX512 void transpose_16_columns(const uint8_t* source, int64_t step, uint8_t* target, int64_t quad_step) {
  const auto load = [=](int64_t column) TARGET_AVX512 {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + column * step));
  };
  __m512i rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_castsi128_si512(load(i));
    rows[i] = _mm512_inserti32x4(rows[i], load(i + 4), 1);
    rows[i] = _mm512_inserti32x4(rows[i], load(i + 8), 2);
    rows[i] = _mm512_inserti32x4(rows[i], load(i + 12), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  _mm512_storeu_si512(target, _mm512_unpacklo_epi64(a, c));
  _mm512_storeu_si512(target + quad_step, _mm512_unpackhi_epi64(a, c));
  _mm512_storeu_si512(target + 2 * quad_step, _mm512_unpacklo_epi64(b, d));
  _mm512_storeu_si512(target + 3 * quad_step, _mm512_unpackhi_epi64(b, d));
}

void transpose_4_columns(const uint8_t* source, int64_t step, uint8_t* target, int64_t quad_step) {
  __m128i rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * step));
  const __m128i a = _mm_unpacklo_epi32(rows[0], rows[1]), b = _mm_unpackhi_epi32(rows[0], rows[1]);
  const __m128i c = _mm_unpacklo_epi32(rows[2], rows[3]), d = _mm_unpackhi_epi32(rows[2], rows[3]);
  const __m128i quads[4] = {_mm_unpacklo_epi64(a, c), _mm_unpackhi_epi64(a, c), _mm_unpacklo_epi64(b, d),
                            _mm_unpackhi_epi64(b, d)};
  for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i * quad_step), quads[i]);
}
#endif

void copy_quads(const Columns& columns, int64_t begin) {
  for (int64_t column = begin; column < columns.count; ++column)
    std::memcpy(columns.target + column * kQuad, columns.source + column * columns.step, kQuad);
}

// Columns whose channels lie side by side.
void gather_channels(Columns columns, int64_t channels) {
  int64_t channel = 0;
#if HAS_X86_LEVELS
  const bool wide = instruction_set() >= InstructionSet::avx512;
  for (; channel + 16 <= channels; channel += 16, columns.source += 16, columns.target += 4 * columns.quad_step) {
    int64_t column = 0;
    for (; wide && column + 16 <= columns.count; column += 16)
      transpose_16_columns(columns.source + column * columns.step, columns.step, columns.target + column * kQuad,
                           columns.quad_step);
    for (; column + 4 <= columns.count; column += 4)
      transpose_4_columns(columns.source + column * columns.step, columns.step, columns.target + column * kQuad,
                          columns.quad_step);
    for (int64_t quad = 0; quad < 4; ++quad) {
      Columns rest = columns;
      rest.source += quad * kQuad;
      rest.target += quad * columns.quad_step;
      copy_quads(rest, column);
    }
  }
#endif
  for (; channel + kQuad <= channels; channel += kQuad, columns.source += kQuad, columns.target += columns.quad_step)
    copy_quads(columns, 0);
  // Of a quad with fewer channels the other bytes do not matter: their weights are zero.
  const int64_t rest = channels - channel;
  if (rest == 0) return;
  for (int64_t column = 0; column < columns.count; ++column) {
    const uint8_t* source = columns.source + column * columns.step;
    uint8_t* target = columns.target + column * kQuad;
    target[0] = source[0];
    if (rest > 1) target[1] = source[1];
    if (rest > 2) target[2] = source[2];
  }
}

// Columns whose channels lie apart.
void gather_planes(const Columns& columns, int64_t channels, int64_t channel_stride) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    const uint8_t* plane = columns.source + channel * channel_stride;
    uint8_t* bytes = columns.target + channel / kQuad * columns.quad_step + channel % kQuad;
    for (int64_t column = 0; column < columns.count; ++column) bytes[column * kQuad] = plane[column * columns.step];
  }
}

void fill_columns(uint8_t* target, int64_t begin, int64_t end, int64_t quads, int64_t quad_step, int value) {
  const uint32_t four = 0x01010101u * static_cast<uint32_t>(value);
  for (int64_t quad = 0; quad < quads; ++quad)
    for (int64_t column = begin; column < end; ++column)
      std::memcpy(target + quad * quad_step + column * kQuad, &four, kQuad);
}

}  // namespace

RowLayout row_layout(const Layer& layer, int64_t output_width) {
  const int64_t phases = layer.stride[1];
  return {phases, output_width + (layer.kernel[1] - 1) * layer.dilation[1] / phases};
}

void gather_row(const Layer& layer, const Input& input, int64_t image, int64_t row, const RowLayout& layout,
                uint8_t* gathered) {
  if (row < 0 || row >= input.height) {
    std::memset(gathered, static_cast<int>(layer.input_zero_point), static_cast<size_t>(layout.bytes(layer)));
    return;
  }
  // A signed code becomes a byte by changing its highest bit, which is done to the whole row in the end.
  const int padding = static_cast<int>(layer.input_zero_point) ^ (layer.input_signed ? 128 : 0);
  const int64_t width = row == input.height - 1 ? input.last_width : input.width;
  const uint8_t* source = input.codes + image * input.image_stride + row * input.row_stride;
  for (int64_t phase = 0; phase < std::min(layout.phases, (layer.kernel[1] - 1) * layer.dilation[1] + 1); ++phase) {
    // Column `q` of the phase is column `q * phases + offset` of the input, where there is one.
    const int64_t offset = phase - layer.padding[1];
    int64_t begin = offset >= 0 ? 0 : (-offset + layout.phases - 1) / layout.phases;
    int64_t end = std::min(layout.columns, (width - offset + layout.phases - 1) / layout.phases);
    if (begin >= end) begin = end = layout.columns;
    uint8_t* target = gathered + phase * layout.columns * kQuad;
    fill_columns(target, 0, begin, layer.quads(), layout.quad_step(), padding);
    fill_columns(target, end, layout.columns, layer.quads(), layout.quad_step(), padding);
    const Columns columns{source + (begin * layout.phases + offset) * input.column_stride,
                          layout.phases * input.column_stride, end - begin, target + begin * kQuad, layout.quad_step()};
    if (input.channel_stride == 1) {
      gather_channels(columns, layer.input_channels);
    } else {
      gather_planes(columns, layer.input_channels, input.channel_stride);
    }
  }
  if (layer.input_signed) run_vectorized<FlipHighestBit>(gathered, layout.bytes(layer));
}

}  // namespace kernels
