#include "microkernels/microkernel.h"
#include "run_layer.h"

namespace kernels {
namespace {

// One call: shares gather their input, and compute their outputs tile by tile.
class Run {
 public:
  Run(const Layer& layer, const Input& input, const Positions& positions, uint8_t* output)
      : kernel_(*microkernel()),
        layer_(layer),
        input_(input),
        positions_(positions),
        output_(output),
        layout_(row_layout(layer, positions.width)),
        row_bytes_(layout_.bytes(layer)),
        shares_(layer, positions, row_bytes_, (layer.blocks() + kernel_.interleaved - 1) / kernel_.interleaved) {
    step_offsets_.reserve(static_cast<size_t>(layer.steps()));
    for (int64_t i = 0; i < layer.kernel[0]; ++i)
      for (int64_t j = 0; j < layer.kernel[1]; ++j) {
        const int64_t tap = i * layer.dilation[0] * row_bytes_ + layout_.offset(j * layer.dilation[1]);
        for (int64_t quad = 0; quad < layer.quads(); ++quad)
          step_offsets_.push_back(static_cast<int32_t>(tap + quad * layout_.quad_step()));
      }
  }

  void operator()() const {
    shares_.run([this](const Share& share) { compute(share); });
  }

 private:
  void compute(const Share& share) const {
    const int64_t image_bytes = shares_.gathered_rows() * row_bytes_;
    uint8_t* const gathered = scratch(shares_.gathered_images() * image_bytes);
    for (int64_t image = share.first_image; image < share.last_image; ++image)
      gather(share, image, gathered + (image - share.first_image) * image_bytes);
    // The groups are blocks that are interleaved; the last may have fewer.
    const int64_t last_block = std::min(kernel_.interleaved * share.last_group, layer_.blocks());
    for (int64_t block = kernel_.interleaved * share.first_group, blocks; block < last_block; block += blocks) {
      blocks = kernel_.blocks_of_tile(last_block - block, positions_.width);
      for (int64_t image = share.first_image; image < share.last_image; ++image) {
        const uint8_t* rows = gathered + (image - share.first_image) * image_bytes;
        for (int64_t row = share.first_row; row < share.last_row; ++row)
          compute_row(rows + (row - share.first_row) * layer_.stride[0] * row_bytes_, block, blocks, image, row);
      }
    }
  }

  void gather(const Share& share, int64_t image, uint8_t* gathered) const {
    const int64_t first = share.first_row * layer_.stride[0] - layer_.padding[0];
    for (int64_t row = 0; row < shares_.rows_read(share.last_row - share.first_row); ++row) {
      // Of a stride that is longer than the kernel, some rows are never read.
      if (row % layer_.stride[0] > (layer_.kernel[0] - 1) * layer_.dilation[0]) continue;
      gather_row(layer_, input_, image, first + row, layout_, gathered + row * row_bytes_);
    }
  }

  void compute_row(const uint8_t* gathered, int64_t block, int64_t blocks, int64_t image, int64_t row) const {
    const TileContext context{&layer_, step_offsets_.data()};
    const int64_t width = positions_.in_row(row), most = kernel_.most_positions[static_cast<size_t>(blocks)];
    const int64_t tiles = (width + most - 1) / most;
    const int64_t position_bytes = layer_.output_channels * layer_.element_size();
    uint8_t* output = output_ + (image * positions_.in_image() + row * positions_.width) * position_bytes;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = width * i / tiles, end = width * (i + 1) / tiles;
      kernel_.tile(blocks, end - begin)(context, gathered + begin * kQuad, block, output + begin * position_bytes);
    }
  }

  const Microkernel& kernel_;
  const Layer& layer_;
  const Input& input_;
  const Positions positions_;
  uint8_t* const output_;
  const RowLayout layout_;
  const int64_t row_bytes_;
  const Shares shares_;
  std::vector<int32_t> step_offsets_;
};

}  // namespace

void run_dense(const Layer& layer, const Input& input, const Positions& positions, uint8_t* output) {
  Run(layer, input, positions, output)();
}

}  // namespace kernels
