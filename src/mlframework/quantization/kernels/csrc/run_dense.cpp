#include "run_layer.h"

namespace kernels {
namespace {

// One call: shares gather their input, unless it lies gathered, and compute their outputs tile by tile.
class Run {
 public:
  Run(const Microkernel& kernel, const Layer& layer, const Input& input, const Positions& positions, uint8_t* output)
      : kernel_(kernel),
        layer_(layer),
        input_(input),
        positions_(positions),
        output_(output),
        layout_(row_layout(kernel, layer, positions.width)),
        row_bytes_(layout_.bytes),
        in_place_(positions.images == 1 && is_gathered(layer, input, layout_)),
        shares_(kernel, layer, positions, row_bytes_ * (layer.wide_steps ? 3 : 1),
                (layer.blocks() + kernel.interleaved - 1) / kernel.interleaved) {
    step_offsets_.reserve(static_cast<size_t>(layer.steps()));
    const int64_t runs_in_row = layer.runs() / layer.kernel[0];
    for (int64_t i = 0; i < layer.kernel[0]; ++i)
      for (int64_t j = 0; j < runs_in_row; ++j) {
        const int64_t run = i * layer.dilation[0] * row_bytes_ + layout_.offset(j * layer.dilation[1]);
        for (int64_t quad = 0; quad < layer.quads(); ++quad)
          step_offsets_.push_back(static_cast<int32_t>(run + quad * layout_.quad_step));
      }
  }

  void operator()() const {
    shares_.run([this](const Share& share) { compute(share); });
  }

 private:
  void compute(const Share& share) const {
    const int64_t image_bytes = shares_.gathered_rows() * row_bytes_;
    const int64_t bytes = (shares_.gathered_images() * image_bytes + kReadBeyond + 1) / 2 * 2;
    const int64_t wide_bytes = layer_.wide_steps ? 2 * bytes : 0;  // for the wide steps
    uint8_t* const copy = scratch(in_place_ ? wide_bytes : bytes + wide_bytes);
    uint8_t* const widened = in_place_ ? copy : copy + bytes;
    const uint8_t* const gathered = in_place_ ? input_.codes + share.first_row * row_bytes_ : copy;
    if (in_place_) {
      const int64_t last_row = share.last_row - 1;
      widen(gathered, (last_row - share.first_row) * row_bytes_ + positions_.in_row(last_row) * layout_.position_step,
            widened);
    } else {
      for (int64_t image = share.first_image; image < share.last_image; ++image) {
        const int64_t offset = (image - share.first_image) * image_bytes;
        gather(share, image, copy + offset, widened + 2 * offset);
      }
    }
    const TileContext context{&layer_,
                              layer_.steps(),
                              layer_.block_bytes(),
                              layer_.bias(),
                              layer_.multiplier(),
                              layer_.weights(),
                              layer_.wide_steps_before(),
                              layer_.order_of_steps(),
                              step_offsets_.data(),
                              layout_.position_step,
                              gathered,
                              widened};
    compute_blocks(context, share);
  }

  // Each block of weights passes over all rows of the share.
  void compute_blocks(const TileContext& context, const Share& share) const {
    const int64_t image_bytes = shares_.gathered_rows() * row_bytes_;
    const int64_t position_bytes = layer_.output_channels * layer_.element_size();
    // The groups are blocks that are interleaved; the last may have fewer.
    const int64_t last_block = std::min(kernel_.interleaved * share.last_group, layer_.blocks());
    for (int64_t block = kernel_.interleaved * share.first_group, blocks; block < last_block; block += blocks) {
      blocks = kernel_.blocks_of_tile(last_block - block, positions_.width);
      const int64_t most = kernel_.most_positions[static_cast<size_t>(blocks)];
      const Cut cut(positions_.width, most), last_cut(positions_.last_width, most);
      for (int64_t image = share.first_image; image < share.last_image; ++image) {
        const uint8_t* rows = context.gathered + (image - share.first_image) * image_bytes;
        uint8_t* output = output_ + image * positions_.in_image() * position_bytes;
        for (int64_t row = share.first_row; row < share.last_row; ++row)
          compute_row(context, row == positions_.height - 1 ? last_cut : cut,
                      rows + (row - share.first_row) * layer_.stride[0] * row_bytes_, block, blocks,
                      output + row * positions_.width * position_bytes);
      }
    }
  }

  void gather(const Share& share, int64_t image, uint8_t* gathered, uint8_t* widened) const {
    const int64_t first = share.first_row * layer_.stride[0] - layer_.padding[0];
    for (int64_t row = 0; row < shares_.rows_read(share.last_row - share.first_row); ++row) {
      // Of a stride that is longer than the kernel, some rows are never read.
      if (row % layer_.stride[0] > (layer_.kernel[0] - 1) * layer_.dilation[0]) continue;
      gather_row(kernel_, layer_, input_, image, first + row, layout_, gathered + row * row_bytes_);
      widen(gathered + row * row_bytes_, row_bytes_, widened + 2 * row * row_bytes_);
    }
  }

  // For the wide steps, if there are any.
  void widen(const uint8_t* bytes, int64_t count, uint8_t* widened) const {
    if (layer_.wide_steps) run_vectorized<Widen>(bytes, count, reinterpret_cast<uint16_t*>(widened));
  }

  // A row of outputs in tiles of one length, or of two: the first `longer` compute one position more.
  struct Cut {
    int64_t tiles, length, longer;

    Cut(int64_t width, int64_t most)
        : tiles((width + most - 1) / most), length(width / tiles), longer(width - tiles * length) {}
  };

  void compute_row(const TileContext& context, const Cut& cut, const uint8_t* gathered, int64_t block, int64_t blocks,
                   uint8_t* output) const {
    const int64_t position_bytes = layer_.output_channels * layer_.element_size();
    for (int64_t i = 0; i < cut.tiles; ++i) {
      const int64_t positions = cut.length + (i < cut.longer);
      kernel_.tile(blocks, positions)(context, gathered, block, output);
      gathered += positions * layout_.position_step;
      output += positions * position_bytes;
    }
  }

  const Microkernel& kernel_;
  const Layer& layer_;
  const Input& input_;
  const Positions positions_;
  uint8_t* const output_;
  const RowLayout layout_;
  const int64_t row_bytes_;
  const bool in_place_;  // the input lies gathered
  const Shares shares_;
  std::vector<int32_t> step_offsets_;
};

}  // namespace

void run_dense(const Microkernel& kernel, const Layer& layer, const Input& input, const Positions& positions,
               uint8_t* output) {
  Run(kernel, layer, input, positions, output)();
}

}  // namespace kernels
