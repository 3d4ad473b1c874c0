// How embed_smear lies on a GPU: what its kernels are given, the rows that a warp holds, and what it
// knows of the positions of a chunk.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/packed.cuh"
#include "embed_smear.h"

namespace pgolf::cuda {
namespace {

constexpr int kBlock = 128;  // few threads, as each holds several rows in registers
constexpr int kWarps = kBlock / kWarp;
constexpr int64_t kRun = 8;  // tokens in a row
static_assert(kWarps == kSmearChunksPerBlock && kWarp == kSmearChunk);

__device__ inline int64_t this_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

// Table elements are T, those of x and of bigrams X.
template <typename T, typename X>
struct Inputs {
  EmbedSmearShape shape;
  const int64_t* ids;
  const T* table;
  const X* bigram;
  const float *scale_at, *gate;
  const bool* starts;
  const int64_t* bigram_ids;
  int64_t bigram_rows;

  __device__ int64_t tokens() const { return shape.batch * shape.time; }
  __device__ int width() const { return static_cast<int>(shape.width); }
  __device__ float scale() const { return bigram && scale_at ? *scale_at : 1.0f; }
  // The row of the table for an id; one too many for an id that it does not have.
  __device__ int64_t row(int64_t id) const {
    return id >= 0 && id < shape.vocab ? id : shape.vocab;
  }
  // The row of its bigram; -1 for an id that their table does not have.
  __device__ int64_t bigram_row(int64_t token) const {
    if (bigram_ids == nullptr) return token;
    const int64_t id = bigram_ids[token];
    return id >= 0 && id < bigram_rows ? id : -1;
  }
  // Whether a token, which may be one too many, sees the one before it.
  __device__ bool joined(int64_t token) const {
    return gate && token < tokens() && divide(token, shape.time).rest != 0 &&
           !(starts && starts[token]);
  }
};

// Rows as a warp holds them.
template <typename T, typename X, int kVector, int kChunks>
struct Rows {
  using Lanes = Row<X, kVector, kWarp, kChunks>;
  using TableLanes = Row<T, kVector, kWarp, kChunks>;
  using Floats = Row<float, kVector, kWarp, kChunks>;
  static constexpr int kCount = Lanes::kCount;
  static constexpr int kWidth = kCount * kWarp;  // the most that fits

  using OfTable = Packed<T, kVector, kWarp, kChunks>;
  using OfX = Packed<X, kVector, kWarp, kChunks>;

  // What makes e of a token.
  struct Fetched {
    OfTable table;
    OfX bigram;
    bool known;
  };
  // Where its bigram and its row of the table begin, if these have one.
  __device__ static Fetched fetch(const Inputs<T, X>& args, int64_t bigram, bool bigram_known,
                                  int64_t row, bool known) {
    const int width = args.width();
    return {OfTable::load(args.table + row, width, known),
            OfX::load(args.bigram + bigram, width, args.bigram && bigram_known), known};
  }

  // e, of rows that are zero where the token has none.
  __device__ static Lanes embedding(const TableLanes& table, float scale, const Lanes& bigram) {
    Lanes e;
#pragma unroll
    for (int i = 0; i < kCount; ++i) e.at[i] = table.at[i] + scale * bigram.at[i];
    return e;
  }

  // The gate's g; it has no alignment to rely on.
  __device__ static Floats gate(const Inputs<T, X>& args) {
    Floats g = Floats::zero();
    if (args.gate == nullptr) return g;
    const auto each = [&](const auto& body) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int place = Floats::place(i / kVector) + i % kVector;
        if (place < args.width()) body(g.at[i], place);
      }
    };
    each([&](float& x, int place) { x = args.gate[place]; });  // all on their way
    each([&](float& x, int) { x = sigmoid(x); });
    return g;
  }
};

// Rounds a row of sums to the elements of a table.
template <typename T, int kVector, int kChunks>
__device__ inline void store_as(const Row<float, kVector, kWarp, kChunks>& sum, T* to, int size) {
  Row<T, kVector, kWarp, kChunks> row;
#pragma unroll
  for (int i = 0; i < kVector * kChunks; ++i) row.at[i] = sum.at[i];
  row.store(to, size);
}

// What the lanes of a warp know of the positions of its chunk, a lane one, so that no load of a row
// waits for another.
template <typename T, typename X>
struct Positions {
  int count;
  // Where the token's row of x, its row of the table and its bigram begin.
  int64_t own_place, own_row_place, own_bigram_place;
  float own_rstd;
  // Of all of them, a bit each: the next token sees this one; its id is one of the table's; the
  // next position has another id; there is a bigram.
  unsigned seen, known, ends, bigram_known;

  __device__ Positions(const Inputs<T, X>& args, const int32_t* order, const float* rstds,
                       int64_t begin) {
    const int64_t left = args.tokens() - begin;
    count = static_cast<int>(left < kWarp ? left : kWarp);
    const bool here = this_lane() < count;
    const int64_t token = here ? order[begin + this_lane()] : 0;
    const int64_t row = here ? args.row(args.ids[token]) : args.shape.vocab;
    own_rstd = here ? rstds[token] : 0.0f;
    seen = __ballot_sync(~0u, here && args.joined(token + 1));
    known = __ballot_sync(~0u, row < args.shape.vocab);
    const int64_t row_after = __shfl_down_sync(~0u, row, 1);
    ends = __ballot_sync(~0u, this_lane() + 1 < count && row != row_after);
    const int64_t bigram = here ? args.bigram_row(token) : -1;
    bigram_known = __ballot_sync(~0u, bigram >= 0);
    own_bigram_place = bigram * args.width();
    own_place = token * args.width();
    own_row_place = row * args.width();
  }

  __device__ int64_t place(int i) const { return __shfl_sync(~0u, own_place, i); }
  __device__ int64_t row_place(int i) const { return __shfl_sync(~0u, own_row_place, i); }
  __device__ int64_t bigram_place(int i) const {
    return __shfl_sync(~0u, own_bigram_place, i);
  }
  __device__ float rstd(int i) const { return __shfl_sync(~0u, own_rstd, i); }
};

// The rows that the gradient of e at a position is made from: those of e, and of dx its own and, if
// that token sees this one, the next.
template <typename R>
struct Position {
  typename R::Fetched e;
  typename R::OfX own, next;
};
template <typename R, typename T, typename X>
__device__ inline Position<R> fetch(const Inputs<T, X>& args, const Positions<T, X>& at,
                                    const X* dx, int i) {
  const int width = args.width();
  const int64_t place = at.place(i);
  return {R::fetch(args, at.bigram_place(i), at.bigram_known >> i & 1, at.row_place(i),
                   at.known >> i & 1),
          R::OfX::load(dx + place, width, true),
          R::OfX::load(dx + place + width, width, at.seen >> i & 1)};
}

}  // namespace
}  // namespace pgolf::cuda
