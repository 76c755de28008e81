// How the work of one call is cut into shares, which threads take in turn.
#pragma once

#include <atomic>

#include "microkernels/microkernel.h"
#include "parallel.h"

namespace kernels {

// Output positions as rows of images; the last row of an image may be a shorter one.
struct Positions {
  int64_t images, height, width, last_width;

  int64_t in_image() const { return (height - 1) * width + last_width; }
  int64_t in_row(int64_t row) const { return row == height - 1 ? last_width : width; }
};

// Some images, or some rows of one; and some groups of output channels.
struct Share {
  int64_t first_image, last_image, first_row, last_row, first_group, last_group;
};

class Shares {
 public:
  // row_bytes: what one row of input takes once gathered; groups: of output channels, that may be parted.
  Shares(const Microkernel& kernel, const Layer& layer, const Positions& positions, int64_t row_bytes, int64_t groups);

  // Rows of input that so many rows of output read.
  int64_t rows_read(int64_t rows) const { return (rows - 1) * row_stride_ + row_reach_; }
  // The most that any share gathers.
  int64_t gathered_images() const { return (images_ + image_shares_ - 1) / image_shares_; }
  int64_t gathered_rows() const { return rows_read((rows_ + row_shares_ - 1) / row_shares_); }

  // Calls `compute(share)` for every share, on as many threads as are worth their while. A thread takes the next share
  // when it is done with one, so that those that the system holds up leave more to the others.
  template <class Compute>
  void run(const Compute& compute) const {
    std::atomic<int64_t> next{0};
    const auto take_shares = [&](int64_t, int64_t) {
      for (int64_t index = next++; index < count(); index = next++) compute(share(index));
    };
    if (threads_ == 1) return take_shares(0, 1);
    parallel_for(0, threads_, 1, take_shares);
  }

 private:
  int64_t count() const { return image_shares_ * row_shares_ * group_shares_; }
  Share share(int64_t index) const;

  int64_t images_, rows_, groups_;
  int64_t row_stride_, row_reach_;
  int64_t threads_;
  int64_t image_shares_, row_shares_, group_shares_;
};

}  // namespace kernels
