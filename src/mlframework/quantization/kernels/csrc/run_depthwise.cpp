#include <cstring>

#include "instruction_set.h"
#include "run_layer.h"

#if HAS_X86_LEVELS
#include <immintrin.h>

namespace kernels {
namespace {

// Outputs of one chunk of channels at one position.
class Chunk {
 public:
  TARGET_AVX512_VNNI Chunk(const Layer& layer, int64_t chunk)
      : layer_(layer),
        first_(chunk * kChunk),
        count_(std::min(layer.output_channels - first_, kChunk)),
        weights_(layer.weights() + chunk * layer.steps() * kChunk * kQuad) {}

  // The channels' bytes at tap t lie at `codes + tap_offsets[t]`; offsets come in fours.
  TARGET_AVX512_VNNI void compute(const uint8_t* codes, const int32_t* tap_offsets, uint8_t* output) const {
    __m512i sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = _mm512_loadu_si512(layer_.bias() + first_ + i * kLanes);
    const int8_t* weights = weights_;
    for (int64_t step = 0; step < layer_.steps(); ++step, tap_offsets += kQuad, weights += kChunk * kQuad) {
      const __m512i a = _mm512_loadu_si512(codes + first_ + tap_offsets[0]);
      const __m512i b = _mm512_loadu_si512(codes + first_ + tap_offsets[1]);
      const __m512i c = _mm512_loadu_si512(codes + first_ + tap_offsets[2]);
      const __m512i d = _mm512_loadu_si512(codes + first_ + tap_offsets[3]);
      const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
      const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
      const __m512i taps[4] = {_mm512_unpacklo_epi16(low_ab, low_cd), _mm512_unpackhi_epi16(low_ab, low_cd),
                               _mm512_unpacklo_epi16(high_ab, high_cd), _mm512_unpackhi_epi16(high_ab, high_cd)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sums[i] = _mm512_dpbusd_epi32(sums[i], taps[i], _mm512_loadu_si512(weights + i * kLanes * kQuad));
    }
    finish(sums, output);
  }

 private:
  TARGET_AVX512_VNNI ALWAYS_INLINE void finish(const __m512i* sums, uint8_t* output) const {
    const __m512 lowest = _mm512_set1_ps(layer_.lowest), highest = _mm512_set1_ps(layer_.highest);
    __m512 scaled[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 multiplier = _mm512_loadu_ps(layer_.multiplier() + first_ + i * kLanes);
      scaled[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), multiplier);
      scaled[i] = _mm512_min_ps(_mm512_max_ps(scaled[i], lowest), highest);
    }
    if (layer_.output == Output::floats) {
      float values[kChunk];
      for (int i = 0; i < 4; ++i) _mm512_storeu_ps(values + i * kLanes, scaled[i]);
      float* to = reinterpret_cast<float*>(output) + first_;
      for (int64_t channel = 0; channel < count_; ++channel) to[channel] = values[depthwise_place(channel)];
      return;
    }
    __m512i codes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      codes[i] = _mm512_add_epi32(_mm512_cvt_roundps_epi32(scaled[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                                  _mm512_set1_epi32(static_cast<int>(layer_.zero_point)));
    const __m512i a = _mm512_packs_epi32(codes[0], codes[1]), b = _mm512_packs_epi32(codes[2], codes[3]);
    const __m512i bytes =
        layer_.output == Output::signed_codes ? _mm512_packs_epi16(a, b) : _mm512_packus_epi16(a, b);
    const __mmask64 channels = count_ == kChunk ? ~__mmask64{0} : (__mmask64{1} << count_) - 1;
    _mm512_mask_storeu_epi8(output + first_, channels, bytes);
  }

  const Layer& layer_;
  const int64_t first_, count_;
  const int8_t* const weights_;
};

// One call: shares gather padded rows as they are, channels side by side, and compute row by row.
class Run {
 public:
  Run(const Layer& layer, const Input& input, const Positions& positions, uint8_t* output)
      : layer_(layer),
        input_(input),
        positions_(positions),
        output_(output),
        columns_((positions.width - 1) * layer.stride[1] + (layer.kernel[1] - 1) * layer.dilation[1] + 1),
        row_bytes_(columns_ * layer.input_channels),
        shares_(layer, positions, row_bytes_, (layer.output_channels + kChunk - 1) / kChunk) {
    for (int64_t i = 0; i < layer.kernel[0]; ++i)
      for (int64_t j = 0; j < layer.kernel[1]; ++j)
        tap_offsets_.push_back(static_cast<int32_t>(i * layer.dilation[0] * row_bytes_ +
                                                    j * layer.dilation[1] * layer.input_channels));
    // The last group of four may lack some: with weights of zero, any byte will do.
    tap_offsets_.resize(static_cast<size_t>(layer.steps() * kQuad), 0);
  }

  void operator()() const {
    shares_.run([this](const Share& share) { compute(share); });
  }

 private:
  void compute(const Share& share) const {
    // Chunks of channels are read whole, and so beyond the last.
    uint8_t* const gathered = scratch(shares_.gathered_rows() * row_bytes_ + kChunk);
    const int64_t position_bytes = layer_.output_channels * layer_.element_size();
    for (int64_t image = share.first_image; image < share.last_image; ++image) {
      const int64_t first = share.first_row * layer_.stride[0] - layer_.padding[0];
      for (int64_t row = 0; row < shares_.rows_read(share.last_row - share.first_row); ++row)
        gather_row(image, first + row, gathered + row * row_bytes_);
      for (int64_t row = share.first_row; row < share.last_row; ++row)
        for (int64_t group = share.first_group; group < share.last_group; ++group) {
          const Chunk chunk(layer_, group);
          const uint8_t* codes = gathered + (row - share.first_row) * layer_.stride[0] * row_bytes_;
          uint8_t* output = output_ + (image * positions_.in_image() + row * positions_.width) * position_bytes;
          for (int64_t column = 0; column < positions_.width; ++column, output += position_bytes)
            chunk.compute(codes + column * layer_.stride[1] * layer_.input_channels, tap_offsets_.data(), output);
        }
    }
  }

  void gather_row(int64_t image, int64_t row, uint8_t* gathered) const {
    const int64_t channels = layer_.input_channels;
    const bool outside = row < 0 || row >= input_.height;
    // A signed code becomes a byte by changing its highest bit, which is done to the whole row in the end.
    const int flip = layer_.input_signed ? 128 : 0;
    const int padding = static_cast<int>(layer_.input_zero_point) ^ flip;
    const int64_t begin = outside ? columns_ : std::min(layer_.padding[1], columns_);
    const int64_t end = outside ? columns_ : std::min(layer_.padding[1] + input_.width, columns_);
    std::memset(gathered, padding, static_cast<size_t>(begin * channels));
    std::memset(gathered + end * channels, padding, static_cast<size_t>((columns_ - end) * channels));
    const uint8_t* source = input_.codes + image * input_.image_stride + row * input_.row_stride;
    if (input_.channel_stride == 1 && input_.column_stride == channels) {
      std::memcpy(gathered + begin * channels, source, static_cast<size_t>((end - begin) * channels));
    } else {
      for (int64_t column = begin; column < end; ++column)
        for (int64_t channel = 0; channel < channels; ++channel)
          gathered[column * channels + channel] =
              source[(column - begin) * input_.column_stride + channel * input_.channel_stride];
    }
    if (flip) run_vectorized<FlipHighestBit>(gathered, row_bytes_);
  }

  const Layer& layer_;
  const Input& input_;
  const Positions positions_;
  uint8_t* const output_;
  const int64_t columns_;  // of the padded input
  const int64_t row_bytes_;
  const Shares shares_;
  std::vector<int32_t> tap_offsets_;
};

}  // namespace

void run_depthwise(const Layer& layer, const Input& input, const Positions& positions, uint8_t* output) {
  Run(layer, input, positions, output)();
}

}  // namespace kernels

#else

namespace kernels {

void run_depthwise(const Layer&, const Input&, const Positions&, uint8_t*) {}

}  // namespace kernels

#endif
