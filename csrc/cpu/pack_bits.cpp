// pack_bits on the CPU: the formula of pack_bits.h, group after group.
#include "pack_bits.h"

#include "cpu/launchers.h"

namespace pgolf::cpu::PGOLF_ISA {

void pack_bits(const int8_t* codes, uint8_t* packed, int64_t count, int bits) {
  for (int64_t g = 0; g < group_count(count); ++g) pack_group(codes, packed, count, bits, g);
}

void unpack_bits(const uint8_t* packed, int8_t* codes, int64_t count, int bits) {
  for (int64_t g = 0; g < group_count(count); ++g) unpack_group(packed, codes, count, bits, g);
}

}  // namespace pgolf::cpu::PGOLF_ISA
