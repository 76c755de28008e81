// Hashes of the contents of tensors, by which a caller knows that they have changed since it last looked.
#include <array>
#include <cstring>

#include "cpu_features.h"
#include "operators.h"
#include "tensors.h"

namespace kernels {
namespace {

constexpr int64_t kLanes = 8, kStripe = kLanes * sizeof(uint64_t);
constexpr int64_t kBlock = 1 << 18;  // bytes; the same for any number of threads, so that the hash is
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;

uint64_t mixed(uint64_t hash) {  // the finalizer of MurmurHash3
  hash = (hash ^ (hash >> 33)) * 0xFF51AFD7ED558CCDu;
  hash = (hash ^ (hash >> 33)) * 0xC4CEB9FE1A85EC53u;
  return hash ^ (hash >> 33);
}

// As XXH3 accumulates: each word is added, and the product of its halves once a key that depends on its position has
// been applied. (A linear sum would not see an even number of signs turn over.)
struct Accumulate {
  ALWAYS_INLINE static void run(const uint8_t* __restrict bytes, int64_t stripes, uint64_t* __restrict sums,
                                uint64_t* __restrict keys) {
    for (int64_t stripe = 0; stripe < stripes; ++stripe)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        uint64_t word;
        std::memcpy(&word, bytes + stripe * kStripe + lane * sizeof(word), sizeof(word));
        const uint64_t keyed = word ^ keys[lane];
        sums[lane] += word + (keyed & 0xFFFFFFFFu) * (keyed >> 32);
        keys[lane] += kOdd;
      }
  }
};

uint64_t hash_of_block(const uint8_t* bytes, int64_t length) {
  std::array<uint64_t, kLanes> sums{}, keys;
  for (int64_t lane = 0; lane < kLanes; ++lane) keys[lane] = mixed(lane + 1);
  const int64_t stripes = length / kStripe, rest = length % kStripe;
  run_vectorized<Accumulate>(bytes, stripes, sums.data(), keys.data());
  if (rest > 0) {
    std::array<uint8_t, kStripe> last{};
    std::memcpy(last.data(), bytes + stripes * kStripe, rest);
    run_vectorized<Accumulate>(last.data(), int64_t{1}, sums.data(), keys.data());
  }
  uint64_t hash = length;
  for (const uint64_t sum : sums) hash = mixed(hash * kOdd ^ sum);
  return hash;
}

int64_t fingerprint(const Tensor& given) {
  const Tensor tensor = dense(given);
  uint64_t hash = static_cast<uint64_t>(tensor.scalar_type());
  const Shape sizes = sizes_of(tensor), strides = strides_of(tensor);
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    hash = mixed(hash * kOdd ^ static_cast<uint64_t>(sizes[axis]));
    if (sizes[axis] > 1) hash = mixed(hash * kOdd ^ static_cast<uint64_t>(strides[axis]));
  }
  const int64_t length = tensor.numel() * tensor.element_size(), blocks = (length + kBlock - 1) / kBlock;
  const uint8_t* bytes = static_cast<const uint8_t*>(tensor.const_data_ptr());
  if (blocks == 1) return static_cast<int64_t>(mixed(hash * kOdd ^ hash_of_block(bytes, length)));
  std::vector<uint64_t> hashes(blocks);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      hashes[block] = hash_of_block(bytes + block * kBlock, std::min(kBlock, length - block * kBlock));
  });
  for (const uint64_t block : hashes) hash = mixed(hash * kOdd ^ block);
  return static_cast<int64_t>(hash);
}

}  // namespace

std::vector<int64_t> fingerprints(std::vector<Tensor> tensors) {
  std::vector<int64_t> found;
  found.reserve(tensors.size());
  for (const Tensor& tensor : tensors) found.push_back(fingerprint(tensor));
  return found;
}

}  // namespace kernels
