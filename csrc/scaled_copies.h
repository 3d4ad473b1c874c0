// scaled_copies: products of one tensor with factors that many layers have for it. With the gradients
// g_i of the products f_i x, all over the same tokens,
//
//   dx = sum over i of f_i g_i,   df_i = sum over tokens of g_i x
//
// so that each of them is read once, when all have come.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "parts.h"

namespace pgolf {

struct ScaledCopiesShape {
  int64_t rows, width;  // T, D
  int count;            // of copies
  Dtype dtype;
};

// x (T, D) and factors (count, D) in float, or double for double; contiguous.
struct ScaledCopiesInputs {
  const void *x, *factors;
};

// Of the sums over tokens: at most four parts for each of the 132 multiprocessors of an H100. On a
// CPU a part is so many tokens in a row, on a GPU every (parts x groups)-th for a group of threads.
constexpr int64_t kCopiesMinPart = 64, kCopiesMaxParts = 528;
constexpr Parts copies_parts(int64_t rows) {
  return parts_of(rows, kCopiesMinPart, kCopiesMaxParts);
}

}  // namespace pgolf
