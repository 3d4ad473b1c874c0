// Threads for the CPU kernels: the caller and helpers that sleep while there is nothing to do.
//
// Work is a range of items that do not depend on each other (rows, tokens), cut into chunks that
// whoever is free takes next: on cores shared with others a thread that is held up delays nobody.
// Each item is computed by one thread in one fixed order, so results do not depend on who took it.
#pragma once

#include <cstdint>

namespace pgolf::cpu {

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);

// Calls function(context, begin, end) on ranges that cover [0, count) and stay in the caches (each
// of 64 KiB of memory traffic, which is bytes_per_item for an item), on at most `threads` threads
// and on fewer where there is too little to share. The function must not throw. Works in the child
// of a fork, and when called on several threads at once (then only one of the callers has helpers).
void parallel_for(int64_t count, int64_t bytes_per_item, int threads, RangeFunction function,
                  const void* context);

// The same for a lambda (begin, end).
template <typename Body>
static inline void parallel_for(int64_t count, int64_t bytes_per_item, int threads,
                                const Body& body) {
  parallel_for(
      count, bytes_per_item, threads,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      &body);
}

}  // namespace pgolf::cpu
