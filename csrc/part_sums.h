// part_sums: the sums over rows of many matrices in one launch. A matrix is what a kernel summed over
// parts of its work, a row for each of them; they are added up in one fixed order, on a GPU that of
// the threads of a block, so that nothing depends on the GPU's size.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace pgolf {

// A matrix (rows, cols) and where its sums go, cols numbers. It is cut into items of
// kPartSumsColumns columns, which are numbered through all matrices.
struct PartSumsMatrix {
  const void* parts;
  void* sums;
  int64_t rows, cols;
  int64_t first_item;
};

// 32 bytes of a row of floats, the least that a GPU's memory moves.
constexpr int64_t kPartSumsColumns = 8;

constexpr int64_t part_sums_items(int64_t cols) {
  return cols / kPartSumsColumns + (cols % kPartSumsColumns != 0);
}

}  // namespace pgolf
