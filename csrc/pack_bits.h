// pack_bits: signed codes of k bits (4 <= k <= 8) to bytes and back. The formula, for CPU and GPU.
//
// Eight codes make one word of 8k bits: code j of the group is its bits [jk, jk + k) in two's
// complement, and the word is stored in k bytes, least significant first. So every group starts on
// a byte, and groups are independent of each other. The last group of r < 8 codes takes
// ceil(rk / 8) bytes; its unused high bits are zero.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pgolf {

constexpr int kCodesPerGroup = 8;
constexpr int kMinBits = 4;
constexpr int kMaxBits = 8;

PGOLF_HOST_DEVICE static inline int64_t group_count(int64_t count) {
  return count / kCodesPerGroup + (count % kCodesPerGroup != 0);
}

PGOLF_HOST_DEVICE static inline int codes_in_group(int64_t count, int64_t group) {
  const int64_t left = count - group * kCodesPerGroup;
  return left < kCodesPerGroup ? static_cast<int>(left) : kCodesPerGroup;
}

PGOLF_HOST_DEVICE static inline int64_t packed_bytes(int64_t count, int bits) {
  return count / kCodesPerGroup * bits + (count % kCodesPerGroup * bits + 7) / 8;
}

// Packs group `group` of codes[count] to its place in packed[packed_bytes(count, bits)].
PGOLF_HOST_DEVICE static inline void pack_group(const int8_t* codes, uint8_t* packed,
                                                int64_t count, int bits, int64_t group) {
  const int n = codes_in_group(count, group);
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t word = 0;
  for (int j = 0; j < n; ++j) {
    word |= (static_cast<uint8_t>(codes[group * kCodesPerGroup + j]) & mask) << (bits * j);
  }
  for (int i = 0; i < (n * bits + 7) / 8; ++i) {
    packed[group * bits + i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

// The inverse of pack_group.
PGOLF_HOST_DEVICE static inline void unpack_group(const uint8_t* packed, int8_t* codes,
                                                  int64_t count, int bits, int64_t group) {
  const int n = codes_in_group(count, group);
  const int mask = (1 << bits) - 1;
  const int sign = 1 << (bits - 1);
  uint64_t word = 0;
  for (int i = 0; i < (n * bits + 7) / 8; ++i) {
    word |= static_cast<uint64_t>(packed[group * bits + i]) << (8 * i);
  }
  for (int j = 0; j < n; ++j) {
    const int low = static_cast<int>(word >> (bits * j)) & mask;
    codes[group * kCodesPerGroup + j] = static_cast<int8_t>((low ^ sign) - sign);
  }
}

}  // namespace pgolf
