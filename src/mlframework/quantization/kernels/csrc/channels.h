// Channels of a dense tensor: where they lie in memory, and the numbers that belong to them.
#pragma once

#include <vector>

#include "tensors.h"

namespace kernels {

// Entry i of a scale or a zero point, of any dtype that those have here; one number is every entry.
class ChannelNumbers {
 public:
  ChannelNumbers(const Tensor& tensor, int64_t channels, const char* name);
  float operator[](int64_t i) const { return read_(data_, i * step_); }

 private:
  Tensor source_;
  int64_t step_;
  const void* data_;
  float (*read_)(const void*, int64_t);
};

// Channels whose runs of memory are shorter than this are taken side by side, each element with numbers of its own.
constexpr int64_t kShortestRun = 64;
// No instruction set reads further than this many elements beyond the last.
constexpr int64_t kPadding = 16;

// `outer` times `channels` times `inner` elements, the last side by side.
struct ChannelLayout {
  int64_t outer, channels, inner;

  int64_t count() const { return outer * channels * inner; }
  // A row is a number of whole periods of channels * inner elements, long enough for a loop to be worth its while.
  int64_t row_length() const {
    const int64_t period = channels * inner;
    return period * ((511 + period) / period);
  }
  // A number to each element of a row, and some more.
  template <class Numbers>
  std::vector<float> repeated(const Numbers& numbers) const {
    std::vector<float> row(static_cast<size_t>(row_length() + kPadding), 1.0f);
    for (int64_t start = 0; start < row_length();)
      for (int64_t channel = 0; channel < channels; ++channel, start += inner)
        std::fill_n(row.begin() + start, inner, static_cast<float>(numbers[channel]));
    return row;
  }
};

// `axis` -1 is one channel for all; the tensor is dense.
ChannelLayout channel_layout(const Tensor& tensor, int64_t axis);

}  // namespace kernels
