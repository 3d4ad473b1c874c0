// How the heads of tokens, of at most kMaxHeadSize elements, lie across lanes. On the host.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "heads.h"

namespace pgolf::cuda {

constexpr int64_t kMaxHeadSize = 256;

// body(vector, lanes, chunks) with the constants of a Row that fit heads of `size` elements.
template <typename T, typename Body>
const char* with_head_lanes(int64_t size, bool vectors, const Body& body) {
  constexpr int kVector = kAccessBytes / sizeof(T);
  static_assert(kMaxHeadSize == 8 * kWarp);
  if (!vectors) return body(Constant<1>{}, Constant<kWarp>{}, Constant<8>{});
  if (size <= 8 * kVector) return body(Constant<kVector>{}, Constant<8>{}, Constant<1>{});
  if (size <= 16 * kVector) return body(Constant<kVector>{}, Constant<16>{}, Constant<1>{});
  constexpr int kChunks = kMaxHeadSize / (kVector * kWarp);
  return body(Constant<kVector>{}, Constant<kWarp>{}, Constant<kChunks>{});
}

// Distances between heads in bytes.
template <typename T>
int64_t head_bytes(Heads x) {
  return (x.batch_stride | x.time_stride | x.head_stride) * int64_t{sizeof(T)};
}

}  // namespace pgolf::cuda
