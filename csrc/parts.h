// Sums over many items are taken over parts of them by themselves, then over those sums: the result
// depends neither on threads nor on the size of a GPU.
#pragma once

#include <cstdint>

namespace pgolf {

struct Parts {
  int64_t each, count;  // items of a part, of which the last may have fewer; parts
};

// `least` items each, or so many that there are at most `most` parts.
constexpr Parts parts_of(int64_t items, int64_t least, int64_t most) {
  const int64_t even = items / most + (items % most != 0);
  const int64_t each = even < least ? least : even;
  return {each, items / each + (items % each != 0)};
}

}  // namespace pgolf
