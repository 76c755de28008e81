#include "shares.h"

#include <algorithm>

namespace kernels {
namespace {

// Gathered input of this size stays in the level-2 cache beside the weights that pass through it. Where the weights are
// too many for any cache, it is worth more to go through them less often.
constexpr int64_t kGatheredBytes = 256 << 10, kGatheredBytesOfLargeLayer = 1 << 20;
constexpr int64_t kLargeLayerBytes = 4 << 20;
// As long as so many products of other layers takes one of a depthwise layer.
constexpr int64_t kDepthwiseProduct = 4;
// Where several threads are at work.
constexpr int64_t kSharesPerThread = 4;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Shares::Shares(const Microkernel& kernel, const Layer& layer, const Positions& positions, int64_t row_bytes,
               int64_t groups)
    : images_(positions.images),
      rows_(positions.height),
      groups_(groups),
      row_stride_(layer.stride[0]),
      row_reach_((layer.kernel[0] - 1) * layer.dilation[0] + 1) {
  const int64_t products = images_ * positions.in_image() * layer.blocks() * layer.steps() * kStepBytes *
                           (layer.depthwise ? kDepthwiseProduct : 1);
  const int64_t worthwhile = std::max<int64_t>(products / kernel.products_per_thread, 1);
  threads_ = std::min(thread_count(), worthwhile);
  const int64_t cache = layer.bytes > kLargeLayerBytes ? kGatheredBytesOfLargeLayer : kGatheredBytes;

  // So few rows that the cache holds them, and that every thread has some.
  row_shares_ = std::min(rows_, divide_up(threads_, images_));
  while (row_shares_ < rows_ && gathered_rows() * row_bytes > cache) ++row_shares_;
  // Or several images, in equal parts for all threads, and in so many that no thread waits long for another.
  image_shares_ = images_;
  if (row_shares_ == 1) {
    const int64_t fitting = std::max<int64_t>(cache / (gathered_rows() * row_bytes), 1);
    const int64_t shares = std::max(divide_up(images_, fitting), threads_ > 1 ? kSharesPerThread * threads_ : 1);
    image_shares_ = std::min(images_, divide_up(shares, threads_) * threads_);
  }
  group_shares_ = std::min(groups_, divide_up(threads_, image_shares_ * row_shares_));
}

Share Shares::share(int64_t index) const {
  const int64_t group = index % group_shares_, row = index / group_shares_ % row_shares_;
  const int64_t image = index / (group_shares_ * row_shares_);
  return {image * images_ / image_shares_, (image + 1) * images_ / image_shares_,
          row * rows_ / row_shares_,       (row + 1) * rows_ / row_shares_,
          group * groups_ / group_shares_, (group + 1) * groups_ / group_shares_};
}

}  // namespace kernels
