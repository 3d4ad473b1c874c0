// A loop over items whose sums are made for parts of them, which the number of threads does not
// change: nor does it change the sums.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/stream.h"
#include "host/parallel.h"
#include "parts.h"

namespace pgolf::cpu::PGOLF_ISA {

// item(index, sums) for each of the items, in order within a part; `sums` are the part's numbers, a
// row of partials (parts, numbers), 0 at first. item_bytes: that an item reads and writes.
template <typename F, typename Item>
void for_items_in_parts(const Parts& parts, int64_t items, int64_t numbers, void* partials,
                        int64_t item_bytes, int threads, const Item& item) {
  parallel_for(parts.count, item_bytes * parts.each, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      F* const sums = static_cast<F*>(partials) + part * numbers;
      std::fill(sums, sums + numbers, F(0));
      const int64_t first = part * parts.each;
      const int64_t last = std::min(first + parts.each, items);
      for (int64_t index = first; index < last; ++index) item(index, sums);
    }
    end_streaming();
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
