// One bit an element: element i is bit i % 8 of byte i / 8, in the order in which the elements lie in memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_features.h"

namespace kernels {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "eight flags are packed as one little-endian number");

// Writes bits in order, any number of up to 32 at a time.
struct BitWriter {
  uint8_t* to;
  uint64_t pending = 0;
  uint32_t filled = 0;  // below 32 between calls

  ALWAYS_INLINE void push(uint32_t bits, uint32_t count) {
    pending |= static_cast<uint64_t>(bits) << filled;
    filled += count;
    if (filled < 32) return;
    std::memcpy(to, &pending, 4);
    to += 4;
    pending >>= 32;
    filled -= 32;
  }
  // What is left; the last byte is filled up with zeros.
  ALWAYS_INLINE void finish() { std::memcpy(to, &pending, (filled + 7) / 8); }
};

inline int64_t mask_bytes(int64_t elements) { return (elements + 7) / 8; }

// Bits as bytes, of which those that are not 0 are set. Writes up to the next multiple of eight.
ALWAYS_INLINE void unpack_mask(const uint8_t* __restrict bits, int64_t count, uint8_t* __restrict flags) {
  for (int64_t i = 0; i < mask_bytes(count); ++i) {
    const uint64_t eight = bits[i] * 0x0101010101010101ull & 0x8040201008040201ull;
    std::memcpy(flags + 8 * i, &eight, 8);
  }
}

}  // namespace kernels
