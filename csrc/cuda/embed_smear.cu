// embed_smear on a GPU: the formulas of embed_smear.h, a warp a row. Forward, a warp takes some
// tokens in a row, so that it has the one before at hand. Backward, it takes a chunk of tokens that
// are sorted by id: the sums of a piece stay in shared memory, and the gradient of the next token,
// which lies elsewhere in that order, is read anew.
#include "embed_smear.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/head_lanes.h"
#include "cuda/launch.h"
#include "cuda/partials.cuh"

namespace pgolf::cuda {
namespace {

constexpr int kBlock = 128;  // few threads, as each holds several rows in registers
constexpr int kWarps = kBlock / kWarp;
constexpr int64_t kRun = 8;  // tokens in a row
static_assert(kWarps == kSmearChunksPerBlock);

__device__ inline int64_t this_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

struct Inputs {
  EmbedSmearShape shape;
  EmbedSmearInputs in;

  __device__ int64_t tokens() const { return shape.batch * shape.time; }
  __device__ int width() const { return static_cast<int>(shape.width); }
  __device__ float scale() const { return in.scale ? *static_cast<const float*>(in.scale) : 1.0f; }
  __device__ bool known(int64_t id) const { return id >= 0 && id < shape.vocab; }
  // Whether a token, which may be one too many, sees the one before it.
  __device__ bool joined(int64_t token) const {
    return in.gate && token < tokens() && divide(token, shape.time).rest != 0 &&
           !(in.starts && in.starts[token]);
  }
};

// Rows as a warp holds them. Table elements are T, those of x and of bigrams X.
template <typename T, typename X, int kVector, int kChunks>
struct Rows {
  using Lanes = Row<X, kVector, kWarp, kChunks>;
  using TableLanes = Row<T, kVector, kWarp, kChunks>;
  using Floats = Row<float, kVector, kWarp, kChunks>;
  static constexpr int kCount = Lanes::kCount;
  static constexpr int kWidth = kCount * kWarp;  // the most that fits

  __device__ static Lanes from_bigram(const Inputs& args, int64_t token) {
    const X* const bigram = static_cast<const X*>(args.in.bigram);
    return bigram ? Lanes::load(bigram + token * args.shape.width, args.width()) : Lanes::zero();
  }

  // e of a token; NaN for an id that the table does not have.
  __device__ static Lanes embedding(const Inputs& args, int64_t id, const Lanes& bigram) {
    Lanes e;
    if (args.known(id)) {
      const T* const table = static_cast<const T*>(args.in.table);
      const TableLanes row = TableLanes::load(table + id * args.shape.width, args.width());
#pragma unroll
      for (int i = 0; i < kCount; ++i) e.at[i] = row.at[i];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) e.at[i] = NAN;
    }
    return args.in.bigram ? e.plus(args.scale(), bigram) : e;
  }

  // The gate's g; it has no alignment to rely on.
  __device__ static Floats gate(const Inputs& args) {
    Floats g = Floats::zero();
    const float* const gate = static_cast<const float*>(args.in.gate);
    if (gate == nullptr) return g;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int place = Floats::place(chunk) + i;
        if (place < args.width()) g.at[chunk * kVector + i] = sigmoid(gate[place]);
      }
    }
    return g;
  }
};

template <typename T, typename X, int kVector, int kChunks>
__global__ void __launch_bounds__(kBlock) embed_smear_forward(Inputs args, X* x, float* rstds) {
  using R = Rows<T, X, kVector, kChunks>;
  using Lanes = typename R::Lanes;
  const auto g = R::gate(args);
  const auto normed = [&](int64_t token, float& rstd) {
    const Lanes e = R::embedding(args, args.in.ids[token], R::from_bigram(args, token));
    rstd = rms_rstd(e.dot(e), args.shape.width, static_cast<float>(args.shape.eps));
    return Lanes::zero().plus(rstd, e);
  };
  const int64_t runs = (args.tokens() + kRun - 1) / kRun;
  for (int64_t run = this_warp(); run < runs; run += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t begin = run * kRun;
    const int64_t end = begin + kRun < args.tokens() ? begin + kRun : args.tokens();
    Lanes before = Lanes::zero();
    float rstd;
    if (args.joined(begin)) before = normed(begin - 1, rstd);
    for (int64_t token = begin; token < end; ++token) {
      const Lanes n = normed(token, rstd);
      if (this_lane() == 0) rstds[token] = rstd;
      const bool joined = args.joined(token);
      Lanes out;
#pragma unroll
      for (int i = 0; i < R::kCount; ++i) {
        out.at[i] = (1.0f - g.at[i]) * n.at[i] + (joined ? g.at[i] * before.at[i] : 0.0f);
      }
      out.store(x + token * args.shape.width, args.width());
      before = n;
    }
  }
}

// Registers for the rows at hand, without spills: 3 blocks an SM leave 168 a thread, 2 leave 255.
template <int kVector, int kChunks>
constexpr int kBlocksPerSm = kVector == 1 || kVector * kChunks > 16 ? 2 : 3;

// A warp a chunk; csrc/embed_smear.h says where pieces go.
template <typename T, typename X, int kVector, int kChunks>
__global__ void __launch_bounds__(kBlock, (kBlocksPerSm<kVector, kChunks>))
    embed_smear_chunks(Inputs args, const int64_t* order, const X* dx, const float* rstds,
                       T* dtable, X* dbigram, float* pieces, float* partials) {
  using R = Rows<T, X, kVector, kChunks>;
  using Lanes = typename R::Lanes;
  using Floats = typename R::Floats;
  // What does not change and what is only added to lies here: registers are for the rows at hand.
  alignas(32) __shared__ float gates[R::kWidth];
  alignas(32) __shared__ float gate_sums[kWarps][R::kWidth];
  alignas(32) __shared__ float piece_sums[kWarps][R::kWidth];
  __shared__ float scale_sums[kWarps];
  const int width = args.width(), warp = static_cast<int>(threadIdx.x) / kWarp;
  if (warp == 0) R::gate(args).store(gates, width);
  Floats::zero().store(gate_sums[warp], width);
  Floats::zero().store(piece_sums[warp], width);
  __syncthreads();
  const int64_t chunk = this_warp(), begin = chunk * kSmearChunk;
  const int64_t end = begin + kSmearChunk < args.tokens() ? begin + kSmearChunk : args.tokens();
  float scale_sum = 0;
  bool first = true;
  int64_t id = begin < end ? args.in.ids[order[begin]] : 0;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t token = order[position], before = id;
    id = args.in.ids[token];
    if (id != before) {
      const Floats sum = Floats::load(piece_sums[warp], width);
      if (first) {
        sum.store(pieces + 2 * chunk * width, width);
      } else if (args.known(before)) {
        typename R::TableLanes row;
#pragma unroll
        for (int i = 0; i < R::kCount; ++i) row.at[i] = sum.at[i];
        row.store(dtable + before * width, width);
      }
      first = false;
      Floats::zero().store(piece_sums[warp], width);
    }
    const Lanes bigram = R::from_bigram(args, token);
    const float rstd = rstds[token];
    const Lanes n = Lanes::zero().plus(rstd, R::embedding(args, id, bigram));
    Lanes dn = Lanes::load(dx + token * width, width);
    if (args.in.gate) {
      const Lanes next = args.joined(token + 1) ? Lanes::load(dx + (token + 1) * width, width)
                                                : Lanes::zero();
      const Floats g = Floats::load(gates, width);
      Floats gate_sum = Floats::load(gate_sums[warp], width);
#pragma unroll
      for (int i = 0; i < R::kCount; ++i) {
        gate_sum.at[i] += n.at[i] * (next.at[i] - dn.at[i]);
        dn.at[i] = (1.0f - g.at[i]) * dn.at[i] + g.at[i] * next.at[i];
      }
      gate_sum.store(gate_sums[warp], width);
    }
    const float mean = dn.dot(n) / static_cast<float>(width);
    const Lanes de = Lanes::zero().plus(rstd, dn.plus(-mean, n));
    Floats sum = Floats::load(piece_sums[warp], width);
    float along_bigram = 0;
#pragma unroll
    for (int i = 0; i < R::kCount; ++i) {
      sum.at[i] += de.at[i];
      along_bigram += de.at[i] * bigram.at[i];
    }
    scale_sum += along_bigram;
    sum.store(piece_sums[warp], width);
    if (dbigram) Lanes::zero().plus(args.scale(), de).store(dbigram + token * width, width);
  }
  if (begin < end) {
    const Floats sum = Floats::load(piece_sums[warp], width);
    sum.store(pieces + (2 * chunk + (first ? 0 : 1)) * width, width);
  }

  // The block's sums for the gate and the scale, its warps in order.
  scale_sum = group_sum<kWarp>(scale_sum);
  if (this_lane() == 0) scale_sums[warp] = scale_sum;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i <= width; i += kBlock) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += i < width ? gate_sums[w][i] : scale_sums[w];
    if (i < width) total *= gates[i] * (1.0f - gates[i]);
    partials[static_cast<int64_t>(blockIdx.x) * (width + 1) + i] = total;
  }
}

// The rows of dtable that are none or several of the pieces: 32 columns of one a block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    embed_smear_rows(Inputs args, const int64_t* bounds, const float* pieces, T* dtable) {
  constexpr int kParts = kThreads / kWarp;
  __shared__ float sums[kParts][kWarp];
  const int64_t width = args.shape.width, columns = (width + kWarp - 1) / kWarp;
  const int part = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t item = blockIdx.x; item < args.shape.vocab * columns; item += gridDim.x) {
    const Divided place = divide(item, columns);
    const int64_t id = place.quotient, column = place.rest * kWarp + this_lane();
    const int64_t begin = bounds[id], end = bounds[id + 1];
    const SmearPieces held = smear_pieces(begin, end, args.tokens());
    if (begin < end && held.whole) continue;  // for all threads of the block
    float sum = 0;
    if (begin < end && column < width) {
      for (int64_t c = held.first_chunk + part; c <= held.last_chunk; c += kParts) {
        sum += pieces[held.row(c, begin) * width + column];
      }
    }
    sums[part][this_lane()] = sum;
    __syncthreads();
    if (part == 0 && column < width) {
      for (int i = 1; i < kParts; ++i) sum += sums[i][this_lane()];
      dtable[id * width + column] = narrow<T>(sum);
    }
    __syncthreads();
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
    using X = decltype(element);
    return launch(embed_smear_forward<decltype(table), X, decltype(vector)::value,
                                      decltype(chunks)::value>,
                  stepping_blocks(runs, kWarps), kBlock, stream, Inputs{shape, in},
                  static_cast<X*>(x), static_cast<float*>(rstd));
  });
}

const char* embed_smear_backward(const EmbedSmearShape& shape, const EmbedSmearInputs& in,
                                 const TokenOrder& tokens, const void* dx, const void* rstd,
                                 const EmbedSmearGradients& out, const EmbedSmearScratch& scratch,
                                 void* stream) {
  const int64_t blocks = smear_blocks(shape.batch * shape.time);
  const Inputs args = {shape, in};
  float* const pieces = static_cast<float*>(scratch.pieces);
  float* const partials = static_cast<float*>(scratch.partials);
  const bool vectors =
      aligned_rows(shape, {in.table, in.bigram, dx, out.dtable, out.dbigram, pieces});
  const char* error =
      with_rows(shape, vectors, [&](auto table, auto element, auto vector, auto chunks) {
        using T = decltype(table);
        using X = decltype(element);
        return launch(embed_smear_chunks<T, X, decltype(vector)::value, decltype(chunks)::value>,
                      blocks, kBlock, stream, args, tokens.order, static_cast<const X*>(dx),
                      static_cast<const float*>(rstd), static_cast<T*>(out.dtable),
                      static_cast<X*>(out.dbigram), pieces, partials);
      });
  if (error) return error;
  error = with_element(shape.table_dtype, [&](auto table) {
    using T = decltype(table);
    const int64_t items = shape.vocab * ((shape.width + kWarp - 1) / kWarp);
    return launch(embed_smear_rows<T>, stepping_blocks(items, 1), kThreads, stream, args,
                  tokens.bounds, static_cast<const float*>(pieces), static_cast<T*>(out.dtable));
  });
  if (error) return error;
  return sum_rows(partials, blocks, shape.width + 1, static_cast<float*>(out.sums), stream);
}

}  // namespace pgolf::cuda
