// embed_smear on a GPU: the formulas of embed_smear.h, a warp a row. Forward, a warp takes some
// tokens in a row, so that it has the one before at hand. Backward, it takes a chunk of tokens that
// are sorted by id, and has the rows of the next one on their way while it works on one. The
// gradient of the token behind lies elsewhere in that order and is read anew: to keep it would be
// to write a row, and to read it, for each row that is saved.
#include "embed_smear.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/embed_smear.cuh"
#include "cuda/launch.h"
#include "cuda/token_order.cuh"

namespace pgolf::cuda {
namespace {

template <typename T, typename X, int kVector, int kChunks>
__global__ void __launch_bounds__(kBlock, 2)
    embed_smear_forward(EmbedSmearShape shape, const int64_t* __restrict__ ids,
                        const T* __restrict__ table, const X* __restrict__ bigram,
                        const float* __restrict__ scale, const float* __restrict__ gate,
                        const bool* __restrict__ starts, const int64_t* __restrict__ bigram_ids,
                        int64_t bigram_rows, X* __restrict__ x,
                        float* __restrict__ rstds) {
  using R = Rows<T, X, kVector, kChunks>;
  using Lanes = typename R::Lanes;
  const Inputs<T, X> args = {shape, ids, table, bigram, scale, gate, starts, bigram_ids, bigram_rows};
  const int width = args.width();
  const float factor = args.scale();
  const auto g = R::gate(args);
  const int64_t runs = (args.tokens() + kRun - 1) / kRun;
  for (int64_t run = this_warp(); run < runs; run += static_cast<int64_t>(gridDim.x) * kWarps) {
    // Lane 0 looks at the token before the run, the others at those of the run.
    const int64_t before_run = run * kRun - 1, left = args.tokens() - run * kRun;
    const int count = static_cast<int>(left < kRun ? left : kRun);
    const int64_t own_token = before_run + this_lane();
    const bool here = own_token >= 0 && this_lane() <= count;
    const int64_t own_row = here ? args.row(ids[own_token]) : shape.vocab;
    const int64_t own_bigram = here ? args.bigram_row(own_token) : -1;
    const unsigned known = __ballot_sync(~0u, own_row < shape.vocab && own_bigram >= 0);
    const unsigned joined = __ballot_sync(~0u, here && args.joined(own_token));
    const auto fetch = [&](int i) {
      const int64_t bigram_place = __shfl_sync(~0u, own_bigram * width, i);
      const int64_t place = __shfl_sync(~0u, own_row * width, i);
      return R::fetch(args, bigram_place, known >> i & 1, place, known >> i & 1);
    };
    Lanes before = Lanes::zero();
    int i = joined >> 1 & 1 ? 0 : 1;
    constexpr bool kAhead = kVector > 1;
    typename R::Fetched ahead = {};
    if (kAhead) ahead = fetch(i);
    for (; i <= count; ++i) {
      if (!kAhead) ahead = fetch(i);
      const bool has_row = ahead.known;
      const Lanes e = R::embedding(ahead.table.unpacked(), factor, ahead.bigram.unpacked());
      if (kAhead && i < count) ahead = fetch(i + 1);
      // An id that the table does not have gives NaN here, and by it in all that follows.
      const float rstd =
          has_row ? rms_rstd(e.dot(e), shape.width, static_cast<float>(shape.eps)) : NAN;
      const Lanes n = Lanes::zero().plus(rstd, e);
      if (i > 0) {
        const int64_t token = before_run + i;
        const bool blended = joined >> i & 1;
        if (this_lane() == 0) rstds[token] = rstd;
        Lanes out;
#pragma unroll
        for (int j = 0; j < R::kCount; ++j) {
          out.at[j] = (1.0f - g.at[j]) * n.at[j] + (blended ? g.at[j] * before.at[j] : 0.0f);
        }
        out.store(x + token * shape.width, width);
      }
      before = n;
    }
  }
}

// Registers for the rows that a position needs, as they lie in memory.
template <typename T, typename X, int kVector, int kChunks>
constexpr int kRowWords = kChunks * (Rows<T, X, kVector, kChunks>::OfTable::kWords +
                                     3 * Rows<T, X, kVector, kChunks>::OfX::kWords);
// 3 blocks an SM leave 168 a thread, 2 leave 255: so many that nothing is spilled. The next
// position's rows are on their way beside those at hand unless even 255 are too few.
template <typename T, typename X, int kVector, int kChunks>
constexpr int kBlocksPerSm = kRowWords<T, X, kVector, kChunks> > 40 ? 2 : 3;
template <typename T, typename X, int kVector, int kChunks>
constexpr bool kFetchAhead = kVector > 1 && kRowWords<T, X, kVector, kChunks> <= 64;

// The row of partials for the block: its sums for the gate and, last, for the scale, each over its
// warps in order.
template <int kWidth>
__device__ inline void write_sums(const float (&gate_sums)[kWarps][kWidth], float scale_sum,
                                  const float* gates, int width, float* partials) {
  __shared__ float scale_sums[kWarps];
  scale_sum = group_sum<kWarp>(scale_sum);
  if (this_lane() == 0) scale_sums[threadIdx.x / kWarp] = scale_sum;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i <= width; i += kBlock) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += i < width ? gate_sums[w][i] : scale_sums[w];
    if (i < width) total *= gates[i] * (1.0f - gates[i]);
    partials[static_cast<int64_t>(blockIdx.x) * (width + 1) + i] = total;
  }
}

// A warp a chunk; csrc/embed_smear.h says where pieces go.
template <typename T, typename X, int kVector, int kChunks>
__global__ void __launch_bounds__(kBlock, (kBlocksPerSm<T, X, kVector, kChunks>))
    embed_smear_chunks(EmbedSmearShape shape, const int64_t* __restrict__ ids,
                       const T* __restrict__ table, const X* __restrict__ bigram,
                       const float* __restrict__ scale, const float* __restrict__ gate,
                       const bool* __restrict__ starts, const int64_t* __restrict__ bigram_ids,
                       int64_t bigram_rows, const int32_t* __restrict__ order,
                       const X* __restrict__ dx, const float* __restrict__ rstds,
                       T* __restrict__ dtable, X* __restrict__ dbigram,
                       float* __restrict__ pieces, float* __restrict__ partials) {
  using R = Rows<T, X, kVector, kChunks>;
  using Lanes = typename R::Lanes;
  using Floats = typename R::Floats;
  const Inputs<T, X> args = {shape, ids, table, bigram, scale, gate, starts, bigram_ids, bigram_rows};
  alignas(32) __shared__ float gates[R::kWidth];
  alignas(32) __shared__ float gate_sums[kWarps][R::kWidth];
  const int width = args.width(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t chunk = this_warp();
  const Positions<T, X> at(args, order, rstds, chunk * kSmearChunk);
  for (int i = static_cast<int>(threadIdx.x); i < R::kWidth; i += kBlock) {
    gates[i] = gate && i < width ? sigmoid(gate[i]) : 0.0f;
  }
  __syncthreads();

  const float factor = args.scale(), one_by_width = 1.0f / static_cast<float>(width);
  Floats sum = Floats::zero(), gate_sum = Floats::zero();
  float scale_sum = 0;
  bool first = true;
  constexpr bool kAhead = kFetchAhead<T, X, kVector, kChunks>;
  if (!kAhead) gate_sum.store(gate_sums[warp], R::kWidth);
  Position<R> ahead = {};
  if (kAhead && at.count > 0) ahead = fetch<R>(args, at, dx, 0);
  for (int i = 0; i < at.count; ++i) {
    const Position<R> now = kAhead ? ahead : fetch<R>(args, at, dx, i);
    const float rstd = at.rstd(i);
    const Lanes added = now.e.bigram.unpacked();
    const Lanes e = R::embedding(now.e.table.unpacked(), factor, added);
    const Lanes n = Lanes::zero().plus(rstd, e);
    const Lanes next = now.next.unpacked();
    Lanes dn = now.own.unpacked();
    const Floats g = Floats::load(gates, R::kWidth);
    if (!kAhead) gate_sum = Floats::load(gate_sums[warp], R::kWidth);
#pragma unroll
    for (int j = 0; j < R::kCount; ++j) {
      const float difference = next.at[j] - dn.at[j];
      gate_sum.at[j] += n.at[j] * difference;
      dn.at[j] += g.at[j] * difference;
    }
    if (!kAhead) gate_sum.store(gate_sums[warp], R::kWidth);
    // The registers of this position's rows are free.
    if (kAhead && i + 1 < at.count) ahead = fetch<R>(args, at, dx, i + 1);
    const float mean = dn.dot(n) * one_by_width;
    Lanes dadded;
    float along_bigram = 0;
#pragma unroll
    for (int j = 0; j < R::kCount; ++j) {
      const float de = rstd * (dn.at[j] - mean * n.at[j]);
      sum.at[j] += de;
      along_bigram += de * added.at[j];
      dadded.at[j] = factor * de;
    }
    scale_sum += along_bigram;
    if (dbigram) dadded.store(dbigram + at.place(i), width);
    if (at.ends >> i & 1) {
      const int64_t place = at.row_place(i);
      if (first) {
        sum.store(pieces + 2 * chunk * width, width);
      } else if (at.known >> i & 1) {
        store_as(sum, dtable + place, width);
      }
      first = false;
      sum = Floats::zero();
    }
  }
  if (at.count > 0) sum.store(pieces + (2 * chunk + (first ? 0 : 1)) * width, width);
  gate_sum.store(gate_sums[warp], R::kWidth);
  write_sums(gate_sums, scale_sum, gates, width, partials);
}

// The sum of the first `size` columns of rows 0 to count - 1, which place(i) gives, in the lanes of
// warp 0: each warp adds up every kParts-th row, and warp 0 what they have, all in order.
template <int kVector, typename Place>
__device__ inline Row<float, kVector, kWarp, 1> sum_of_rows(int64_t count, int size,
                                                           const Place& place) {
  using Columns = Row<float, kVector, kWarp, 1>;
  constexpr int kParts = kThreads / kWarp;
  alignas(16) __shared__ float parts[kParts][kWarp * kVector];
  const int part = static_cast<int>(threadIdx.x) / kWarp;
  Columns sum = Columns::zero();
#pragma unroll 4
  for (int64_t i = part; i < count; i += kParts) {
    sum = sum.plus(1.0f, Columns::load(place(i), size));
  }
  __syncthreads();  // the parts of the sum before have been read
  sum.store(parts[part], kWarp * kVector);
  __syncthreads();
  if (part == 0) {
    for (int i = 1; i < kParts; ++i) {
      sum = sum.plus(1.0f, Columns::load(parts[i], kWarp * kVector));
    }
  }
  return sum;
}

// What is left to be added up, some columns a block: the sums for gate and scale, and the rows of
// dtable that are none or several of the pieces.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    embed_smear_rows(EmbedSmearShape shape, const int32_t* __restrict__ bounds,
                     const float* __restrict__ pieces, const float* __restrict__ partials,
                     int64_t blocks, T* __restrict__ dtable, float* __restrict__ sums) {
  using Columns = Row<float, kVector, kWarp, 1>;
  const int width = static_cast<int>(shape.width);
  const bool last = threadIdx.x < kWarp;  // of the warps
  const int64_t of_sums = width / kWarp + 1, of_row = (width - 1) / (kVector * kWarp) + 1;
  for (int64_t item = blockIdx.x; item < of_sums + shape.vocab * of_row; item += gridDim.x) {
    if (item < of_sums) {
      const int column = static_cast<int>(item) * kWarp, size = width + 1 - column;
      const auto sum = sum_of_rows<1>(
          blocks, size, [&](int64_t i) { return partials + i * (width + 1) + column; });
      if (last) sum.store(sums + column, size);
      continue;
    }
    const Divided place = divide(item - of_sums, of_row);
    const int64_t id = place.quotient, begin = bounds[id], end = bounds[id + 1];
    const int column = static_cast<int>(place.rest) * kVector * kWarp, size = width - column;
    const SmearPieces held = smear_pieces(begin, end, shape.batch * shape.time);
    if (begin < end && held.whole) continue;  // for all threads of the block
    const int64_t chunks = begin < end ? held.last_chunk - held.first_chunk + 1 : 0;
    const Columns sum = sum_of_rows<kVector>(chunks, size, [&](int64_t i) {
      return pieces + held.row(held.first_chunk + i, begin) * width + column;
    });
    if (last) store_as(sum, dtable + id * width + column, size);
  }
}

// body(table element, x element, vector, chunks) with the constants that fit.
template <typename Body>
const char* with_rows(const EmbedSmearShape& shape, bool vectors, const Body& body) {
  return with_element(shape.table_dtype, [&](auto table) {
    return with_element(shape.x_dtype, [&](auto x) {
      constexpr int kWide = sizeof(table) > sizeof(x) ? sizeof(table) : sizeof(x);
      constexpr int kVector = kAccessBytes / kWide;
      constexpr int kMost = kMaxSmearWidth / kWarp;  // numbers a lane
      const bool narrow = shape.width <= 16 * kWarp;
      if (!vectors && narrow) return body(table, x, Constant<1>{}, Constant<16>{});
      if (!vectors) return body(table, x, Constant<1>{}, Constant<kMost>{});
      if (narrow) return body(table, x, Constant<kVector>{}, Constant<16 / kVector>{});
      return body(table, x, Constant<kVector>{}, Constant<kMost / kVector>{});
    });
  });
}

// Whether rows can be moved in vectors: in the narrower type, too, one begins every 16 bytes.
bool aligned_rows(const EmbedSmearShape& shape, std::initializer_list<const void*> addresses) {
  return aligned(addresses, {shape.width * 2});
}

}  // namespace

const char* embed_smear(const EmbedSmearShape& shape, const EmbedSmearInputs& in, void* x,
                        void* rstd, void* stream) {
  const int64_t runs = (shape.batch * shape.time + kRun - 1) / kRun;
  const bool vectors = aligned_rows(shape, {in.table, in.bigram, x});
  return with_rows(shape, vectors, [&](auto table, auto element, auto vector, auto chunks) {
    using T = decltype(table);
    using X = decltype(element);
    return launch(embed_smear_forward<T, X, decltype(vector)::value, decltype(chunks)::value>,
                  stepping_blocks(runs, kWarps), kBlock, stream, shape, in.ids,
                  static_cast<const T*>(in.table), static_cast<const X*>(in.bigram),
                  static_cast<const float*>(in.scale), static_cast<const float*>(in.gate),
                  in.starts, in.bigram_ids, in.bigram_rows, static_cast<X*>(x), static_cast<float*>(rstd));
  });
}

const char* token_order(const TokenIds* lists, int count, void* stream) {
  for (int begin = 0; begin < count; begin += kOrderLists) {
    OrderLists some = {};
    const int size = std::min(kOrderLists, count - begin);
    std::copy_n(lists + begin, size, some.lists);
    const int items = size * kOrderBlocks;
    if (const char* error = launch(token_order_blocks, stepping_blocks(items, 1), kOrderThreads,
                                   stream, some, items)) {
      return error;
    }
  }
  return nullptr;
}

const char* embed_smear_backward(const EmbedSmearShape& shape, const EmbedSmearInputs& in,
                                 const TokenOrder& tokens, const void* dx, const void* rstd,
                                 const EmbedSmearGradients& out, const EmbedSmearScratch& scratch,
                                 void* stream) {
  const int64_t blocks = smear_blocks(shape.batch * shape.time);
  float* const pieces = static_cast<float*>(scratch.pieces);
  float* const partials = static_cast<float*>(scratch.partials);
  const bool vectors =
      aligned_rows(shape, {in.table, in.bigram, dx, out.dtable, out.dbigram, pieces});
  const char* error =
      with_rows(shape, vectors, [&](auto table, auto element, auto vector, auto chunks) {
        using T = decltype(table);
        using X = decltype(element);
        return launch(embed_smear_chunks<T, X, decltype(vector)::value, decltype(chunks)::value>,
                      blocks, kBlock, stream, shape, in.ids, static_cast<const T*>(in.table),
                      static_cast<const X*>(in.bigram), static_cast<const float*>(in.scale),
                      static_cast<const float*>(in.gate), in.starts, in.bigram_ids, in.bigram_rows,
                      tokens.order,
                      static_cast<const X*>(dx), static_cast<const float*>(rstd),
                      static_cast<T*>(out.dtable), static_cast<X*>(out.dbigram), pieces, partials);
      });
  if (error) return error;
  return with_element(shape.table_dtype, [&](auto table) {
    using T = decltype(table);
    const auto start = [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int64_t of_rows = shape.vocab * blocks_for(shape.width, kVector * kWarp);
      return launch(embed_smear_rows<T, kVector>,
                    stepping_blocks(blocks_for(shape.width + 1, kWarp) + of_rows, 1), kThreads,
                    stream, shape, tokens.bounds, pieces, partials, blocks,
                    static_cast<T*>(out.dtable), static_cast<float*>(out.sums));
    };
    return vectors ? start(Constant<4>{}) : start(Constant<1>{});
  });
}

}  // namespace pgolf::cuda
