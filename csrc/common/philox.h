// Philox4x32-10 (Salmon et al., SC 2011) and the library's counter layout: the randomness contract of core/rng.py,
// in C++ and CUDA. A random word is a function of (seed, row id, step, stream, block) alone.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace nlhf {

struct PhiloxBlock {
  uint32_t word[4];
};

NLHF_HOST_DEVICE PhiloxBlock philox_4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;  // the golden ratio and sqrt(3) - 1, as Weyl sequences
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Return four words of one (row, step, stream): key = seed, counter = (row low, row high, step, stream << 24 | block).
NLHF_HOST_DEVICE PhiloxBlock random_block(int64_t seed, int64_t row_id, int64_t step, uint32_t stream,
                                          uint32_t block) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint64_t row = static_cast<uint64_t>(row_id);
  return philox_4x32_10({{static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(step),
                          (stream << 24) | (block & 0xFFFFFFu)}},
                        static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// Return the 64 random bits of a row: the first two words of block 0.
NLHF_HOST_DEVICE uint64_t random_bits(int64_t seed, int64_t row_id, int64_t step, uint32_t stream) {
  const PhiloxBlock block = random_block(seed, row_id, step, stream, 0);
  return (static_cast<uint64_t>(block.word[1]) << 32) | block.word[0];
}

// Return (k + 1/2) / 2^52 for the upper 52 bits k: exact in double, never 0, never 1.
NLHF_HOST_DEVICE double open_unit(uint64_t bits) {
  return (static_cast<double>(static_cast<int64_t>(bits >> 12)) + 0.5) * 0x1p-52;
}

}  // namespace nlhf
