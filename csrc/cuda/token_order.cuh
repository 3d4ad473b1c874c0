// Tokens sorted by id on a GPU, stable; the order depends on nothing but the ids.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.cuh"
#include "embed_smear.h"

namespace pgolf::cuda {

constexpr int kOrderWarps = 32;
constexpr int kOrderThreads = kOrderWarps * kWarp;
constexpr int kOrderBlocks = 128;  // of a list, each with ids of its own
constexpr int kOrderIds = kMaxOrderVocab / kOrderBlocks + 1;
constexpr int kOrderLists = 4;  // that a launch takes, in its arguments
constexpr int kOrderAhead = 8;  // loads that a thread waits for at once

// body(token, key) for `count` tokens from `begin` on, in their order and a warp's at once: the key
// is the id, `vocab` for one that the table does not have, and more than that in lanes beyond the
// end, whose token may be more than an int holds.
template <typename Body>
__device__ inline void for_keys(const int64_t* ids, int begin, int count, int vocab,
                                const Body& body) {
  for (int done = 0; done < count; done += kOrderAhead * kWarp) {
    const int left = count - done - this_lane();
    const int64_t first = int64_t{begin} + done + this_lane();
    int keys[kOrderAhead];
#pragma unroll
    for (int i = 0; i < kOrderAhead; ++i) {
      const bool there = i * kWarp < left;
      const auto id = static_cast<uint64_t>(there ? ids[first + i * kWarp] : 0);
      keys[i] = !there ? INT32_MAX : id < vocab ? static_cast<int>(id) : vocab;
    }
#pragma unroll
    for (int i = 0; i < kOrderAhead; ++i) body(first + i * kWarp, keys[i]);
  }
}

// body(key, its lanes) for every key below `keys` that a lane of the warp has.
template <typename Body>
__device__ inline void for_equal_keys(unsigned key, unsigned keys, const Body& body) {
  unsigned left = __ballot_sync(~0u, key < keys);
  while (left != 0) {
    const unsigned chosen = __shfl_sync(~0u, key, kWarp - 1 - __clz(left));
    const unsigned lanes = __ballot_sync(~0u, key == chosen);
    body(chosen, lanes);
    left &= ~lanes;
  }
}

struct OrderLists {
  TokenIds lists[kOrderLists];
};

// Counting sorts in one launch: a block reads all ids of a list and writes the tokens of
// `per_block` of them. (embed_smear's backward has three launches by it instead of 27; not timed.)
// Each of its warps has a part of the tokens; from how many of an id each has found follows where
// it puts its own.
static __global__ void __launch_bounds__(kOrderThreads, 1)
    token_order_blocks(OrderLists all, int items) {
  __shared__ int places[kOrderWarps][kOrderIds];  // what a warp found of an id, then where it goes
  __shared__ int totals[kOrderIds], smaller[kOrderWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const TokenIds list = all.lists[item / kOrderBlocks];
    const int count = static_cast<int>(list.count), vocab = static_cast<int>(list.vocab);
    const int per_block = vocab / kOrderBlocks + 1;
    const int first = item % kOrderBlocks * per_block;
    if (first > vocab) continue;  // for all threads of the block
    // Parts of whole warps' tokens, the last of which may be less or nothing.
    const int part = (count / kOrderThreads + (count % kOrderThreads != 0)) * kWarp;
    const int begin = warp * int64_t{part} < count ? warp * part : count;
    const int own = part < count - begin ? part : count - begin;
    const int keys = per_block < vocab + 1 - first ? per_block : vocab + 1 - first;
    for (int i = this_lane(); i < keys; i += kWarp) places[warp][i] = 0;
    __syncwarp();
    int found_smaller = 0;
    for_keys(list.ids, begin, own, vocab, [&](int64_t, int key) {
      found_smaller += key < first;
      for_equal_keys(key - first, keys, [&](unsigned which, unsigned lanes) {
        if (this_lane() == 0) places[warp][which] += __popc(lanes);
      });
    });
    found_smaller = group_sum<kWarp>(found_smaller);
    if (this_lane() == 0) smaller[warp] = found_smaller;
    __syncthreads();
    if (thread < keys) {
      int total = 0;
      for (int w = 0; w < kOrderWarps; ++w) total += places[w][thread];
      totals[thread] = total;
    }
    __syncthreads();
    if (thread < keys) {
      int place = 0;
      for (int w = 0; w < kOrderWarps; ++w) place += smaller[w];
      for (int i = 0; i < thread; ++i) place += totals[i];
      list.bounds[first + thread] = place;
      for (int w = 0; w < kOrderWarps; ++w) {
        const int found = places[w][thread];
        places[w][thread] = place;
        place += found;
      }
    }
    __syncthreads();
    for_keys(list.ids, begin, own, vocab, [&](int64_t token, int key) {
      for_equal_keys(key - first, keys, [&](unsigned which, unsigned lanes) {
        const int place = places[warp][which];
        const unsigned before = lanes & ((1u << this_lane()) - 1);
        if (lanes >> this_lane() & 1) list.order[place + __popc(before)] = static_cast<int>(token);
        __syncwarp();  // all have read the place
        if (this_lane() == 0) places[warp][which] = place + __popc(lanes);
        __syncwarp();
      });
    });
    __syncthreads();  // the next ids use the same memory
  }
}

}  // namespace pgolf::cuda
