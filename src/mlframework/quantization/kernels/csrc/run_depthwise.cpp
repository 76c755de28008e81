#include <cstring>

#include "run_layer.h"

namespace kernels {
namespace {

// One call: shares gather padded rows as they are, channels side by side, and compute them chunk by chunk.
class Run {
 public:
  Run(const Microkernel& kernel, const Layer& layer, const Input& input, const Positions& positions, uint8_t* output)
      : kernel_(kernel),
        layer_(layer),
        input_(input),
        positions_(positions),
        output_(output),
        columns_((positions.width - 1) * layer.stride[1] + (layer.kernel[1] - 1) * layer.dilation[1] + 1),
        row_bytes_(columns_ * layer.input_channels),
        shares_(kernel, layer, positions, row_bytes_, (layer.output_channels + kChunk - 1) / kChunk) {
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
    const DepthwiseContext context{&layer_, tap_offsets_.data(), layer_.stride[1] * layer_.input_channels,
                                   layer_.output_channels * layer_.element_size()};
    for (int64_t image = share.first_image; image < share.last_image; ++image) {
      const int64_t first = share.first_row * layer_.stride[0] - layer_.padding[0];
      for (int64_t row = 0; row < shares_.rows_read(share.last_row - share.first_row); ++row)
        gather_row(image, first + row, gathered + row * row_bytes_);
      for (int64_t group = share.first_group; group < share.last_group; ++group)
        for (int64_t row = share.first_row; row < share.last_row; ++row)
          kernel_.depthwise_row(
              context, gathered + (row - share.first_row) * layer_.stride[0] * row_bytes_, group, positions_.width,
              output_ + (image * positions_.in_image() + row * positions_.width) * context.output_step);
    }
  }

  void gather_row(int64_t image, int64_t row, uint8_t* gathered) const {
    const int64_t channels = layer_.input_channels;
    const bool outside = row < 0 || row >= input_.height;
    const int padding = layer_.padding_code();
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
    if (layer_.flips_input) run_vectorized<FlipHighestBit>(gathered, row_bytes_);
  }

  const Microkernel& kernel_;
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

void run_depthwise(const Microkernel& kernel, const Layer& layer, const Input& input, const Positions& positions,
                   uint8_t* output) {
  Run(kernel, layer, input, positions, output)();
}

}  // namespace kernels
