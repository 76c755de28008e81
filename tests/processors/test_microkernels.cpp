// Every microkernel that this processor can run, against sums in int64: random layers, and those whose products are the
// largest. Needs no PyTorch, and so runs under an emulator of another processor (tests/kernels/test_microkernels.py).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "packing.h"
#include "run_layer.h"

namespace kernels {

// Work is shared out as for several threads, and done by one.
int64_t thread_count() { return 3; }

void call_in_parallel(int64_t begin, int64_t end, int64_t, void (*function)(const void*, int64_t, int64_t),
                      const void* argument) {
  function(argument, begin, end);
}

}  // namespace kernels

namespace {

using namespace kernels;

std::mt19937 generator(7);

int64_t random_number(int64_t lowest, int64_t highest) {
  return std::uniform_int_distribution<int64_t>(lowest, highest)(generator);
}

enum class Codes { random, lowest, highest };

// Two weights in turn, or any (0 and 0). Products by 255 of a pair that sums past 128 exceed 16 bits.
struct WeightPattern {
  const char* name;
  int8_t first, second;
};
constexpr WeightPattern kWeightPatterns[] = {
    {"random", 0, 0},        {"127", 127, 127},        {"-127", -127, -127},   {"-128", -128, -128},
    {"127, -128", 127, -128}, {"127, 1", 127, 1},       {"127, 2", 127, 2},     {"64", 64, 64},
    {"64, 65", 64, 65},      {"-64", -64, -64},        {"-64, -65", -64, -65}, {"-128, 0", -128, 0},
};

// A layer, its input and what is expected of it.
struct Case {
  Layer layer{};
  int64_t images, height, width;  // of the input
  bool channels_last;
  bool has_one_multiplier;
  WeightPattern weights;
  Codes codes;

  int64_t outputs(int axis) const {
    const int64_t size = axis == 0 ? height : width, reach = layer.dilation[axis] * (layer.kernel[axis] - 1) + 1;
    return (size + 2 * layer.padding[axis] - reach) / layer.stride[axis] + 1;
  }
  int64_t inputs_per_sum() const { return layer.depthwise ? 1 : layer.input_channels; }
};

struct Freed {
  void operator()(void* block) const { std::free(block); }
};

class Run {
 public:
  explicit Run(const Case& description) : case_(description), layer_(description.layer) {
    fill_weights();
    fill_codes();
    sum();
    finish();
  }

  // Whether the microkernel gives exactly what is expected.
  bool agrees(const Microkernel& kernel) const {
    std::unique_ptr<void, Freed> block;
    const LayerContents contents{weights_.data(), bias_.data(), multiplier_.data(), case_.has_one_multiplier};
    pack(kernel, layer_, contents, [&](int64_t bytes) {
      block.reset(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
      return block.get();
    });
    const auto& packed = *static_cast<const Layer*>(block.get());
    const int64_t channels = layer_.input_channels, pixels = case_.height * case_.width;
    const Input input = case_.channels_last ? Input{codes_.data(), case_.height, case_.width, case_.width,
                                                    pixels * channels, 1, case_.width * channels, channels}
                                            : Input{codes_.data(), case_.height, case_.width, case_.width,
                                                    pixels * channels, pixels, case_.width, 1};
    const Positions positions{case_.images, case_.outputs(0), case_.outputs(1), case_.outputs(1)};
    std::vector<uint8_t> actual(expected_.size() + kBeyond, kUntouched);
    (packed.depthwise ? run_depthwise : run_dense)(kernel, packed, input, positions, actual.data());
    for (size_t i = expected_.size(); i < actual.size(); ++i)
      if (actual[i] != kUntouched) return false;
    return std::memcmp(actual.data(), expected_.data(), expected_.size()) == 0;
  }

 private:
  static constexpr size_t kBeyond = 256;
  static constexpr uint8_t kUntouched = 0xa5;

  void fill_weights() {
    weights_.resize(static_cast<size_t>(layer_.output_channels * layer_.taps() * case_.inputs_per_sum()));
    for (size_t i = 0; i < weights_.size(); ++i)
      weights_[i] = case_.weights.first == 0 ? static_cast<int8_t>(random_number(-128, 127))
                                             : i % 2 ? case_.weights.second : case_.weights.first;
  }

  void fill_codes() {
    const int lowest = layer_.input_signed ? -128 : 0;
    codes_.resize(static_cast<size_t>(case_.images * case_.height * case_.width * layer_.input_channels));
    for (uint8_t& code : codes_)
      code = static_cast<uint8_t>(case_.codes == Codes::lowest    ? lowest
                                  : case_.codes == Codes::highest ? lowest + 255
                                                                  : random_number(lowest, lowest + 255));
  }

  // The code at a place, or the zero point around the input, less the zero point.
  int64_t value_at(int64_t image, int64_t channel, int64_t row, int64_t column) const {
    if (row < 0 || row >= case_.height || column < 0 || column >= case_.width) return 0;
    const int64_t channels = layer_.input_channels;
    const int64_t place = case_.channels_last
                              ? ((image * case_.height + row) * case_.width + column) * channels + channel
                              : ((image * channels + channel) * case_.height + row) * case_.width + column;
    const uint8_t byte = codes_[static_cast<size_t>(place)];
    return (layer_.input_signed ? int64_t{static_cast<int8_t>(byte)} : int64_t{byte}) - layer_.input_zero_point;
  }

  int64_t sum_at(int64_t image, int64_t row, int64_t column, int64_t output) const {
    int64_t sum = 0;
    const int64_t count = case_.inputs_per_sum();
    for (int64_t i = 0; i < layer_.kernel[0]; ++i)
      for (int64_t j = 0; j < layer_.kernel[1]; ++j)
        for (int64_t channel = 0; channel < count; ++channel)
          sum += value_at(image, layer_.depthwise ? output : channel,
                          row * layer_.stride[0] - layer_.padding[0] + i * layer_.dilation[0],
                          column * layer_.stride[1] - layer_.padding[1] + j * layer_.dilation[1]) *
                 weights_[static_cast<size_t>((output * layer_.taps() + i * layer_.kernel[1] + j) * count + channel)];
    return sum;
  }

  void sum() {
    for (int64_t image = 0; image < case_.images; ++image)
      for (int64_t row = 0; row < case_.outputs(0); ++row)
        for (int64_t column = 0; column < case_.outputs(1); ++column)
          for (int64_t output = 0; output < layer_.output_channels; ++output)
            sums_.push_back(sum_at(image, row, column, output));
  }

  // Bias and multipliers that spread the sums over the codes and beyond; then the outputs that follow.
  void finish() {
    double spread = 1;
    for (int64_t sum : sums_) spread = std::max(spread, std::abs(static_cast<double>(sum)));
    for (int64_t output = 0; output < layer_.output_channels; ++output) {
      bias_.push_back(static_cast<int32_t>(random_number(-3000, 3000)));
      multiplier_.push_back(static_cast<float>(static_cast<double>(random_number(100, 400)) / spread));
    }
    const size_t channels = bias_.size();
    for (size_t i = 0; i < sums_.size(); ++i) {
      const auto accumulator = static_cast<int32_t>(sums_[i] + bias_[i % channels]);
      const float scaled = static_cast<float>(accumulator) * multiplier_[case_.has_one_multiplier ? 0 : i % channels];
      const float clamped = std::min(std::max(scaled, layer_.lowest), layer_.highest);
      if (layer_.output == Output::floats) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(&clamped);
        expected_.insert(expected_.end(), bytes, bytes + sizeof(clamped));
      } else {
        expected_.push_back(static_cast<uint8_t>(std::lrint(clamped) + layer_.zero_point));
      }
    }
  }

  const Case& case_;
  const Layer& layer_;
  std::vector<int8_t> weights_;
  std::vector<uint8_t> codes_;
  std::vector<int64_t> sums_;
  std::vector<int32_t> bias_;
  std::vector<float> multiplier_;
  std::vector<uint8_t> expected_;
};

// Whatever a layer may be, but for its channels, its geometry and its size.
Case any_case() {
  Case result;
  Layer& layer = result.layer;
  layer.input_signed = random_number(0, 1);
  layer.input_zero_point = random_number(0, 255) - 128 * layer.input_signed;
  layer.output = static_cast<Output>(random_number(0, 2));
  if (layer.output == Output::floats) {
    layer.lowest = random_number(0, 1) ? -100 : 0;
    layer.highest = 200;
  } else {
    const int64_t lowest = layer.output == Output::signed_codes ? -128 : 0;
    layer.zero_point = random_number(lowest, lowest + 255);
    layer.lowest = static_cast<float>(lowest - layer.zero_point);
    layer.highest = static_cast<float>(lowest + random_number(128, 255) - layer.zero_point);
  }
  result.channels_last = random_number(0, 3) > 0;
  result.has_one_multiplier = random_number(0, 7) == 0;
  result.weights = kWeightPatterns[random_number(0, static_cast<int64_t>(std::size(kWeightPatterns)) - 1)];
  result.codes = static_cast<Codes>(random_number(0, 2));
  return result;
}

void set_both(int64_t (&values)[2], int64_t number) { values[0] = values[1] = number; }

// A kernel of one size in both directions, at every position.
void set_kernel(Layer& layer, int64_t size) {
  set_both(layer.kernel, size);
  set_both(layer.stride, 1);
  set_both(layer.dilation, 1);
}

void set_channels(Case& any, bool depthwise, int64_t inputs, int64_t outputs, int64_t height, int64_t width) {
  any.layer.depthwise = depthwise;
  any.layer.input_channels = inputs;
  any.layer.output_channels = depthwise ? inputs : outputs;
  any.images = random_number(1, 2);
  any.height = height;
  any.width = width;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const bool depthwise : {false, true}) {
    // Every number of positions to a row, every number of channels.
    for (int64_t width = 1; width <= 40; ++width)
      for (const int64_t outputs : {1, 16, 31, 70}) {
        Case any = any_case();
        set_kernel(any.layer, 1);
        set_channels(any, depthwise, depthwise ? width + outputs : width, outputs, random_number(1, 3), width);
        cases.push_back(any);
      }
    for (int i = 0; i < 250; ++i) {
      Case any = any_case();
      int64_t sizes[2];
      for (int axis = 0; axis < 2; ++axis) {
        any.layer.kernel[axis] = random_number(1, 4);
        any.layer.stride[axis] = random_number(1, 3);
        any.layer.dilation[axis] = random_number(1, 2);
        any.layer.padding[axis] = random_number(0, 3);
        const int64_t reach = any.layer.dilation[axis] * (any.layer.kernel[axis] - 1) + 1;
        sizes[axis] = std::max(random_number(1, axis ? 24 : 6), reach - 2 * any.layer.padding[axis]);
      }
      set_channels(any, depthwise, random_number(1, depthwise ? 140 : 40), random_number(1, 70), sizes[0], sizes[1]);
      cases.push_back(any);
    }
    // Every extreme of weights with every extreme of codes.
    for (const WeightPattern& weights : kWeightPatterns)
      for (const Codes codes : {Codes::random, Codes::lowest, Codes::highest})
        for (const bool is_signed : {false, true}) {
          Case any = any_case();
          any.weights = weights;
          any.codes = codes;
          any.layer.input_signed = is_signed;
          any.layer.input_zero_point = is_signed ? -128 : 0;
          set_kernel(any.layer, 3);
          set_channels(any, depthwise, 67, 33, 4, 9);
          cases.push_back(any);
        }
  }
  // One that is worth several threads.
  Case large = any_case();
  set_kernel(large.layer, 1);
  set_channels(large, false, 130, 50, 30, 30);
  cases.push_back(large);
  return cases;
}

std::string description_of(const Case& any) {
  const Layer& layer = any.layer;
  const auto pair = [](int64_t a, int64_t b) { return std::to_string(a) + " x " + std::to_string(b); };
  return (layer.depthwise ? "depthwise, " : "dense, ") + std::to_string(layer.input_channels) + " to " +
         std::to_string(layer.output_channels) + " channels, kernel " + pair(layer.kernel[0], layer.kernel[1]) +
         ", stride " + pair(layer.stride[0], layer.stride[1]) + ", input " + pair(any.height, any.width) +
         (layer.input_signed ? " int8" : " uint8") + ", weights " + any.weights.name;
}

}  // namespace

// Prints a line for each microkernel: its name, and how many of its layers agree. Fails where any does not.
int main() {
  const std::vector<const Microkernel*> rows = runnable_microkernels();
  std::vector<int> agreeing(rows.size(), 0);
  const std::vector<Case> cases = all_cases();
  for (const Case& each : cases) {
    const Run run(each);
    for (size_t row = 0; row < rows.size(); ++row) {
      const bool agrees = run.agrees(*rows[row]);
      agreeing[row] += agrees;
      if (!agrees) std::printf("%s differs: %s\n", rows[row]->name, description_of(each).c_str());
    }
  }
  bool all_agree = true;
  for (size_t row = 0; row < rows.size(); ++row) {
    std::printf("%s: %d of %d layers\n", rows[row]->name, agreeing[row], static_cast<int>(cases.size()));
    all_agree = all_agree && agreeing[row] == static_cast<int>(cases.size());
  }
  return all_agree ? 0 : 1;
}
