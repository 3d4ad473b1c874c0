// embed_smear on the CPU: the formulas of embed_smear.h, row by row in buffers that stay in the
// caches. Sums are in float for float and bf16, in double for double.
#include "embed_smear.h"

#include <algorithm>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/lanes.h"
#include "cpu/stream.h"
#include "host/parallel.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

template <typename F>
using Buffer = F[kMaxSmearWidth];

// e of a token, lanes at a time. Table elements are T, those of x and of bigrams X.
template <typename T, typename X>
struct Embedding {
  using F = compute_t<X>;
  const T* row;
  const X* bigram;  // or null
  Row<F> scale;

  template <typename L>
  Row<F> at(int64_t i, L lanes) const {
    const Row<F> e = lanes.load(row + i);
    return bigram ? e + scale * lanes.load(bigram + i) : e;
  }
};

template <typename T, typename X>
struct Operator {
  using F = compute_t<X>;
  EmbedSmearShape shape;
  EmbedSmearInputs in;
  F scale;
  alignas(64) Buffer<F> gate;  // g

  Operator(const EmbedSmearShape& s, const EmbedSmearInputs& inputs)
      : shape(s), in(inputs), scale(in.scale ? *static_cast<const F*>(in.scale) : F(1)) {
    if (!in.gate) return;
    for (int64_t i = 0; i < shape.width; ++i) gate[i] = sigmoid(static_cast<const F*>(in.gate)[i]);
  }

  int64_t tokens() const { return shape.batch * shape.time; }
  const X* bigram(int64_t token) const {
    if (!in.bigram) return nullptr;
    const int64_t row = in.bigram_ids ? in.bigram_ids[token] : token;
    return static_cast<const X*>(in.bigram) + row * shape.width;
  }
  // Whether a token sees the one before it.
  bool joined(int64_t token) const {
    return in.gate && token % shape.time != 0 && !(in.starts && in.starts[token]);
  }

  Embedding<T, X> embedding(int64_t token) const {
    const T* const row = static_cast<const T*>(in.table) + in.ids[token] * shape.width;
    return {row, bigram(token), Row<F>::filled(scale)};
  }

  // Writes e of a token; returns its rstd.
  F embed(int64_t token, F* e) const {
    const Embedding<T, X> from = embedding(token);
    Row<F> squares = Row<F>::filled(0);
    each_lanes<F>(shape.width, [&](int64_t i, auto lanes) {
      const Row<F> here = from.at(i, lanes);
      squares = squares + here * here;
      lanes.store(here, e + i);
    });
    return rms_rstd(squares.sum(), shape.width, static_cast<F>(shape.eps));
  }

  void forward(int64_t begin, int64_t end, const Output<X, kMaxSmearWidth>& x, F* rstds) const {
    alignas(64) Buffer<F> buffers[2];
    F* e = buffers[0];
    F* before = buffers[1];
    F rstd_before = 0;
    if (begin < end && joined(begin)) rstd_before = embed(begin - 1, before);
    for (int64_t token = begin; token < end; ++token) {
      const F own = rstds[token] = embed(token, e);
      x.row(token, [&](X* to) { blend(e, own, before, rstd_before, joined(token), to); });
      std::swap(e, before);
      rstd_before = own;
    }
  }

  void blend(const F* e, F rstd, const F* before, F rstd_before, bool with_before, X* to) const {
    const Row<F> factor = Row<F>::filled(rstd), factor_before = Row<F>::filled(rstd_before);
    each_lanes<F>(shape.width, [&](int64_t i, auto lanes) {
      Row<F> x = factor * lanes.load(e + i);
      if (in.gate) {
        const Row<F> g = lanes.load(gate + i);
        x = (Row<F>::filled(1) - g) * x;
        if (with_before) x = x + g * (factor_before * lanes.load(before + i));
      }
      lanes.store(x, to + i);
    });
  }
};

template <typename T, typename X>
struct Backward {
  using F = compute_t<X>;
  const Operator<T, X>& op;
  TokenOrder tokens;
  const X* dx;
  const F* rstds;
  T* dtable;
  X* dbigram;
  F* pieces;
  F* partials;

  int64_t id_at(int64_t position) const { return op.in.ids[tokens.order[position]]; }

  // n, dn and what the token adds to the sums of the gate; returns n . dn.
  F through_gate(int64_t token, F* n, F* dn, F* gate_sums) const {
    const int64_t width = op.shape.width;
    const X* const d = dx + token * width;
    const bool seen = token + 1 < op.tokens() && op.joined(token + 1);  // by the next
    const Embedding<T, X> from = op.embedding(token);
    const Row<F> rstd = Row<F>::filled(rstds[token]);
    Row<F> products = Row<F>::filled(0);
    each_lanes<F>(width, [&](int64_t i, auto lanes) {
      const Row<F> own = rstd * from.at(i, lanes), upstream = lanes.load(d + i);
      Row<F> result = upstream;
      if (op.in.gate) {
        const Row<F> g = lanes.load(op.gate + i);
        const Row<F> next = seen ? lanes.load(d + width + i) : Row<F>::filled(0);
        result = (Row<F>::filled(1) - g) * upstream + g * next;
        lanes.store(lanes.load(gate_sums + i) + own * (next - upstream), gate_sums + i);
      }
      products = products + own * result;
      lanes.store(own, n + i);
      lanes.store(result, dn + i);
    });
    return products.sum();
  }

  // Adds de of a token to `sum`, writes its dbigram; returns what it adds to the sum of the scale.
  F add_token(int64_t token, F* sum, F* gate_sums) const {
    alignas(64) Buffer<F> n, dn;
    const int64_t width = op.shape.width;
    const F along = through_gate(token, n, dn, gate_sums);
    const Row<F> mean = Row<F>::filled(along / static_cast<F>(width));
    const Row<F> rstd = Row<F>::filled(rstds[token]), scale = Row<F>::filled(op.scale);
    const X* const bigram = op.bigram(token);
    Row<F> along_bigram = Row<F>::filled(0);
    each_lanes<F>(width, [&](int64_t i, auto lanes) {
      const Row<F> de = rstd * (lanes.load(dn + i) - mean * lanes.load(n + i));
      lanes.store(lanes.load(sum + i) + de, sum + i);
      if (bigram == nullptr) return;
      along_bigram = along_bigram + de * lanes.load(bigram + i);
      lanes.store(scale * de, dbigram + token * width + i);
    });
    return along_bigram.sum();
  }

  template <typename To>
  void write(const F* sum, To* to) const {
    each_lanes<F>(op.shape.width,
                  [&](int64_t i, auto lanes) { lanes.store(lanes.load(sum + i), to + i); });
  }

  // One chunk of sorted positions: whole pieces to dtable, the first and the last to `pieces`.
  F chunk(int64_t index, F* gate_sums) const {
    alignas(64) Buffer<F> sum;
    const int64_t width = op.shape.width, begin = index * kSmearChunk;
    const int64_t end = std::min(begin + kSmearChunk, op.tokens());
    F scale_sum = 0;
    bool first = true;
    std::fill(sum, sum + width, F(0));
    for (int64_t position = begin; position < end; ++position) {
      if (position > begin && id_at(position) != id_at(position - 1)) {
        if (first) {
          write(sum, pieces + 2 * index * width);
        } else {
          write(sum, dtable + id_at(position - 1) * width);
        }
        first = false;
        std::fill(sum, sum + width, F(0));
      }
      scale_sum += add_token(tokens.order[position], sum, gate_sums);
    }
    write(sum, pieces + (2 * index + !first) * width);
    return scale_sum;
  }

  // The chunks that share a row of sums for gate and scale.
  void block(int64_t index) const {
    F* const sums = partials + index * (op.shape.width + 1);
    std::fill(sums, sums + op.shape.width + 1, F(0));
    const int64_t first = index * kSmearChunksPerBlock;
    const int64_t last = std::min(first + kSmearChunksPerBlock, smear_chunks(op.tokens()));
    for (int64_t i = first; i < last; ++i) sums[op.shape.width] += chunk(i, sums);
  }

  // A row of dtable that is none or several of the pieces.
  void table_row(int64_t id) const {
    const int64_t width = op.shape.width;
    const int64_t begin = tokens.bounds[id], end = tokens.bounds[id + 1];
    const SmearPieces held = smear_pieces(begin, end, op.tokens());
    if (begin < end && held.whole) return;
    alignas(64) Buffer<F> sum;
    std::fill(sum, sum + width, F(0));
    for (int64_t c = held.first_chunk; begin < end && c <= held.last_chunk; ++c) {
      const F* const piece = pieces + held.row(c, begin) * width;
      each_lanes<F>(width, [&](int64_t i, auto lanes) {
        lanes.store(lanes.load(sum + i) + lanes.load(piece + i), sum + i);
      });
    }
    write(sum, dtable + id * width);
  }

  void sums(F* to) const {
    const int64_t width = op.shape.width, blocks = smear_blocks(op.tokens());
    for (int64_t i = 0; i <= width; ++i) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += partials[b * (width + 1) + i];
      const F g = i < width && op.in.gate ? op.gate[i] : F(0);
      to[i] = static_cast<F>(sum) * (i < width ? g * (F(1) - g) : F(1));
    }
  }
};

// body(table element, x element)
template <typename Body>
void with_elements(const EmbedSmearShape& shape, const Body& body) {
  with_element(shape.table_dtype, [&](auto table) {
    with_element(shape.x_dtype, [&](auto x) {
      if constexpr ((sizeof(table) == sizeof(double)) == (sizeof(x) == sizeof(double))) {
        body(table, x);
      }
    });
  });
}

void sort_tokens(const TokenIds& list) {
  int32_t* const next = list.bounds;  // at first, one further: ends as bounds
  std::fill(next, next + list.vocab + 1, 0);
  for (int64_t i = 0; i < list.count; ++i) ++next[list.ids[i]];
  for (int64_t id = 1; id <= list.vocab; ++id) next[id] += next[id - 1];
  for (int64_t i = list.count - 1; i >= 0; --i) {
    list.order[--next[list.ids[i]]] = static_cast<int32_t>(i);
  }
}

}  // namespace

void embed_smear(const EmbedSmearShape& shape, const EmbedSmearInputs& in, void* x, void* rstd,
                 int threads) {
  with_elements(shape, [&](auto table_element, auto element) {
    using X = decltype(element);
    const Operator<decltype(table_element), X> op(shape, in);
    const Output<X, kMaxSmearWidth> to(x, op.tokens(), shape.width);
    const int64_t bytes = 3 * shape.width * int64_t{sizeof(X)};
    parallel_for(op.tokens(), bytes, threads, [&](int64_t begin, int64_t end) {
      op.forward(begin, end, to, static_cast<compute_t<X>*>(rstd));
      end_streaming();
    });
  });
}

void token_order(const TokenIds* lists, int count, int threads) {
  int64_t bytes = 1;  // of a list, at least one
  for (int i = 0; i < count; ++i) {
    bytes = std::max(bytes, lists[i].count * int64_t{sizeof(int64_t)});
  }
  parallel_for(count, bytes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sort_tokens(lists[i]);
  });
}

void embed_smear_backward(const EmbedSmearShape& shape, const EmbedSmearInputs& in,
                          const TokenOrder& tokens, const void* dx, const void* rstd,
                          const EmbedSmearGradients& out, const EmbedSmearScratch& scratch,
                          int threads) {
  with_elements(shape, [&](auto table_element, auto element) {
    using T = decltype(table_element);
    using X = decltype(element);
    using F = compute_t<X>;
    const Operator<T, X> op(shape, in);
    const Backward<T, X> backward = {op,
                                     tokens,
                                     static_cast<const X*>(dx),
                                     static_cast<const F*>(rstd),
                                     static_cast<T*>(out.dtable),
                                     static_cast<X*>(out.dbigram),
                                     static_cast<F*>(scratch.pieces),
                                     static_cast<F*>(scratch.partials)};
    const int64_t row_bytes = shape.width * int64_t{sizeof(X)};
    parallel_for(smear_blocks(op.tokens()), 4 * kSmearChunk * kSmearChunksPerBlock * row_bytes,
                 threads, [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) backward.block(i);
                 });
    parallel_for(shape.vocab, 4 * row_bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t id = begin; id < end; ++id) backward.table_row(id);
    });
    backward.sums(static_cast<F*>(out.sums));
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
